"""What the benchmarks share: a batch, the variants of a training step, timing in turn, memory of fresh processes, and
tables.

Every variant of a step has a model of its own with equal weights. Each round runs one step of every variant, in an
order that rotates, and ratios are taken
within a round: what slows the machine down for a while then slows all of them. Processor time stands beside the
clock's: where other programs share the
machine, it is the steadier of the two. lambda is 0.5 and a class is dropped in every step.

plain                 F.cross_entropy on logits (N,C,H,W) in a plain loop: what everything is compared with
plain again           the same once more: how far two equal things differ here
plain, Flat           fastai's CrossEntropyLossFlat in the plain loop
plain, Learner        fastai's Learner with nn.CrossEntropyLoss, one batch with all its events
dropclass             the head and the fused losses in the plain loop: what DropClassCallback does
dropclass, Learner    the same as a user gets it: DropClassCallback in a Learner
dropclass, stacked    the head and `dropclass_loss`, both paths through the model's tail: what happens where the losses
                      cannot be fused
authors' formula      drop path as the paper's authors describe it: scale is the mean of ReLU(W) over the kept classes,
                      convolution, BatchNorm, ReLU, the
                      classifier again; each path is resized by itself, and a softmax of its own gives the suppression
Grad-CAM              Eq. (1) to (4) as they are written: the importance of each kept class by autograd, its features,
                      their average
"""
import copy
import csv as csv_module
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from statistics import median, quantiles

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dropclass.callback import DropClassCallback
from dropclass.fused import resize_dropclass_loss
from dropclass.head import compensation_block, split_paths
from dropclass.surgery import add_dropclass, find_classifier
from dropclass.losses import dropclass_loss
from dropclass.models import create_model

LAM,ALPHA,DROPPED = .5,10.,1
VOID = -100 # 255 is a class where there are a thousand
PAPER = 'hrnet_v1_w18,hrnet_v2_w18,deeplabv3_mobilenetv3'
RESULTS = Path(__file__).resolve().parent.parent/'results'


def parse_size(size):
    "Height and width out of '512x1024'."
    try: height,width = (int(o) for o in size.lower().split('x'))
    except ValueError: raise ValueError(f"a size is HEIGHTxWIDTH in pixels, as 256x512, got {size!r}") from None
    return height,width


def batch_size(arch, bs=0):
    "Images per batch; 0 is one, and two for DeepLabV3, whose pooling branch norms over a single pixel per image."
    return bs or (2 if arch.startswith('deeplab') else 1)


