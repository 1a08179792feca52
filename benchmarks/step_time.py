"""What a DropClass step costs: forward, backward and optimizer of one training step, all variants in turn in one
process (see common.py).

    python benchmarks/step_time.py --threads 2 --csv results/step_time.csv
    python benchmarks/step_time.py --archs hrnet_v1_w18 --profile
"""
import torch
from fastcore.script import call_parse, store_true

from common import (PAPER, TIMES, VARIANTS, batch_size, make_batch, make_steps, measure, parse_size, setting, show,
                    summary, write_csv)


def show_profile(steps, device, names=('plain', 'dropclass'), top=14):
    "Where the plain and the DropClass step spend their time, operator by operator."
    from torch.profiler import profile, ProfilerActivity
    for name in names:
        with profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*(device=='cuda')) as prof:
            for _ in range(3): steps[name]()
        total = sum(o.self_cpu_time_total for o in prof.key_averages())
        print(f"\n{name}: {total/3e3:.0f} ms per step")
        for o in sorted(prof.key_averages(),
                        key=lambda o: -o.self_cpu_time_total)[:top]: print(f"  {o.self_cpu_time_total/3e3:8.1f} ms  "
                                                                           f"{o.count//3:5d} x  {o.key}")


APART = ('Grad-CAM',)


@call_parse
def main(
    archs:str=PAPER, # Networks, of `model_names()`
    size:str='512x1024', # Height x width of the images, in pixels
    bs:int=0, # Images per batch; 0 is one, for DeepLabV3 two
    classes:int=19, # Number of classes
    rounds:int=7, # Timed rounds; at least 5
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    variants:str='', # Variants, separated by semicolons; empty runs all
    channels_first:store_true=False, # Lay networks and images out channels first?
    csv:str='', # Write the table here as well
    profile:store_true=False, # Show where the time goes?
):
    "Time one training step of every variant, in turn in one process."
    if rounds<5: raise ValueError(f"`rounds` must be at least 5 for a median with quartiles, got {rounds}")
    torch.set_num_threads(threads)
    rows,names = [],variants.split(';') if variants else VARIANTS
    for arch in archs.split(','):
        x,y = make_batch(batch_size(arch, bs), parse_size(size), classes, device, not channels_first)
        steps = make_steps(arch, classes, x, y, names, not channels_first)
        measured = summary(measure({k:v for k,v in steps.items() if k not in APART}, rounds, device))
        # Beside plain alone: what runs after a step of several times the memory is slower than it should be
        for name in APART:
            if name in steps:
                measured += summary(measure({'plain':steps['plain'], name:steps[name]}, rounds, device))[1:]
        new = [setting(arch, parse_size(size), len(x), classes, rounds, threads, device) | o for o in measured]
        show(new, TIMES)
        rows += new
        write_csv(rows, csv)
        if profile: show_profile(steps, device)
