"The commands as a user meets them: processes, exit codes, signals."
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dropclass.run.cli
from conftest import COMMANDS

TINY = ['--bs', '4', '--size', '32x48', '--threads', '1', '--data-options', 'n_train=8,n_valid=4']
ENV = {**os.environ, 'OMP_NUM_THREADS':'1',
       'PYTHONPATH':os.pathsep.join([str(Path(dropclass.run.cli.__file__).parents[1]),
                                     os.environ.get('PYTHONPATH', '')])}


@pytest.fixture(scope='module')
def start(scripts):
    "Start a command in a process of its own."
    def _start(name, *args, **kwargs):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        command = [sys.executable, str(scripts/f'dropclass-{name}.py'), *map(str, args)]
        return subprocess.Popen(command, env=ENV, text=True, **pipes, **kwargs)
    return _start


def finish(process, timeout=600):
    "Wait for a process: (exit code, stdout, stderr)."
    out,err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture(scope='module')
def runs(start, command, tmp_path_factory):
    "Two finished runs, one trained by a process, one in this one."
    folder = tmp_path_factory.mktemp('runs')
    options = lambda o: ['scenes', '--method', o, '--epochs', '2', '--out', folder/o, *TINY]
    results = dict(plain=finish(start('train', *options('plain'))), dropclass=command('train', *options('dropclass')))
    for code,_,err in results.values(): assert code==0, err
    return folder, {k: out for k,(_,out,_) in results.items()}


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_quick_and_complete(start, name):
    begin = os.times()
    code,out,err = finish(start(name, '--help'))
    end = os.times()
    assert (code, err)==(0, '') and out.startswith('usage:')
    assert end.children_user-begin.children_user<1.5 # Seconds of computing: fastai alone takes several
    options = [o.split()[0] for o in out.splitlines() if o.startswith('  --')]
    assert len(options)>=3 and '--debug' in options


@pytest.mark.parametrize('local,said', [('0', True), ('1', False)])
def test_every_machine_prints_its_error_once(command, monkeypatch, local, said):
    for k,v in dict(RANK='4', LOCAL_RANK=local).items(): monkeypatch.setenv(k, v)
    code,out,err = command('compare', 'nowhere')
    assert code==2 and ('There is no run folder' in err)==said and 'Traceback' not in err


def test_training_reports_epochs_and_classes(runs):
    folder,outs = runs
    for method,out in outs.items():
        lines = out.splitlines()
        assert sum(o.startswith('epoch ') for o in lines)==2 and not any('\r' in o or 'Traceback' in o for o in lines)
        table = lines[next(i for i,o in enumerate(lines) if o.startswith('class '))+2:]
        shares = [float(o.replace('†', '').split()[-2]) for o in table[:15]]
        assert shares==sorted(shares) and sum('†' in o for o in table[:15])==7
        assert all(any(o.startswith(mean) for o in table) for mean in ('mIoU', 'rare mIoU'))
        assert 'unbiased test set' in out
        assert str(folder/method/'examples.png') in out and Image.open(folder/method/'examples.png').size[0]>300


def test_compare_prints_and_saves(runs, command, tmp_path, monkeypatch):
    folder,_ = runs
    monkeypatch.chdir(folder)
    code,out,err = command('compare', 'plain', 'dropclass', '--test', 'unbiased')
    assert code==0 and not err and 'dropclass is ' in out and max(map(len, out.split('\n\n')[1].splitlines()))<=80
    for path in ('plain', 'mean'):
        code,out,_ = command('compare', folder/'plain', folder/'dropclass', '--path-of', path, '--save',
                             tmp_path/f'{path}.csv')
        assert code==0 and f'({path} path)' in out and (tmp_path/f'{path}.csv').is_file()
    assert (tmp_path/'plain.csv').read_text()!=(tmp_path/'mean.csv').read_text()
    assert command('compare', folder/'plain', '--save',
                   tmp_path/'one.png')[0]==0 and Image.open(tmp_path/'one.png').format=='PNG'
    code,_,err = command('compare', folder/'plain', '--save', tmp_path/'one.png')
    assert code==2 and 'one.png exists: choose another name, or allow --overwrite' in err
    assert command('compare', folder/'plain', '--save', tmp_path/'one.png', '--overwrite')[0]==0


