"""Compute the data of every table and figure from two run folders, and keep them small.

    python benchmarks/evidence.py RUN_A RUN_B --out results/NAME

RUN_A is the baseline, RUN_B the run that is compared with it, both on the same data. nbs/analyses/30_evidence_scenes
reads what this writes, so it renders without the weights. Pictures are written for generated images only.
"""
import argparse
import json
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from dropclass.analysis.bias import bias_scores, pair_confusions, proxy_values, rank_agreement, worst_confusions
from dropclass.analysis.context import colocation, erase, image_counts, image_stats, make_fill, robustness_table
from dropclass.analysis.subjects import iter_batches, open_data, open_model
from dropclass.analysis.entanglement import MEASURES, entanglement, entanglement_table
from dropclass.analysis.figures import differences, plot_differences, plot_grad_cam
from dropclass.run.compare import comparison
from dropclass.core import eval_mode, write_json
from dropclass.run.experiment import load_run


def naive_colocation(model, data, spec):
    "The data set and a copy of it per class, all evaluated in full."
    C,paint,passes = len(spec),make_fill('mean', image_stats(data)),0
    total,erased = torch.zeros(C, C, dtype=torch.long),torch.zeros(C, C, C, dtype=torch.long)
    with torch.no_grad(), eval_mode(model):
        for x,y in iter_batches(data): total,passes = total+image_counts(model, x, y, spec).sum(0),passes+len(x)
        for c in range(C):
            for x,y in iter_batches(data):
                copy = torch.stack([erase(image, target==c, paint) for image,target in zip(x, y)])
                erased[c] += image_counts(model, copy, y, spec).sum(0)
                passes += len(x)
    return total,erased,passes


def measure_cost(run):
    "Reuse against the naive way, in one process: passes, seconds, and whether every count is equal."
    subject = open_model(run)
    data = list(iter_batches(open_data(subject))) # In memory, so that reading files is no part of it
    colocation(subject, data, max_images=16) # Warm up
    seconds = [[], []]
    for _ in range(3): # Seconds of computing, in turns: what else the machine does is no part of it
        start = time.process_time()
        fast = colocation(subject, data)
        middle = time.process_time()
        total,erased,passes = naive_colocation(subject.model, data, subject.spec)
        seconds[0].append(middle-start)
        seconds[1].append(time.process_time()-middle)
    fast_seconds,naive_seconds = map(median, seconds)
    bound = (1+float((fast.presence/fast.images).sum()))/(len(subject.spec)+1)
    return dict(images=fast.images, classes=len(subject.spec), presences=fast.presence.tolist(), passes=fast.passes,
                naive_passes=passes, pass_ratio=fast.passes/passes, bound=bound,
                cpu_seconds=round(fast_seconds, 2), naive_cpu_seconds=round(naive_seconds, 2),
                cpu_ratio=fast_seconds/naive_seconds, repeats=len(seconds[0]), threads=torch.get_num_threads(),
                equal=bool(torch.equal(fast.confusion, total) and torch.equal(fast.erased, erased)))


def compare_fills(run, fills, max_images):
    "The falls of one run under several fills, and how alike their rankings are."
    found = {o:colocation(run, fill=o, max_images=max_images) for o in fills}
    falls = pd.DataFrame({o:100*co.fall().flatten() for o,co in found.items()}).dropna()
    table = pd.DataFrame(dict(images=max_images, mean_fall=falls.mean(), largest_fall=falls.max()))
    for o in fills: table[f'rank correlation with {o}'] = falls.corr(method='spearman')[o]
    return table.rename_axis('fill')


def save_small(fig, path):
    "Save a figure with a palette of 128 colours."
    from PIL import Image
    fig.savefig(path, dpi=75)
    with Image.open(path) as picture: small = picture.convert('RGB').quantize(128)
    small.save(path, optimize=True)


