"""Is the data loader ever the bottleneck? Training images per second of one process, beside the images per second of a
training step.

    python benchmarks/data_loading.py --threads 2 --csv results/data_loading.csv

Loading is everything up to the batch that the network gets: reading and decoding (or memory, where images are kept),
random scale, crop and flip, normalisation.
It runs on one thread in the training process (`num_workers=0`); with workers, it runs beside the step and each of them
adds about as many images.

scenes                generated street scenes, kept in memory after the first look
files                 PNG files of 1024x2048 pixels with 19 classes, decoded every time, windows of 512x1024
files, kept           the same, decoded once
camvid                a copy of CamVid, given by `--camvid` or DROPCLASS_CAMVID; left out where there is none
"""
import os
import tempfile
import time
from itertools import cycle, islice
from statistics import median

import torch
from fastcore.script import call_parse, store_true

from common import build_step, make_base, make_batch, measure, setting, show, spread, synchronize, write_csv
from dropclass.data.camvid import camvid_dls
from dropclass.data.core import write_toy_folder
from dropclass.data.folder import folder_dls
from dropclass.data.scenes import scenes_dls


def data_sets(folder, camvid, device, small):
    "Name, network, and a function that makes the DataLoaders."
    big = (64, 128) if small else (1024, 2048)
    files = write_toy_folder(folder, 5 if small else 10, 19, big)
    window = tuple(o//2 for o in big)
    from_files = lambda cache: folder_dls(*files, [f'class {i}' for i in range(19)], bs=2, crop=window, cache=cache,
                                          device=device)
    sets = [('scenes', 'small', lambda: scenes_dls(n_train=16, n_valid=2, size=(96,128), bs=8, device=device)),
            ('files', 'hrnet_v1_w18', lambda: from_files(False)),
            ('files, kept', 'hrnet_v1_w18', lambda: from_files(True))]
    if camvid: sets.append(('camvid', 'hrnet_v1_w18', lambda: camvid_dls(camvid, size=None, bs=4, device=device)))
    return sets


def loading(dls, rounds, device):
    "Seconds per batch of the training loader, one number per batch, after a first epoch that fills the memory."
    for _ in dls.train: pass
    batches,seconds = (b for _ in cycle([0]) for b in dls.train),[]
    start = time.perf_counter()
    for _ in islice(batches, rounds):
        synchronize(device)
        now = time.perf_counter()
        seconds.append(now-start)
        start = now
    return seconds


@call_parse
def main(
    rounds:int=15, # Timed batches
    threads:int=2, # Threads of the training step; loading has one
    device:str='cpu', # Where batches go: cpu or cuda
    camvid:str='', # Folder of a copy of CamVid
    csv:str='', # Write the table here as well
    small:store_true=False, # Small files, to try the script
):
    "Time the training loader of several data sets, and a training step on one of its batches."
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name,arch,make in data_sets(folder, camvid or os.environ.get('DROPCLASS_CAMVID'), device, small):
            torch.set_num_threads(1)
            dls = make()
            seconds = loading(dls, rounds, device)
            size,bs,classes = tuple(dls.one_batch()[0].shape[-2:]),dls.train.bs,len(dls.vocab)
            torch.set_num_threads(threads)
            x,y = make_batch(bs, size, classes, device, True)
            steps = {'dropclass':build_step('dropclass', make_base(arch, classes, device, True), classes, x, y)}
            step = median(o[0] for o in measure(steps, 5, device)['dropclass'])/1000
            low,mid,high = spread([bs/o for o in seconds], 1)
            rows.append(setting(arch, size, bs, classes, rounds, threads, device)
                        | dict(data=name, loaded_per_s_low=low, loaded_per_s=mid, loaded_per_s_high=high,
                trained_per_s=round(bs/step, 1), loading_share=round(median(seconds)/(median(seconds)+step), 3)))
            show(rows[-1:],
                 ['data', 'arch', 'height', 'width', 'loaded_per_s_low', 'loaded_per_s', 'loaded_per_s_high',
                  'trained_per_s', 'loading_share'])
            write_csv(rows, csv)
