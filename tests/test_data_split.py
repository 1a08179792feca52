"Which images validate: one rule for training and audit, no leaks, no class lost where it can be helped."
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dropclass.analysis.subjects import open_images
from dropclass.core import ClassSpec
from dropclass.data.core import SegmentationItems, pair_files, write_toy_folder
from dropclass.data.folder import folder_dls, folder_items
from dropclass.data.split import brought_split, listed_images, spread_classes, split_pairs, tile_hint

NAMES = ['ground','wall','sky']


def data_set(root, layout):
    "A folder of images and masks with one of the usual ways to say which validate, and the names that do."
    if layout=='folders':
        for part,n in (('train',5), ('val',3)):
            write_toy_folder(root, n, seed=n, folders=(f'images/{part}',f'masks/{part}'))
        held = {f'val/{i:03}' for i in range(3)}
    else:
        write_toy_folder(root, 8)
        held = {'002','005','006'}
        lists = dict(valid={'valid.txt':held}, val={'val.txt':held},
                     both={'train.txt':{f'{i:03}' for i in range(8)}-held, 'test.txt':held},
                     inside={'images/valid.txt':held})[layout]
        for name,stems in lists.items(): (root/name).write_text('\n'.join(sorted(stems)))
    (root/'classes.txt').write_text('\n'.join(NAMES))
    return root,held


def stems(pairs, root): return {o.relative_to(root/'images').with_suffix('').as_posix() for o,_ in pairs}


@pytest.mark.parametrize('layout', ['folders', 'valid', 'val', 'both', 'inside'])
def test_training_and_audit_look_at_the_same_images(tmp_path, capsys, layout):
    root,held = data_set(tmp_path, layout)
    train,valid = folder_items(root/'images', root/'masks', NAMES)
    assert stems(valid.pairs, root)==held and not stems(train.pairs, root)&held
    assert f'{len(train)} images train, {len(valid)} validate' in capsys.readouterr().out
    loader,_,_ = open_images(root)
    assert stems(loader.dataset.source.pairs, root)==held


def test_a_share_that_is_asked_for_is_drawn(tmp_path):
    root,_ = data_set(tmp_path, 'valid')
    assert len(folder_items(root/'images', root/'masks', NAMES, valid=.25)[1])==2


def test_lists_that_contradict_are_refused(tmp_path):
    root,held = data_set(tmp_path, 'valid')
    (root/'train.txt').write_text('000\n002\n')
    with pytest.raises(ValueError, match='train.txt and valid.txt: 1 images train and validate, .*002.png'):
        folder_items(root/'images', root/'masks', NAMES)
    (root/'train.txt').write_text('000\n100\n')
    with pytest.raises(ValueError, match='train.txt names 1 images that are not there: 100'):
        folder_items(root/'images', root/'masks', NAMES)


def test_a_list_takes_no_other_image_for_one_that_is_missing(tmp_path):
    there,file = ['photo.jpg','photo (1).jpg','street.png','cam.png'],tmp_path/'valid.txt'
    for line in ('photo (2).jpg','street 7.png','cam.7'):
        file.write_text(line)
        with pytest.raises(ValueError, match='1 images that are not there'): listed_images(there, file)
    for line,i in (('photo (1).jpg',1), ('photo (1)',1), ('images/street.png masks/street.png',2), ('cam',3)):
        file.write_text(line)
        assert listed_images(there, file)=={i}


def test_all_of_few_images_drawn_is_said(tmp_path):
    pairs = [(f'{i}.png', f'{i}.png') for i in range(2)]
    with pytest.raises(ValueError, match='All 2 images validate'): split_pairs(pairs, .9, counts=np.ones((2, 3)))


def test_an_image_called_train_is_no_folder(tmp_path):
    "Names of parts count for folders only, and only below the images."
    root = tmp_path/'train'/'val'
    write_toy_folder(root, 4)
    for o in ('images','masks'): (root/o/'000.png').rename(root/o/'val.png')
    assert brought_split(pair_files(root/'images', root/'masks'), root/'images') is None


# ---- classes on both sides

def sides(held, out):
    "Classes that lack a side that they could be on."
    inside,total = held[sorted(out)].sum(0),held.sum(0)
    return int(((inside==0)&(total>1)).sum()+((inside==total)&(total>0)).sum())


