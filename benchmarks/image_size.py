"""How a step grows with the image: plain and DropClass at several sizes, one image each.

    python benchmarks/image_size.py --threads 2 --csv results/image_size.csv
"""
import torch
from fastcore.script import call_parse

from common import TIMES, make_batch, make_steps, measure, parse_size, setting, show, summary, write_csv


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    sizes:str='128x256,256x512,512x1024,1024x2048', # Heights x widths of the images, in pixels
    classes:int=19, # Number of classes
    rounds:int=5, # Timed rounds; at least 5
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time plain and DropClass steps for several image sizes."
    torch.set_num_threads(threads)
    rows = []
    for size in map(parse_size, sizes.split(',')):
        x,y = make_batch(1, size, classes, device, True)
        steps = make_steps(arch, classes, x, y, ('plain', 'dropclass', "authors' formula"), True)
        rows += (new := [setting(arch, size, 1, classes, rounds, threads, device) | o
                         for o in summary(measure(steps, rounds, device))])
        show(new, TIMES)
        write_csv(rows, csv)
