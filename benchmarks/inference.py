"""The inference cost of a folded head beside the plain model, for each network of the paper.

    python benchmarks/inference.py --threads 2                         # on a CPU; writes results/inference.csv
    python benchmarks/inference.py --threads 2 --size 512x1024
    python benchmarks/inference.py --device cuda --size 1024x2048 --rounds 50 --csv results/inference_cuda.csv

All variants of a network have the same weights and see the same images. They take turns, one forward pass each, and the
order moves on by one every round, so that a machine that grows slower harms all alike. Compare the column `wall_ratio`:
the time over that of
the plain model in the same round, whose median and quartiles are kept. On a CPU `cpu_ratio` does not see other
processes' time slices. Nothing is downloaded.

plain       the network as it was before the head came
head        with the head, which answers by the drop path
folded      `fold_dropclass`: the same answer from plain convolutions
"""
import copy
from csv import DictWriter
from pathlib import Path
from statistics import quantiles
import time

import torch
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode

from dropclass.surgery import add_dropclass

from dropclass.fold import fold_dropclass
from dropclass.models import create_model

PAPER = 'hrnet_v1_w18,hrnet_v2_w18,deeplabv3_mobilenetv3'


def make_variants(arch, classes, x):
    "The same network three times, in evaluation mode; refuses a folded one that answers differently."
    torch.manual_seed(0)
    plain = create_model(arch, classes).eval().to(x.device)
    head = copy.deepcopy(plain)
    add_dropclass(head, classes, predict='drop')
    folded = fold_dropclass(copy.deepcopy(head.eval()))
    expected = head(x)
    error = ((folded(x)-expected).abs().max()/expected.abs().max()).item()
    if error>1e-5*(1 if x.device.type=='cpu' else 100):
        raise RuntimeError(f"The folded {arch} differs from the one with the head by {error:.0e} of the largest logit")
    return dict(plain=plain, head=head, folded=folded.eval()),error


def giga_macs(model, x):
    "Multiply-adds of a forward pass, in billions."
    with FlopCounterMode(display=False) as counter: model(x)
    return counter.get_total_flops()/2e9


def timed(model, x):
    "Milliseconds of a forward pass: on the clock, and of processor time."
    sync = torch.cuda.synchronize if x.device.type=='cuda' else lambda: None
    sync()
    wall,cpu = time.perf_counter(),time.process_time()
    model(x)
    sync()
    return (time.perf_counter()-wall)*1000, (time.process_time()-cpu)*1000


def measure(models, x, rounds, warm=2):
    "Times of every variant in every round."
    names,times = list(models),{name:[] for name in models}
    for i in range(warm+rounds):
        k = i%len(names)
        for name in names[k:]+names[:k]:
            both = timed(models[name], x)
            if i>=warm: times[name].append(both)
    return times


def summary(times):
    "Median and quartiles of the times, and of the ratios to `plain` in the same round, by variant."
    spread = lambda o,digits: [round(v, digits) for v in quantiles(o, n=4, method='inclusive')]
    rows = {name:{} for name in times}
    for name,both in times.items():
        for i,kind in enumerate(('wall', 'cpu')):
            ms,base = [o[i] for o in both],[o[i] for o in times['plain']]
            for k,v in zip(('low', 'median', 'high'), spread(ms, 1)): rows[name][f'{kind}_ms_{k}'] = v
            for k,v in zip(('low', 'median', 'high'), spread([a/b for a,b in zip(ms, base)], 3)):
                rows[name][f'{kind}_ratio_{k}'] = v
    return rows


@call_parse
def main(
    archs:str=PAPER, # Networks, by commas
    size:str='256x512', # Height x width of the images, in pixels
    bs:int=1, # Images per batch
    classes:int=19, # Number of classes
    rounds:int=15, # Timed rounds; at least 7
    threads:int=1, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str=str(Path(__file__).resolve().parents[1]/'results/inference.csv'), # Where the table goes; '' only prints it
):
    "Time a forward pass of each network plain, with the head, and folded, in turn in one process."
    if rounds<7: raise ValueError(f"`rounds` must be at least 7 for a median with quartiles, got {rounds}")
    try: height,width = (int(o) for o in size.lower().split('x'))
    except ValueError: raise ValueError(f"`size` must be HEIGHTxWIDTH in pixels, as 256x512, got {size!r}") from None
    torch.set_num_threads(threads)
    x = torch.randn(bs, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    print(f"{classes} classes, {bs} x {height}x{width}, {rounds} rounds, {threads} thread(s), {x.device.type}, torch "
          f"{torch.__version__}")
    print(f"{'network':22s} {'variant':7s} {'GMAC':>7s} {'parameters':>11s} {'wall ms':>9s} {'ratio':>7s} "
          f"{'quartiles':>13s} {'cpu ratio':>10s}")
    for arch in archs.split(','):
        with torch.no_grad():
            models,error = make_variants(arch, classes, x)
            timings = summary(measure(models, x, rounds))
            for name,model in models.items():
                row = dict(arch=arch, height=height, width=width, batch=bs, classes=classes, rounds=rounds,
                           threads=threads, device=x.device.type, torch=torch.__version__, variant=name,
                           gmac=round(giga_macs(model, x), 4), parameters=sum(p.numel() for p in model.parameters()),
                           fold_error=f'{error:.0e}', **timings[name])
                rows.append(row)
                print(f"{arch:22s} {name:7s} {row['gmac']:7.2f} {row['parameters']:11,d} {row['wall_ms_median']:9.1f} "
                      f"{row['wall_ratio_median']:7.3f} "
                      f"{row['wall_ratio_low']:6.3f}-{row['wall_ratio_high']:<6.3f} {row['cpu_ratio_median']:10.3f}",
                      flush=True)
    if csv:
        Path(csv).parent.mkdir(parents=True, exist_ok=True)
        with open(csv, 'w', newline='') as f:
            table = DictWriter(f, list(rows[0]), lineterminator='\n')
            table.writeheader()
            table.writerows(rows)