def make_batch(bs, size, classes, device='cpu', channels_last=False):
    "Random images, labels in blocks, a void frame."
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(bs, 3, *size, generator=gen)
    y = torch.randint(classes, (bs, size[0]//16, size[1]//16),
                      generator=gen).repeat_interleave(16, 1).repeat_interleave(16, 2)
    y[:, :4] = VOID
    x = x.to(device)
    return x.to(memory_format=torch.channels_last) if channels_last else x, y.to(device)


def looped(model, loss_of, x, y):
    "A step of a plain PyTorch loop."
    model.train()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    def step(_=0):
        loss_of(model, x, y).backward()
        opt.step()
        opt.zero_grad()
    return step


def plain(model, x, y): return F.cross_entropy(model(x), y, ignore_index=VOID)

def flat():
    loss = CrossEntropyLossFlat(axis=1, ignore_index=VOID)
    return lambda model,x,y: loss(model(x), y)


def keep_mask(classes):
    mask = torch.ones(classes)
    mask[DROPPED] = 0
    return mask


def fused(model, classes):
    "The loss of a loop with the head, from the small logits."
    head,mask = add_dropclass(model, classes),keep_mask(classes)
    def loss_of(model, x, y):
        with head.dropping(mask, LAM, small_only=True) as step: model(x)
        logits,drop_logits = step.small
        return resize_dropclass_loss(logits, drop_logits, y, DROPPED, LAM, ALPHA, ignore_index=VOID)[0]
    return loss_of


def stacked(model, classes):
    "The loss of a loop with the head, from the full-size logits."
    head,mask = add_dropclass(model, classes),keep_mask(classes)
    base_loss = nn.CrossEntropyLoss(ignore_index=VOID)
    def loss_of(model, x, y):
        with head.dropping(mask, LAM): out = model(x)
        logits,drop_logits = split_paths(out, len(x))
        return dropclass_loss(logits, drop_logits, y, mask, LAM, ALPHA, base_loss)
    return loss_of


def second_path(model, classes, drop):
    """The loss of a loop whose second path classifies `drop(features, logits, classifier)`, a block and the classifier
    behind it."""
    classifier = model.get_submodule(find_classifier(model, classes))
    model.extra = compensation_block(classifier.in_channels).to(classifier.weight.device)
    seen = []
    classifier.register_forward_pre_hook(lambda m,args: seen.append(args[0]))
    def loss_of(model, x, y):
        seen.clear()
        logits = model(x)
        low = F.conv2d(model.extra(drop(seen.pop(), logits, classifier)), classifier.weight, classifier.bias)
        drop_logits = F.interpolate(low, size=x.shape[-2:], mode='bilinear', align_corners=False)
        masked = F.cross_entropy(drop_logits, y.masked_fill(y==DROPPED, VOID), ignore_index=VOID)
        suppression = drop_logits.softmax(1)[:,DROPPED].mean()
        return (1-LAM)*F.cross_entropy(logits, y, ignore_index=VOID) + LAM*masked + ALPHA*suppression
    return loss_of


def authors_formula(model, classes):
    kept = [c for c in range(classes) if c!=DROPPED]
    def drop(features, logits, classifier):
        return features*classifier.weight.flatten(1).relu()[kept].mean(0)[:,None,None]
    return second_path(model, classes, drop)


def gradcam(model, classes):
    def drop(features, logits, classifier):
        total = 0.
        for c in range(classes):
            if c==DROPPED: continue
            importance, = torch.autograd.grad(logits[:,c].mean((1, 2)).sum(), features, retain_graph=True)
            total = total + (features*importance).relu()
        return total/classes
    return second_path(model, classes, drop)


def in_learner(model, x, y, cbs=None):
    "A step of fastai's Learner: one batch with all its events; `step(pct)` is the share of the training that is done."
    one = DataLoader(list(zip(x.cpu(), y.cpu())), bs=len(x))
    learn = Learner(DataLoaders(one, one, device=x.device), model, nn.CrossEntropyLoss(ignore_index=VOID), cbs=cbs,
                    opt_func=sgd)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.create_opt()
    learn.n_epoch,learn.epoch,learn.n_iter,learn.dl = 1,0,10_000,learn.dls.train
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    def step(pct=0.):
        learn.pct_train = pct
        learn.one_batch(int(pct*9_999), (x, y)) # The number of the step decides which class is drawn
    return step

def sgd(params, lr=1e-3): return SGD(params, lr=lr, mom=.9)


def only_class(classes): return [o for o in range(classes) if o!=DROPPED]

def build_step(name, base, classes, x, y, callback=DropClassCallback, **cb_options):
    "The step of one variant."
    model = copy.deepcopy(base)
    loops = {'plain':lambda m: plain, 'plain again':lambda m: plain, 'plain, Flat':lambda m: flat(),
             'dropclass':lambda m: fused(m, classes),
             'dropclass, stacked':lambda m: stacked(m, classes),
             "authors' formula":lambda m: authors_formula(m, classes), 'Grad-CAM':lambda m: gradcam(m, classes)}
    if name in loops: return looped(model, loops[name](model), x, y)
    if name=='plain, Learner': return in_learner(model, x, y)
    return in_learner(model, x, y,
                      callback(**{**dict(lam=LAM, drop_prob=1., never_drop=only_class(classes)), **cb_options}))

VARIANTS = ('plain', 'plain again', 'plain, Flat', 'plain, Learner', 'dropclass', 'dropclass, Learner',
            'dropclass, stacked', "authors' formula", 'Grad-CAM')

def make_base(arch, classes, device='cpu', channels_last=False):
    "A network with random weights."
    torch.manual_seed(0)
    model = create_model(arch, classes).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model

def make_steps(arch, classes, x, y, names=VARIANTS, channels_last=False):
    "One function per variant."
    base = make_base(arch, classes, x.device, channels_last)
    return {name:build_step(name, base, classes, x, y) for name in names}


def synchronize(device):
    if torch.device(device).type=='cuda': torch.cuda.synchronize()

def timed(step, device='cpu', *args):
    "Milliseconds of one call: on the clock, and of processor time."
    synchronize(device)
    wall,cpu = time.perf_counter(),time.process_time()
    step(*args)
    synchronize(device)
    return (time.perf_counter()-wall)*1000, (time.process_time()-cpu)*1000


def measure(steps, rounds, device='cpu', warm=1, args=()):
    "Times of every variant in every round; `args` are the arguments of the rounds' steps."
    names,times = list(steps),{name:[] for name in steps}
    for i in range(warm+rounds):
        for name in names[i%len(names):]+names[:i%len(names)]:
            both = timed(steps[name], device, *([args[max(i-warm, 0)]] if len(args) else []))
            if i>=warm: times[name].append(both)
    return times


def spread(values, digits):
    "Quartiles and median."
    return [round(v, digits) for v in quantiles(values, n=4, method='inclusive')]

def summary(times, base='plain'):
    "Median and quartiles of the times, and of the ratios to `base` in the same round."
    rows = []
    for name,both in times.items():
        row = dict(variant=name)
        for i,kind in enumerate(('wall', 'cpu')):
            ms,of = [o[i] for o in both],[o[i] for o in times[base]]
            for k,v in zip(('low', 'median', 'high'), spread(ms, 1)): row[f'{kind}_ms_{k}'] = v
            for k,v in zip(('low', 'median', 'high'), spread([a/b for a,b in zip(ms, of)], 3)):
                row[f'{kind}_ratio_{k}'] = v
        rows.append(row)
    return rows


def in_fresh_process(script, *args, **environment):
    "Run a script on its own and return the last line that it prints."
    done = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(map(str, args))} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]

