"What the data notebooks cannot show: worker processes, resuming, a second Python process, properties over many draws."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.data.external import URLs
from fastai.learner import Learner
from fastai.torch_core import TensorImage, TensorMask
from PIL import Image

from dropclass.data import camvid as data_camvid
from dropclass.core import VOID, ClassSpec
from dropclass.data.camvid import camvid_dls, camvid_items, write_toy_camvid
from dropclass.data.core import (BatchTransform, SegmentationItems, crop_coords, crop_images, crop_masks, make_dls,
                                 pair_files, read_image,
                                 read_mask, write_toy_folder)
from dropclass.data.folder import folder_dls
from dropclass.stats import class_stats, median_frequency_weights
from dropclass.testing import ToyNet

SPEC = ClassSpec(('ground','wall','sky'))


@pytest.fixture
def items(tmp_path):
    "Ten small images, in memory."
    return SegmentationItems(pair_files(*write_toy_folder(tmp_path/'toy', n=10)), SPEC, size=(24,32))


def loaders(items, num_workers=0, **kwargs):
    "Loaders of small windows, on the CPU."
    return make_dls(items, items, SPEC, bs=3, crop=(16,24), num_workers=num_workers, device='cpu', **kwargs)


def epoch(dls): return [tuple(o.clone() for o in b) for b in dls.train]


def same(a, b):
    "Are two epochs equal, bit for bit?"
    return len(a)==len(b) and all(torch.equal(s, t) for p,q in zip(a, b) for s,t in zip(p, q))


@pytest.mark.parametrize('num_workers', [0,2])
def test_saved_states_continue_bit_equal(items, num_workers):
    torch.manual_seed(0)
    dls = loaders(items, num_workers)
    first = epoch(dls)
    torch_state,order_state = torch.get_rng_state(),dls.train.rng.getstate()
    second = epoch(dls)
    assert not same(first, second)
    resumed = loaders(items, num_workers) # A new object, as after a restart
    torch.manual_seed(99)
    torch.set_rng_state(torch_state)
    resumed.train.rng.setstate(order_state)
    assert same(epoch(resumed), second)
    torch.manual_seed(99)
    resumed.train.rng.setstate(order_state)
    assert not same(epoch(resumed), second) # Without the generator it is another epoch


def test_workers_change_nothing(items):
    epochs = []
    for num_workers in (0,2):
        dls = loaders(items, num_workers)
        torch.manual_seed(3)
        dls.train.rng.seed(3)
        epochs.append(epoch(dls))
    assert same(*epochs)


def test_validation_draws_nothing(items):
    dls = loaders(items)
    list(dls.train)
    state = torch.get_rng_state()
    b = dls.train.after_batch.fs[0]((TensorImage(items[0][0][None]), TensorMask(items[0][1][None])), split_idx=1)
    assert torch.equal(torch.get_rng_state(), state) and b[0].dtype==torch.uint8
    assert not any(isinstance(o, BatchTransform) for o in dls.valid.after_batch.fs)


def test_image_and_mask_move_together():
    "Where pixel and label both hold the column (or row), the read values agree to half a pixel, whatever the window."
    torch.manual_seed(0)
    H,W = 40,60
    at = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij'))
    for crop in ((40,60), (24,20), (90,130)):
        rows,cols = crop_coords(torch.rand(4, 64), (H,W), crop)
        for axis in (0,1):
            image,mask = at[axis].expand(64,3,H,W),at[axis].expand(64,H,W)
            x,y = crop_images(image, rows, cols, torch.full((3,), -50.)),crop_masks(mask, rows, cols, fill=-50)
            assert (x[:,0]-y).abs().max()<=.5+1e-3
            assert ((x==-50).all(1)==(y==-50)).all()


def test_windows_hold_as_much_of_the_image_as_they_can():
    torch.manual_seed(0)
    draws = torch.rand(4, 2000)
    rows,cols = crop_coords(draws, (40,60), (30,50))
    scale = 1/(rows[:,1]-rows[:,0])
    assert scale.min()>=.5-1e-3 and scale.max()<=2.1+1e-3 and scale.min()<.52 and scale.max()>2.08
    assert abs((cols[:,1]<cols[:,0]).float().mean()-.5)<.05
    for pos,full,part in ((rows,40,30),(cols.sort(1).values,60,50)):
        inside = (pos>=-.5-1e-3)&(pos<full-.5+1e-3)
        fits = scale*full>=part+1
        assert inside[fits].all() # No padding where the scaled image covers the window
        small = scale*full<part-1
        seen = inside[small].sum(1)
        assert (seen>=(scale[small]*full).floor()-1).all() and (seen<part).any() # All of the image where it does not