def main():
    "Write everything for two runs."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs=2, type=Path, help="run folders: the baseline, then the other")
    parser.add_argument('--out', type=Path, required=True, help="folder for the results")
    parser.add_argument('--pairs', nargs='*', default=None, metavar='A/B',
                        help="pairs of look-alike classes; the worst confusions of the baseline when left out")
    parser.add_argument('--fill-images', type=int, default=40, help="images for the comparison of fills")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [load_run(o) for o in args.runs]
    labels = [o.config.method for o in runs] if runs[0].config.method!=runs[1].config.method else [o.folder.name
                                                                                                   for o in runs]
    a,b = (open_model(o, label=l) for o,l in zip(runs, labels))
    spec,scenes = a.spec,runs[0].config.data=='scenes'
    write_json(args.out/'about.json',
               dict(data=runs[0].config.data, labels=labels,
                    runs=[dict(folder=o.folder.name, method=o.config.method, arch=o.config.arch, epochs=o.config.epochs,
                               size=o.config.size, seed=o.config.seed,
        weights=o.config.weights, dropclass=o.config.dropclass, predicts=o.predicts) for o in runs],
        measures=list(MEASURES), pictures=scenes))

    for test in runs[0].metrics['tests']:
        comparison(runs, test).to_csv(args.out/f'table1_{test}.csv') # Tables 1, 2, 3 and 6
    print('comparison written', flush=True)

    contexts = [colocation(o) for o in (a, b)] # Table 4
    for o,co in zip(labels, contexts): co.save(args.out/f'context_{o}.json')
    table4 = robustness_table(*contexts)
    table4.to_csv(args.out/'table4.csv')
    write_json(args.out/'cost.json', measure_cost(a))
    compare_fills(a, ['mean','noise','blur','inpaint'], args.fill_images).to_csv(args.out/'fills.csv')
    print('erased context written', flush=True)

    tangled = [entanglement(o) for o in (a, b)] # Table 5, Figure 3
    entanglement_table(*tangled).to_csv(args.out/'table5.csv')
    for l,o in zip(labels, tangled):
        write_json(args.out/f'classifier_{l}.json',
                   dict(pixel_counts=torch.as_tensor(o.pixel_counts).tolist(),
                        weight=[[round(v, 5) for v in row] for row in o.weight.tolist()]))

    confusions = {l:co.confusion for l,co in zip(labels, contexts)}
    pd.concat({l:worst_confusions(o, spec, 8) for l,o in confusions.items()},
              names=['network']).to_csv(args.out/'confusions.csv')
    worst = worst_confusions(confusions[labels[0]], spec, 8)
    pairs = [tuple(o.split('/'))
             for o in args.pairs] if args.pairs else list(dict.fromkeys(tuple(sorted(o))
                                                                        for o in zip(worst.truth, worst.predicted)))
    pair_confusions(confusions, spec, pairs).rename_axis('pair').to_csv(args.out/'pairs.csv')
    diff = differences(a, b) # Figures 2 and 4
    diff.pairs(8).to_csv(args.out/'differences.csv')
    if scenes:
        ranks = {}
        for l,run,co in zip(labels, runs, contexts):
            scores = bias_scores(run.confusion('valid'), run.confusion('unbiased'), spec)
            scores.to_csv(args.out/f'bias_{l}.csv')
            values = proxy_values(co, scores)
            values.to_csv(args.out/f'proxy_{l}.csv')
            ranks[l] = rank_agreement(values).T.to_dict()
        write_json(args.out/'ranks.json', ranks)
        # The worst confusion by share: pixels alone would choose the largest classes
        pair = next(o for o in zip(worst.truth, worst.predicted) if diff.images(o))
        save_small(plot_differences(a, b, pair=pair, n=3, found=diff), args.out/'figure2.png')
        save_small(plot_grad_cam(a, b, truth=pair[0], alikes=[pair[1]], n=2), args.out/'figure4.png')
    print(json.dumps(json.loads((args.out/'cost.json').read_text())), flush=True)


if __name__=='__main__': main()
