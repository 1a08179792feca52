"Images of other kinds: more bits, more channels, other sizes; what the network is given, and what it is measured on."
import warnings

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.vision.core import imagenet_stats
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dropclass.callback import DropClassCallback
from dropclass.core import VOID, ClassSpec
from dropclass.data.core import FittedItems, SegmentationItems, full_size_dl, make_dls, read_image, write_toy_folder
from dropclass.data.folder import folder_dls
from dropclass.data.sampling import RareClassDL
from dropclass.data.scenes import scenes_dls
from dropclass.data.voc import voc_dls, write_toy_voc
from dropclass.metrics import class_iou, confusion_matrix, evaluate, segmentation_metrics
from dropclass.models import create_model, repeat_channels

NAMES = ['ground','wall','sky']


# ---- bits and channels

@pytest.mark.parametrize('bits', [10, 12, 16])
def test_brightness_does_not_depend_on_the_image(tmp_path, bits):
    """Two images of one camera, one four times as dark: so are their bytes, and no grey level is lost that eight bits
    can hold."""
    light = np.linspace(0, 2**bits-1, 4096).reshape(64,64).astype(np.uint16)
    for name,o in (('light',light), ('dark',light//4)): Image.fromarray(o).save(tmp_path/f'{name}.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a,b = (read_image(tmp_path/f'{o}.png', bits=bits).long() for o in ('light','dark'))
    assert (a//4-b).abs().max()<=1 and len(a.unique())==256 and a.max()==255


def test_twelve_bits_in_sixteen_are_pointed_out(tmp_path):
    Image.fromarray(np.full((4,4), 4000, np.uint16)).save(tmp_path/'a.png')
    with pytest.warns(UserWarning, match='use bits=12'): assert read_image(tmp_path/'a.png').max()==15
    with pytest.raises(ValueError, match='a.png holds values 4000..4000, more than 11 bits'):
        read_image(tmp_path/'a.png', bits=11)


def test_a_fourth_band_is_data():
    "Pillow weighs colours by opacity when it resizes; bands of a satellite image must not be."
    bands = np.random.default_rng(0).integers(256, size=(32,48,4)).astype(np.uint8)
    bands[...,3] //= 8
    whole = read_image(bands, (16,24), in_chans=4)
    for k in range(4): assert torch.equal(whole[k], read_image(bands[...,k], (16,24), in_chans=1)[0])


def test_an_opaque_fourth_band_is_none(tmp_path):
    "Photographs are often saved with one."
    Image.new('RGBA', (4,4), (1,2,3,255)).save(tmp_path/'a.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(tmp_path/'a.png')[:,0,0].tolist()==[1,2,3]


@pytest.fixture
def infrared(tmp_path):
    "Images of four bands of which only the fourth tells the classes apart."
    images,masks = write_toy_folder(tmp_path, 12, size=(32,32))
    for o in sorted(masks.iterdir()):
        mask = np.array(Image.open(o))
        bands = np.random.default_rng(0).integers(256, size=(32,32,4)).astype(np.uint8)
        bands[...,3] = 100*np.minimum(mask, 2)
        Image.fromarray(bands).save(images/f'{o.stem}.tif')
        (images/o.name).unlink()
    return images,masks


def test_four_channels_from_file_to_prediction(infrared):
    torch.manual_seed(0)
    dls = folder_dls(*infrared, NAMES, bs=4, in_chans=4, augment=False, device='cpu')
    pixelwise = nn.Sequential(nn.Conv2d(dls.in_chans, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 1))
    learn = Learner(dls, pixelwise, metrics=segmentation_metrics(3), lr=.05)
    with learn.no_bar(), learn.no_logging(): learn.fit(12)
    assert learn.recorder.values[-1][2]>.9
    dls.show_batch(max_n=1)
    with learn.no_bar(): assert learn.predict(next(iter(infrared[0].iterdir())))[1].shape==(32,32)


def test_dropclass_trains_on_four_channels(infrared):
    dls = folder_dls(*infrared, NAMES, bs=4, in_chans=4, device='cpu')
    learn = Learner(dls, create_model('small', 3, in_chans=dls.in_chans), cbs=DropClassCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.parametrize('in_chans', [1, 2, 4, 7])
def test_first_convolutions_are_timms(in_chans):
    timm = pytest.importorskip('timm')
    weight = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(repeat_channels(weight, in_chans), timm.models.adapt_input_conv(in_chans, weight))


# ---- labels at their own size

class Perfect(nn.Module):
    "It knows the colour of each class, and nothing else."
    def __init__(self, colors):
        super().__init__()
        self.register_buffer('colors', torch.as_tensor(colors).float())
    def forward(self, x):
        nearest = (x[:,None]-self.colors[None,:,:,None,None]).pow(2).sum(2).argmin(1)
        return F.one_hot(nearest, len(self.colors)).movedim(-1, 1).float()


def perfect():
    "The network for `stripes_of`, whose greys come to it normalised."
    mean,std = (torch.tensor(o) for o in imagenet_stats)
    return Perfect((torch.tensor([[0.],[100.],[200.]])/255-mean)/std)


def stripes_of(folder, size, n=3, seed=0):
    """Images of broad stripes, upright or lying, each class in one grey. (Logits are enlarged linearly, which rounds
    the corners of squares.)"""
    rng = np.random.default_rng(seed)
    for o in ('images','masks'): (folder/o).mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(n):
        stripes = rng.permutation(np.arange(size[i%2]//12)%3).repeat(12)
        mask = np.broadcast_to(stripes[:,None] if i%2==0 else stripes, size).astype(np.uint8)
        Image.fromarray(np.repeat(mask[...,None]*100, 3, 2)).save(folder/f'images/{seed}{i}.png')
        Image.fromarray(mask).save(folder/f'masks/{seed}{i}.png')
        pairs.append((folder/f'images/{seed}{i}.png', folder/f'masks/{seed}{i}.png'))
    return pairs


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_a_perfect_network_is_perfect_at_any_size(tmp_path, k):
    items = SegmentationItems(stripes_of(tmp_path, (48,96)), ClassSpec(NAMES), (48//k,96//k))
    dl = full_size_dl(make_dls(items, items, items.spec, bs=2, device='cpu').valid)
    counts = evaluate(perfect(), dl, 3)
    assert class_iou(counts).tolist()==[1.,1.,1.] and counts.sum()==3*48*96


def test_a_perfect_network_is_perfect_on_a_canvas(tmp_path):
    "Pictures of two sizes, shrunk onto one canvas by different factors, each measured at its own size."
    pairs = [*stripes_of(tmp_path, (48,96)), *stripes_of(tmp_path, (96,48), seed=1)]
    items = FittedItems(pairs, ClassSpec(NAMES), (24,24))
    dl = full_size_dl(make_dls(items, items, items.spec, bs=2, device='cpu').valid)
    counts = evaluate(perfect(), dl, 3)
    # The last pixels of a picture mix with the canvas beside it
    assert class_iou(counts).min()>.998 and counts.sum()==6*48*96


def test_every_data_set_gives_labels_at_their_own_size(tmp_path):
    dl = full_size_dl(voc_dls(write_toy_voc(tmp_path), size=(16,16), bs=2, device='cpu').valid)
    own = [np.array(Image.open(o)) for _,o in dl.dataset.source.items.pairs]
    assert [int((y!=VOID).sum()) for _,y in dl]==[int((o!=VOID).sum()) for o in own]
    dls = scenes_dls(n_train=4, n_valid=4, size=(32,48), bs=4, device='cpu')
    assert full_size_dl(dls.valid) is dls.valid


def test_memory_does_not_grow_with_the_classes(monkeypatch):
    "Logits are enlarged tile by tile, with the same result."
    from dropclass import fused
    made,real = [],fused.resize_tile
    def seen(*args):
        made.append(real(*args))
        return made[-1]
    monkeypatch.setattr(fused, 'resize_tile', seen)
    logits,y = torch.randn(1, 150, 100, 150),torch.randint(150, (1,400,600))
    class Net(nn.Module):
        def forward(self, x): return logits
    counts = evaluate(Net(), [(torch.zeros(1,3,100,150), y)], 150)
    assert max(o.numel() for o in made)<=4*fused.tile_numbers('cpu')<150*400*600/8
    want = confusion_matrix(F.interpolate(logits, (400,600), mode='bilinear'), y, 150)
    assert (counts-want).abs().sum()<=4 # Logits that are alike up to rounding


# ---- windows that show the drawn class

@pytest.fixture
def rare(tmp_path):
    "A class in a corner of a third of the images."
    images,masks = write_toy_folder(tmp_path, 12)
    for i in range(0, 12, 3):
        mask = np.array(Image.open(masks/f'{i:03}.png'))
        mask[4:16,4:16] = 3
        Image.fromarray(mask).save(masks/f'{i:03}.png')
    return folder_dls(images, masks, [*NAMES,'boat'], bs=4, crop=(20,24), scale=(1,1), device='cpu',
                      dl_type=RareClassDL, temperature=.02)


def aimed_epoch(dls, workers):
    dl = dls.train
    dl.fake_l.num_workers = workers
    torch.manual_seed(5)
    dl.rng.seed(5)
    return [tuple(o.clone() for o in b) for b in dl]


def share_seen(dl):
    "How many of the windows of eight epochs show the class that was drawn."
    seen = []
    torch.manual_seed(5)
    dl.rng.seed(5)
    for _ in range(8):
        drawn,real = [],dl.get_idxs
        dl.get_idxs = lambda: drawn.extend(real()) or drawn
        labels = torch.cat([y for _,y in dl]).as_subclass(torch.Tensor)
        dl.get_idxs = real
        # The last, incomplete batch is left out
        seen += [(y==i//len(dl.dataset)).any().item() for y,i in zip(labels, drawn)]
    return np.mean(seen)


def test_windows_show_the_drawn_class(rare, monkeypatch):
    assert share_seen(rare.train)>.9
    monkeypatch.setattr('dropclass.data.core.TRIES', 0)
    assert share_seen(rare.train)<.6


def test_aimed_windows_do_not_depend_on_workers_and_continue(rare):
    first,again = aimed_epoch(rare, 0),aimed_epoch(rare, 2)
    assert all(torch.equal(a, b) for p,q in zip(first, again) for a,b in zip(p, q))
    assert all(len(o)==2 for o in first)
