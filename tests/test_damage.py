"Run folders that were cut off, flipped, mixed up or forged: a sentence that names the file, or the right result."
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from safetensors.torch import save_file

from dropclass.run.compare import comparison
from dropclass.run.config import Config, read_config
from dropclass.run.experiment import load_run, prior_counts, train_run
from dropclass.run.predict import predict_images

SAID = (ValueError, OSError, ImportError, FloatingPointError) # What a command says in one line
QUIET = dict(progress=False, write=lambda o: None)


class Stop(Callback):
    order = 200
    def after_epoch(self):
        if self.epoch==0: raise KeyboardInterrupt


class Evil:
    "Code in a pickle."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return (os.mkdir, (self.mark,))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A run that was killed, the same one finished, and an image."
    where = tmp_path_factory.mktemp('runs')
    config = Config(epochs=2, bs=4, size=(16,24), threads=1, data_options=dict(n_train=4, n_valid=2))
    with pytest.raises(KeyboardInterrupt): train_run(config, where/'killed', cbs=[Stop()], **QUIET)
    train_run(config, where/'finished', **QUIET)
    (where/'images').mkdir()
    Image.new('RGB', (24,16), (90,90,90)).save(where/'images/a.png')
    return where


# ---- what can befall a file

def cut(n): return lambda p: p.write_bytes(p.read_bytes()[:n])

def keep(share): return lambda p: p.write_bytes(p.read_bytes()[:int(share*p.stat().st_size)])

def flip(at):
    def damage(p):
        data = bytearray(p.read_bytes())
        data[int(len(data)*at)] ^= 0xff
        p.write_bytes(bytes(data))
    return damage

def text(o): return lambda p: p.write_text(o)

def field(name, *value):
    "Take a field out of a JSON file, or give it another value."
    def damage(p):
        found = json.loads(p.read_text())
        if value: found[name] = value[0]
        else: del found[name]
        p.write_text(json.dumps(found))
    return damage

def kept(change):
    "Change what a checkpoint holds."
    def damage(p):
        found = torch.load(p, weights_only=True)
        made = change(found)
        torch.save(found if made is None else made, p)
    return damage

def without(k): return kept(lambda o: {a:b for a,b in o.items() if a!=k})

def within(k, v): return kept(lambda o: {**o, k:v})

def a_folder(p):
    p.unlink(missing_ok=True)
    p.mkdir()

BYTES = {'empty':cut(0), 'ten bytes':cut(10), 'half':keep(.5), 'last byte gone':cut(-1), 'missing':Path.unlink,
         'folder':a_folder,
         'pickle':lambda p: p.write_bytes(pickle.dumps(Evil(p.parent/'PWNED'), protocol=2)),
         'zip':lambda p: torch.save(dict(model=Evil(p.parent/'PWNED')), p),
         'legacy':lambda p: torch.save(dict(model=Evil(p.parent/'PWNED')), p,
                                       _use_new_zipfile_serialization=False)}
FLIPS = {f'flip at {o}':flip(o) for o in (.05,.2,.5,.8,.95)}
JSON = {'empty':cut(0), 'half':keep(.5), 'missing':Path.unlink, 'folder':a_folder, 'list':text('[1]'),
        'text':text('"x"'),
        'null':text('null'), 'number':text('3'), 'not UTF-8':lambda p: p.write_bytes(b'\xff\xfe{}'),
        'deep':text('['*200000), '{}':text('{}')}

def values(make, pairs): return {f'{k} {v!r}'[:60]:make(k, v) for k,v in pairs}

def nan_weights(o): o['model'] = {k:v*float('nan') if v.is_floating_point() else v for k,v in o['model'].items()}

CHECKPOINT = {
    **BYTES, **FLIPS, '{}':kept(lambda o: {}), 'list':kept(lambda o: [1]), 'tensor':kept(lambda o: torch.ones(3)),
    **{f'no {k}':without(k) for k in ('model','opt','random','epoch','table','seconds','smooth','key')},
    **values(within, (('model',{'a':torch.ones(2)}), ('model',[]), ('opt',{}), ('epoch',10**6), ('epoch',-5),
                      ('epoch','x'),
                      ('table',None), ('random',{}), ('random',[]), ('smooth',[]), ('seconds','x'), ('key',3),
                      ('ranks',[0]*1000))),
    'NaN':kept(nan_weights)}
