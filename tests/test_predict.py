"Labelling images: the files' own labels, large images by tiles, the tuned class bias, images of other channels"
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dropclass.core import ClassSpec, write_json
from dropclass.data.ade20k import ADE20K_LABEL_MAP
from dropclass.data.camvid import write_toy_camvid
from dropclass.data.cityscapes import CITYSCAPES, CITYSCAPES_IDS, CITYSCAPES_LABEL_MAP
from dropclass.data.core import read_lines, read_mask, write_toy_folder
from dropclass.prior import TAUS
from dropclass.run.audit import audit_files
from dropclass.run.compare import comparison
from dropclass.run.config import Config
from dropclass.run.experiment import train_run
from dropclass.run.predict import _open_run, file_labels, predict_images, predict_large, predict_mask
from dropclass.run.tuned import tuned_text
from dropclass.run.tune import tune_file, tune_run, tuned_model

NAMES = ['road','person','bicycle']


def renamed(folder, to):
    "Write masks with other labels."
    table = np.arange(256, dtype=np.uint8)
    table[:len(to)] = to
    for o in folder.iterdir(): Image.fromarray(table[np.array(Image.open(o))]).save(o)


def folder_run(where, change=None, **options):
    "A short run on a folder with three classes."
    images,masks = write_toy_folder(where, 8, len(NAMES), (32,48))
    if change: change(images, masks)
    options = dict(masks=str(masks), names=NAMES, valid=.25, **options)
    config = Config(data='folder', path=str(images), method='plain', epochs=8, bs=4, lr=.01, optimizer='adamw',
                    threads=1, data_options=options)
    return train_run(config, where/'run', progress=False, write=lambda o: None),images,masks


@pytest.fixture(scope='module')
def cityscapes_like(tmp_path_factory):
    "A run on masks whose labels are 7, 24 and 33."
    where = tmp_path_factory.mktemp('ids')
    return folder_run(where, lambda _,masks: renamed(masks, (7,24,33)), label_map={7:0, 24:1, 33:2})


def test_masks_have_the_labels_of_the_files(cityscapes_like, tmp_path):
    run,images,masks = cityscapes_like
    written = predict_images(run.folder, images, tmp_path/'out')
    for file,_ in written:
        picture = Image.open(file)
        ours,theirs = np.array(picture),np.array(Image.open(masks/file.name))
        assert set(np.unique(ours))<={7,24,33}
        known = theirs!=255
        assert (ours==theirs)[known].mean()>.8
        colors = {7:run.spec.colors[0], 24:run.spec.colors[1], 33:run.spec.colors[2]}
        assert picture.convert('RGB').getpixel((5,5))==tuple(colors[ours[5,5]])


def test_masks_of_a_camvid_with_codes_have_its_labels(tmp_path):
    "Void stands among fastai's codes, so the classes behind it have other numbers in the files."
    where = write_toy_camvid(tmp_path/'camvid', 'fastai')
    codes = read_lines(where/'codes.txt')
    run = train_run(Config(data='camvid', path=str(where), method='plain', epochs=1, bs=2, size=(48,64), threads=1),
                    tmp_path/'run', progress=False, write=lambda o: None)
    net = _open_run(run, False, None)
    labels = file_labels(net.label_map, len(net.spec), net.spec.ignore_index)
    assert [codes[i] for i in labels]==list(net.spec.names)


def test_the_names_and_void_of_a_runs_files_hold_for_an_audit(tmp_path):
    def change(images, masks):
        for o in masks.iterdir(): o.rename(masks/f'{o.stem}_mask.png')
        renamed(masks, [*range(255), 9])
    run,*_ = folder_run(tmp_path, change, mask_name='{stem}_mask', ignore_index=9)
    (tmp_path/'classes.txt').write_text('\n'.join(NAMES))
    found = audit_files([run.folder], data=tmp_path, progress=False)
    assert found.images==8 and found.spec.ignore_index==9


def test_label_maps_of_data_sets_turn_round():
    ids = file_labels(CITYSCAPES_LABEL_MAP, len(CITYSCAPES), 255)
    assert [CITYSCAPES_IDS[o] for o in ids]==list(range(19))
    assert file_labels(ADE20K_LABEL_MAP, 150, 255)==list(range(1, 151))


def test_tiles_need_little_memory():
    "The logits of a strip, not of the image: what is kept at once does not grow with the height."
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores,self.sizes = nn.Conv2d(3, 4, 1),[]
        def forward(self, x):
            self.sizes.append(tuple(x.shape[2:]))
            return self.scores(x)
    net,image = Seen().eval(),torch.randint(256, (3,700,90), dtype=torch.uint8)
    mask = predict_large(net, image, tile=64)
    assert set(net.sizes)=={(64,64)} and mask.dtype==torch.uint8
    torch.testing.assert_close(mask, predict_mask(net, image))


@pytest.mark.parametrize('size', [(100,130), (48,48), (33,200), (49,97), (20,20)])
def test_tiled_equals_whole(size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)).double().eval()
    image = torch.randint(256, (3,*size), dtype=torch.uint8)
    torch.testing.assert_close(predict_large(net, image, tile=48), predict_mask(net, image))


