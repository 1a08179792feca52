"""What a DropClass step costs: forward, backward and optimizer of one training step, all variants in turn in one process.

    python benchmarks/step_time.py --threads 1 --steps 15 --csv results/step_time.csv

Each round times one step of every variant, in an order that rotates, and the ratios are taken within a round: what slows the machine
down for a while then slows all of them. Processor time stands beside the clock's: where other programs share the machine, it is the steadier of
the two. The first rounds are thrown away. lambda is 0.5 and a class is dropped in every step.

plain                 F.cross_entropy in a plain loop: what everything is compared with
dropclass             the same loop with the head and `dropclass_loss`
plain, Learner        fastai's Learner with nn.CrossEntropyLoss, one batch with all its events
dropclass, Learner    the same with DropClassCallback
plain, Flat           CrossEntropyLossFlat in the plain loop
authors' formula      drop path as the paper's authors describe it: scale is the mean of ReLU(W) over the kept classes, convolution, BatchNorm, ReLU, the
                      classifier again; each path is resized by itself, and a softmax of its own gives the suppression
"""
import copy
import time
from csv import DictWriter
from pathlib import Path
from statistics import quantiles

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastcore.script import call_parse, store_true
from torch import nn
from torch.nn import functional as F

from dropclass.callback import DropClassCallback
from dropclass.core import VOID
from dropclass.head import add_dropclass, compensation_block, find_classifier, split_paths
from dropclass.losses import dropclass_loss
from dropclass.models import create_model

LAM,ALPHA,DROPPED = .5,10.,3


