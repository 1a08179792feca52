"""What the fused loss saves: forward and backward of the loss alone, from small logits to their gradient, both forms in
turn in one process.

    python benchmarks/fused_loss.py --threads 1,2 --rounds 11 --csv results/fused_loss.csv

literal   F.interpolate, then F.cross_entropy; for a step of both paths `dropclass_loss` on the two resized logits,
          lambda 0.5 and a class dropped
fused     `resize_cross_entropy`, and `resize_dropclass_loss`

The ratios are taken within a round, so what slows the machine down for a while slows both; quartiles of the rounds are
the spread. CPU seconds stand beside
wall seconds: on a shared machine they are the steadier of the two. Peak memory comes from a fresh process for each
form, beyond what it held before the loss.
"""
from itertools import product
from statistics import median, quantiles

import torch
from fastcore.script import call_parse
from torch.nn import functional as F

from common import in_fresh_process, keep_mask, peak_bytes, timed, write_csv
from dropclass.core import VOID
from dropclass.fused import resize_cross_entropy, resize_dropclass_loss
from dropclass.losses import dropclass_loss

CASES = {'19':(19, (128, 256), (512, 1024)), '150':(150, (128, 128), (512, 512))} # classes, small size, label size
LAM,DROPPED = .5,1


def make_inputs(case, device):
    "Small logits of both paths and labels in blocks with a void frame."
    C,size,out_size = CASES[case]
    gen = torch.Generator().manual_seed(0)
    logits = [(3*torch.randn(1, C, *size, generator=gen)).to(device).requires_grad_() for _ in range(2)]
    target = torch.randint(C, (1, out_size[0]//16, out_size[1]//16),
                           generator=gen).repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, :4] = VOID
    return *logits, target.to(device)


def losses(case, loss, device):
    "The two forms of a loss, as functions that run forward and backward and return the loss."
    x,drop_x,target = make_inputs(case, device)
    mask = keep_mask(x.shape[1])
    up = lambda x: F.interpolate(x, size=target.shape[1:], mode='bilinear')
    forms = {'plain':(lambda: F.cross_entropy(up(x), target, ignore_index=VOID),
                      lambda: resize_cross_entropy(x, target)),
             'both paths':(lambda: dropclass_loss(up(x), up(drop_x), target, mask, LAM),
                           lambda: resize_dropclass_loss(x, drop_x, target, DROPPED, LAM)[0])}[loss]
    def run(form):
        x.grad = drop_x.grad = None
        value = form()
        value.backward()
        if device!='cpu': torch.cuda.synchronize()
        return value.item(),x.grad
    return {name:lambda form=form: run(form) for name,form in zip(('literal', 'fused'), forms)}


def memory(case, loss, name, threads, device):
    "Peak memory of one form, measured in a fresh process."
    return int(in_fresh_process(__file__, '--only', f'{case},{loss},{name}', '--threads', threads, '--device', device))


def report_memory(only, device):
    "Print the bytes that one form takes at its peak."
    case,loss,name = only.split(',')
    form = losses(case, loss, device)[name]
    if device!='cpu': torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    form()
    print(peak_bytes(device)-before)


def measure(case, loss, rounds, threads, device):
    "One row of the table."
    forms = losses(case, loss, device)
    (a,ga),(b,gb) = [f() for f in forms.values()]
    ms = {name:[] for name in forms}
    for i in range(rounds):
        for name in list(forms)[::1 if i%2 else -1]: ms[name].append(timed(forms[name], device))
    wall = [f[0]/l[0] for l,f in zip(ms['literal'], ms['fused'])]
    cpu = [f[1]/l[1] for l,f in zip(ms['literal'], ms['fused'])]
    bytes_ = {name:memory(case, loss, name, threads, device) for name in forms}
    C,_,(h,w) = CASES[case]
    row = dict(classes=C, height=h, width=w, loss=loss, device=device, threads=threads, rounds=rounds)
    for name in forms: row[f'{name}_ms'] = round(median(o[0] for o in ms[name]), 1)
    row.update(zip(('ratio_q1', 'ratio', 'ratio_q3'), (round(o, 3) for o in quantiles(wall, n=4))))
    for name in forms: row[f'{name}_cpu_ms'] = round(median(o[1] for o in ms[name]), 1)
    row['cpu_ratio'] = round(median(cpu), 3)
    for name in forms: row[f'{name}_mb'] = round(bytes_[name]/2**20, 1)
    row['memory_ratio'] = round(bytes_['fused']/bytes_['literal'], 3)
    return row | dict(loss_error=f'{abs(a-b)/abs(a):.1e}', gradient_error=f'{float((ga-gb).norm()/ga.norm()):.1e}')


@call_parse
def main(
    rounds:int=11, # Rounds, each with one run of either form
    threads:str='1', # Numbers of CPU threads, one table row each
    cases:str='19,150', # Numbers of classes, of those listed
    device:str='cpu', # 'cpu' or 'cuda'
    csv:str=None, # Write the table to this file
    only:str=None, # Used by the script itself: 'case,loss,form' prints the peak memory of one form
):
    "Time and memory of the fused loss against the literal form."
    rows = []
    for n,case,loss in product(map(int, threads.split(',')), cases.split(','), ('plain', 'both paths')):
        torch.set_num_threads(n)
        if only: return report_memory(only, device)
        rows.append(measure(case, loss, rounds, n, device))
        print(rows[-1])
    write_csv(rows, csv)