def test_class_names_do_not_steer_the_terminal(runs, command, tmp_path):
    shutil.copytree(runs[0]/'plain', tmp_path/'run')
    path = tmp_path/'run'/'metrics.json'
    metrics = json.loads(path.read_text())
    metrics['classes'][0] = '\x1b[31mred'
    path.write_text(json.dumps(metrics))
    code,out,err = command('compare', tmp_path/'run', '--by-run')
    assert code==0 and 'red' in out and '\x1b' not in out+err
    code,out,err = command('compare', tmp_path/'no\x1b[31m')
    assert code==2 and 'no' in err and '\x1b' not in err


def test_no_name_steers_the_terminal(start, command, tmp_path):
    "Names of classes and folders in the first line, in warnings, in the table and in an error."
    from dropclass.data.core import write_toy_folder
    write_toy_folder(tmp_path, 8, 3, (32,48))
    (tmp_path/'classes.txt').write_text('a\nb\nc\n\x1b[2Jnever\n')
    folder = ['folder', '--path', tmp_path, '--epochs', 1, '--bs', 4, '--threads', 1, '--out',
              tmp_path/'run\x1b[31m\u202e']
    code,out,err = finish(start('train', *folder))
    assert code==0, err
    assert r'into' in out and r'run\x1b[31m\u202e' in out.splitlines()[0] and r'\x1b[2Jnever' in out
    assert err.startswith(r'Warning: No training pixel is labelled \x1b[2Jnever') and 'warnings.warn' not in err
    assert not {'\x1b','\u202e'} & {*out, *err}
    code,out,err = command('train', *folder)
    assert code==2 and len(err.splitlines())==1 and r'run\x1b[31m' in err and '\x1b' not in err


def test_seeds_are_taken_together(command, tmp_path):
    for seed in (0, 1, 2):
        for method in ('plain', 'ignore_label'):
            code,_,err = command('train', 'scenes', '--method', method, '--epochs', 1, '--seed', seed, '--out',
                                 tmp_path/f'{method}-{seed}', *TINY)
            assert code==0, err
    folders = sorted(tmp_path.iterdir(), key=lambda o: o.name, reverse=True) # Plain first
    code,out,err = command('compare', *folders, '--save', tmp_path/'arms.csv')
    assert code==0 and '95 % t-intervals' in out and 'ignore_label has ' in out and 'over 3 common seeds' in out, err
    assert sum('0,1,2' in o for o in out.splitlines())==2
    table = np.genfromtxt(tmp_path/'arms.csv', delimiter=',', names=True, dtype=None, encoding='utf-8')
    row = next(o for o in table if o['arm']=='ignore_label' and o['class']=='mIoU')
    def read(run):
        cm = np.array(json.loads((run/'confusion.json').read_text())['valid']['plain'])
        # Over classes that are in the test set
        return 100*np.mean([cm[i,i]/(cm[i].sum()+cm[:,i].sum()-cm[i,i]) for i in range(len(cm)) if cm[i].sum()])
    steps = [read(tmp_path/f'ignore_label-{s}')-read(tmp_path/f'plain-{s}') for s in (0, 1, 2)]
    assert abs(row['difference']-np.mean(steps))<1e-9 and row['low']<row['difference']<row['high'] and row['pairs']==3
    code,out,_ = command('compare', *folders, '--by-run')
    assert code==0 and 'plain seed=2' in out and 't-intervals' not in out


def test_recipes_are_printed_in_full_and_can_be_changed(command, tmp_path):
    from dataclasses import fields
    from dropclass.run.config import RECIPES, Config
    code,out,err = command('train', '--list-recipes')
    assert (code, err)==(0, '') and [o.split()[1] for o in out.splitlines() if o.startswith('Recipe')]==list(RECIPES)
    for o in fields(Config): assert out.count(f'\n{o.name} ')==len(RECIPES)
    assert '[512, 1024]' in out and '[0.5, 2.1]' in out and '968' in out
    code,out,err = command('train', 'scenes', '--recipe', 'cityscapes_hrnet_v2', '--arch', 'small', '--weights', 'none',
                           '--no-pretrained', '--num-workers', 0, '--epochs', 1, '--bs', 4,
        '--size', '32x64', '--threads', 1, '--data-options', 'crop=(16,32),n_train=8,n_valid=4', '--no-suppression',
        '--no-sync-bn', '--out', tmp_path/'run')
    assert code==0 and out.startswith('Recipe cityscapes_hrnet_v2'), err
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['lr']==.004 and config['data_options']['scale']==[.5,2.1] and config['data_options']['crop']==[16,32]
    assert config['dropclass']=={'per_epoch':True, 'average':'kept', 'scale':'raw', 'predict':'drop', 'alpha':0.,
                                 'masked_weights':True} and config['sync_bn'] is False
    code,out,_ = command('train', '--resume', '--out', tmp_path/'run') # Finished: shown again
    assert code==0 and 'Recipe' not in out


