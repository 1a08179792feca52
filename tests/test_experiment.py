"Run folders: what a notebook cannot show, in processes of their own."
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dropclass.core import writing
from dropclass.run.config import _FIRST_FIELDS, Config, config_hash, read_config
from dropclass.run.experiment import (RunRecorder, hold_folder, load_checkpoint, load_run, make_data, open_folder,
                                      random_states, set_random_states, train_run)
from fastai.callback.core import Callback

TINY = Config(epochs=3, size=(32,48), bs=4, data_options=dict(n_train=8, n_valid=4), threads=1)


class PowerCut(Callback):
    "Ends a fit in the middle of an epoch."
    order,reads_pred = RunRecorder.order+5,False # The route of a resumed run must be that of the first half
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.epoch==self.at and self.iter==1: raise KeyboardInterrupt


def weights(folder): return load_file(folder/'weights.safetensors')


def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('change',
                         [dict(method='plain', optimizer='adamw', schedule='onecycle'),
                          dict(weights='median', dropclass=dict(lam='hold:0.5')),
                          dict(resample={'car':2}, num_workers=2, loss='ohem'),
                          dict(method='ignore_label', sampling='rare_class', temperature=.05),
                          dict(method='fade_weights', weights='median'),
                          dict(loss='dice_ce', sampling='rare_class')])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, change):
    config = replace(TINY, **change)
    train_run(config, tmp_path/'whole', progress=False, write=lambda o: None)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, tmp_path/'cut', progress=False, write=lambda o: None, cbs=[PowerCut(2)])
    for _ in range(3):
        random.random()
        np.random.rand()
        torch.rand(1) # The world goes on between the two halves
    train_run(config, tmp_path/'cut', resume=True, progress=False, write=lambda o: None)
    assert same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))
    assert (tmp_path/'whole'/'confusion.json').read_text()==(tmp_path/'cut'/'confusion.json').read_text()
    assert load_run(tmp_path/'whole').history.equals(load_run(tmp_path/'cut').history)


class Forget(Callback):
    "Makes the last epoch the worst."
    order,reads_pred = RunRecorder.order-15,False
    def after_batch(self):
        if self.training and self.epoch==2: next(self.model.parameters()).data.zero_()


def test_the_best_epoch_is_kept_also_over_an_interruption(tmp_path):
    config,quiet = replace(TINY, keep='best', method='plain'),dict(progress=False, write=lambda o: None)
    whole = train_run(config, tmp_path/'whole', cbs=[Forget()], **quiet)
    with pytest.raises(KeyboardInterrupt): train_run(config, tmp_path/'cut', cbs=[Forget(), PowerCut(2)], **quiet)
    cut = train_run(config, tmp_path/'cut', resume=True, cbs=[Forget()], **quiet)
    assert same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))
    last = load_checkpoint(tmp_path/'whole'/'checkpoint.pt')['model']
    assert whole.history.miou.idxmax()<2 and not same(last, weights(tmp_path/'whole'))
    assert whole.metrics['tests']['valid']['plain']['miou']==pytest.approx(whole.history.miou.max(), abs=1e-6)
    (cut.folder/'weights.safetensors').unlink()
    with pytest.warns(UserWarning, match='come from checkpoint.pt'):
        assert same(cut.weights(), weights(tmp_path/'whole'))


def test_a_batch_of_one_behind_image_pooling_is_refused_before_the_first_step(tmp_path):
    config = replace(TINY, arch='deeplabv3_mobilenetv3', method='plain', bs=1)
    with pytest.raises(ValueError, match='use `bs=2` or more'):
        train_run(config, tmp_path/'one', progress=False, write=lambda o: None)
    assert not (tmp_path/'one').exists()


