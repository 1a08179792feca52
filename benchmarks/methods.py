"""Four ways to train beside each other, against the number of classes: time of a step, and memory of its tensors.

    python benchmarks/methods.py --csv results/methods.csv

Plain, DropClass, the authors' formula, and Grad-CAM, Eq. (1) by autograd for each class (see common.py). Times are
medians of rounds in which they take turns, in time of the processor; Grad-CAM runs beside plain alone, in a third of
the rounds, since what runs after a step of its memory is slower. `tensor_mb` is the most that the tensors of one
step hold at a time, which no other program disturbs.
"""
import torch
from fastcore.script import call_parse

from common import make_batch, make_steps, measure, parse_size, peak_tensors, setting, show, summary, write_csv

METHODS = ('plain', 'dropclass', "authors' formula", 'Grad-CAM')


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='128x128', # Height x width of the images, in pixels
    classes:str='2,8,19,60,150', # Numbers of classes
    rounds:int=5, # Timed rounds; at least 5
    threads:int=1, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time a step of each method and measure its tensors, for several numbers of classes."
    torch.set_num_threads(threads)
    rows = []
    for C in map(int, classes.split(',')):
        x,y = make_batch(1, parse_size(size), C, device, True)
        steps = make_steps(arch, C, x, y, METHODS, True)
        known = setting(arch, parse_size(size), 1, C, rounds, threads, device)
        dear = {'Grad-CAM':steps['Grad-CAM']}
        rows_of = lambda some,n: [known|o for o in summary(measure(some, n, device))]
        new = rows_of({k:v for k,v in steps.items() if k not in dear}, 3*rounds)
        new += rows_of(dict(plain=steps['plain'], **dear), rounds)[1:]
        for row in new: row['tensor_mb'] = round(peak_tensors(steps[row['variant']])/2**20, 1)
        show(new, ['classes', 'variant', 'cpu_ms_median', 'cpu_ratio_median', 'tensor_mb'])
        rows += new
        write_csv(rows, csv)