def test_a_broken_pipe_is_no_error(start):
    job = start('train', '--list-recipes')
    job.stdout.close()
    _,err = job.wait(timeout=300), job.stderr.read()
    assert 'Traceback' not in err and 'Error' not in err


def test_tune_takes_a_run_and_a_grid(runs, command, tmp_path):
    shutil.copytree(runs[0]/'plain', tmp_path/'run')
    code,out,err = command('tune', tmp_path/'run', '--on', 'valid', '--taus=-1,-0.5,0')
    assert code==0 and 'Written' in out, err
    assert '-0.0' not in out and 'nan' not in out.lower() and '\nLeave the network as it is: with ' in out
    text = (tmp_path/'run'/'tuning.json').read_text()
    assert [o['tau'] for o in json.loads(text)['curve']]==[-1., -.5, 0.]
    assert '-0.0,' not in text and '-0.0\n' not in text and 'NaN' not in text


def test_predict_writes_masks_of_the_images_size(runs, command, tmp_path):
    rng = np.random.default_rng(0)
    for i,size in enumerate([(64,40), (51,33)]):
        Image.fromarray(rng.integers(256, size=(*size[::-1],3), dtype=np.uint8)).save(tmp_path/f'{i}.jpg')
    images = [tmp_path/f'{i}.jpg' for i in range(2)]
    code,out,err = command('predict', runs[0]/'dropclass', *images, '--out', tmp_path/'out')
    assert code==0, err
    assert '2 images labelled' in out
    for i,size in enumerate([(64,40), (51,33)]):
        mask = Image.open(tmp_path/'out'/'masks'/f'{i}.png')
        assert (mask.mode, mask.size)==('P', size) and np.array(mask).max()<15
        assert Image.open(tmp_path/'out'/'overlays'/f'{i}.png').size==size


def test_predict_sees_what_validation_saw(runs, command, tmp_path):
    from dropclass.data.scenes import Scenes
    from dropclass.run.experiment import load_run, make_data
    from dropclass.metrics import confusion_matrix
    run = load_run(runs[0]/'dropclass')
    ds,cm = make_data(run.config).valid.dataset,0
    for i in range(len(ds)): Image.fromarray(ds[i][0].permute(1,2,0).numpy()).save(tmp_path/f'{i}.png')
    assert command('predict', runs[0]/'dropclass', tmp_path, '--out', tmp_path/'out')[0]==0
    for i in range(len(ds)):
        mask = torch.from_numpy(np.array(Image.open(tmp_path/'out'/'masks'/f'{i}.png'))).long()
        cm = cm+confusion_matrix(mask[None], ds[i][1][None].long(), 15)
    assert (cm-run.confusion()).abs().sum()<=cm.sum()*.001 # A batch of one rounds otherwise than a batch of four


