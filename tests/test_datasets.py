"""Cityscapes, Pascal VOC and ADE20K beyond what their notebooks show: torchvision's readers on the same files, worker
processes, memory, training, and a real copy where there is one."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from PIL import Image
from torchvision.datasets import Cityscapes, SBDataset, VOCSegmentation

from dropclass.data import core as data_core
from dropclass.callback import DropClassCallback
from dropclass.core import VOID
from dropclass.data.ade20k import ADE20K, ade20k_dls, ade20k_items, ade20k_pairs, write_toy_ade20k
from dropclass.data.cityscapes import (CITYSCAPES, cityscapes_dls, cityscapes_items, cityscapes_pairs,
                                       write_toy_cityscapes)
from dropclass.data.core import FittedItems, read_image, workers_for
from dropclass.stats import class_stats
from dropclass.data.voc import TRAINAUG, VOC, VocItems, voc_dls, voc_items, voc_pairs, write_toy_voc
from dropclass.testing import ToyNet


@pytest.fixture(scope='module')
def copies(tmp_path_factory):
    "One small copy of each data set."
    root = tmp_path_factory.mktemp('copies')
    return dict(cityscapes=write_toy_cityscapes(root/'c'), voc=write_toy_voc(root/'v'),
                ade20k=write_toy_ade20k(root/'a'))


def loaders(copies, name, **kwargs):
    "Loaders of small windows, on the CPU."
    options = dict(bs=2, crop=(16,24), device='cpu', **kwargs)
    if name=='cityscapes': return cityscapes_dls(copies[name], **options)
    if name=='voc': return voc_dls(copies[name], size=(40,40), splits=('trainaug','val'), **options)
    return ade20k_dls(copies[name], size=(40,40), **options)


# ---- what torchvision reads from the same files

@pytest.mark.parametrize('kind', ['fine', 'coarse'])
def test_cityscapes_is_what_torchvision_reads(copies, kind):
    "Its table of ids, applied pixel by pixel to what it reads, gives our labels; and the images are the same."
    theirs = Cityscapes(copies['cityscapes'], split='train', mode=kind, target_type='semantic')
    pairs = cityscapes_pairs(copies['cityscapes'], coarse=kind=='coarse')
    items = (cityscapes_items(copies['cityscapes'])[0] if kind=='fine'
             else data_core.SegmentationItems(pairs, CITYSCAPES,
                                              label_map=cityscapes_items(copies['cityscapes'])[0].label_map))
    train_id = {o.id:o.train_id for o in Cityscapes.classes}
    ours = {o[0].name:items[i] for i,o in enumerate(pairs)}
    assert len(theirs)==len(items)
    for path,(image,ids) in zip(theirs.images, theirs):
        x,y = ours[Path(path).name]
        expected = np.vectorize(lambda o: train_id[o] if 0<=train_id[o]<19 else VOID)(np.array(ids))
        assert torch.equal(y.long(), torch.from_numpy(expected)) and torch.equal(x, read_image(image))
    assert set(y.unique().tolist()) - {VOID}, "a mask without a class would prove nothing"


def test_voc_is_what_torchvision_reads(copies):
    theirs = VOCSegmentation(copies['voc'], year='2012', image_set='val', download=False)
    items = voc_items(copies['voc'], size=(64,64))[1]
    assert len(theirs)==len(items)==3
    for (image,mask),(x,y) in zip(theirs, items):
        h,w = mask.height,mask.width
        assert torch.equal(y[:h,:w].long(), torch.from_numpy(np.array(mask)).long())
        assert torch.equal(x[:,:h,:w], read_image(image))
        assert (y[h:]==VOID).all() and (y[:,w:]==VOID).all() and (y[:h,:w]==VOID).any(), "rim and canvas are void"


def test_sbd_is_what_torchvision_reads(copies):
    sbd = copies['voc']/'benchmark_RELEASE/dataset'
    theirs = SBDataset(sbd, image_set='train', mode='segmentation', download=False)
    by_name = {o[1].stem:o for o in voc_pairs(copies['voc'], 'trainaug') if o[1].suffix=='.mat'}
    found = 0
    for mask in theirs.masks:
        if Path(mask).stem not in by_name: continue
        pair = by_name[Path(mask).stem]
        y = VocItems([pair], VOC, (64,64))[0][1]
        raw = torch.from_numpy(np.array(theirs._get_segmentation_target(mask)))
        assert torch.equal(y[:raw.shape[0],:raw.shape[1]], raw)
        found += 1
    assert found==2


# ---- encodings and broken copies

def test_labels_in_sixteen_bits(tmp_path):
    "Label files of other tools hold 16 bits; the licence plate, -1, is 65535 there."
    copy = write_toy_cityscapes(tmp_path)
    mask = cityscapes_pairs(copy)[0][1]
    ids = np.array(Image.open(mask)).astype(np.uint16)
    before = cityscapes_items(copy)[0][0][1]
    ids[0,:4] = 65535
    Image.fromarray(ids).save(mask)
    assert Image.open(mask).mode.startswith('I')
    after = cityscapes_items(copy)[0][0][1]
    assert (after[0,:4]==VOID).all() and torch.equal(after[1:], before[1:])


def test_a_label_that_is_none_names_the_file(tmp_path):
    copy = write_toy_ade20k(tmp_path)
    image,mask = ade20k_pairs(copy)[1]
    Image.fromarray(np.full(np.array(Image.open(mask)).shape, 200, np.uint8)).save(mask)
    with pytest.raises(ValueError, match=f'{mask.name} holds label 200'): ade20k_items(copy)


@pytest.mark.parametrize('lost', ['gtFine/val', 'leftImg8bit/train', 'gtFine'])
def test_cityscapes_names_the_folder(tmp_path, lost):
    copy = write_toy_cityscapes(tmp_path)
    (copy/lost).rename(copy/'elsewhere')
    with pytest.raises(FileNotFoundError) as e: cityscapes_items(copy)
    assert str(copy/lost) in str(e.value) and 'leftImg8bit/{train,val}/CITY' in str(e.value)


def test_a_lost_mask_is_named(tmp_path):
    copy = write_toy_cityscapes(tmp_path)
    mask = cityscapes_pairs(copy)[2][1]
    mask.unlink()
    with pytest.raises(ValueError, match='1 of 4 images have no mask'): cityscapes_items(copy)


# ---- memory and processes

def test_full_cityscapes_stays_on_disk(copies, monkeypatch):
    "2,975 images of 1024x2048 are 25 GB: nothing is decoded before it is asked for."
    assert 2975*4*1024*2048>20*data_core.CACHE_LIMIT
    read = []
    real = data_core.read_image
    monkeypatch.setattr(data_core, 'read_image', lambda *args: read.append(1) or real(*args))
    monkeypatch.setattr(data_core, 'CACHE_LIMIT', 4*4*32*64-1) # One byte less than the training images need
    train,valid = cityscapes_items(copies['cityscapes'])
    assert train.cached is None and valid.cached is not None and workers_for(train)>=1 and workers_for(valid)==0
    assert len(read)==len(valid)
    class_stats(train)
    assert len(read)==len(valid), "counting labels decodes no image"
    train[0]
    assert len(read)==len(valid)+1 and train.cached is None


@pytest.mark.parametrize('name', ['cityscapes', 'voc', 'ade20k'])
def test_memory_disk_and_processes_agree(copies, name):
    def epoch(**kwargs):
        dls = loaders(copies, name, augment=False, **kwargs)
        return sorted((tuple(x.flatten()[:50].tolist()),tuple(y.flatten().tolist())) for b in (*dls.valid, *dls.train)
                      for x,y in zip(*b))
    first = epoch(cache=True)
    assert first==epoch(cache=False, num_workers=0)==epoch(cache=False, num_workers=2)


# ---- training

@pytest.mark.parametrize('name, spec', [('cityscapes', CITYSCAPES), ('voc', VOC), ('ade20k', ADE20K)])
def test_a_fit(copies, name, spec):
    "DropClass trains on it as it comes, and every label a loss sees is a class or void."
    torch.manual_seed(0)
    dls = loaders(copies, name)
    for _,y in dls.train: assert ((y>=0)&(y<len(spec)) | (y==VOID)).all()
    learn = Learner(dls, ToyNet(num_classes=len(spec)), cbs=DropClassCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert torch.tensor(list(learn.recorder.values[-1])).isfinite().all()
    learn.show_results(max_n=1)


def test_canvas_counts_nowhere(tmp_path):
    "The same pictures on a larger canvas give the same class counts."
    copy = write_toy_voc(tmp_path)
    small,large = (class_stats(voc_items(copy, size=(o, o))[0]) for o in (40, 64))
    assert torch.equal(small.pixels, large.pixels) and small.pixels.sum()>0


def test_shrinking_keeps_shape(tmp_path):
    "A picture twice the canvas is halved on both axes."
    Image.new('RGB', (80,40), (9,9,9)).save(tmp_path/'a.png')
    Image.new('L', (80,40), 1).save(tmp_path/'b.png')
    x,y = FittedItems([(tmp_path/'a.png', tmp_path/'b.png')], VOC, size=(40,40))[0]
    assert (y[:20]==1).all() and (y[20:]==VOID).all() and (x[:,:20]==9).all() and x[0,20:].unique().tolist()==[124]


@pytest.mark.parametrize('read', [cityscapes_items, voc_items, ade20k_items])
def test_nothing_is_downloaded(tmp_path, monkeypatch, read):
    "A missing copy is an error, never a download."
    def no(*args, **kwargs): raise AssertionError('a download was tried')
    import torchvision.datasets.utils as utils
    for o in ('download_url', 'download_and_extract_archive'): monkeypatch.setattr(utils, o, no)
    with pytest.raises(FileNotFoundError, match='Expected is'): read(tmp_path)


# ---- real copies, where there are some

def real(name):
    path = os.environ.get(f'DROPCLASS_{name}')
    if not path: pytest.skip(f'DROPCLASS_{name} names no copy')
    return path


def test_real_cityscapes():
    train,valid = cityscapes_items(real('CITYSCAPES'))
    assert (len(train), len(valid), train.size, train.cached)==(2975, 500, (1024,2048), None)


def test_real_voc():
    path = real('VOC')
    assert [len(voc_pairs(path, o)) for o in ('train','val','trainaug')]==[1464, 1449, TRAINAUG]


def test_real_ade20k():
    path = real('ADE20K')
    assert [len(ade20k_pairs(path, o)) for o in ('training','validation')]==[20210, 2000]
