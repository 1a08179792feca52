"""The script that makes all runs of a plan: finished ones are skipped, interrupted ones resumed, rows of other code
refused."""
import argparse
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from dropclass.data.camvid import write_toy_camvid

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT/'benchmarks'/'camvid'/'run.py'
sys.path.insert(0, str(SCRIPT.parent))
import run as script # noqa: E402


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A toy copy of CamVid and a plan of three small runs."
    folder = tmp_path_factory.mktemp('plan')
    write_toy_camvid(folder/'data', n=8)
    plan = dict(title='toy',
                shared=dict(data='camvid', arch='small', size=[48, 64], epochs=3, bs=4, threads=1, valid_every=2,
                            data_options=dict(crop=[32, 48])), dropclass=dict(alpha=1., both_paths=False),
                arms=dict(plain=dict(title='plain'),
                          drop=dict(title='DropClass', method='dropclass', weights='median',
                                    dropclass=dict(draw='cycle'))),
                order=[dict(arms=['plain', 'drop'], seeds=[0]), dict(arms=['plain'], seeds=[0, 1])])
    (folder/'toy.json').write_text(json.dumps(plan))
    return folder


def command(home, *more): return [sys.executable, str(SCRIPT), str(home/'toy.json'), '--data', str(home/'data'),
                                  '--runs', str(home/'runs'), '--results', str(home/'results'), '--poll', '.1', *more]
def go(home, *more):
    "Run the script in this process; the runs that it starts are processes of their own."
    out,err,code = io.StringIO(),io.StringIO(),0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', command(home, *more)[1:])
        patch.setattr(signal, 'signal', lambda *_: None) # Those of the tests stay
        try: script.main()
        except SystemExit as e: code = e.code
    if isinstance(code, str): return SimpleNamespace(returncode=1, stdout=out.getvalue(), stderr=code)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def rows(home): return script.read_rows(home/'results'/'toy.csv')


def test_every_plan_that_comes_along_is_sound():
    from dropclass.run.config import Config
    for file in (ROOT/'benchmarks').glob('*/*.json'):
        plan = script.read_plan(str(file))
        assert len(plan['runs'])>=9 and len(set(plan['runs']))==len(plan['runs']) # Three arms of three seeds
        hashes = [json.dumps(script.run_options(plan, *o), sort_keys=True, default=str) for o in plan['runs']]
        assert len(set(hashes))==len(hashes), 'two arms are the same'
        for arm,seed in plan['runs']: Config(**script.run_options(plan, arm, seed))


