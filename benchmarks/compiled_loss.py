"""The fused loss beside PyTorch's compiler: forward and backward of one path's loss, all forms in turn in one process.

    python benchmarks/compiled_loss.py --csv results/compiled_loss.csv

literal    F.interpolate, then F.cross_entropy
compiled   the same through `torch.compile`, after its compilation
fused      `resize_cross_entropy`

The compiler joins the operations behind the resize but keeps the resized logits. Libraries that fuse the classifier
with the cross-entropy, as Liger does for language models, take chunks of rows, and know of no resize between the two.
"""
import torch
from fastcore.script import call_parse
from torch.nn import functional as F

from common import measure, show, summary, write_csv
from dropclass.core import VOID
from dropclass.fused import resize_cross_entropy
from fused_loss import CASES, make_inputs


def literal(x, target):
    full = F.interpolate(x, size=target.shape[1:], mode='bilinear')
    return F.cross_entropy(full, target, ignore_index=VOID)


def make_forms(case, device):
    "One function per form: forward and backward, from the small logits to their gradient."
    x,_,target = make_inputs(case, device)
    forms = dict(literal=literal, compiled=torch.compile(literal, dynamic=False), fused=resize_cross_entropy)
    def run(form):
        x.grad = None
        form(x, target).backward()
    return {name:lambda _=0,form=form: run(form) for name,form in forms.items()}


@call_parse
def main(
    cases:str='19,150', # Numbers of classes, of those in fused_loss.py
    rounds:int=15, # Timed rounds; at least 5
    threads:int=1, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda
    csv:str='', # Write the table here as well
):
    "Time the loss of one path in three forms."
    torch.set_num_threads(threads)
    rows = []
    for case in cases.split(','):
        C,_,(height,width) = CASES[case]
        known = dict(classes=C, height=height, width=width, rounds=rounds, threads=threads, device=device)
        times = measure(make_forms(case, device), rounds, device, warm=3)
        rows += [known|o for o in summary(times, 'literal')]
        show(rows[-3:], ['classes', 'variant', 'cpu_ms_median', 'cpu_ratio_low', 'cpu_ratio_median', 'cpu_ratio_high'])
        write_csv(rows, csv)
