"The scenes: what needs other processes, many scenes, or a Learner."
import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dropclass.core import VOID
from dropclass.data.scenes import LABEL, RULES, Scenes, plan_scene, render_scene, scenes_dls
from dropclass.testing import ToyNet

def digest(n=4):
    h = hashlib.sha256()
    for i in range(n):
        for o in render_scene(i, seed=3): h.update(o.tobytes())
    return h.hexdigest()

def test_same_in_another_process():
    code = "import sys; sys.path.insert(0, 'tests'); from test_scenes import digest; print(digest())"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code],
                         env={**os.environ, 'PYTHONHASHSEED':'123', 'PYTHONPATH':os.pathsep.join(['.', *sys.path])},
                         capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1]==digest()

def test_global_random_state_is_left_alone():
    before = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
    render_scene(0)
    assert random.getstate()==before[0]
    assert (np.random.get_state()[1]==before[1]).all() and torch.equal(torch.get_rng_state(), before[2])

@pytest.mark.parametrize('size', [(96,128), (97,131), (64,64), (48,160), (192,96)])
def test_any_size(size):
    image,mask = render_scene(1, size=size)
    assert image.shape==(*size,3) and mask.shape==size
    assert set(np.unique(mask)) <= {*range(15), VOID}
    assert (mask==LABEL['road']).mean()>.1

def test_the_worlds_hold_the_same_classes_as_often():
    def count(bias):
        names = [o.name for i in range(6000) for o in plan_scene(i, seed=5, bias=bias)[1]]
        return {o: names.count(o)/6000 for o in LABEL if o in names}
    a,b = count(.95),count(0.)
    assert a.keys()==b.keys()=={o.name for o in RULES}
    for o in a:
        assert a[o]==pytest.approx(b[o], rel=.15, abs=.01), o

@pytest.mark.parametrize('bias', [0., .5, .9, 1.])
def test_the_knob(bias):
    plans = [plan_scene(i, seed=6, bias=bias) for i in range(3000)]
    chance = np.mean([1/len(street.bands) for street,_ in plans])
    cars = [o for _,things in plans for o in things if o.name=='car']
    assert np.mean([o.support=='road' for o in cars])==pytest.approx(bias+(1-bias)*chance, abs=.04)
    trucks = [street.setting=='country' for street,things in plans for o in things if o.name=='truck']
    assert np.mean(trucks)==pytest.approx(bias+(1-bias)/2, abs=.07)

def test_riders_and_two_wheelers_are_independent_without_bias():
    def lift(bias):
        has = np.array([[any(o.name=='rider' for o in things), any(o.name in ('bicycle','motorcycle') for o in things)]
                        for _,things in (plan_scene(i, seed=7, bias=bias) for i in range(4000))])
        return np.corrcoef(has.T)[0,1]
    assert lift(.95)>.85
    assert lift(0.)<.15 # A seated rider, one two-wheeler in eight, is what remains

def test_image_and_mask_have_the_same_edges():
    scenes = Scenes(100)
    x,y = scenes.images.float().mean(1),scenes.masks.int()
    step,edge = (x[:,:,1:]-x[:,:,:-1]).abs(),y[:,:,1:]!=y[:,:,:-1]
    assert step[edge].mean()>1.5*step[~edge].mean()

def test_no_scene_is_in_two_sets():
    dls = scenes_dls(24, 16, bs=8, bias=0., device='cpu') # Same world everywhere: only the indices part them
    sets = [{o.numpy().tobytes() for o in dl.dataset.source.images} for dl in dls.loaders]
    assert [len(o) for o in sets]==[24,16,16]
    assert len(set.union(*sets))==24+16+16

def test_seed_moves_training_only():
    a,b = scenes_dls(8, 4, seed=0, device='cpu'),scenes_dls(8, 4, seed=1, device='cpu')
    same = [torch.equal(x.dataset.source.images, y.dataset.source.images) for x,y in zip(a.loaders, b.loaders)]
    assert same==[False, True, True]

def test_a_learner_validates_on_the_unbiased_world():
    from fastai.learner import Learner
    dls = scenes_dls(8, 4, bs=4, size=(32,48), device='cpu')
    torch.manual_seed(0)
    learn = Learner(dls, ToyNet(15), nn.CrossEntropyLoss(ignore_index=VOID))
    with learn.no_logging():
        learn.fit(1)
        preds,target = learn.get_preds(ds_idx=2)
        losses = [learn.validate(i)[0] for i in (1,2)]
    assert torch.equal(target, dls.unbiased.dataset.source.masks.long())
    assert preds.shape==(4,15,32,48) and losses[0]!=losses[1]
    assert dls.to('cpu').loaders[2] is dls.unbiased
