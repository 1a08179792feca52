"""Where the time of a step goes: what DropClass adds to it and what it saves, part by part, forward and backward, each
by itself.

    python benchmarks/parts.py --threads 2 --csv results/parts.csv

whole step            the plain step, and DropClass
literal loss          resize and F.cross_entropy, which the plain step pays
fused losses          of both paths, what DropClass pays instead
classifier            the second run of the classifier
convolution           of the compensation block: K x K numbers for each small pixel. It cannot be left out, so it is the
                      floor
norm                  BatchNorm and ReLU of the block
"""
import torch
from fastcore.script import call_parse
from statistics import median
from torch.nn import functional as F

from common import (ALPHA, DROPPED, LAM, PAPER, VOID, batch_size, make_base, make_batch, make_steps, measure,
                    parse_size, setting, show, write_csv)
from dropclass.fused import resize_dropclass_loss
from dropclass.surgery import add_dropclass


def make_parts(arch, classes, x, y):
    "One function per part, on tensors of the sizes that the network has."
    model,seen = make_base(arch, classes, x.device, True).train(),[]
    head = add_dropclass(model, classes)
    handle = head.register_forward_hook(lambda m,args,out: seen.append((args[0].detach(), out.detach())))
    with torch.no_grad(): model(x)
    handle.remove()
    (features,logits),(mix,norm,act) = seen[0],head.compensation
    def part(f, *inputs):
        leaves = [o.clone(memory_format=torch.preserve_format).requires_grad_() for o in inputs]
        def run(_=0):
            out = f(*leaves)
            out.backward(None if out.dim()==0 else out.detach())
            for o in leaves: o.grad = None
            model.zero_grad()
        return run
    literal = lambda z: F.cross_entropy(F.interpolate(z, size=y.shape[1:], mode='bilinear'), y, ignore_index=VOID)
    both = lambda a,b: resize_dropclass_loss(a, b, y, DROPPED, LAM, ALPHA, ignore_index=VOID)[0]
    return {'literal loss':part(literal, logits),
            'fused losses':part(both, logits, logits),
            'classifier':part(head.classifier, features), 'convolution':part(mix, features),
            'norm':part(lambda o: act(norm(o)), features)}


@call_parse
def main(
    archs:str=PAPER, # Networks, of `model_names()`
    size:str='512x1024', # Height x width of the images, in pixels
    classes:int=19, # Number of classes
    rounds:int=7, # Timed rounds; at least 5
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time the parts of a step that differ between plain training and DropClass."
    torch.set_num_threads(threads)
    rows = []
    for arch in archs.split(','):
        x,y = make_batch(batch_size(arch), parse_size(size), classes, device, True)
        steps = {f'whole step, {k}':v for k,v in make_steps(arch, classes, x, y, ('plain', 'dropclass'), True).items()}
        times = measure(steps, rounds, device) | measure(make_parts(arch, classes, x, y), rounds, device)
        plain = median(o[0] for o in times['whole step, plain'])
        new = [setting(arch, parse_size(size), len(x), classes, rounds, threads, device)
               | dict(part=k, wall_ms=round(median(o[0] for o in v), 1),
               cpu_ms=round(median(o[1] for o in v), 1), share=round(median(o[0] for o in v)/plain, 3))
               for k,v in times.items()]
        show(new, ['arch', 'part', 'wall_ms', 'cpu_ms', 'share'])
        rows += new
        write_csv(rows, csv)
