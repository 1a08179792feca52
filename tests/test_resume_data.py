"A run goes on with the data and the settings that it began with, or says what has changed."
import json
import shutil

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image

from dropclass.data.core import write_toy_folder
from dropclass.data.folder import folder_dls
from dropclass.run.config import Config, read_config
from dropclass.run.experiment import data_files, load_checkpoint, train_run


class Stop(Callback):
    "End a training after its first epoch, as a power cut would."
    order = 200
    def after_epoch(self):
        if self.epoch==0: raise KeyboardInterrupt


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run with one epoch of two behind it."
    where = tmp_path_factory.mktemp('begun')/'all'
    images,masks = write_toy_folder(where/'data', 6, 3, (32,48))
    options = dict(masks=str(masks), names=['a','b','c'], valid=.34)
    config = Config(data='folder', path=str(images), method='plain', epochs=2, bs=2, threads=1, data_options=options)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, where/'run', progress=False, write=lambda o: None, cbs=[Stop()])
    shutil.copytree(where, where.with_name('kept'))
    return where


@pytest.fixture
def copy(begun):
    "The same, as it was left, and its configuration."
    shutil.rmtree(begun)
    shutil.copytree(begun.with_name('kept'), begun)
    return begun,read_config(begun/'run')


def resume(where, config): return train_run(config, where/'run', resume=True, progress=False, write=lambda o: None)


def test_moved_data_are_the_same(copy, tmp_path):
    where,_ = copy
    shutil.copytree(where/'data', tmp_path/'elsewhere')
    files = lambda o: data_files(folder_dls(o/'images', o/'masks', ['a','b','c'], bs=2))
    there,here = files(where/'data'),files(tmp_path/'elsewhere')
    assert there==here and len(here)==12


def roll_mask(data):
    file = data/'masks/000.png'
    Image.fromarray(np.roll(np.array(Image.open(file)), 7, 1)).save(file)

def add_pair(data):
    for o in ('images','masks'): shutil.copy(data/o/'000.png', data/o/'100.png')

def change_image(data):
    file = data/'images/001.png'
    image = np.array(Image.open(file))
    image[0,0] ^= 1
    Image.fromarray(image).save(file)

@pytest.mark.parametrize('change,says', [(roll_mask, 'masks/000.png has changed since'),
                                         (add_pair, 'images/100.png is new since, so have 1 more files'),
                                         (change_image, 'images/001.png has changed since')])
def test_changed_data_are_named(copy, change, says):
    where,config = copy
    change(where/'data')
    with pytest.raises(ValueError, match=f'was trained on other data: {says}'): resume(where, config)


def test_an_edited_setting_is_named(copy):
    "Where the settings in the folder were edited, not those of the command."
    where,_ = copy
    file = where/'run/config.json'
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, 'lr':.5}))
    with pytest.raises(ValueError, match='another configuration .lr was 0.03, is 0.5.'):
        resume(where, read_config(where/'run'))


def test_checkpoints_of_older_versions_go_on(copy):
    where,config = copy
    file = where/'run/checkpoint.pt'
    torch.save({k:v for k,v in load_checkpoint(file).items() if k not in ('files','config')}, file)
    assert resume(where, config).metrics['finished']