@pytest.mark.parametrize('name,args,says', [
    ('train', ['scenes', '--size', '64'], "'64x96' say, got '64'"),
    ('train', ['scenes', '--dropclass', 'alpha'], "KEY=VALUE"),
    ('train', ['scenes', '--method', 'dropclas'], "did you mean 'dropclass'"),
    ('train', ['scene'], "did you mean 'scenes'"),
    ('train', ['scenes', '--weights', 'medain'], "did you mean 'median'"),
    ('train', ['scenes', '--arch', 'smal', '--out', 'NEW', *TINY], "did you mean 'small'"),
    ('train', ['scenes', '--dropclass', 'alfa=3', '--out', 'NEW', *TINY], "did you mean 'alpha'"),
    ('train', ['scenes', '--dropclass', 'per_epoch=maybe', '--out', 'NEW'],
     "`per_epoch` must be yes or no, got 'maybe'"),
    ('train', ['scenes', '--data-options', 'augment=often', '--out', 'NEW'],
     "`augment` must be yes or no, got 'often'"),
    ('train', ['scenes', '--data-options', 'valid_bs=2.5', '--out', 'NEW'],
     "`valid_bs` must be a whole number or none, got '2.5'"),
    ('train', ['scenes', '--loss', 'focal', '--loss-options', 'gamma=high', '--out', 'NEW'],
     "`gamma` must be a number, got 'high'"),
    ('train', ['scenes', '--out', 'NEW', *TINY[:-1], 'n_train=8,n_valid=4,n=3'],
     'Training gets 3 images, less than a batch of 4'),
    ('train', ['scenes', '--method', 'no_drop', '--dropclass', 'drop_prob=.5', '--out', 'NEW'],
     '`drop_prob` would be ignored'),
    ('train', ['scenes', '--method', 'no_drop', '--dropclass', 'alpha=5', '--out', 'NEW'], 'alpha would be ignored'),
    ('train', ['scenes', '--temperature', '.1', '--out', 'NEW'], '`--temperature` is for `--sampling rare_class`'),
    ('train', ['scenes', '--path', 'here', '--out', 'NEW'], 'scenes are generated'),
    ('train', ['scenes', '--pretrained', '--out', 'NEW', *TINY], 'leave out `--pretrained` and `--weights-file`'),
    # Before the data are looked for
    ('train', ['camvid', '--path', 'NOWHERE', '--arch', 'timm:resnet19', '--out', 'NEW'], 'resnet19'),
    ('train', ['scenes', '--seed', str(2**64), '--out', 'NEW'], '`--seed` must be at most'),
    ('train', ['scenes', '--threads', '100000', '--out', 'NEW'], '`--threads` must be at most 1024'),
    ('train', ['scenes', '--lr', '1e40', '--out', 'NEW'], '`--lr` must be at most 1e+30'),
    ('train', ['scenes', '--dropclass', 'detach=9', '--out', 'NEW'], "`detach` must be yes or no or none, got '9'"),
    ('train', ['scenes', '--epochs', '0'], '`--epochs` must be more than 0'),
    ('train', ['scenes', '--loss', 'foca', '--out', 'NEW'], "did you mean 'focal'"),
    ('train', ['scenes', '--loss', 'focal', '--loss-options', 'gama=2', '--out', 'NEW', *TINY],
     "must be one of 'gamma', 'alpha', got 'gama'"),
    ('train', ['scenes', '--weights', 'hrnet', '--out', 'NEW', *TINY], 'published for the 19 classes of Cityscapes'),
    ('train', ['scenes', '--resample', 'car', '--out', 'NEW'], "'motorcycle=2' say"),
    ('train', ['scenes', '--resample', 'cars=2', '--out', 'NEW', *TINY], "did you mean 'car'"),
    ('train', ['scenes', '--resample', 'car=2', '--sampling', 'rare_class', '--out', 'NEW'], 'use one of the two'),
    ('train', ['scenes', '--no-suppression', '--dropclass', 'alpha=5', '--out', 'NEW'], 'leave out one of them'),
    ('train', ['scenes', '--method', 'plain', '--no-suppression', '--out', 'NEW', *TINY], "has no options, got alpha"),
    ('train', ['--recipe', 'cityscapes_hrnet', '--out', 'NEW'],
     "'cityscapes_hrnet_v1', 'cityscapes_hrnet_v2', 'cityscapes_deeplabv3'"),
    ('train', ['camvid', '--path', 'NOWHERE', '--out', 'NEW'], 'NOWHERE'),
    ('train', ['folder', '--path', 'NOWHERE', '--out', 'NEW'], 'There is no folder NOWHERE'),
    ('train', ['scenes', '--out', 'RUNS/plain', *TINY], 'holds another run'),
    ('train', ['--resume', '--out', 'NEW'], 'no config.json'),
    ('train', ['--resume', '--out', 'RUNS/plain', '--epochs', '3'], 'epochs was 2, is 3'),
    ('train', ['scenes', '--out', 'RUNS/plain/config.json/below', *TINY], 'RUNS/plain/config.json/below'),
    ('compare', ['NOWHERE'], 'There is no run folder NOWHERE'),
    ('compare', ['RUNS/plain', 'RUNS'], 'it is no run folder'),
    ('compare', ['RUNS/plain', 'RUNS/dropclass', '--test', 'train'], "'valid', 'unbiased'"),
    ('compare', ['RUNS/plain', 'RUNS/dropclass', '--save', 'table.xls'], "'.csv'"),
    ('predict', ['RUNS/plain', 'NOWHERE.png', '--out', 'NEW'], 'NOWHERE.png'),
    ('predict', ['RUNS/plain', 'RUNS/plain/config.json', '--out', 'NEW'], 'Cannot read'),
    ('predict', ['RUNS/plain', 'RUNS/plain/examples.png', '--out', 'NEW', '--path-of', 'drop'],
     "`--path-of` must be one of 'plain'"),
    ('predict', ['RUNS/plain', 'RUNS/plain/examples.png', '--out', 'NEW', '--tile', '3'], 'at least 16 pixels, got 3'),
    ('compare', ['RUNS/plain', '--path-of', 'dorp'], "did you mean 'drop'"),
    ('audit', ['RUNS/plain', '--arch', 'small', '--out', 'NEW'], '`--arch` small is for weights files'),
    ('train', ['scenes', '--dropclass', 'alpha=1,alpha=2', '--out', 'NEW'], "gives 'alpha' twice"),
    ('tune', ['RUNS/plain', '--weights', '1,2'], '`--weights` is for --model'),
    ('tune', ['--model', 'w.pth', '--arch', 'small', '--data', 'x', '--on', 'train'], '`--on` is for a run'),
    ('tune', ['RUNS/plain', '--taus', '0,x'], "numbers with commas between, '0.5,1,2' say, got '0,x'"),
    ('tune', ['--model', 'w.pth', '--arch', 'small', '--data', 'x', '--out', 'RUNS/plain/config.json'], 'is a file'),
    ('demo', ['--n-test', '-1', '--out', 'NEW'], 'at least 1 scene'),
    ('demo', ['--size', 'big'], "got 'big'"),
])
def test_errors_are_one_line_and_exit_code_2(runs, scripts, command, tmp_path, monkeypatch, name, args, says):
    monkeypatch.chdir(tmp_path)
    fill = lambda o: o.replace('RUNS', str(runs[0]))
    code,_,err = command(name, *map(fill, args))
    assert code==2 and fill(says) in err and err.startswith('Error: ') and len(err.splitlines())==1
    assert not list(tmp_path.rglob('*.part')) and not (tmp_path/'NEW'/'masks').exists()
    with pytest.raises((ValueError, OSError)): # `--debug` lets the error through
        monkeypatch.setattr(sys, 'argv', [name, *map(fill, args), '--debug'])
        runpy.run_path(str(scripts/f'dropclass-{name}.py'), run_name='__main__')


