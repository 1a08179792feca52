"""The weights of the arm `confused` in options.json: which classes a plain network mixes up.

    python benchmarks/scenes/confused.py        # a minute on one core

Trains the plan's plain arm with a seed and test scenes that the plan itself never uses, and prints `confused_weights`
of its confusion matrix.
"""
import json
import sys
import tempfile
from pathlib import Path

from dropclass.run.config import Config
from dropclass.run.experiment import load_run, train_run
from dropclass.analysis.controls import confused_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'camvid'))
from run import read_plan, run_options # noqa: E402

def main():
    options = run_options(read_plan(str(Path(__file__).with_name('options.json'))), 'plain', 99)
    options['data_options'] = {**options['data_options'], 'test_seed':1}
    with tempfile.TemporaryDirectory() as folder:
        train_run(Config(**options), Path(folder)/'run', progress=False, write=lambda o: None)
        run = load_run(Path(folder)/'run')
        weights = confused_weights(run.confusion()).tolist()
    for name,weight in zip(run.spec.names, weights): print(f'{weight:.3f}  {name}')
    print(json.dumps([round(o, 3) for o in weights]))

if __name__=='__main__': main()
