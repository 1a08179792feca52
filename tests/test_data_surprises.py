"""Folders, labels and options that are a little out of the ordinary: what is trained, predicted and compared must be
what was meant."""
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from torch import nn

from dropclass.analysis.subjects import head_options, load_network
from dropclass.run.audit import audit_files
from dropclass.run.cli import default_folder, make_config
from dropclass.run.compare import comparison, describe_arms, describe_comparison, compare_arms, group_arms, read_run
from dropclass.run.predict import predict_images, predict_mask
from dropclass.core import ClassSpec
from dropclass.data.camvid import write_toy_camvid
from dropclass.data.core import SegmentationItems, pair_files, write_toy_folder
from dropclass.stats import check_counts
from dropclass.data.folder import folder_dls
from dropclass.data.voc import voc_dls, write_toy_voc
from dropclass.run.config import Config, config_hash
from dropclass.rivals import region_loss
from dropclass.run.experiment import data_parameters, make_data, make_learner, train_run
from dropclass.metrics import class_iou, mean_iou

SMALL = dict(data='scenes', epochs=1, bs=4, size=(32,48), threads=1, data_options=dict(n_train=8, n_valid=4))


def quiet(config, out): return train_run(config, out, progress=False, write=lambda line: None)


# ---- prediction sees what validation saw

@pytest.mark.parametrize('data', ['voc', 'folder'])
def test_pictures_of_many_sizes_are_predicted_as_they_were_validated(tmp_path, data):
    "On VOC, and from a folder with `fit`, the network saw pictures on a canvas, not stretched to it."
    if data=='voc': where,options,size = write_toy_voc(tmp_path/'voc', n=6),{},(48,48)
    else:
        where,masks = write_toy_folder(tmp_path/'toy', n=6)
        options,size = dict(masks=str(masks), names=['ground','wall','sky'], fit=True),(64,64)
    config = Config(data=data, path=str(where), method='plain', epochs=1, bs=2, size=size, threads=1,
                    data_options=dict(augment=False, **options))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning) # Most classes do not occur
        run = quiet(config, tmp_path/'run')
    dls,net = make_data(config),run.load_model()
    pairs = dls.valid.dataset.source.pairs
    files = predict_images(run, [o for o,_ in pairs], tmp_path/'out')
    for i,(mask,_) in enumerate(files):
        x,_ = dls.valid.do_batch([dls.valid.do_item(i)]),None
        with torch.no_grad(): expected = net(dls.valid.after_batch(x)[0].as_subclass(torch.Tensor))[0].argmax(0)
        found = torch.from_numpy(np.array(Image.open(mask)))
        h,w = found.shape
        assert (expected[:h,:w]==found).float().mean()>.99


def test_files_come_onto_the_canvas_too(tmp_path):
    dls = voc_dls(write_toy_voc(tmp_path/'voc', n=3), size=(48,48), bs=2)
    image,_ = dls.valid.dataset.source.pairs[0]
    (x,) = dls.test_dl([image]).one_batch()
    assert torch.equal(x[0].cpu(), dls.valid.one_batch()[0][0].cpu())


def test_other_statistics_are_those_of_the_training(tmp_path):
    "Images are normalised in prediction as they were in training."
    stats = [[.2,.2,.2],[.05,.1,.2]]
    config = Config(**{**SMALL, 'data_options':{**SMALL['data_options'], 'stats':stats}})
    run = quiet(config, tmp_path/'run')
    dls,folder = make_data(config),tmp_path/'images'
    folder.mkdir()
    for i,(x,_) in enumerate(dls.valid.dataset.source):
        Image.fromarray(x.permute(1,2,0).numpy()).save(folder/f'{i}.png')
    masks = [np.array(Image.open(o)) for o,_ in predict_images(run, folder, tmp_path/'out')]
    with torch.no_grad():
        expected = run.load_model()(dls.valid.one_batch()[0].as_subclass(torch.Tensor).cpu()).argmax(1)
    assert np.mean(np.stack(masks)==expected.numpy())>.99


# ---- labels and options

def binary(folder, object_label):
    "Images of squares, with 0 and `object_label` in the masks."
    for o in ('images','masks'): (folder/o).mkdir(parents=True)
    for i in range(8):
        mask = np.zeros((32,32), dtype=np.uint8)
        mask[8:8+i+4, 8:24] = object_label
        Image.fromarray(mask).save(folder/f'masks/{i}.png')
        Image.fromarray(np.repeat((mask>0)[...,None]*200, 3, 2).astype(np.uint8)).save(folder/f'images/{i}.png')
    (folder/'classes.txt').write_text('background\nlesion\n')
    return make_config(dict(data='folder', path=str(folder), method='plain', epochs=1, bs=2))


