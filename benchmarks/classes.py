"""How a step grows with the number of classes, at fixed image size: the whole step beside plain, and the part of the
drop path that is neither classifier nor loss.

    python benchmarks/classes.py --threads 2 --csv results/classes.csv

`outside_ms` is forward and backward from the features to the compensated features of the drop path, at the size of this
network and image: importance, scale,
convolution, BatchNorm, ReLU. The classifier, the resize and the losses must grow with the classes; this must not.
"""
import torch
from fastcore.script import call_parse
from statistics import median

from common import (TIMES, keep_mask, make_base, make_batch, make_steps, measure, parse_size, setting, show, summary,
                    timed, write_csv)
from dropclass.surgery import add_dropclass


def outside_step(arch, classes, x, channels_last=True):
    "Forward and backward of the drop path without its classifier."
    model = make_base(arch, classes, x.device, channels_last).train()
    head,seen = add_dropclass(model, classes),[]
    handle = head.register_forward_pre_hook(
        lambda m,args: seen.append(args[0].detach().clone(memory_format=torch.preserve_format).requires_grad_()))
    with head.dropping(keep_mask(classes)), torch.no_grad(): model(x)
    handle.remove()
    head.classify = lambda features: features # What the classifier would have been given
    mask,features = keep_mask(classes),seen[0]
    def step(_=0):
        out = head.drop_logits(features, mask)
        out.backward(out.detach())
        features.grad = None
        head.zero_grad()
    return step


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='512x512', # Height x width of the images, in pixels
    classes:str='2,19,150,1000', # Numbers of classes
    rounds:int=5, # Timed rounds; at least 5
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time plain and DropClass steps for several numbers of classes."
    torch.set_num_threads(threads)
    rows,counts = [],[int(o) for o in classes.split(',')]
    x,_ = make_batch(1, parse_size(size), 2, device, True)
    parts = {C:outside_step(arch, C, x) for C in counts}
    outside = {C:median(o[0] for o in times) for C,times in measure(parts, 3*rounds, device).items()} # In turn, too
    for C in counts:
        x,y = make_batch(1, parse_size(size), C, device, True)
        steps = make_steps(arch, C, x, y, ('plain', 'dropclass'), True)
        new = summary(measure(steps, rounds, device))
        share = (outside[C]-outside[counts[0]])/new[0]['wall_ms_median']
        rows += [setting(arch, parse_size(size), 1, C, rounds, threads, device) | o
                 | dict(outside_ms=round(outside[C], 1), outside_growth=round(share, 4)) for o in new]
        show(rows[-2:], TIMES+['outside_ms', 'outside_growth'])
        write_csv(rows, csv)
