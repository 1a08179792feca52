"""What DropClass costs over a whole training, where lambda and the drop probability rise from 0 to 1: steps at evenly
spaced points of the schedule, beside plain.

    python benchmarks/schedule.py --threads 2 --csv results/schedule.csv

every step            both paths in each step; a path of weight 0 is skipped
paths='sample'        `SampledPaths`: each step takes one path by chance, the plain one with probability 1 - lambda
authors' epochs       schedules that rise once per epoch (`PerEpoch`), so that the first epoch is plain training; 10
                      epochs

The ratio of each variant is that of its mean step to the mean plain step.
"""
from statistics import mean

import torch
from fastai.callback.schedule import SchedLin
from fastcore.script import call_parse

from common import build_step, make_base, make_batch, measure, parse_size, setting, show, write_csv
from dropclass.analysis.ablations import SampledPaths


def make_variants(base, classes, x, y):
    "Steps that take the share of the training that is done."
    ramp,tenths = dict(lam=SchedLin(0, 1), drop_prob=SchedLin(0, 1), never_drop=()),lambda pct: min(int(10*pct)/9, 1.)
    one = lambda **options: build_step('dropclass, Learner', base, classes, x, y, **options)
    plain = build_step('plain', base, classes, x, y)
    variants = {'plain':plain, 'every step':one(**ramp),
                "authors' epochs":one(**{**ramp, 'lam':tenths, 'drop_prob':tenths})}
    return {**variants, "paths='sample'":one(**ramp, callback=SampledPaths)}


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='512x1024', # Height x width of the images, in pixels
    classes:int=19, # Number of classes
    points:int=20, # Points of the schedule
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time steps along the schedule."
    torch.set_num_threads(threads)
    size = parse_size(size)
    x,y = make_batch(1, size, classes, device, True)
    times = measure(make_variants(make_base(arch, classes, device, True), classes, x, y), points, device,
                    args=[i/(points-1) for i in range(points)])
    rows = []
    for name,both in times.items():
        row = setting(arch, size, 1, classes, points, threads, device) | dict(variant=name)
        for i,kind in enumerate(('wall', 'cpu')):
            row[f'{kind}_ms'] = round(mean(o[i] for o in both), 1)
            row[f'{kind}_ratio'] = round(mean(o[i] for o in both)/mean(o[i] for o in times['plain']), 3)
        rows.append(row)
    show(rows, ['arch', 'variant', 'wall_ms', 'wall_ratio', 'cpu_ms', 'cpu_ratio'])
    write_csv(rows, csv)
