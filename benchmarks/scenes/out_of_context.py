"""Draw what two runs make of streets in and out of context; writes nbs/images/out_of_context.png.

    python benchmarks/scenes/out_of_context.py runs/scenes/paste_confirm/plain_w-s5 \
        runs/scenes/paste_confirm/paste_w-s5

Both networks answer at the tau that the test images in context choose. The streets are those, of all test streets in
and out of context, in which the second network finds most pixels of rare classes that the first misses.
"""
import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from PIL import Image

from dropclass.core import colorize
from dropclass.prior import shift_classes
from dropclass.run.experiment import load_run, make_data, prior_counts
from dropclass.run.tuned import Grid, best_tau

ROOT = Path(__file__).resolve().parents[2]


def tuned_model(folder):
    "A run's network, shifted by the tau that the test images in context choose."
    model,grid = load_run(folder).load_model(),Grid(folder)
    shift_classes(model, prior_counts(folder)['offsets'][best_tau(grid, 'valid')])
    return model.eval()


def predictions(models, dl):
    "Images, labels and what each network predicts (N,H,W)."
    found = []
    with torch.no_grad():
        for x,y in dl: found.append((x, y, *(m(x).argmax(1) for m in models)))
    return [torch.cat([torch.as_tensor(o) for o in part]) for part in zip(*found)]


def most_different(y, first, second, rare, n):
    "The streets in which the second network finds more rare pixels than the first, most first."
    is_rare = torch.isin(y, torch.tensor(rare))
    more = ((second==y)&is_rare).flatten(1).sum(1)-((first==y)&is_rare).flatten(1).sum(1)
    return more.argsort(descending=True)[:n].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('runs', nargs=2, type=Path, help='two runs on scenes')
    parser.add_argument('--titles', nargs=2, default=['class weights', 'with class paste'])
    parser.add_argument('--out', type=Path, default=ROOT/'nbs'/'images'/'out_of_context.png')
    args = parser.parse_args()
    run,models = load_run(args.runs[0]),[tuned_model(o) for o in args.runs]
    dls = make_data(run.config)
    matplotlib.use('agg')
    fig,axs = plt.subplots(3, 4, figsize=(8,4.2), layout='constrained')
    spec,row,seen = run.spec,0,set()
    for world,dl,n in (('in context', dls.valid, 1), ('out of context', dls.unbiased, 2)):
        x,y,*answers = predictions(models, dl)
        for i in most_different(y, *answers, run.metrics['rare'], n):
            shown = dls.valid.decode_batch((x[i:i+1], y[i:i+1]))[0][0]
            pictures = [shown.permute(1, 2, 0).byte().cpu(), *(colorize(o[i], spec) for o in (y, *answers))]
            for ax,picture in zip(axs[row], pictures): ax.imshow(picture)
            axs[row,0].set_ylabel(world, fontsize=8)
            seen |= set(torch.cat([o[i].flatten() for o in (y, *answers)]).unique().tolist())
            row += 1
    for ax,title in zip(axs[0], ('street','truth',*args.titles)): ax.set_title(title, fontsize=9)
    for ax in axs.flat: ax.set(xticks=[], yticks=[])
    known = [c for c in sorted(seen) if c<len(spec)]
    colors = [tuple(v/255 for v in spec.colors[c]) for c in known]
    handles = [Patch(color=o, label=spec.names[c]) for o,c in zip(colors, known)]
    fig.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=7, frameon=False)
    fig.savefig(args.out, dpi=110)
    Image.open(args.out).convert('RGB').quantize(256).save(args.out, optimize=True) # A third of the size


if __name__=='__main__': main()