def peak_bytes(device='cpu'):
    "Peak memory of this process so far: resident on a CPU, of the allocator on a GPU."
    if torch.device(device).type=='cuda': return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status')
    if status.exists():
        return next(int(o.split()[1])*1024 for o in status.read_text().splitlines() if o.startswith('VmHWM'))
    # Where there is no /proc; on Linux it would count what the parent process held when it started this one
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform=='darwin' else 1024)


class LiveTensors(TorchDispatchMode):
    "Count the bytes of the tensors that operations have made and that are still held."
    def __init__(self):
        super().__init__()
        self.held,self.now,self.peak = {},0,0

    def forget(self, key): self.now -= self.held.pop(key, 0)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held: return
        self.held[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self.forget, key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple,list)) else [out]:
            if isinstance(o, torch.Tensor): self.note(o)
        self.peak = max(self.peak, self.now)
        return out

def peak_tensors(step):
    "The most bytes that the tensors of one call hold at a time; the machine's load does not matter."
    with LiveTensors() as live: step()
    return live.peak


def setting(arch, size, bs, classes, rounds, threads, device):
    "The columns that say what was measured."
    return dict(arch=arch, height=size[0], width=size[1], batch=bs, classes=classes, rounds=rounds, threads=threads,
                device=torch.device(device).type, torch=torch.__version__)

def show(rows, columns):
    "Print some columns of a table."
    cells = [columns]+[[f'{row[c]}' for c in columns] for row in rows]
    widths = [max(len(o[i]) for o in cells) for i in range(len(columns))]
    for o in cells:
        print('  '.join(c.ljust(w) if i==0 else c.rjust(w) for i,(c,w) in enumerate(zip(o, widths))), flush=True)

TIMES = ['arch', 'height', 'width', 'classes', 'variant', 'wall_ms_median', 'wall_ratio_low', 'wall_ratio_median',
         'wall_ratio_high', 'cpu_ratio_median']

def write_csv(rows, path):
    "Write a table, its folder too."
    if not path: return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        table = csv_module.DictWriter(f, list(rows[0]), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