@pytest.mark.parametrize('name,args', [
    ('train', ['scenes', '--out', '', *TINY]), ('train', ['scenes', '--out=', *TINY]),
    ('train', ['folder', '--path', '', '--out', 'NEW']), ('train', ['scenes', '--recipe', '', '--out', 'NEW', *TINY]),
    ('compare', ['RUNS/plain', '--save', '']), ('compare', ['RUNS/plain', '']),
    ('predict', ['RUNS/plain', 'RUNS/plain/examples.png', '--out', '']),
    ('audit', ['RUNS/plain', '--out', '']), ('audit', ['RUNS/plain', '--data', '', '--out', 'NEW']),
    ('tune', ['--model', 'RUNS/plain/weights.safetensors', '--arch', 'small', '--data', 'scenes', '--out', '']),
    ('demo', ['--epochs', '1', '--out', '']),
])
def test_an_empty_value_is_refused(runs, command, tmp_path, monkeypatch, name, args):
    "A path would be the folder one stands in."
    monkeypatch.chdir(tmp_path)
    code,_,err = command(name, *[o.replace('RUNS', str(runs[0])) for o in args])
    assert code==2 and err.startswith('Error: ') and ' is empty, as ' in err and len(err.splitlines())==1
    assert not any(tmp_path.iterdir())