def test_masks_of_0_and_255(tmp_path):
    "255 is void by default, so nothing but background would be left; the message has the options that help."
    config = binary(tmp_path/'two', 255)
    with pytest.raises(ValueError, match='hold one class of 2.*label_map={255: 1} and ignore_index=254'):
        make_learner(config)
    config = make_config(dict(data_options=dict(label_map={255:1}, ignore_index=254)), config)
    assert make_learner(config).dls.valid.one_batch()[1].unique().tolist()==[0,1]


def test_a_class_that_never_occurs_is_named():
    with pytest.warns(UserWarning, match='No training pixel is labelled wall, sky'):
        check_counts(torch.tensor([5,0,0,7]), ClassSpec(('road','wall','sky','car')))


@pytest.mark.parametrize('option,means', [('augmnt', 'augment'), ('scael', 'scale'), ('n_trian', 'n_train')])
def test_misspelt_data_options(option, means):
    with pytest.raises(ValueError, match=f"did you mean '{means}'"):
        make_data(Config(**{**SMALL, 'data_options':{option:1}}))


def test_a_window_is_a_pair():
    with pytest.raises(ValueError, match='`crop` must be a pair'):
        make_data(Config(**{**SMALL, 'data_options':{**SMALL['data_options'], 'crop':32}}))


# ---- folders that move

@pytest.fixture
def folders(tmp_path):
    "One folder of images and masks, and a copy of it."
    write_toy_folder(tmp_path/'a', n=10, num_classes=3, folders=('images','masks'))
    (tmp_path/'a/classes.txt').write_text('ground\nwall\nsky\n')
    shutil.copytree(tmp_path/'a', tmp_path/'b')
    return tmp_path/'a',tmp_path/'b'


def test_masks_move_with_their_images(folders):
    "The same data elsewhere are the same experiment, and a resumed run reads both from where it is told."
    a,b = (make_config(dict(data='folder', path=str(o), epochs=1)) for o in folders)
    assert config_hash(a)==config_hash(b)
    moved = make_config(dict(path=str(folders[1])), a)
    assert moved==b and config_hash(moved)==config_hash(a)
    pairs = make_data(moved).train_ds.source.pairs
    assert all(folders[1] in p.parents for pair in pairs for p in pair)


def test_seeds_of_moved_data_are_one_arm(folders, tmp_path):
    runs = [quiet(make_config(dict(data='folder', path=str(o), method='plain', epochs=1, bs=4, seed=s, threads=1)),
                  tmp_path/f'r{s}') for s,o in enumerate(folders)]
    assert len(group_arms([read_run(o) for o in runs]))==1


def test_rotated_photographs(tmp_path):
    "A photograph that EXIF turns fits a mask that stands upright."
    exif = Image.Exif()
    exif[274] = 6
    for o in ('images','masks'): (tmp_path/o).mkdir()
    Image.new('RGB', (8,4)).save(tmp_path/'images/0.jpg', exif=exif)
    Image.new('L', (4,8)).save(tmp_path/'masks/0.png') # Upright already
    Image.new('RGB', (8,4)).save(tmp_path/'images/1.jpg', exif=exif)
    Image.new('L', (8,4)).save(tmp_path/'masks/1.png', exif=exif) # Turned by the same tag
    for x,y in SegmentationItems(pair_files(tmp_path/'images', tmp_path/'masks'), ClassSpec(('a','b'))):
        assert x.shape==(3,8,4) and y.shape==(8,4)


def test_folder_names_are_fit_for_any_disk():
    name = str(default_folder(Config(resample={'pole/sign: a?':2})))
    assert name.count('/')==1 and not set(name)&set(' :?*<>|"')


# ---- runs that fail, and weights that travel

def test_a_failing_run_keeps_the_users_folder(tmp_path, monkeypatch):
    "Only what the run made goes, and the error is the run's own."
    class Stop(Callback):
        def before_epoch(self): raise KeyboardInterrupt
    (tmp_path/'mine').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'mine')
    monkeypatch.chdir(tmp_path/'mine')
    for out in (tmp_path/'mine', tmp_path/'link', '.'):
        with pytest.raises(KeyboardInterrupt): train_run(Config(**SMALL), out, progress=False, cbs=[Stop()])
        assert (tmp_path/'mine').is_dir() and not any((tmp_path/'mine').iterdir())