def test_a_batch_of_one_all_void_and_another_void():
    x,y = TensorImage(torch.zeros(1,3,8,8, dtype=torch.uint8)),TensorMask(torch.full((1,8,8), 255, dtype=torch.uint8))
    xb,yb = BatchTransform()((x, y), split_idx=0)
    assert xb.shape==(1,3,8,8) and (yb==255).all()
    _,yb = BatchTransform(scale=(.5,.5), ignore_index=-1)((x, y*0), split_idx=0)
    assert yb.unique().tolist()==[-1,0]


def test_padding_is_the_mean_and_void():
    x,y = TensorImage(torch.full((2,3,8,8), 255, dtype=torch.uint8)),TensorMask(torch.zeros(2,8,8, dtype=torch.uint8))
    xb,yb = BatchTransform(scale=(.5,.5), fill=(.1,.2,.3))((x, y), split_idx=0)
    assert torch.allclose(xb.permute(0,2,3,1)[yb==VOID].as_subclass(torch.Tensor), torch.tensor([25.5,51,76.5]))
    assert (yb==0).sum()==2*16 and (xb.permute(0,2,3,1)[yb==0]==255).all()


@pytest.mark.parametrize('kind', ['segnet','fastai','folder'])
def test_void_is_255_from_file_to_batch(tmp_path, kind):
    if kind=='folder': dls = folder_dls(*write_toy_folder(tmp_path, n=8), list(SPEC.names), bs=2, device='cpu')
    else: dls = camvid_dls(write_toy_camvid(tmp_path, kind), size=(48,64), bs=2, device='cpu')
    for dl in dls.loaders:
        for x,y in dl:
            assert x.dtype==torch.float32 and y.dtype==torch.int64
            labels = y.unique().tolist()
            assert labels[-1]==VOID and all(o<dls.c for o in labels[:-1])
    assert (dls.valid.one_batch()[1][:,:2]==VOID).all() # The frame
    assert dls.c==len(dls.vocab)==len(dls.spec)==dict(segnet=11, fastai=31, folder=3)[kind]


def test_no_path_asks_fastai(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data_camvid, 'untar_data',
                        lambda url: asked.append(url) or write_toy_camvid(tmp_path/str(len(asked)), 'fastai'))
    assert len(camvid_items()[0])==6
    assert len(camvid_items(tiny=True)[0])==6
    assert asked==[URLs.CAMVID, URLs.CAMVID_TINY]


def test_another_sampler(items):
    wgts = np.array([0.]*9+[1.])
    dls = loaders(items, dl_type=WeightedDL, wgts=wgts, augment=False)
    for x,_ in dls.train: assert (x==x[0]).all()


def test_learner_end_to_end_and_in_another_process(items, tmp_path):
    dls = loaders(items, path=tmp_path)
    torch.manual_seed(0)
    learn = Learner(dls, ToyNet(3), lr=.02)
    learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])
    learn.logger = lambda *args: None
    learn.fit(6)
    image = items.pairs[0][0]
    labels,index,probs = learn.predict(image)
    assert index.shape==(24,32) and set(index.unique().tolist())<={0,1,2}
    assert torch.equal(labels.as_subclass(torch.Tensor), index)
    seen = items[0][1]!=VOID
    assert (index[seen]==items[0][1][seen]).float().mean()>.8
    preds,targets = learn.get_preds()
    assert preds.shape==(10,3,24,32) and (targets==VOID).any()
    learn.export('model.pkl')
    code = f"""if True:
        import torch, warnings; warnings.simplefilter('ignore')
        from fastai.learner import load_learner
        learn = load_learner({str(tmp_path/'model.pkl')!r})
        learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])
        torch.save(learn.predict({str(image)!r})[2].as_subclass(torch.Tensor), {str(tmp_path/'probs.pt')!r})
        assert learn.dls.vocab==['ground','wall','sky'] and learn.dls.c==3"""
    root = Path(__file__).parent.parent
    env = os.environ|{'PYTHONPATH': os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))}
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root, env=env)
    saved = torch.load(tmp_path/'probs.pt', weights_only=True)
    assert torch.allclose(saved, probs.as_subclass(torch.Tensor), atol=1e-6)


