"""Peak memory of a training step, each variant in a fresh process.

    python benchmarks/memory.py --threads 2 --csv results/memory.csv

On a CPU it is the peak resident memory of the process: Python, PyTorch, the network, its gradients and three steps;
`step_mb` is what the steps added to
what was there before them. On a GPU both are the allocator's. Plain runs twice: their difference is the spread.

Linux keeps freed memory of a process for later, in one heap with gaps, and the gaps count as resident. `allocator` says
which way it was measured: 'default', or
'mapped', where each tensor of 2 MB or more is a mapping of its own (MALLOC_MMAP_THRESHOLD_), so that what is freed is
gone and the peak is what the tensors need.
"""
import sys

import torch
from fastcore.script import call_parse

from common import (PAPER, VARIANTS, batch_size, build_step, in_fresh_process, make_base, make_batch, parse_size,
                    peak_bytes, setting, show, write_csv)

ALLOCATORS = {'default':{}, 'mapped':{'MALLOC_MMAP_THRESHOLD_':str(2*10**6)}}
COMPARED = [o for o in VARIANTS if o!='plain, Learner']


def report(name, arch, size, bs, classes, threads, device):
    "Print the peak of this process, and what the steps added to it, in bytes."
    torch.set_num_threads(threads)
    x,y = make_batch(batch_size(arch, bs), size, classes, device, True)
    step = build_step(name, make_base(arch, classes, device, True), classes, x, y)
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    for _ in range(3): step()
    print(peak_bytes(device), peak_bytes(device)-before)


@call_parse
def main(
    archs:str=PAPER, # Networks, of `model_names()`
    size:str='512x1024', # Height x width of the images, in pixels
    bs:int=0, # Images per batch; 0 is one, for DeepLabV3 two
    classes:int=19, # Number of classes
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    variants:str='', # Variants, separated by semicolons; empty runs all, for the first network
    csv:str='', # Write the table here as well
    only:str='', # Used by the script itself: report the memory of one variant
):
    "Measure the peak memory of every variant."
    if only: return report(only, archs, parse_size(size), bs, classes, threads, device)
    rows = []
    for i,arch in enumerate(archs.split(',')):
        names = (variants.split(';') if variants else COMPARED if i==0
                 else ['plain', 'plain again', 'dropclass, Learner', "authors' formula"])
        args = ['--archs', arch, '--size', size, '--bs', bs, '--classes', classes, '--threads', threads, '--device',
                device]
        for allocator,env in ALLOCATORS.items() if i==0 and device=='cpu' else [('default', {})]:
            peaks = {name:[int(o)/2**20 for o in in_fresh_process(__file__, '--only', name, *args, **env).split()]
                     for name in names}
            where = setting(arch, parse_size(size), batch_size(arch, bs), classes, 1, threads,
                            device) | dict(allocator=allocator)
            new = [where
                   | dict(variant=name, peak_mb=round(peak), step_mb=round(step),
                          ratio=round(peak/peaks['plain'][0], 3), step_ratio=round(step/peaks['plain'][1], 3))
                   for name,(peak,step) in peaks.items()]
            show(new, ['arch', 'allocator', 'variant', 'peak_mb', 'step_mb', 'ratio', 'step_ratio'])
            rows += new
            write_csv(rows, csv)