def test_another_programs_configuration(tmp_path):
    "A config.json beside weights need not be ours."
    (tmp_path/'config.json').write_text('{"architecture": "x"}')
    (tmp_path/'model.pth').touch()
    with pytest.warns(UserWarning, match='default options'): assert head_options(tmp_path/'model.pth')=={}


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path, monkeypatch):
    "The folder is free again for the next try."
    def fail(*args, **kwargs): raise RuntimeError('out of memory')
    with monkeypatch.context() as m:
        m.setattr('dropclass.run.experiment.save_checkpoint', fail) # History is written by then
        with pytest.raises(RuntimeError, match='out of memory'): quiet(Config(**SMALL), tmp_path/'run')
    assert not (tmp_path/'run').exists()
    quiet(Config(**SMALL), tmp_path/'run')


@pytest.mark.parametrize('options', [dict(scale='raw', average='kept'), {}])
def test_weights_bring_the_options_of_their_head(tmp_path, options):
    """A weights file alone gives the run's network; files of earlier versions ask the run's configuration, and others
    warn."""
    from safetensors.torch import load_file, save_file
    run = quiet(Config(**{**SMALL, 'dropclass':{**options, 'alpha':1.}}), tmp_path/'run')
    x = torch.randn(2, 3, 32, 48)
    expected = run.load_model()(x)
    shutil.copy(run.folder/'weights.safetensors', tmp_path/'alone.safetensors')
    assert torch.equal(load_network(tmp_path/'alone.safetensors', 'small', len(run.spec))(x), expected)
    save_file(load_file(run.folder/'weights.safetensors'), run.folder/'weights.safetensors')
    assert torch.equal(load_network(run.folder/'weights.safetensors', 'small', len(run.spec))(x), expected)
    shutil.copy(run.folder/'weights.safetensors', tmp_path/'alone.safetensors')
    with pytest.warns(UserWarning, match='default options'):
        found = load_network(tmp_path/'alone.safetensors', 'small', len(run.spec))(x)
    assert torch.equal(found, expected)==(not options)


def test_an_audit_of_weights_follows_its_options(tmp_path):
    run = quiet(Config(**SMALL), tmp_path/'run')
    ask = dict(weights=[run.folder/'weights.safetensors'], archs=['small'], data='scenes', size=(32,48), progress=False,
               max_images=8)
    iou = {o:audit_files(**ask, **dict(o)).networks[0].iou for o in ((), (('test','unbiased'),), (('path','plain'),))}
    default,unbiased,plain = (o.nan_to_num() for o in iou.values())
    assert not torch.equal(default, unbiased) and not torch.equal(default, plain)
    for wrong in (dict(test='nonsense'), dict(path='nonsense'), dict(names=['a'])):
        with pytest.raises(ValueError): audit_files(**ask, **wrong)


# ---- comparisons

def write_matrix(folder, method, cm, seed=0):
    "A run folder with one confusion matrix, three classes, the last of which is rare."
    folder.mkdir()
    cm = torch.tensor(cm)
    iou = class_iou(cm)
    scores = dict(miou=float(mean_iou(cm)), rare_miou=float(iou[2]), pixel_acc=1., absent=0,
                  class_iou=[None if o.isnan() else float(o) for o in iou])
    path = 'plain'
    files = dict(config=dict(format=1, data='scenes', method=method, seed=seed), confusion={'valid':{path:cm.tolist()}},
                 metrics=dict(finished=True, ignore_index=255, classes=['road','sky','boat'], pixel_counts=[50,40,10],
                              rare=[2], predicts=path, tests={'valid':{path:scores}}))
    for name,o in files.items(): (folder/f'{name}.json').write_text(json.dumps(o))
    return folder


def test_one_wrong_pixel_is_no_class(tmp_path):
    "A class that is not in the test set counts in no mean, whether one pixel is taken for it or none."
    plain = [write_matrix(tmp_path/f'p{s}', 'plain', [[1000,0,0],[0,500,0],[0,0,0]], s) for s in range(3)]
    other = [write_matrix(tmp_path/f'd{s}', 'dropclass', [[999,0,1],[0,500,0],[0,0,0]], s) for s in range(3)]
    df = comparison([plain[0], other[0]])
    assert abs(df.difference['mIoU']
               +.05)<1e-9 and math.isnan(df.difference['boat']) and math.isnan(df.difference['rare mIoU'])
    arms = compare_arms(plain+other)
    assert abs(arms.loc[('dropclass','mIoU')].difference+.05)<1e-9
    for text in (describe_comparison(df), describe_arms(arms)): assert 'nan' not in text and 'rare' not in text


