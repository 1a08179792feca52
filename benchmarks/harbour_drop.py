"""Do boats lean less on the water where classes were dropped in training? Small networks on a harbour, in pairs of a
seed.

    python benchmarks/harbour_drop.py

Trains with and without the drop at three lengths, and with alpha 10 at each, at the unit scale. Writes
results/harbour_drop.csv, a row per network:
the fall of the IoU of boats, in points, where the water is erased from the images and where it is dropped from the
features (32 test images; the pixels of the water do not count),
and the mean IoU of cars and boats where boats are always on the water (`biased`) and where they are on the road as
often (`unbiased`).
The page nbs/analyses/60_what_a_drop_takes.ipynb reads them.
"""
import argparse
from pathlib import Path

import pandas as pd
import torch

from dropclass.analysis.context import HARBOUR, colocation, harbour
from dropclass.analysis.drop import compare_removals, drop_effect, train_harbour_drop
from dropclass.metrics import class_iou

ARMS = {'no drop': dict(drop=0.), 'DropClass': dict(drop=1.), "DropClass, alpha 10": dict(drop=1., alpha=10.)}
THINGS = [HARBOUR.names.index(o) for o in ('car', 'boat')]


def measure(model):
    "Ask a trained network for what stands in a row."
    biased, unbiased = ([harbour(32, bias, seed=9)] for bias in (1., 0.))
    effect = drop_effect(model, biased, HARBOUR)
    pairs = compare_removals(effect, colocation(model, biased, HARBOUR)).set_index(['removed', 'class'])
    things = {k: 100*class_iou(o.confusion)[THINGS].mean().item()
              for k,o in dict(biased=effect, unbiased=drop_effect(model, unbiased, HARBOUR)).items()}
    return {**pairs.loc[('water', 'boat')].to_dict(), **things}


def main():
    "Train and measure all networks."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, nargs='+', default=[80, 320, 1280], help="training steps")
    parser.add_argument('--seeds', type=int, default=5, help="seeds of each")
    parser.add_argument('--threads', type=int, default=1, help="processor threads")
    parser.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'results'/'harbour_drop.csv',
                        help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for steps in args.steps:
        for seed in range(args.seeds):
            for arm, options in ARMS.items():
                rows.append({'steps': steps, 'seed': seed, 'arm': arm,
                             **measure(train_harbour_drop(steps=steps, seed=seed, **options))})
                print(' '.join(f'{v:.1f}' if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    pd.DataFrame(rows).round(2).to_csv(args.out, index=False)


if __name__=='__main__': main()
