"""Check the package on a machine with a GPU, in one command of a few minutes.

    python benchmarks/gpu_check.py --data FOLDER --weights FOLDER
    python benchmarks/gpu_check.py --device cpu --quick    # tries the script itself, on tiny images

tests   those that need a GPU; elsewhere they are skipped
steps   time and peak memory of a training step of the paper's three networks: 512x1024, eight images, bfloat16
loss    the fused loss against F.interpolate and F.cross_entropy (benchmarks/fused_loss.py)
runs    with --data, as many runs of benchmarks/camvid/pretrained.json as fit into the rest of the time, several at once

Tables go to results/, as gpu_steps.csv and fused_loss_cuda.csv, and rows of runs to results/camvid_gpu/.
A part that fails is named at the end, the others go on, and the exit status is 1.
"""
import copy
import subprocess
import sys
import time
from pathlib import Path

import torch
from fastcore.script import call_parse, store_true

from common import (PAPER, RESULTS, TIMES, authors_formula, fused, looped, make_base, make_batch, measure, parse_size,
                    plain, setting, show, stacked, summary, write_csv)

HERE = Path(__file__).resolve().parent
TESTS = ['test_data', 'test_fused', 'test_metrics_oracle', 'test_precision']
STEPS = {'plain':lambda model,classes: plain, 'dropclass':fused, 'dropclass, stacked':stacked,
         "authors' formula":authors_formula}


def half_step(name, base, classes, x, y):
    "A training step of one variant in bfloat16."
    model = copy.deepcopy(base)
    loss_of = STEPS[name](model, classes)
    def in_half(*args):
        with torch.autocast(x.device.type, torch.bfloat16): return loss_of(*args)
    return looped(model, in_half, x, y)

def peak_mb(name, base, classes, x, y):
    "Peak memory of two steps in MiB, after one that warms up; none but on a GPU."
    if x.device.type!='cuda': return ''
    step = half_step(name, base, classes, x, y)
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2): step()
    return round(torch.cuda.max_memory_allocated()/2**20)

def check_steps(device, quick):
    "Time and memory of every variant, network by network."
    archs,size,bs,classes,rounds = ('small', '32x64', 2, 4, 5) if quick else (PAPER, '512x1024', 8, 19, 15)
    rows,size = [],parse_size(size)
    for arch in archs.split(','):
        x,y = make_batch(bs, size, classes, device, True)
        base = make_base(arch, classes, device, True)
        steps = {name: half_step(name, base, classes, x, y) for name in STEPS}
        found = summary(measure(steps, rounds, device, warm=3))
        del steps
        for o in found: o['peak_mb'] = peak_mb(o['variant'], base, classes, x, y)
        where = setting(arch, size, bs, classes, rounds, torch.get_num_threads(), device)
        new = [where | {'precision':'bf16'} | o for o in found]
        show(new, [*TIMES, 'peak_mb'])
        rows += new
        if not quick: write_csv(rows, RESULTS/f'gpu_steps{"" if device=="cuda" else "_"+device}.csv')

def run(*command, minutes=None, cwd=None):
    "Run a command and show what it prints; fails as it does."
    print('$', *command, flush=True)
    command = [sys.executable, '-W', 'ignore', *map(str, command)]
    subprocess.run(command, check=True, cwd=cwd, timeout=minutes and 60*minutes)

def check_tests(minutes):
    "The tests of the modules that do something of their own on a GPU."
    files = [f'tests/{o}.py' for o in TESTS]
    run('-m', 'pytest', '-q', *files, '-k', 'gpu or cuda or mixed_precision', minutes=minutes, cwd=HERE.parent)

def check_loss(device, quick):
    "The fused loss alone."
    table = ['--csv', RESULTS/f'fused_loss_{device}.csv'] if not quick else []
    cases,rounds = ('19',3) if quick else ('19,150',11)
    run(HERE/'fused_loss.py', '--device', device, '--cases', cases, '--rounds', rounds, *table)

def check_runs(data, weights, jobs, minutes):
    "Runs of the plan, in its order."
    if minutes<1: return print("No time is left for runs", flush=True)
    run(HERE/'camvid'/'run.py', 'pretrained', '--data', data, '--weights', weights, '--jobs', jobs,
        '--minutes', minutes, '--runs', HERE.parent/'runs'/'camvid_gpu', '--results', RESULTS/'camvid_gpu')


@call_parse
def main(
    minutes:float=8., # For everything together
    device:str='cuda', # Where to run: cuda, or cpu to try the script
    data:str='', # Folder of a CamVid copy; empty makes no runs
    weights:str='', # Folder of the file of trained weights that the plan names
    jobs:int=16, # Runs at the same time; more than one a core does not pay
    quick:store_true=False, # Only try the script: tiny images, no tables
):
    "Check the package on a GPU."
    if device=='cuda' and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU: --device cpu --quick tries the script without one")
    if data and not weights: raise SystemExit("--data needs --weights, the folder of the file that the plan names")
    start,failed = time.monotonic(),[]
    left = lambda: minutes-(time.monotonic()-start)/60
    parts = {'tests':lambda: check_tests(left()), 'steps':lambda: check_steps(device, quick),
             'loss':lambda: check_loss(device, quick)}
    if data: parts['runs'] = lambda: check_runs(data, weights, jobs, left()-.5)
    for name,part in parts.items():
        print(f"\n{name}: {left():.1f} minutes are left", flush=True)
        try: part()
        except (Exception, SystemExit) as e:
            failed.append(name)
            print(f"{name} failed: {e}", flush=True)
    print(f"\n{60*(minutes-left()):.0f} s; {'failed: '+', '.join(failed) if failed else 'all is well'}", flush=True)
    if failed: raise SystemExit(1)