def make_batch(bs, size, classes, device):
    "Random images, labels in blocks, a void frame."
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(bs, 3, *size, generator=gen)
    y = torch.randint(classes, (bs, size[0]//16, size[1]//16), generator=gen).repeat_interleave(16, 1).repeat_interleave(16, 2)
    y[:, :4] = VOID
    return x.to(device), y.to(device)


def looped(model, loss_of, x, y):
    "A step of a plain PyTorch loop."
    model.train()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    def step():
        loss_of(model, x, y).backward()
        opt.step()
        opt.zero_grad()
    return step


def plain(model, x, y): return F.cross_entropy(model(x), y, ignore_index=VOID)

def flat():
    loss = CrossEntropyLossFlat(axis=1, ignore_index=VOID)
    return lambda model,x,y: loss(model(x), y)


def dropclass(model, classes):
    "The loss of a loop with the head."
    head,keep_mask = add_dropclass(model, classes),torch.ones(classes)
    keep_mask[DROPPED] = 0
    def loss_of(model, x, y):
        with head.dropping(keep_mask, LAM): out = model(x)
        logits,drop_logits = split_paths(out, len(x))
        return dropclass_loss(logits, drop_logits, y, keep_mask, LAM, ALPHA)
    return loss_of


def authors_formula(model, classes):
    "The loss of a loop that computes the drop path as the authors describe it."
    classifier = model.get_submodule(find_classifier(model, classes))
    model.extra = compensation_block(classifier.in_channels).to(classifier.weight.device)
    kept,seen = [c for c in range(classes) if c!=DROPPED],[]
    classifier.register_forward_pre_hook(lambda m,args: seen.append(args[0]))
    def loss_of(model, x, y):
        seen.clear()
        logits = model(x)
        scale = classifier.weight.flatten(1).relu()[kept].mean(0)
        low = F.conv2d(model.extra(seen[0]*scale[:,None,None]), classifier.weight, classifier.bias)
        drop_logits = F.interpolate(low, size=x.shape[-2:], mode='bilinear', align_corners=False)
        masked = F.cross_entropy(drop_logits, y.masked_fill(y==DROPPED, VOID), ignore_index=VOID)
        suppression = drop_logits.softmax(1)[:,DROPPED].mean()
        return (1-LAM)*F.cross_entropy(logits, y, ignore_index=VOID) + LAM*masked + ALPHA*suppression
    return loss_of


def in_learner(model, x, y, cbs=None):
    "A step of fastai's Learner: one batch with all its events, in the middle of a fit."
    one = DataLoader(list(zip(x.cpu(), y.cpu())), bs=len(x))
    learn = Learner(DataLoaders(one, one, device=x.device), model, nn.CrossEntropyLoss(ignore_index=VOID), cbs=cbs, opt_func=sgd)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.create_opt()
    learn.n_epoch,learn.epoch,learn.n_iter,learn.dl = 1,0,10_000,learn.dls.train
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    return lambda: learn.one_batch(0, (x, y))

def sgd(params, lr=1e-3): return SGD(params, lr=lr, mom=.9)


def make_steps(arch, classes, x, y):
    "One function per variant, each with a model of its own and equal weights."
    torch.manual_seed(0)
    base = create_model(arch, classes).to(x.device)
    def loop(build):
        model = copy.deepcopy(base)
        return looped(model, build(model), x, y)
    learner = lambda cbs=None: in_learner(copy.deepcopy(base), x, y, cbs)
    others = [o for o in range(classes) if o!=DROPPED]
    return {'plain': loop(lambda m: plain), 'dropclass': loop(lambda m: dropclass(m, classes)),
            'plain, Learner': learner(), 'dropclass, Learner': learner(DropClassCallback(lam=LAM, drop_prob=1., never_drop=others)),
            'plain, Flat': loop(lambda m: flat()), "authors' formula": loop(lambda m: authors_formula(m, classes))}


def timed(step, device):
    "Milliseconds of one step: on the clock, and of processor time."
    sync = torch.cuda.synchronize if device.type=='cuda' else lambda: None
    sync()
    wall,cpu = time.perf_counter(),time.process_time()
    step()
    sync()
    return (time.perf_counter()-wall)*1000, (time.process_time()-cpu)*1000


def measure(steps, rounds, device, warm=2):
    "Times of every variant in every round."
    names,times = list(steps),{name:[] for name in steps}
    for i in range(warm+rounds):
        for name in names[i%len(names):]+names[:i%len(names)]:
            both = timed(steps[name], device)
            if i>=warm: times[name].append(both)
    return times


def summary(times):
    "Median and quartiles of the times, and of the ratios to `plain` in the same round."
    spread = lambda o,digits: [round(v, digits) for v in quantiles(o, n=4, method='inclusive')]
    rows = []
    for name,both in times.items():
        row = dict(variant=name)
        for i,kind in enumerate(('wall', 'cpu')):
            ms,base = [o[i] for o in both],[o[i] for o in times['plain']]
            for k,v in zip(('low', 'median', 'high'), spread(ms, 1)): row[f'{kind}_ms_{k}'] = v
            for k,v in zip(('low', 'median', 'high'), spread([a/b for a,b in zip(ms, base)], 3)): row[f'{kind}_ratio_{k}'] = v
        rows.append(row)
    return rows


def show_profile(steps, device, top=14):
    "Where the plain and the DropClass step spend their time, operator by operator."
    from torch.profiler import profile, ProfilerActivity
    for name in ('plain', 'dropclass'):
        with profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*(device.type=='cuda')) as prof:
            for _ in range(3): steps[name]()
        total = sum(o.self_cpu_time_total for o in prof.key_averages())
        print(f"\n{name}: {total/3e3:.0f} ms per step")
        for o in sorted(prof.key_averages(), key=lambda o: -o.self_cpu_time_total)[:top]: print(f"  {o.self_cpu_time_total/3e3:8.1f} ms  {o.count//3:5d} x  {o.key}")


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='256x512', # Height x width of the images, in pixels
    bs:int=2, # Images per batch
    classes:int=19, # Number of classes
    steps:int=9, # Timed rounds; at least 7
    threads:int=1, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
    profile:store_true=False, # Show where the time goes?
):
    "Time one training step of every variant, in turn in one process."
    if steps<7: raise ValueError(f"`steps` must be at least 7 for a median with quartiles, got {steps}")
    try: height,width = (int(o) for o in size.lower().split('x'))
    except ValueError: raise ValueError(f"`size` must be HEIGHTxWIDTH in pixels, as 256x512, got {size!r}") from None
    torch.set_num_threads(threads)
    device = torch.device(device)
    x,y = make_batch(bs, (height, width), classes, device)
    fns = make_steps(arch, classes, x, y)
    rows = summary(measure(fns, steps, device))
    print(f"{arch}, {classes} classes, {bs} x {height}x{width}, {steps} rounds, {threads} thread(s), {device.type}, torch {torch.__version__}")
    print(f"{'variant':20s} {'wall ms':>9s} {'quartiles':>17s} {'ratio':>7s} {'quartiles':>13s} {'cpu ms':>9s} {'ratio':>7s} {'quartiles':>13s}")
    for o in rows:
        print(f"{o['variant']:20s} {o['wall_ms_median']:9.1f} {o['wall_ms_low']:8.1f}-{o['wall_ms_high']:<8.1f} {o['wall_ratio_median']:7.3f} {o['wall_ratio_low']:6.3f}-{o['wall_ratio_high']:<6.3f} "
              f"{o['cpu_ms_median']:9.1f} {o['cpu_ratio_median']:7.3f} {o['cpu_ratio_low']:6.3f}-{o['cpu_ratio_high']:<6.3f}")
    if csv:
        setting = dict(arch=arch, height=height, width=width, batch=bs, classes=classes, rounds=steps, threads=threads, device=device.type, torch=torch.__version__)
        Path(csv).parent.mkdir(parents=True, exist_ok=True)
        with open(csv, 'w', newline='') as f:
            table = DictWriter(f, [*setting, *rows[0]], lineterminator='\n')
            table.writeheader()
            table.writerows({**setting, **o} for o in rows)
    if profile: show_profile(fns, device)