@pytest.mark.parametrize('units,classes,rare', [(40,3,.08), (60,12,.05), (25,30,.15), (200,40,.012)])
def test_no_class_is_lost_where_it_can_be_helped(units, classes, rare):
    """Over many draws: never worse than the draw, as large as it, itself where nothing was missing, and most losses
    mended."""
    rng = np.random.default_rng(0)
    helped,lost = [],[]
    for seed in range(40):
        held = rng.random((units, classes))<rare
        held[:,0] = True
        drawn = set(random.Random(seed).sample(range(units), units//5))
        out = spread_classes(held, drawn, random.Random(seed))
        before,after = sides(held, drawn),sides(held, out)
        assert len(out)==len(drawn) and after<=before and (before or out==drawn)
        helped.append(before)
        lost.append(after)
    assert sum(helped)>20 and sum(lost)<=.3*sum(helped)


def test_tiles_stay_together_whatever_the_seed():
    pairs = [(Path(f'{scene}_{i}.png'), Path()) for scene in 'abcdef' for i in range(5)]
    counts = torch.ones(30, 2)
    counts[5:,1] = 0 # A class in one picture only
    for seed in range(30):
        train,valid = split_pairs(pairs, 1/3, seed, r'(.+)_\d', counts)
        scenes = [{o.stem[0] for o,_ in part} for part in (train, valid)]
        assert not scenes[0]&scenes[1] and len(valid)==10 and 'a' in scenes[0]


def test_one_picture_of_tiles_cannot_be_divided():
    with pytest.raises(ValueError, match='none is left to train on'):
        split_pairs([(Path(f'a_{i}.png'), Path()) for i in range(5)], .2, group='(.)_')


@pytest.mark.parametrize('names,hint', [
    (['austin1_0_0','austin1_0_512','kyiv2_0_0','kyiv2_0_512'], True),
    (['a-r01-c01','a-r01-c02','b-r01-c01','b-r02-c01'], True),
    (['s1_patch12','s1_patch13','s2_patch1','s2_patch2'], True),
    (['2007_000032','2007_000033','2008_000001','2008_000002'], False),
    (['10_10_s','10_11_s','11_1_s','11_2_s'], False),
    (['aachen_000000_000019_leftImg8bit','ulm_000001_000019_leftImg8bit'], False), (['DSC0001','DSC0002'], False)])
def test_hints_at_tiles(names, hint): assert bool(tile_hint([f'{o}.png' for o in names]))==hint


# ---- what is said before training starts

def test_a_class_without_a_validation_image_is_named(tmp_path):
    images,masks = write_toy_folder(tmp_path, 8)
    mask = np.array(Image.open(masks/'003.png'))
    mask[10:20,10:20] = 3
    Image.fromarray(mask).save(masks/'003.png')
    with pytest.warns(UserWarning, match='No validation pixel is labelled boat'):
        train,_ = folder_items(images, masks, [*NAMES,'boat'])
    assert any((train.get_mask(i)==3).any() for i in range(len(train)))


@pytest.mark.parametrize('which', ['train', 'valid'])
def test_masks_on_disk_are_checked_before_training(tmp_path, which):
    "Without a cache a wrong label of a validation image would show after the first epoch."
    images,masks = write_toy_folder(tmp_path, 8)
    mask = pair_files(images, masks)[0 if which=='train' else 5][1]
    (tmp_path/'valid.txt').write_text('005\n006\n')
    Image.new('L', (64,48), 9).save(mask)
    with pytest.raises(ValueError, match=f'{mask.name} holds label 9'):
        folder_dls(images, masks, NAMES, bs=2, cache=False)


def test_masks_are_counted_once(tmp_path, monkeypatch):
    "The pass that divides the images is the one that training asks for its counts."
    from dropclass.data import core
    from dropclass.stats import class_counts
    images,masks = write_toy_folder(tmp_path, 8)
    read,real = [],core.read_mask
    monkeypatch.setattr(core, 'read_mask', lambda *args: read.append(1) or real(*args))
    train,valid = folder_items(images, masks, NAMES, cache=False)
    total = class_counts(train)+class_counts(valid)
    assert len(read)==8
    assert torch.equal(total, class_counts(SegmentationItems(pair_files(images, masks), ClassSpec(NAMES))))


def test_good_draws_are_those_of_before(tmp_path):
    "A split that misses no class is the one that the seed has always given."
    images,masks = write_toy_folder(tmp_path, 20)
    pairs = pair_files(images, masks)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for seed in range(10):
            assert folder_items(images, masks, NAMES, seed=seed)[1].pairs==split_pairs(pairs, .2, seed)[1]