def test_resuming_over_a_changed_default_says_what_changed(tmp_path):
    "Weights in Eq. (6) were the default once; such a run has the same fields, and another hash."
    config = replace(TINY, weights='median')
    with pytest.raises(KeyboardInterrupt):
        train_run(replace(config, dropclass={'masked_weights':True}), tmp_path/'run', progress=False,
                  write=lambda o: None, cbs=[PowerCut(2)])
    written = json.loads((tmp_path/'run'/'config.json').read_text())
    (tmp_path/'run'/'config.json').write_text(json.dumps({**written, 'dropclass':{}})) # As it was written then
    old = tmp_path/'run'/'checkpoint.pt'
    torch.save({k:v for k,v in load_checkpoint(old).items() if k!='config'}, old)
    with pytest.raises(ValueError, match='a default has changed since.*masked_weights=True'):
        train_run(config, tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    train_run(replace(config, dropclass={'masked_weights':True}), tmp_path/'run', resume=True, progress=False,
              write=lambda o: None)


@pytest.mark.parametrize('left_out', ['python', 'torch', 'loaders'])
def test_every_random_state_is_needed(left_out):
    from fastai.torch_core import set_seed
    set_seed(0)
    dls = make_data(TINY)
    states = random_states(dls)
    def draw(): return random.random(), torch.rand(1).item(), dls.train.rng.random()
    first = draw()
    draw()
    now = random_states(dls)
    set_random_states({**states, left_out:now[left_out]}, dls)
    assert draw()!=first
    set_random_states(states, dls)
    assert draw()==first


def test_another_seed_is_another_run(tmp_path):
    a,b = (train_run(replace(TINY, epochs=1, seed=s), tmp_path/str(s), progress=False, write=lambda o: None).folder
           for s in (0, 1))
    assert not same(weights(a), weights(b))


def test_arms_of_one_seed_share_weights_and_data_order(tmp_path):
    seen = {}
    class Watch(Callback):
        "Keeps the first weights and all images."
        order = 4
        def before_fit(self):
            ours = ('classifier', 'compensation', 'drop_trained')
            state = self.learn.model.state_dict().items()
            self.learn.first = {k:v.clone() for k,v in state if not any(o in k for o in ours)}
        def before_batch(self):
            if self.training: seen.setdefault(self.learn.first_key, []).append(self.xb[0].sum().item())
    firsts = []
    for method in ('plain', 'dropclass', 'no_drop'):
        class Tell(Callback):
            "Says whose batches these are."
            order = 3
            def before_fit(self): self.learn.first_key = method
            def after_fit(self): firsts.append(self.learn.first)
        train_run(replace(TINY, method=method), tmp_path/method, progress=False, write=lambda o: None,
                  cbs=[Watch(), Tell()])
    assert seen['plain']==seen['dropclass']==seen['no_drop']
    assert same(firsts[0], firsts[1]) and same(firsts[0], firsts[2])


def fork(job):
    "Run a function in a process of its own, which ends with it; its id."
    if pid := os.fork(): return pid
    try: job()
    finally: os._exit(1)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    "A limit on file size, in a process of its own, stands for the full disk: the same error from the same calls."
    class Fill(Callback):
        order,reads_pred = RunRecorder.order-1,False
        def before_epoch(self):
            if self.epoch==1: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    def train():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try: train_run(TINY, tmp_path/'run', progress=False, write=lambda o: None, cbs=[Fill()])
        except OSError as e: (tmp_path/'said').write_text(str(e))
    os.waitpid(fork(train), 0)
    assert 'disk is not full' in (tmp_path/'said').read_text()
    assert not list((tmp_path/'run').glob('.*.part'))
    run = train_run(TINY, tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    train_run(TINY, tmp_path/'whole', progress=False, write=lambda o: None)
    assert same(weights(run.folder), weights(tmp_path/'whole'))


def test_metrics_are_plain_json(tmp_path):
    run = train_run(replace(TINY, epochs=1), tmp_path/'run', progress=False, write=lambda o: None)
    saved = json.loads((run.folder/'metrics.json').read_text())
    cm = run.confusion('unbiased', 'plain').double()
    iou = cm.diag()/(cm.sum(0)+cm.sum(1)-cm.diag())
    listed = saved['tests']['unbiased']['plain']['class_iou']
    for a,b in zip(iou.tolist(), listed): assert b is None if a!=a else abs(a-b)<1e-9
    assert len(saved['rare'])==len(saved['classes'])//2


def test_a_run_folder_from_a_stranger_writes_nowhere_else(tmp_path):
    "Archives keep symbolic links: under every name that a run writes to, one leads to a file of mine."
    precious = tmp_path/'precious'
    precious.write_text('mine')
    with pytest.raises(KeyboardInterrupt):
        train_run(TINY, tmp_path/'run', progress=False, write=lambda o: None, cbs=[PowerCut(2)])
    names = ['weights.safetensors', 'examples.png', 'confusion.json', 'metrics.json', 'history.csv']
    for o in [*names, *(f'.{o}.part' for o in [*names, 'checkpoint.pt', 'config.json'])]:
        (tmp_path/'run'/o).unlink(missing_ok=True)
        if o!='metrics.json': (tmp_path/'run'/o).symlink_to(precious)
    train_run(TINY, tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    assert precious.read_text()=='mine' and not any(o.is_symlink() for o in (tmp_path/'run').iterdir())
    (tmp_path/'run'/'.lock').symlink_to(precious)
    (tmp_path/'run'/'metrics.json').unlink()
    with pytest.raises(OSError): train_run(TINY, tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    assert precious.read_text()=='mine'


def test_two_writers_never_show_half_a_file(tmp_path):
    data = os.urandom(2_000_000)
    def write():
        while True:
            with writing(tmp_path/'file') as temp: temp.write_bytes(data)
    for _ in range(5):
        pids = [fork(write) for _ in range(2)]
        while not (tmp_path/'file').exists(): time.sleep(.001)
        for _ in range(40): assert (tmp_path/'file').read_bytes()==data
        for o in pids: os.kill(o, signal.SIGKILL)
        for o in pids: os.waitpid(o, 0)
        assert (tmp_path/'file').read_bytes()==data
        for o in tmp_path.iterdir(): o.unlink()


def test_of_two_runs_one_gets_the_folder(tmp_path):
    for i in range(20):
        start = time.monotonic()+.02
        def begin():
            while time.monotonic()<start: pass
            try: open_folder(tmp_path/str(i), TINY)
            except FileExistsError: os._exit(3)
            os._exit(0)
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(o, 0)[1]) for o in [fork(begin), fork(begin)])==[0, 3]


def test_a_folder_says_who_holds_it(tmp_path):
    "Nobody else trains in it, and a kill sets it free, even while a process that loaded images lives on."
    def hold():
        os.setsid() # So that both processes end together
        with hold_folder(tmp_path/'run'):
            if not os.fork(): time.sleep(60) # Stands for a process that loads images
            (tmp_path/'held').touch()
            time.sleep(60)
    train_run(replace(TINY, epochs=1), tmp_path/'run', progress=False, write=lambda o: None)
    (tmp_path/'run'/'metrics.json').unlink()
    pid = fork(hold)
    for _ in range(6000): # A minute
        if (tmp_path/'held').exists(): break
        time.sleep(.01)
    with pytest.raises(BlockingIOError, match=f'in use by process {pid} on {socket.gethostname()}: wait'):
        train_run(replace(TINY, epochs=1), tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    train_run(replace(TINY, epochs=1), tmp_path/'run', resume=True, progress=False, write=lambda o: None)
    assert not (tmp_path/'run'/'.lock').exists()
    os.killpg(pid, signal.SIGKILL)


TABLES = sorted({o.parents[1] for o in (Path(__file__).parents[1]/'results').glob('*/*/*/config.json')})


@pytest.mark.parametrize('folder', TABLES, ids=lambda o: '-'.join(o.parts[-2:]))
def test_stored_runs_still_load_with_their_hash(folder):
    for file in folder.glob('*/config.json'):
        run = load_run(file.parent)
        same = config_hash(run.config)==json.loads(file.read_text())['hash']
        assert same or run.config.data=='folder', file.parent.name # There only the names of the files are kept
        assert run.confusion().sum()>0


def test_every_later_setting_changes_the_hash_and_no_default_does():
    changes = dict(loss='focal', loss_options={'gamma':1.}, resample={'car':2}, sampling='rare_class', temperature=.1,
                   sync_bn=False, keep='best')
    base = Config()
    assert {o.name for o in fields(Config)}-set(_FIRST_FIELDS)>=set(changes) # Settings that the first runs did not have
    for name,value in changes.items():
        changed = replace(base, loss='focal') if name=='loss_options' else base
        assert config_hash(replace(changed, **{name:value}))!=config_hash(changed)
        assert config_hash(replace(base, **{name:getattr(base, name)}))==config_hash(base)


def test_a_folder_gives_back_the_configuration_it_was_given(tmp_path):
    config = replace(TINY, epochs=1, resample={3:2},
                     data_options=dict(n_train=8, n_valid=4, crop=(16,16), scale=(.5,2.1)),
                     dropclass=dict(never_drop=('car',)))
    train_run(config, tmp_path/'run', progress=False, write=lambda o: None)
    assert read_config(tmp_path/'run')==config
    assert train_run(config, tmp_path/'run', resume=True).config==config # Finished: read, not trained


@pytest.mark.parametrize('name', ['cityscapes', 'voc', 'ade20k'])
def test_data_sets_are_imported_when_named(name, monkeypatch):
    made = []
    def build(path, **kwargs): made.append((path, kwargs))
    monkeypatch.setitem(sys.modules, f'dropclass.data.{name}', types.SimpleNamespace(**{f'{name}_dls':build}))
    make_data(Config(data=name, path='here', bs=3, size=(8,9), data_options=dict(crop=(4,5)), resample={'car':2}))
    path,kwargs = made[0]
    assert path=='here'
    assert [kwargs[o] for o in ('bs', 'size', 'crop', 'times')]==[3, (8,9), [4,5], {'car':2}]
    with pytest.raises(ValueError, match='needs `path`'): make_data(Config(data=name))


@pytest.mark.parametrize('change',
                         [dict(loss=o) for o in ('focal', 'dice_ce', 'lovasz', 'ohem')]
                         +[dict(method='ignore_label'), dict(method='fade_weights', weights='median')])
def test_every_arm_learns(tmp_path, change):
    "Each loss and method, after a few epochs, beats the network it began with."
    config = replace(TINY, **{'method':'plain', **change}, epochs=12, optimizer='adamw', lr=3e-3)
    run = train_run(config, tmp_path/'run', progress=False, write=lambda o: None)
    assert run.history.train_loss.iloc[-1]<.95*run.history.train_loss.iloc[0]
    assert run.predicts=='plain' and run.load_model() is not None


def test_bfloat16_trains_on_a_cpu(tmp_path):
    config = replace(TINY, precision='bf16', epochs=12, method='plain', optimizer='adamw', lr=3e-3)
    run = train_run(config, tmp_path/'bf16', progress=False, write=lambda o: None)
    assert run.history.train_loss.iloc[-1]<.9*run.history.train_loss.iloc[0]
    assert {v.dtype for k,v in weights(run.folder).items() if 'num_batches' not in k}=={torch.float32}
    exact = train_run(replace(config, precision='float32'), tmp_path/'exact', progress=False, write=lambda o: None)
    assert not same(weights(run.folder), weights(exact.folder))
    assert abs(run.history.train_loss-exact.history.train_loss).max()<.1


def test_bfloat16_resumes_bit_for_bit(tmp_path):
    config = replace(TINY, precision='bf16')
    train_run(config, tmp_path/'whole', progress=False, write=lambda o: None)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, tmp_path/'cut', progress=False, write=lambda o: None, cbs=[PowerCut(2)])
    assert not torch.is_autocast_enabled('cpu') # The interruption left nothing behind
    train_run(config, tmp_path/'cut', resume=True, progress=False, write=lambda o: None)
    assert same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))


def test_comparisons_know_the_defaults_that_old_runs_did_not_write():
    from dropclass.run.compare import _LATER
    base = Config()
    assert {o.name:getattr(base, o.name) for o in fields(Config)}=={k:v for k,v in _LATER.items() if k!='processes'}


def test_random_states_come_back_on_a_machine_with_fewer_gpus(monkeypatch):
    "A checkpoint of an older version holds the state of every GPU that its machine had."
    seen = []
    cuda = dict(is_available=lambda: True, current_device=lambda: 0, get_rng_state=lambda: torch.tensor([7]),
                set_rng_state=seen.append,
                set_rng_state_all=lambda o: pytest.fail('the state of GPUs that may not be there'))
    for name,value in cuda.items(): monkeypatch.setattr(torch.cuda, name, value)
    states = random_states()
    assert [o.tolist() for o in states['cuda']]==[[7]]
    for found in (states['cuda'], [torch.tensor([7]), torch.tensor([8])]): set_random_states({**states, 'cuda':found})
    assert [o.tolist() for o in seen]==[[7], [7]]