CONFIG = {
    **JSON,
    **values(field, (('epochs','2'), ('epochs',9), ('lr',None), ('lr',.5), ('size','16x24'), ('size',[32]),
                     ('size',['a','b']),
                     ('data_options',None), ('data_options',[1]), ('dropclass',[1]), ('method',['plain']),
                     ('method','plain'),
                     ('resample',None), ('resample',{'x':[]}), ('channels_last','no'), ('seed',True), ('format',2),
                     ('arch','foo'), ('arch',3), ('arch',None), ('data','foo'), ('paste','x'), ('paste',{'p':[]}),
                     ('loss_options',{'x':1}), ('threads',-1), ('num_workers',1.5)))}
METRICS = {
    **JSON,
    **{f'no {k}':field(k) for k in ('finished','classes','colors','ignore_index','pixel_counts','rare','predicts',
                                    'tests')},
    **values(field, (('classes',['a','b','c']), ('classes',None), ('classes',[1]*15), ('colors',[[999,0,0]]*15),
                     ('colors',['red']*15), ('colors',3), ('predicts','foo'), ('predicts',None), ('tests',{}),
                     ('tests',[]),
                     ('tests',{'valid':3}), ('tests',{'valid':{'plain':{}}}), ('pixel_counts',[]),
                     ('pixel_counts',['x']*15), ('rare',[99]), ('rare','x'), ('ignore_index','x')))}
CONFUSION = {**JSON, 'short':text('{"valid":{"plain":[[1,2],[3,4]]}}'), 'words':text('{"valid":{"plain":[["a"]]}}')}
WEIGHTS = {**BYTES, **FLIPS, 'of another network':lambda p: save_file({'a':torch.ones(2)}, p),
           'header of 2^60':lambda p: p.write_bytes((2**60).to_bytes(8, 'little')+b'{}')}


def cases(**files):
    return [pytest.param(k, damage, id=f'{k}: {name}') for k,v in files.items() for name,damage in v.items()]

def damaged(run, folder, file, damage):
    shutil.copytree(run, folder)
    names = dict(checkpoint='checkpoint.pt', weights='weights.safetensors', prior='prior.npz')
    path = folder/names.get(file, f'{file}.json')
    damage(path)
    return path

def outcome(do, path):
    "Run something: what it says of the damaged file, or None where it went well."
    try: do()
    except SAID as e:
        assert str(path.parent) in str(e), e
        assert 'weights_only' not in str(e) and len(str(e))<500, e
        return str(e)
    finally: assert not (path.parent/'PWNED').exists()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('file,damage', cases(checkpoint=CHECKPOINT, config=CONFIG))
def test_resuming(runs, tmp_path, file, damage, request):
    path = damaged(runs/'killed', tmp_path/'run', file, damage)
    resume = lambda: train_run(read_config(tmp_path/'run'), tmp_path/'run', resume=True, **QUIET)
    said = outcome(resume, path)
    if 'seed True' in request.node.name or said: return
    run,ref = (load_run(o).weights() for o in (tmp_path/'run', runs/'finished'))
    assert all(torch.equal(run[k], ref[k]) for k in ref), "it went on, to another result"


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('file,damage', cases(weights=WEIGHTS, metrics=METRICS, confusion=CONFUSION, config=CONFIG))
def test_using(runs, tmp_path, file, damage, request):
    run = tmp_path/'run'
    path = damaged(runs/'finished', run, file, damage)
    says = [outcome(lambda: predict_images(run, runs/'images', tmp_path/'out'), path),
            outcome(lambda: comparison([runs/'finished', run]), path)]
    if file=='weights': assert says==[None,None], "the checkpoint holds the same"
    elif file=='confusion': assert says[1]
    elif file=='metrics': assert says[0] and (says[1] or 'colors' in says[0]) or 'no colors' in request.node.name


@pytest.mark.parametrize('file,damage', cases(weights=WEIGHTS, prior={**BYTES, **FLIPS}))
def test_nothing_to_restore_from(runs, tmp_path, file, damage):
    path = damaged(runs/'finished', tmp_path/'run', file, damage)
    (tmp_path/'run/checkpoint.pt').unlink()
    run = load_run(tmp_path/'run')
    if file=='weights': assert outcome(run.load_model, path)
    elif outcome(lambda: prior_counts(run.folder), path) is None: # What was flipped was a date
        ours,theirs = prior_counts(run.folder),prior_counts(runs/'finished')
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_restored_weights_are_the_same(runs, tmp_path):
    damaged(runs/'finished', tmp_path/'run', 'weights', keep(.5))
    with pytest.warns(UserWarning, match='checkpoint.pt, which holds the same'):
        weights = load_run(tmp_path/'run').weights()
    ref = load_run(runs/'finished').weights()
    assert all(torch.equal(weights[k], ref[k]) for k in ref)