def test_a_bar_for_one_large_image_counts_strips(tmp_path):
    images,_ = write_toy_folder(tmp_path, 2, 3, (70,40))
    net,spec,seen = nn.Conv2d(3, 3, 1).eval(),ClassSpec(NAMES),[]
    bar = lambda o: seen.append(len(list(o))) or o
    predict_images(net, images/'000.png', tmp_path/'a', spec=spec, tile=32, progress=bar)
    predict_images(net, images, tmp_path/'b', spec=spec, tile=32, progress=bar)
    assert seen==[3,2]


def test_the_tuned_class_bias(cityscapes_like, tmp_path):
    run,images,_ = cityscapes_like
    with pytest.raises(FileNotFoundError, match='was not tuned'): predict_images(run, images, tmp_path/'no', tuned=True)
    write_json(run.folder/'tuning.json', dict(format=1, tau=1., offsets=dict(zip(NAMES, (0.,99.,0.)))))
    files = predict_images(run, images, tmp_path/'out', tuned=True)
    assert {*np.unique(np.array(Image.open(files[0][0])))}=={24}
    assert predict_images(run, images, tmp_path/'plain') and tuned_model(run) is not None


def test_four_channels_from_training_to_prediction(tmp_path):
    "The fourth band alone tells the classes apart."
    def add_band(images, masks):
        for o in images.iterdir():
            labels = np.array(Image.open(masks/o.name))
            grey = np.full((*labels.shape, 3), 128)
            band = np.where(labels==255, 0, 100*labels.astype(int))
            Image.fromarray(np.concatenate([grey, band[...,None]], 2).astype(np.uint8), 'RGBA').save(o)
    run,images,masks = folder_run(tmp_path, add_band, in_chans=4)
    assert run.metrics['tests']['valid']['plain']['pixel_acc']>.6
    assert run.load_model().stem[0].in_channels==4
    ours = read_mask(predict_images(run, images, tmp_path/'out')[0][0])
    theirs = read_mask(masks/'000.png')
    assert (ours==theirs)[theirs!=255].float().mean()>.6
    weights = run.folder/'weights.safetensors' # The file alone says how many channels there are
    (tmp_path/'classes.txt').write_text('\n'.join(run.spec.names))
    audited = audit_files(weights=[weights], archs=['small'], data=tmp_path, progress=False)
    assert audited.images==len([*images.iterdir()])
    assert tune_file(weights, 'small', tmp_path)[1]==[*run.spec.names]
    with pytest.raises(ValueError, match='reads images of 4 channels'): tune_file(weights, 'small', 'scenes')
    same = predict_images(run.load_model(), images, tmp_path/'network', spec=run.spec, size=(32,48))
    assert torch.equal(read_mask(same[0][0]), ours)
    three = tmp_path/'three.png'
    Image.open(images/'000.png').convert('RGB').save(three)
    with pytest.raises(ValueError, match='three.png has 3 channels'): predict_images(run, three, tmp_path/'no')


def test_a_file_that_cannot_be_read_stops_before_anything_is_written(cityscapes_like, tmp_path):
    run,images,_ = cityscapes_like
    Image.fromarray(np.ones((8,8), np.float32)).save(tmp_path/'heights.tif')
    label = partial(predict_images, run, out=tmp_path/'out')
    with pytest.raises(ValueError, match='heights.tif holds floating point'): label([images, tmp_path/'heights.tif'])
    assert not (tmp_path/'out').exists()
    assert len(label(images))==8


# ---- measured at the labels' own size

@pytest.fixture(scope='module')
def shrunk(tmp_path_factory):
    "A run that saw its images at half their size."
    where = tmp_path_factory.mktemp('shrunk')
    images,masks = write_toy_folder(where, 8, len(NAMES), (33,48))
    config = Config(data='folder', path=str(images), epochs=1, bs=4, size=(16,24), threads=1,
                    data_options=dict(masks=str(masks), names=NAMES, valid=.25))
    return train_run(config, where/'run', progress=False, write=lambda o: None)


def test_a_run_is_measured_at_the_size_of_the_label_files(shrunk, cityscapes_like):
    full,valid = (shrunk.confusion(o).sum() for o in ('full','valid'))
    assert full==2*29*44 and valid<2*16*24 # Without the frame of void
    assert set(shrunk.metrics['tests']['full'])=={'plain','drop','mean'}
    assert 'full' not in cityscapes_like[0].metrics['tests'] # It saw the files as they are
    shown = comparison(shrunk, 'full').loc['mIoU'].iloc[-1]
    assert shown==pytest.approx(100*shrunk.metrics['tests']['full'][shrunk.predicts]['miou'])
    assert tuned_text([shrunk.folder], 'valid', 'plain') and tuned_text([shrunk.folder], 'full')=='' # Not counted there


def test_tuning_counts_labels_at_their_own_size(shrunk):
    found = tune_run(shrunk, on='valid')
    assert found.confusions[0].sum()==shrunk.confusion('full').sum()
    at_zero = found.confusions[TAUS.index(0)]
    assert torch.equal(at_zero, shrunk.confusion('full'))
