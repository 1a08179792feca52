"""What a co-location audit costs: every class erased in turn, against one look at the images and against the naive way.

    python benchmarks/audit.py --threads 2 --csv results/audit.csv

evaluate              one pass over the images, with the counts for all metrics
audit                 `colocation`: besides, one pass per class for the images that contain it
naive                 one pass over *all* images for each class, as a loop over copies of the data set would do
"""
from statistics import median

import torch
from fastcore.script import call_parse

from common import make_base, measure, parse_size, setting, show, spread, write_csv
from dropclass.analysis.context import colocation, erase, image_counts, image_stats, make_fill
from dropclass.data.scenes import scenes_dls


def ways(model, batches, spec):
    "The three ways as functions; each returns its counts."
    paint = make_fill('mean', image_stats(batches, 'cpu', None), 0)
    count = lambda x,y: image_counts(model, x, y, spec).sum(0)
    def without(x, y, c, start):
        return torch.stack([erase(image, labels==c, paint, start+i) for i,(image,labels) in enumerate(zip(x, y))])
    @torch.no_grad()
    def evaluate(_=0): return sum(count(x, y) for x,y in batches)
    @torch.no_grad()
    def naive(_=0): return evaluate(),torch.stack([sum(count(without(x, y, c, n*len(x)), y)
                                                       for n,(x,y) in enumerate(batches)) for c in range(len(spec))])
    return dict(evaluate=evaluate, audit=lambda _=0: colocation(model, batches, spec), naive=naive)


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='96x128', # Height x width of the scenes, in pixels
    images:int=16, # Number of scenes
    rounds:int=5, # Timed rounds; at least 5
    threads:int=2, # Threads of PyTorch
    csv:str='', # Write the table here as well
):
    "Time the three ways in turn, and check that audit and naive way agree."
    torch.set_num_threads(threads)
    dls = scenes_dls(n_train=8, n_valid=images, size=parse_size(size), device='cpu')
    batches = [(torch.as_tensor(x).as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in dls.valid]
    model = make_base(arch, len(dls.spec)).eval()
    fs = ways(model, batches, dls.spec)
    found,(whole,erased) = fs['audit'](),fs['naive']()
    if not (torch.equal(found.confusion, whole) and (found.erased-erased).abs().sum()<=1e-3*erased.sum()):
        raise ValueError("The audit and the naive way do not agree")
    times = measure(fs, rounds)
    passes = dict(evaluate=images, audit=found.passes, naive=found.naive_passes)
    rows = []
    for name,both in times.items():
        row = setting(arch, parse_size(size), images, len(dls.spec), rounds, threads,
                      'cpu') | dict(way=name, passes=passes[name], seconds=round(median(o[0] for o in both)/1000, 3))
        rows.append(row
                    | dict(zip(('ratio_low', 'ratio', 'ratio_high'),
                               spread([a[0]/b[0] for a,b in zip(both, times['evaluate'])], 2))))
    show(rows, ['arch', 'way', 'passes', 'seconds', 'ratio_low', 'ratio', 'ratio_high'])
    write_csv(rows, csv)