def test_interrupted_then_finished_then_skipped(home):
    assert '0 of 3 runs are done, 0 to do' in go(home, '--seeds', '7').stdout
    process = subprocess.Popen(command(home, '--jobs', '1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    history = home/'runs'/'toy'/'plain-s0'/'history.csv'
    deadline = time.monotonic()+120
    while not history.is_file() and time.monotonic()<deadline and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert history.is_file() and rows(home)==[]
    before = len(history.read_text().splitlines())-1
    result = go(home, '--jobs', '2')
    assert result.returncode==0, result.stdout+result.stderr
    assert sorted((o['arm'], o['seed']) for o in rows(home))==[('drop', '0'), ('plain', '0'), ('plain', '1')]
    log = (home/'runs'/'toy'/'plain-s0.log').read_text()
    assert log.count('epoch   1/3')==1 or before==0, 'the first epoch was trained again'
    again = go(home)
    assert '3 of 3 runs are done, 0 to do' in again.stdout and len(rows(home))==3


def test_rows_come_from_the_folders(home):
    for row in rows(home):
        kept = home/'results'/row['folder']
        metrics = json.loads((kept/'metrics.json').read_text())
        miou = 100*metrics['tests']['valid'][row['path']]['miou']
        assert float(row[f"miou_{row['path']}"])==pytest.approx(miou, abs=1e-3)
        assert sorted(o.name for o in kept.iterdir())==sorted(o.replace('*', '') for o in script.KEPT)
        assert row['code']==script.code_hash() and len(row['config'])==12
    drop = next(o for o in rows(home) if o['arm']=='drop')
    config = json.loads((home/'results'/drop['folder']/'config.json').read_text())
    assert drop['path']=='drop' and drop['miou_mean']
    assert config['dropclass']=={'alpha':1., 'both_paths':False, 'draw':'cycle'}
    listed = go(home, '--list').stdout
    assert '3 of 3 runs are done' in listed and 'DropClass' in listed


def test_rows_of_other_code_are_refused(home, tmp_path):
    table = tmp_path/'toy.csv'
    changed = [{**o, 'code':'0'*12, 'commit':'abc1234567'} for o in rows(home)[:1]]
    with open(table, 'w', newline='') as f:
        writer = csv.DictWriter(f, script.COLUMNS)
        writer.writeheader()
        writer.writerows(changed)
    result = go(home, '--results', str(tmp_path))
    assert result.returncode==1 and 'abc1234567' in result.stderr and 'git worktree add' in result.stderr
    assert script.read_rows(table)==changed


def test_rows_of_code_with_the_same_numbers_are_welcome(home, tmp_path, monkeypatch):
    """Five epochs decide, not the hash: a change that no number depends on passes, one that a number depends on does
    not."""
    changed = {'passes':'a = b = 1',
               'refused':'Config.__dataclass_fields__["wd"].default = .05\nConfig.__init__.__defaults__ = tuple(.05 '
                         'if o==5e-4 else o for o in Config.__init__.__defaults__)'}
    results = tmp_path/'results'
    shutil.copytree(home/'results', results)
    for name,more in changed.items():
        for o in ('dropclass', 'benchmarks'):
            shutil.copytree(ROOT/o, tmp_path/name/o, ignore=shutil.ignore_patterns('__pycache__'))
        (tmp_path/name/'COMMIT').write_text(f'{name}00'[:10])
        with open(tmp_path/name/'dropclass'/'run'/'experiment.py', 'a') as f: f.write('\n'+more+'\n')
    refused = go(home, '--results', str(results), '--same', str(tmp_path/'refused'), '--epochs', '2')
    assert refused.returncode==1 and 'numbers differ' in refused.stderr and not (results/'same_code.json').is_file()
    table = results/'toy.csv'
    old = table.read_text().replace(script.code_hash(), script.code_hash(tmp_path/'passes'))
    # Rows of the other code, in whatever order they ended, and one run to do
    table.write_text(''.join(o for o in old.splitlines(True) if not o.startswith('toy,plain,1,')))
    assert len(script.read_rows(table))==2
    assert go(home, '--results', str(results)).returncode==1
    passed = go(home, '--results', str(results), '--same', str(tmp_path/'passes'), '--epochs', '2', '--arms', 'drop')
    assert passed.returncode==0 and passed.stdout.count('all equal')==1, passed.stdout+passed.stderr
    note, = json.loads((results/'same_code.json').read_text())
    assert (note['commits'][0]=='passes00' and note['arms']==['drop']
            and script.same_codes(results, script.code_hash())==set(note['codes']))
    assert go(home, '--results', str(results)).returncode==0
    assert len({o['code'] for o in script.read_rows(table)})==2 and len(script.read_rows(table))==3
    # As if a run had ended at once
    monkeypatch.setattr(script, 'start', lambda *args, **kwargs: subprocess.Popen([sys.executable, '-S', '-c', '']))
    ended = go(home, '--results', str(results), '--same', str(tmp_path/'passes'))
    assert ended.returncode==1 and 'ended after 0 epochs' in ended.stderr


def test_a_run_stays_what_began_it(home, tmp_path):
    """Neither other code nor other settings go on with a run, whatever table they write to; code with the same numbers
    does, and the row names who began."""
    plan,out = script.read_plan(str(home/'toy.json')),tmp_path/'plain-s0'
    mine = script.begun(plan, 'plain', 0, out, 'first00000', 'a'*12, set())
    out.mkdir()
    assert script.begun(plan, 'plain', 0, out, 'second0000', 'b'*12, {'a'*12})==mine and mine['commit']=='first00000'
    with pytest.raises(SystemExit, match='code of commit first00000'):
        script.begun(plan, 'plain', 0, out, 'second0000', 'b'*12, set())
    plan['shared'] = {**plan['shared'], 'lr':.5}
    with pytest.raises(SystemExit, match='other settings than the plan'):
        script.begun(plan, 'plain', 0, out, 'first00000', 'a'*12, set())
    out.rmdir() # Deleted, so begun anew
    assert script.begun(plan, 'plain', 0, out, 'first00000', 'a'*12, set())['options']['lr']==.5


def test_one_process_and_one_row_for_each_run(home, tmp_path):
    with script.alone(home/'runs'/'toy'):
        result = go(home)
        assert result.returncode==1 and 'Another process makes runs' in result.stderr
    assert go(home).returncode==0
    table = tmp_path/'toy.csv'
    script.add_row(table, rows(home)[0])
    with pytest.raises(SystemExit, match='already'): script.add_row(table, rows(home)[0])
    assert len(script.read_rows(table))==1


@pytest.mark.parametrize('table', [o for o in sorted((ROOT/'results').glob('*/*.csv')) if o.with_suffix('').is_dir()],
                         ids=lambda o: f'{o.parent.name}/{o.name}')
def test_stored_rows_share_a_table_only_where_they_may(table):
    rows = script.read_rows(table)
    script.check_code(rows, rows[0]['code'], script.same_codes(table.parent, rows[0]['code']))
    with pytest.raises(SystemExit):
        script.check_code([*rows, {**rows[0], 'code':'0'*12}], rows[0]['code'],
                          script.same_codes(table.parent, rows[0]['code']))


def test_stored_runs_say_where_their_class_weights_counted():
    "The default has changed, so a configuration that does not say would be read as another training."
    configs = [json.loads(o.read_text()) for o in (ROOT/'results').rglob('config.json')]
    weighted = [o for o in configs if o['method'] in ('dropclass', 'no_drop') and o['weights']!='none']
    assert len(weighted)>50 and all(isinstance(o['dropclass'].get('masked_weights'), bool) for o in weighted)


def test_no_run_starts_with_code_that_changed_meanwhile(home, tmp_path, monkeypatch, capsys):
    hashes = iter(['a'*12, 'b'*12])
    monkeypatch.setattr(script, 'code_hash', lambda **kwargs: next(hashes))
    monkeypatch.setattr(script, 'start', lambda *args: pytest.fail('a run was started'))
    args = argparse.Namespace(results=tmp_path, runs=tmp_path, arms=None, seeds=None, jobs=1, minutes=None, poll=0)
    with pytest.raises(SystemExit): script.run_all(args, script.read_plan(str(home/'toy.json')))
    assert 'has changed' in capsys.readouterr().out and not script.read_rows(tmp_path/'toy.csv')


def test_code_hash_sees_code_and_nothing_else(tmp_path):
    (tmp_path/'dropclass').mkdir()
    file = tmp_path/'dropclass'/'core.py'
    file.write_text('"Doc"\ndef f(x):\n    "Says."\n    return x # why\n')
    first = script.code_hash(tmp_path)
    file.write_text('"Other"\n# %% cell\ndef f(x):\n    "Says more."\n    return x\n')
    assert script.code_hash(tmp_path)==first
    (tmp_path/'dropclass'/'data_scenes.py').write_text('x = 1\n')
    assert script.code_hash(tmp_path)==first # Only trainings on scenes pass through it
    assert script.code_hash(tmp_path, 'scenes')!=first
    file.write_text('def f(x):\n    "Says."\n    return x+1\n')
    assert script.code_hash(tmp_path)!=first


def test_unknown_plan_and_arm(home, tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), 'tpu', '--data', str(home)], capture_output=True, text=True,
                            env=dict(os.environ))
    assert result.returncode==1 and "no plan 'tpu'" in result.stderr and 'cpu' in result.stderr
    broken = json.loads((home/'toy.json').read_text())
    broken['order'].append(dict(arms=['gone'], seeds=[0]))
    (tmp_path/'toy.json').write_text(json.dumps(broken))
    with pytest.raises(SystemExit, match='gone'): script.read_plan(str(tmp_path/'toy.json'))


def test_packed_folder_runs_on_its_own(home, tmp_path):
    import pack
    pack.pack(tmp_path/'packed', home/'data', quality=95)
    plan = json.loads((home/'toy.json').read_text())
    packed = {**plan, 'order':plan['order'][:1]} # One run of each arm
    (tmp_path/'packed'/'code'/'benchmarks'/'camvid'/'toy.json').write_text(json.dumps(packed))
    (tmp_path/'python3').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path/'python3').chmod(0o755)
    env = {**os.environ, 'PATH':f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(['sh', str(tmp_path/'packed'/'go.sh'), 'toy', '--arms', 'plain', '--jobs', '1'],
                            capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode==0, result.stdout+result.stderr
    rows = script.read_rows(tmp_path/'packed'/'results'/'toy.csv')
    assert len(rows)==1 and rows[0]['code']==script.code_hash()
    from dropclass.data.camvid import camvid_items
    (x,y),(a,b) = camvid_items(tmp_path/'packed'/'camvid', size=None)[0][0],camvid_items(home/'data', size=None)[0][0]
    assert (y==b).all() and (x.float()-a.float()).abs().mean()<8
    with pytest.raises(FileExistsError): pack.pack(tmp_path/'packed', home/'data')