def test_learner_sees_plain_targets(items):
    "Loss and metric get void where the files have it, on both splits."
    seen = []
    class Look(Callback):
        def before_batch(self): seen.append((self.training, VOID in self.y, self.y.dtype))
    learn = Learner(loaders(items), ToyNet(3), cbs=Look())
    learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])
    learn.logger = lambda *args: None
    learn.fit(1)
    assert (True,True,torch.int64) in seen and (False,True,torch.int64) in seen
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.parametrize('mode', ['L','RGBA','P','I;16','1','CMYK'])
def test_any_picture_becomes_rgb(tmp_path, mode):
    if mode=='I;16': image = Image.fromarray(np.full((4,6), 128*256, dtype=np.uint16))
    else: image = Image.new('RGB', (6,4), (255,255,255)).convert(mode)
    path = tmp_path/('a.tif' if mode=='CMYK' else 'a.png')
    image.save(path)
    x = read_image(path)
    assert x.shape==(3,4,6) and x.dtype==torch.uint8 and (x==(128 if mode=='I;16' else 255)).all()


@pytest.mark.parametrize('mode', ['RGB','RGBA','LA','F'])
def test_masks_with_channels_are_refused(tmp_path, mode):
    path = tmp_path/'mask.tif'
    Image.new(mode, (4,4)).save(path)
    with pytest.raises(ValueError, match=f'mask.tif has mode {mode}.*labels_from_colors'): read_mask(path)


def test_negative_void(tmp_path):
    spec = ClassSpec(SPEC.names, ignore_index=-1)
    ds = SegmentationItems(pair_files(*write_toy_folder(tmp_path)), spec, label_map={255: -1})
    x,y = make_dls(ds, ds, spec, bs=6, device='cpu').one_batch()
    assert y.min()==-1 and y.max()<3


def test_stats_of_an_absent_class(items):
    spec = ClassSpec((*SPEC.names, 'unicorn'))
    ds = SegmentationItems(items.pairs, spec, cache=False)
    stats = class_stats(ds)
    assert stats.pixels[3]==stats.images[3]==stats.present_pixels[3]==0
    w = median_frequency_weights(ds)
    assert w[3]==0 and torch.allclose(w[:3], median_frequency_weights(SegmentationItems(items.pairs, SPEC)))
    freq = stats.pixels[:3]/stats.present_pixels[:3]
    assert torch.allclose(w[:3], freq.median()/freq)


def test_a_damaged_image_on_disk_is_named_when_it_is_read(tmp_path):
    images,masks = write_toy_folder(tmp_path)
    ds = SegmentationItems(pair_files(images, masks), SPEC, cache=False)
    data = (images/'002.png').read_bytes()
    (images/'002.png').write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='002.png'): ds[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_same_windows_on_the_gpu(items):
    batches = []
    for device in ('cpu','cuda'):
        dls = make_dls(items, items, SPEC, bs=3, crop=(16,24), device=device)
        torch.manual_seed(3)
        dls.train.rng.seed(3)
        batches.append([o.cpu() for o in dls.one_batch()])
    assert torch.allclose(*[o[0] for o in batches], atol=1e-2)
    assert (batches[0][1]!=batches[1][1]).float().mean()<.01


@pytest.mark.skipif(not os.environ.get('DROPCLASS_CAMVID'), reason='DROPCLASS_CAMVID is not set')
def test_real_camvid():
    train,valid = camvid_items(os.environ['DROPCLASS_CAMVID'], size=None, cache=False)
    assert (len(train), len(valid), train.size)==(367,101,(360,480))
    expected = torch.tensor([.2793,.2017,4.7865,.1490,1.0000,.4217,3.8467,1.9736,.7889,6.3747,8.8587])
    assert torch.allclose(median_frequency_weights(train), expected, atol=1e-4)