def test_a_diverged_run_is_an_error(command, tmp_path):
    """The learning rate is far too large from the second epoch on: the first one is kept, and nothing says that the run
    is finished."""
    wild = ['--schedule', 'onecycle', '--lr', '1e30', '--epochs', '40']
    code,out,err = command('train', 'scenes', '--method', 'plain', *wild, '--out', tmp_path/'run', *TINY)
    assert code==1 and err.startswith('Error: Training diverged in epoch') and 'learning rate' in err, err
    assert len(err.splitlines())==1
    assert not (tmp_path/'run'/'metrics.json').exists() and not (tmp_path/'run'/'weights.safetensors').exists()
    steep = ['--lr', 1000, '--epochs', 2, '--bs', 4, '--size', '32x48', '--threads', 1]
    code,_,err = command('train', 'scenes', *steep, '--data-options', 'n_train=16,n_valid=8', '--out', tmp_path/'steep')
    # NaN in validation
    assert code==1 and 'Training diverged in epoch 1' in err and not (tmp_path/'steep').exists(), err
    code,_,err = command('train', 'scenes', '--method', 'plain', '--lr', 'inf', '--out', tmp_path/'new', *TINY)
    assert code==2 and '`--lr` must be a finite number' in err


def test_no_means_no(command, tmp_path):
    "An option that is switched off by a word trains what False trains, to the last digit, and True something else."
    base = ['train', 'scenes', *TINY[:-2], '--epochs', '1']
    def loss(name, *args, data='n_train=16,n_valid=4'):
        code,_,err = command(*base, *args, '--data-options', data, '--out', tmp_path/name)
        assert code==0, err
        return (tmp_path/name/'history.csv').read_text()
    off = loss('a', '--dropclass', 'per_epoch=False')
    assert [loss(o, '--dropclass', f'per_epoch={o}')==off for o in ('no', 'yes')]==[True, False]
    plain = loss('b', data='n_train=16,n_valid=4,augment=False')
    assert [loss(f'{o}2', data=f'n_train=16,n_valid=4,augment={o}')==plain for o in ('no', 'on')]==[True, False]


def test_options_of_the_data_can_be_listed(command):
    "Every option of the data set that has a comment, with a kind, a default and an example that is read back."
    import inspect
    from dropclass.data.folder import folder_dls
    from dropclass.data.core import make_dls
    from dropclass.run.cli import typed_options
    code,out,err = command('train', 'folder', '--list-options')
    assert code==0, err
    data = out.split('--paste')[0]
    shown = {o.split('=')[0].strip(): o.split('=', 1)[1].split('  [')[0]
             for o in data.splitlines()[1:] if o.startswith('  ') and o[2]!=' '}
    named = {o for f in (folder_dls, make_dls) for o in inspect.signature(f).parameters}
    assert set(shown)<=named and {'masks', 'names', 'valid', 'label_map', 'crop', 'scale', 'flip', 'augment',
                                  'valid_bs', 'fit'}<=set(shown)
    for k,v in shown.items(): typed_options(dict(data='folder', data_options=f'{k}={v}'), {})
    assert 'crop=192x256  [several values or none; default none]' in out and 'needed' in out


def test_missing_arguments_exit_2(command):
    for name,args in (('compare', []), ('predict', ['x']), ('train', ['--nonsense'])): assert command(name, *args)[0]==2


def test_interrupted_before_the_first_epoch_leaves_nothing(command, tmp_path, monkeypatch):
    from dropclass.run.experiment import RunRecorder
    def interrupted(self): raise KeyboardInterrupt
    monkeypatch.setattr(RunRecorder, 'before_fit', interrupted)
    code,_,err = command('train', 'scenes', '--out', tmp_path/'run', *TINY)
    assert code==130 and 'No epoch was finished' in err and not (tmp_path/'run').exists()


def wait_for(test, job, seconds=600):
    "Wait until `test()` holds while a process runs."
    end = time.monotonic()+seconds
    while not test():
        assert job.poll() is None, job.communicate()
        assert time.monotonic()<end
        time.sleep(.005)