def test_masks_of_more_classes_than_a_byte_holds():
    net = nn.Conv2d(3, 300, 1)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.arange(300.))
    assert predict_mask(net, torch.zeros(3, 4, 4, dtype=torch.uint8)).unique().tolist()==[299]


@pytest.mark.parametrize(('cache','given','workers'), [(True,0,0), (False,0,2), (False,1,1)])
def test_images_on_disk_are_read_by_workers(monkeypatch, tmp_path, cache, given, workers):
    monkeypatch.setattr('dropclass.data.core.num_cpus', lambda: 2)
    images,masks = write_toy_folder(tmp_path, n=10)
    dls = folder_dls(images, masks, ['ground','wall','sky'], bs=2, num_workers=given or None, cache=cache)
    assert dls.train.fake_l.num_workers==workers


def test_workers_of_a_configuration_are_the_data_sets_own(monkeypatch, tmp_path):
    monkeypatch.setattr('dropclass.data.core.num_cpus', lambda: 2)
    write_toy_camvid(tmp_path)
    config = lambda n, cache: Config(data='camvid', path=str(tmp_path), bs=2, num_workers=n,
                                     data_options=dict(cache=cache))
    assert [make_data(config(n, cache)).train.fake_l.num_workers for n,cache in ((0,True),(0,False),(3,False))]==[0,2,3]


@pytest.mark.parametrize('size', [32, (32,), '32x32'])
def test_sizes_are_pairs(tmp_path, size):
    images,masks = write_toy_folder(tmp_path, n=10)
    with pytest.raises(ValueError, match='a height and a width'):
        folder_dls(images, masks, ['ground','wall','sky'], size=size)


def test_links_that_lead_back_end(tmp_path):
    "Two links to the folder above would make 2^40 paths; a linked folder elsewhere is searched."
    images,masks = write_toy_folder(tmp_path, 4, 3)
    for o in (images, masks):
        for name in ('a','b'): (o/name).symlink_to('.')
    for o in (images, masks): shutil.copytree(o, tmp_path/'more'/o.name, symlinks=True)
    for o in (images, masks): (o/'linked').symlink_to(tmp_path/'more'/o.name)
    found = [o.relative_to(images).as_posix() for o,_ in pair_files(images, masks)]
    assert found==[f'{i:03}.png' for i in range(4)]+[f'linked/{i:03}.png' for i in range(4)]


def test_a_folder_without_permission_says_so(tmp_path, monkeypatch):
    images,masks = write_toy_folder(tmp_path, 2, 3)
    def refuse(folder): raise PermissionError(13, 'Permission denied', str(folder))
    monkeypatch.setattr(Path, 'iterdir', refuse)
    with pytest.raises(PermissionError, match='Permission denied'): pair_files(images, masks)


@pytest.mark.parametrize('data', ['folder','scenes'])
@pytest.mark.filterwarnings('ignore')
def test_every_data_option_takes_odd_values_or_says_why_not(tmp_path, data):
    "A value of the wrong kind or size ends in a sentence, whatever the option, or in a batch."
    write_toy_folder(tmp_path, 12, 3, (32,48))
    (tmp_path/'classes.txt').write_text('a\nb\nc\n')
    path,base = (tmp_path,'') if data=='folder' else (None,'n_train=8,n_valid=4,')
    known = [*data_parameters(Config(data=data)),'shuffle','drop_last','temperature','times','after_item']
    assert 'crop' in known and len(known)>20
    refused = 0
    for option in known:
        for value in ('-1','0','nan','a,b','[1,2]','0x0','none','99','1e9'):
            given = f'{base}{option}={value}' if not option.startswith('n_') else f'{option}={value}'
            try: make_data(make_config(dict(data=data, path=path, bs=4, data_options=given))).train.one_batch()
            except (ValueError, OSError) as e: refused += len(str(e))>20
    assert refused>5*len(known)


def test_losses_and_resampling_refuse_numbers_without_sense():
    for name,option in (('focal','gamma'), ('dice_ce','dice_weight'), ('blv','sigma')):
        for value in (-1., math.nan, math.inf):
            with pytest.raises(ValueError, match=f'`{option}` must be a finite number of at least 0'):
                region_loss(name, pixel_counts=[1,2], **{option:value})
    many = make_config({**SMALL, 'resample':'car=1000000000'})
    with pytest.raises(ValueError, match='from 1 to 10000'): make_data(many)
