"""What validation costs in a fit: time and memory of one validation batch, plain and with both paths of DropClass.

    python benchmarks/validation.py --csv results/validation.csv

Every variant is a Learner with `segmentation_metrics`, and all take turns in one process. `both paths` is what a fit
with `DropClassCallback` does: losses and classes tile by tile, from small logits. `both paths, full size` is the form
that it replaces. `tensor_mb` is the most that the tensors of one batch hold at a time, seen by an observer of every
operation; `train_mb` is the same for a training step. Neither depends on the load of the machine.
"""
import copy
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastcore.script import call_parse
from torch import nn

from common import (VOID, make_base, make_batch, measure, parse_size, peak_tensors, setting, sgd, show, summary,
                    write_csv)
from dropclass.callback import DropClassCallback
from dropclass.metrics import segmentation_metrics


def make_learner(model, classes, x, y, *cbs):
    "A Learner after one epoch of one step."
    one = DataLoader(list(zip(x, y)), bs=len(x))
    loss = nn.CrossEntropyLoss(ignore_index=VOID)
    learn = Learner(DataLoaders(one, one), model, loss, cbs=cbs, opt_func=sgd,
                    metrics=segmentation_metrics(classes, ignore_index=VOID))
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda *args: None
    return learn


def make_step(base, classes, x, y, both=False, full_size=False):
    "One validation batch, inside a fit that never ends."
    learn = make_learner(copy.deepcopy(base), classes, x, y, *[DropClassCallback(lam=.6)]*both)
    if full_size: learn.drop_class_history.valid_resize = lambda: None
    learn.fit(1)
    routes = dict(learn.drop_class.routes) if both else {}
    learn.n_epoch,learn.epoch,learn.n_iter,learn.dl = 1,0,1,learn.dls.valid
    learn('before_fit')
    if both: learn.drop_class.routes = routes
    learn.model.eval()
    def step(_=0):
        learn('before_validate')
        with torch.no_grad(): learn.one_batch(0, (x, y))
        learn('after_validate')
    return step


def training_peak(base, classes, x, y, both=False):
    "Bytes of the tensors of a training step."
    learn = make_learner(copy.deepcopy(base), classes, x, y, *[DropClassCallback(lam=.6)]*both)
    learn.dls.loaders[1] = DataLoader([], bs=1)
    learn.fit(1)
    return peak_tensors(lambda: learn.fit(1))


VARIANTS = {'plain':{}, 'plain again':{}, 'both paths':dict(both=True),
            'both paths, full size':dict(both=True, full_size=True)}


def table(arch, size, classes, rounds, threads):
    "The rows of one number of classes."
    x,y = make_batch(1, size, classes, 'cpu', True)
    base = make_base(arch, classes, 'cpu', True)
    steps = {k:make_step(base, classes, x, y, **v) for k,v in VARIANTS.items()}
    times = summary(measure(steps, rounds))
    trained = {both:training_peak(base, classes, x, y, both) for both in (False, True)}
    known,mb = setting(arch, size, 1, classes, rounds, threads, 'cpu'),lambda n: round(n/2**20, 1)
    return [known|o|dict(tensor_mb=mb(peak_tensors(steps[o['variant']])), train_mb=mb(trained['both' in o['variant']]))
            for o in times]


@call_parse
def main(
    arch:str='hrnet_v1_w18', # Network, one of `model_names()`
    size:str='256x256', # Height x width of the images, in pixels
    classes:str='19,150', # Numbers of classes
    rounds:int=15, # Timed rounds; at least 5
    threads:int=1, # Threads of PyTorch
    csv:str='', # Write the table here as well
):
    "Time a validation batch of every variant, in turn in one process, and measure its memory."
    torch.set_num_threads(threads)
    rows = []
    for C in map(int, classes.split(',')):
        rows += table(arch, parse_size(size), C, rounds, threads)
        show(rows[-4:], ['classes', 'variant', 'cpu_ms_median', 'cpu_ratio_low', 'cpu_ratio_median', 'cpu_ratio_high',
                         'tensor_mb', 'train_mb'])
        write_csv(rows, csv)
