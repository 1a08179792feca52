"""What class paste costs: a call of `paste_classes` or `erase_classes` beside a training step, in turn (common.py).

    python benchmarks/paste_step.py --csv results/paste_step.csv

Each round runs one plain step and then one call of every variant, so a ratio is the share of a step that the call adds.
p is 1: every image changes in every call; at the default p = 1/2 it is half as much on average. The image is noise and
its labels are blocks of 16 pixels, so every class is in every image.
"""
import torch
from fastcore.script import call_parse

from common import TIMES, looped, make_base, make_batch, measure, parse_size, plain, setting, show, summary, write_csv
from dropclass.core import step_generator
from dropclass.analysis.controls import erase_classes
from dropclass.paste import paste_classes

VARIANTS = {
    'paste':(paste_classes, {}),
    'paste, scaled':(paste_classes, dict(scale=(.5,2.))),
    'paste, feathered':(paste_classes, dict(feather=2)),
    'paste, component':(paste_classes, dict(components=True)),
    'erase, mean':(erase_classes, {}),
    'erase, noise':(erase_classes, dict(fill='noise')),
}


def make_call(function, options, x, y, weights):
    "One call, with other draws every time."
    steps = iter(range(10**9))
    return lambda: function(x, y, weights, step_generator(0, next(steps)), p=1., **options)


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, of `model_names()`
    size:str='512x1024', # Height x width of the images, in pixels
    bs:int=2, # Images per batch; at least two, for a piece comes from another image
    classes:int=19, # Number of classes
    rounds:int=7, # Timed rounds; at least 5
    threads:int=1, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time class paste beside a training step."
    if rounds<5: raise ValueError(f"`rounds` must be at least 5 for a median with quartiles, got {rounds}")
    torch.set_num_threads(threads)
    x,y = make_batch(bs, parse_size(size), classes, device, channels_last=True)
    weights = torch.ones(classes)
    steps = {'plain':looped(make_base(arch, classes, device, channels_last=True), plain, x, y)}
    steps |= {name:make_call(*o, x, y, weights) for name,o in VARIANTS.items()}
    common = setting(arch, parse_size(size), bs, classes, rounds, threads, device)
    rows = [common|o for o in summary(measure(steps, rounds, device))]
    show(rows, TIMES)
    write_csv(rows, csv)