def test_killed_and_interrupted_runs_go_on_bit_for_bit(start, command, tmp_path):
    """Ctrl-C in the second epoch, SIGKILL in the middle of a later one, and the same weights as the run that was left
    alone."""
    args = ['--epochs', '5', '--bs', '4', '--size', '32x48', '--threads', '1', '--data-options', 'n_train=80,n_valid=4']
    assert command('train', 'scenes', *args, '--out', tmp_path/'whole')[0]==0
    history = tmp_path/'cut'/'history.csv'
    rows = lambda: len(history.read_text().splitlines())-1 if history.is_file() else 0

    job = start('train', 'scenes', *args, '--out', tmp_path/'cut')
    wait_for(lambda: (tmp_path/'cut'/'checkpoint.pt').is_file(), job)
    job.send_signal(signal.SIGINT)
    code,_,err = finish(job)
    assert code==130 and f"dropclass-train --resume --out {tmp_path/'cut'}" in err and 'Traceback' not in err
    first = rows()
    assert 1<=first<4

    job = start('train', '--resume', '--out', tmp_path/'cut')
    wait_for(lambda: rows()>first, job)
    time.sleep(.1)
    job.kill()
    assert finish(job)[0]==-signal.SIGKILL
    assert rows()<5 and not (tmp_path/'cut'/'metrics.json').exists()

    done = torch.load(tmp_path/'cut'/'checkpoint.pt', weights_only=True)['epoch']+1
    code,out,err = finish(start('train', '--resume', '--out', tmp_path/'cut'))
    assert code==0, err
    assert first<=done<5 and sum(o.startswith('epoch ') for o in out.splitlines())==5-done
    a,b = (load_file(tmp_path/o/'weights.safetensors') for o in ('whole', 'cut'))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path/'whole'/'confusion.json').read_text()==(tmp_path/'cut'/'confusion.json').read_text()


def test_demo_compares_in_both_worlds(command, monkeypatch, tmp_path):
    "On runs that are there; its page trains them in processes."
    from dropclass.run.config import Config
    from dropclass.run.demo import demo_configs
    from dropclass.run.experiment import train_run
    for name,config in demo_configs(epochs=2, n_train=8, n_test=4, size=(32,48), seed=0).items():
        train_run(Config(**config), tmp_path/'demo'/name, progress=False, write=lambda o: None)
    monkeypatch.setattr('dropclass.run.demo._start', lambda *args: pytest.fail('finished runs are trained again'))
    code,out,err = command('demo', '--epochs', 2, '--n-train', 8, '--n-test', 4, '--size', '32x48', '--out',
                           tmp_path/'demo')
    assert code==0, err
    assert 'In context' in out and 'Out of context' in out and 'This is one seed' in out
    assert 'class paste, tuned' in out
    for o in ('biased.png', 'unbiased.png', 'class_weights/metrics.json', 'dropclass/metrics.json',
              'fade_weights/metrics.json', 'class_paste/metrics.json'):
        assert (tmp_path/'demo'/o).is_file()
    configs = [json.loads((tmp_path/'demo'/o/'config.json').read_text())
               for o in ('class_weights', 'dropclass', 'fade_weights', 'class_paste')]
    for o in configs[1:]:
        assert all(configs[0][k]==o[k] for k in o if k not in ('method', 'dropclass', 'paste', 'hash'))
    arms = ['plain', 'dropclass', 'fade_weights', 'plain']
    assert [o['method'] for o in configs]==arms and {o['weights'] for o in configs}=={'median'}


def test_demo_stops_both_when_one_fails(monkeypatch, tmp_path, command):
    started = []
    def fake(config, out):
        code = "raise SystemExit('No space left')" if config['method']=='plain' else "import time; time.sleep(60)"
        with open(out.with_suffix('.log'), 'w') as log:
            started.append(subprocess.Popen([sys.executable, '-c', code], stderr=log))
        return started[-1]
    monkeypatch.setattr('dropclass.run.demo._start', fake)
    code,_,err = command('demo', '--out', tmp_path/'demo')
    assert code==2 and 'Training class_weights failed: No space left' in err and len(err.splitlines())==1
    assert started[1].poll() is not None


def test_interrupted_demo_stops_its_processes(start, tmp_path):
    job = start('demo', '--out', tmp_path/'demo', start_new_session=True)
    wait_for(lambda: (tmp_path/'demo'/'dropclass.log').is_file(), job)
    time.sleep(.5)
    os.killpg(job.pid, signal.SIGINT) # As a terminal does
    code,_,err = finish(job, timeout=120)
    assert code==130 and 'the same command goes on' in err and 'Traceback' not in err
    with pytest.raises(ProcessLookupError): os.killpg(job.pid, 0)
