"""What a pass costs that counts a whole grid of shifts, beside an ordinary evaluation: all in turn in one process.

    python benchmarks/prior_pass.py --size 512x1024 --rounds 15
    python benchmarks/prior_pass.py --arch small --device cuda --csv prior_pass.csv

evaluate    `dropclass.metrics.evaluate`: forward, argmax, one confusion matrix
one pass    `dropclass.prior.prior_confusions` with counts per image: forward, a confusion matrix for each of nine tau
slow form   forward, then one argmax and one confusion matrix for each tau

Each round runs all three, in an order that rotates. Ratios are taken within a round, and their quartiles are the
spread.
The network has random weights. The shifts are scaled until a quarter of the pixels change their class over the grid,
as in a network trained on CamVid with class weights; only those cost a walk. Peak memory comes from a fresh process
for each, beyond what the network and the batch held before.
"""
import torch
from fastcore.script import call_parse

from common import (TIMES, batch_size, in_fresh_process, make_base, make_batch, measure, parse_size, peak_bytes,
                    setting, show, summary, write_csv)
from dropclass.metrics import confusion_matrix, evaluate
from dropclass.prior import TAUS, class_offsets, prior_confusions


def slow_form(model, dl, offsets):
    "The literal way: one tau after the other."
    (x,y), = dl
    with torch.no_grad(): logits = model(x)
    return torch.stack([confusion_matrix(logits+o.view(1, -1, 1, 1), y, logits.shape[1]) for o in offsets]).cpu()


def quarter_turns(model, x, offsets):
    "Scale shifts until a quarter of the pixels change their class between the first and the last."
    with torch.no_grad(): logits = model(x[:1,:,:64,:128]) # Small: the peak of memory is measured after it
    low,high = 0.,100.
    for _ in range(20):
        scale = (low+high)/2
        first,last = (logits.add(scale*o.view(-1, 1, 1)).argmax(1) for o in offsets[[0,-1]])
        low,high = (scale,high) if (first!=last).float().mean()<.25 else (low,scale)
    return scale*offsets


def make_passes(arch, size, classes, bs, device):
    "The three, on the same network and batch."
    x,y = make_batch(batch_size(arch, bs), size, classes, device)
    model,dl = make_base(arch, classes, x.device).eval(),[(x, y)]
    offsets = quarter_turns(model, x, class_offsets(torch.logspace(-1, 1, classes), TAUS).to(x.device))
    return {'evaluate':lambda: evaluate(model, dl, classes),
            'one pass':lambda: prior_confusions(model, dl, offsets, per_image=True)[0],
            'slow form':lambda: slow_form(model, dl, offsets)}


def memory_args(arch, size, classes, bs, threads, device):
    "The same setting for a fresh process."
    named = dict(arch=arch, size=size, classes=classes, bs=bs, threads=threads, device=device)
    return [o for k,v in named.items() for o in (f'--{k}', v)]


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, as `create_model` names it
    size:str='512x1024', # Height and width of the images
    classes:int=19, # Number of classes
    bs:int=0, # Images in a batch; 0 is one, or two where one is too few
    rounds:int=15, # Rounds, each with one run of all three
    threads:int=1, # CPU threads
    device:str='cpu', # 'cpu' or 'cuda'
    csv:str=None, # Write the table to this file
    only:str=None, # Used by the script itself: prints the peak memory of this one
):
    "Time and memory of one pass over a grid of shifts."
    torch.set_num_threads(threads)
    passes = make_passes(arch, parse_size(size), classes, bs, device)
    if only:
        if device!='cpu': torch.cuda.reset_peak_memory_stats()
        before = peak_bytes(device)
        passes[only]()
        return print(peak_bytes(device)-before)
    if not passes['one pass']().equal(passes['slow form']()): raise RuntimeError("The two forms count differently")
    rows = summary(measure(passes, rounds, device), 'evaluate')
    same = memory_args(arch, size, classes, bs, threads, device)
    for row in rows: row['peak_mb'] = round(int(in_fresh_process(__file__, '--only', row['variant'], *same))/2**20, 1)
    about = setting(arch, parse_size(size), batch_size(arch, bs), classes, rounds, threads, device)
    rows = [about | row for row in rows]
    show(rows, [*TIMES, 'cpu_ratio_low', 'cpu_ratio_high', 'peak_mb'])
    write_csv(rows, csv)

