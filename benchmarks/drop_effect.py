"""Drop every class in turn from trained networks, and count what they still find.

    python benchmarks/drop_effect.py RUN... --out results/NAME [--data FOLDER] [--erase FILL]

Every RUN is a run folder with weights, of method `dropclass` or `no_drop`; FOLDER is the data set's, where the run does
not say.
Writes NAME/RUN.json for each, counts on the validation set with the configuration hash beside them, and skips those
that are there.
With `--erase` every class is also erased from the images, painted over with FILL: NAME/erased/RUN-FILL.json. Both by
the drop path.
The page nbs/analyses/60_what_a_drop_takes.ipynb reads them.
"""
import argparse
import json
from pathlib import Path

import torch

from dropclass.analysis.context import FILLS, colocation
from dropclass.analysis.drop import drop_effect
from dropclass.run.experiment import load_run


def main():
    "Measure the runs that have not been measured."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help="run folders")
    parser.add_argument('--out', type=Path, required=True, help="folder for the results")
    parser.add_argument('--data', help="folder of the data set")
    parser.add_argument('--erase', choices=FILLS, metavar='FILL',
                        help="erase every class from the images too, and fill in " + ', '.join(FILLS))
    parser.add_argument('--threads', type=int, default=1, help="processor threads")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for folder in args.runs:
        file = args.out/f'{folder.name}.json'
        run = load_run(folder)
        config = json.loads((folder/'config.json').read_text())['hash']
        if args.data and run.config.data!='scenes': run.config.path = args.data
        known = file.is_file() and json.loads(file.read_text()).get('config')==config
        if not known:
            found = drop_effect(run, label=folder.name)
            found.save(file, config=config)
            table = found.table()
            print(f"{folder.name}: recall {table.loc['mean','recall']:.1f}, with the class dropped "
                  f"{table.loc['mean','recall, dropped']:.1f}, IoU of the others "
                  f"{table.loc['mean','IoU of the others']:+.2f}", flush=True)
        erased = args.out/'erased'/f'{folder.name}-{args.erase}.json'
        if args.erase and not (known and erased.is_file()):
            erased.parent.mkdir(exist_ok=True)
            found = colocation(run.subject('drop'), fill=args.erase, label=folder.name)
            found.save(erased)
            print(f"{folder.name}: erased by {args.erase}, mean fall {100*found.fall('same').nanmean():+.2f}",
                  flush=True)


if __name__=='__main__': main()
