"""Run all notebooks and all files of tests, some side by side: `python .ci/tests.py [--workers 2] [--flags slow] [FILE ...]`.

Each gets a process of its own, for fastai changes torch.Tensor for whoever comes after it. The processes are forked from this
one, which has imported what takes them seconds to import: for notebooks all but fastai, for tests fastai too.
What a process prints is shown when it ends.
"""
import argparse
import gc
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot # noqa: F401
import pandas # noqa: F401
import pytest
import safetensors.torch # noqa: F401
import scipy.stats # noqa: F401
import torchvision # noqa: F401
from nbdev.config import get_config
from nbdev.test import test_nb

NOTHING_TO_DO = 5 # What pytest ends with where all tests are marked slow


def everything():
    "Notebooks from the last floor to the first, then files of tests, the long ones first."
    hidden = lambda o: any(part[0] in '._' for part in o.parts)
    notebooks = sorted((o for o in Path('nbs').rglob('*.ipynb') if not hidden(o)), reverse=True)
    return [*notebooks, *sorted(Path('tests').glob('test_*.py'), key=lambda o: -o.stat().st_size)]


def run(file, flags):
    "Run one file in this process; 0 where all is well."
    if file.suffix=='.py':
        code = pytest.main(['-q', str(file), *(['-m', ''] if flags else [])])
        return 0 if code==NOTHING_TO_DO else int(code)
    config = get_config()
    done,_ = test_nb(file.absolute(), config.tst_flags.split(), flags.split(), basepath=config.config_path,
                     cell_timeout=config.cell_timeout)
    return int(not done)


def start(file, flags):
    "Fork a process that runs one file: its id, and where it prints to."
    if file.suffix=='.py': import_module('fastai.vision.all')
    gc.freeze() # Else each child would walk through all that is imported, and copy it, when it ends
    log = tempfile.TemporaryFile('w+', errors='replace')
    sys.stdout.flush()
    if pid := os.fork(): return pid,log
    for stream in (1, 2): os.dup2(log.fileno(), stream)
    sys.exit(run(file, flags))


def run_all(files, workers, flags):
    "Run files, so many at a time; the ones that failed."
    running,failed = {},[]
    while files or running:
        while files and len(running)<workers:
            file,*files = files
            pid,log = start(file, flags)
            running[pid] = file,log,time.monotonic()
        pid,status = os.wait()
        file,log,begin = running.pop(pid)
        log.seek(0)
        print(f'{log.read()}{file}: {time.monotonic()-begin:.0f} secs', flush=True)
        if status: failed.append(file)
    return failed


if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('files', nargs='*', type=Path)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--flags', default='', help='slow, or "slow cuda": cells and tests that are left out otherwise')
    args = parser.parse_args()
    sys.path[0] = os.getcwd()
    failed = run_all(args.files or everything(), args.workers, args.flags)
    if failed: sys.exit('Failed: '+', '.join(map(str, failed)))
