"""Do boats lean less on the water where classes were pasted or erased in training? Small networks on a harbour.

    python benchmarks/harbour_paste.py

In training boats are always on the water. Writes results/harbour_paste.csv, a row per network: the fall of the IoU of
boats, in points, where the water is erased from the images (its pixels do not count), and the mean IoU on 32 images of
cars and boats where boats are always on the water (`biased`) and where they are on the road as often (`unbiased`).
The page nbs/analyses/70_class_paste.ipynb reads them.
"""
import argparse
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from dropclass.analysis.context import HARBOUR, colocation, harbour, train_harbour
from dropclass.core import step_generator
from dropclass.metrics import class_iou, evaluate
from dropclass.analysis.controls import erase_classes
from dropclass.paste import paste_classes

THINGS = torch.tensor([float(o in ('car', 'boat')) for o in HARBOUR.names]) # Road and water are never pasted


def changed(how, seed, images, labels, step):
    "A batch as training sees it."
    return how(images, labels, THINGS, step_generator(seed, step))

ARMS = {'as they are': None, 'class paste': partial(paste_classes, components=True),
        'class paste, 9 of 10': partial(paste_classes, components=True, p=.9),
        'class erased': erase_classes}


def measure(model):
    "Fall of the boats' IoU without water, and the IoU of cars and boats in both worlds."
    worlds = {k: [harbour(32, bias, seed=9)] for k, bias in dict(biased=1., unbiased=0.).items()}
    fall = colocation(model, worlds['biased'], HARBOUR).fall()
    water, boat = (HARBOUR.names.index(o) for o in ('water', 'boat'))
    iou = {k: class_iou(evaluate(model, data, len(HARBOUR)))[THINGS.bool()] for k, data in worlds.items()}
    return {'erased': 100*fall[water, boat].item(), **{k: 100*o.mean().item() for k, o in iou.items()}}


def main():
    "Train and measure all networks."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, nargs='+', default=[320, 1280], help="training steps")
    parser.add_argument('--seeds', type=int, default=5, help="seeds of each")
    parser.add_argument('--threads', type=int, default=1, help="processor threads")
    table = Path(__file__).parent.parent/'results'/'harbour_paste.csv'
    parser.add_argument('--out', type=Path, default=table, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for steps in args.steps:
        for seed in range(args.seeds):
            for arm, how in ARMS.items():
                change = how and partial(changed, how, seed)
                model = train_harbour(steps=steps, seed=seed, change=change)
                rows.append({'steps': steps, 'seed': seed, 'arm': arm, **measure(model)})
                print(' '.join(f'{v:.1f}' if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    pd.DataFrame(rows).round(2).to_csv(args.out, index=False)


if __name__=='__main__': main()
