"""Make all runs of a plan: skip the finished, resume the interrupted, several at once, one csv row for each.

    python benchmarks/camvid/run.py cpu --data FOLDER            # the plan benchmarks/camvid/cpu.json
    python benchmarks/camvid/run.py cpu --list                   # what is done and what is left
    python benchmarks/camvid/run.py cpu --data FOLDER --same OLD # does this code train to the same numbers as that in
    the folder OLD?
    python benchmarks/camvid/run.py benchmarks/scenes/map.json   # another plan, on another data set
    python benchmarks/camvid/run.py pretrained --data FOLDER --weights FOLDER # a plan that starts from a file of
    trained weights, which lies in a folder of yours

A plan is a table of arms (settings of `dropclass.run.experiment.Config` on top of shared ones), and the order in which
arms and seeds are run. Every finished run adds a row to
results/camvid/PLAN.csv, and a folder of small files to results/camvid/PLAN/ARM-sSEED: configuration, learning curve,
confusion matrices of all paths, the counts of every shift of the class bias and, unless
the plan says `"context": false`, the classifier's weights and counts with every class erased, once for each of the
plan's "fills".

A row names the commit and the hash of the code that training passes through. Rows of different code share a table only
where --same has shown that both give the same numbers: it trains
the first epochs of the arms that are there with both, on one machine, and writes into same_code.json beside the rows if
every figure is equal to the last digit. Elsewhere the script says which commit to check out. A run is
always trained to its planned end; it is never lengthened.
"""
import argparse
import ast
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

HERE,ROOT = Path(__file__).resolve().parent,Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT)) # Where the package is not installed
MODULES = ('core','features','importance','losses','fused','schedules','head','models','callback','baselines',
           'data_core','data_camvid','data_sampling','metrics','experiment',
           'rivals','surgery','fold','stats','paste','prior','data/core','data/sampling','analysis/ablations',
           'run/config',
           'run/experiment') # A folder has the old names or the new ones
# Beside MODULES
OTHER_DATA = {'scenes':('data_scenes','ranks','data/scenes'), 'camvid':('data/camvid',), 'folder':('data/folder',)}
KEPT = ('config.json','history.csv','metrics.json','confusion.json','prior.npz','context*.json','classifier.json')
COLUMNS = ['plan','arm','seed','commit','code','config','finished','device','threads','torch','seconds','epochs','path',
           'miou_plain','rare_plain','miou_drop','rare_drop','miou_mean','rare_mean','best_miou','still_rising',
           'folder']


# ---------------------------------------------------------------- plan and code

def read_plan(name):
    "A plan by its name or file, with its runs in order as (arm, seed)."
    path = Path(name) if name.endswith('.json') else HERE/f'{name}.json'
    if not path.is_file():
        raise SystemExit(f"There is no plan {name!r}: choose "
                         f"{', '.join(sorted(o.stem for o in HERE.glob('*.json')))}, or give a .json file")
    plan = json.loads(path.read_text())
    plan['name'] = path.stem
    pairs = [(arm, seed) for stage in plan['order'] for seed in stage['seeds'] for arm in stage['arms']]
    unknown = sorted({arm for arm,_ in pairs}-set(plan['arms']))
    if unknown: raise SystemExit(f"The order of {path} names {', '.join(unknown)}, which is no arm of it")
    plan['runs'] = list(dict.fromkeys(pairs))
    return plan

def run_options(plan, arm, seed, data=None, weights=None):
    "The fields of `Config` of one run; a file of trained weights lies in the folder `weights`."
    own = {k:v for k,v in plan['arms'][arm].items() if k!='title'}
    options = {**plan['shared'], 'method':'plain', **own, 'seed':seed, 'path':data}
    if data and options['data']=='folder': # Images, masks, classes and the list that validates lie side by side
        files = {k:str(Path(data)/v) for k,v in options['data_options'].items() if k in ('masks','names','valid')}
        options |= dict(path=str(Path(data)/'images'), data_options={**options['data_options'], **files})
    if weights and options.get('weights_file'): options['weights_file'] = str(Path(weights)/options['weights_file'])
    if options['method'] in ('dropclass','no_drop'):
        options['dropclass'] = {**plan.get('dropclass', {}), **own.get('dropclass', {})}
    return options

def code_hash(root=ROOT, data='camvid'):
    "Hash of the modules that training on a data set passes through, without comments and docstrings."
    def bare(path):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, 'body', None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant): first.value.value = ''
        return ast.unparse(tree)
    found = [o for o in (*MODULES, *OTHER_DATA.get(data, ())) if (root/'dropclass'/f'{o}.py').is_file()]
    return hashlib.sha256('\0'.join(f'{o}\n'+bare(root/'dropclass'/f'{o}.py') for o in found).encode()).hexdigest()[:12]

def commit_of(root=ROOT):
    "The commit that was packed, or that is checked out."
    if (root/'COMMIT').is_file():
        return (root/'COMMIT').read_text() # What pack.py noted; the folder may lie in another repository
    try:
        return subprocess.run(['git', '-C', root, 'rev-parse', '--short=10', 'HEAD'], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return 'unknown'


# ---------------------------------------------------------------- rows

def read_rows(table):
    "The rows of a table, none if there is no table yet."
    if not table.is_file(): return []
    with open(table, newline='') as f: return list(csv.DictReader(f))

def same_codes(results, code):
    "All code that was shown to give the same numbers as this, by any chain of comparisons."
    path,found = results/'same_code.json',{code}
    pairs = [set(o['codes']) for o in json.loads(path.read_text())] if path.is_file() else []
    for _ in pairs: found.update(*(o for o in pairs if o&found))
    return found

def check_code(rows, code, same=()):
    "Refuse to add rows of this code to rows of other code."
    other = {o['commit'] for o in rows if o['code'] not in {code, *same}}
    if other:
        raise SystemExit(f"The rows there were made by other code (commit {', '.join(sorted(other))}): check that "
                         f"commit out in a folder of its own "
            f"(git worktree add ../frozen {sorted(other)[0]}) and run its script with --results pointing here, show "
            f"with --same ../frozen that the numbers are the same, or start another table with --results")

def add_row(table, row):
    "Append a row; the file is whole at any time."
    rows = read_rows(table)
    if any((o['arm'], int(o['seed']))==(row['arm'], int(row['seed'])) for o in rows):
        raise SystemExit(f"{table} has a row of {row['arm']} seed {row['seed']} already: another process has added "
                         f"it, so this one is left out")
    rows.append(row)
    from dropclass.core import writing
    table.parent.mkdir(parents=True, exist_ok=True)
    extra = dict.fromkeys(k for o in rows for k in o if k not in COLUMNS)
    with writing(table) as temp, open(temp, 'w', newline='') as f:
        writer = csv.DictWriter(f, [*COLUMNS[:-1], *extra, COLUMNS[-1]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def still_rising(history):
    """Mean mIoU of the last fifth of the epochs minus that of the fifth before, in points; validation may be every few
    epochs."""
    seen = history[history.miou.notna()]
    last = history.epoch.max()+1
    mean = lambda a,b: seen.miou[(seen.epoch>=a*last)&(seen.epoch<b*last)].mean()
    return round(100*(mean(.8, 1.01)-mean(.6, .8)), 2)

def make_row(plan, arm, seed, folder, commit, code):
    "The row of a finished run."
    import pandas as pd, torch
    config,metrics = (json.loads((folder/o).read_text()) for o in ('config.json','metrics.json'))
    history = pd.read_csv(folder/'history.csv')
    row = dict(plan=plan['name'], arm=arm, seed=seed, commit=commit, code=code, config=config['hash'],
               finished=date.today().isoformat(), threads=plan['shared'].get('threads') or 1,
               device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', torch=torch.__version__,
               seconds=metrics['seconds'], epochs=metrics['epochs'],
               path=metrics['predicts'], best_miou=round(100*history.miou.max(), 2), still_rising=still_rising(history),
               folder=f"{plan['name']}/{arm}-s{seed}")
    for test,found in metrics['tests'].items():
        prefix = '' if test=='valid' else f'{test}_'
        for p,scores in found.items():
            row |= {f'{prefix}miou_{p}':round(100*scores['miou'], 3),
                    f'{prefix}rare_{p}':round(100*scores['rare_miou'], 3)}
    return row


# ---------------------------------------------------------------- one run, in a process of its own

def train_one(plan, arm, seed, data, weights, out):
    "Train, or resume, one run, then measure how it leans on context."
    import warnings
    warnings.filterwarnings('ignore')
    from dropclass.analysis.context import colocation
    from dropclass.analysis.entanglement import classifier_weight
    from dropclass.core import write_json
    from dropclass.run.config import Config
    from dropclass.run.experiment import make_data, train_run
    config = Config(**run_options(plan, arm, seed, data, weights))
    resume = (out/'checkpoint.pt').is_file()
    if not resume and out.is_dir(): shutil.rmtree(out)
    run = train_run(config, out, resume, progress=False, write=lambda o: print(o, flush=True))
    if plan.get('context', True):
        model,dls = run.load_model(),make_data(config)
        write_json(out/'classifier.json', classifier_weight(model, None, len(run.spec)).tolist())
        for fill in plan.get('fills', ['mean']): # Those that say how they fill carry it in their name
            name = f'context-{fill}.json' if 'fills' in plan else 'context.json'
            colocation(model.to(dls.device), dls.valid, run.spec, fill, label=f'{arm}, seed {seed}').save(out/name)
    (out/'done').touch()


# ---------------------------------------------------------------- all runs

MEMORY = ':'.join(('glibc.malloc.hugetlb=1', 'glibc.malloc.mmap_threshold=4000000000',
                   'glibc.malloc.trim_threshold=8000000000', 'glibc.malloc.top_pad=268435456'))

def start(args, plan, arm, seed, out, root=ROOT):
    "Start one run in a process of its own, of this code or of another folder's; what it prints goes to a log."
    threads = str(plan['shared'].get('threads') or 1)
    data = [o for k in ('data','weights') if getattr(args, k) is not None for o in (f'--{k}', str(getattr(args, k)))]
    env = {**os.environ, 'OMP_NUM_THREADS':threads, 'MKL_NUM_THREADS':threads, 'PYTHONUNBUFFERED':'1',
           'PYTHONPATH':os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))}
    # Blocks of memory stay with the process, in large pages: a step on a CPU takes 8 to 15 % less, the numbers are the
    # same
    env.setdefault('GLIBC_TUNABLES', MEMORY)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix('.log'), 'a') as log:
        return subprocess.Popen([sys.executable, str(root/'benchmarks'/'camvid'/'run.py'), args.plan, *data, '--one',
                                 arm, str(seed), str(out)], stdin=subprocess.DEVNULL, stdout=log,
                                 stderr=subprocess.STDOUT, env=env)

def keep(results, plan, arm, seed, folder, commit, code):
    "Copy a run's small files, then add its row."
    target = results/plan['name']/f'{arm}-s{seed}'
    from dropclass.core import write_json
    target.mkdir(parents=True, exist_ok=True)
    for o in (o for kept in KEPT for o in folder.glob(kept)): shutil.copyfile(o, target/o.name)
    saved = json.loads((target/'config.json').read_text())
    # Where images and weights were is nobody's business
    file = saved['weights_file'] and Path(saved['weights_file']).name
    named = run_options(plan, arm, seed)['data_options']
    write_json(target/'config.json', {**saved, 'path':None, 'weights_file':file, 'data_options':named})
    row = make_row(plan, arm, seed, folder, commit, code)
    add_row(results/f"{plan['name']}.csv", row)
    return row

@contextlib.contextmanager
def alone(folder):
    "Hold a folder of runs against a second process; the system lets go of it however this one ends."
    try: import fcntl
    except ImportError: # Not on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'.lock', 'w') as f:
        try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
        except OSError:
            text = f"Another process makes runs in {folder}: wait for its end, or give another --runs"
            raise SystemExit(text) from None
        yield

def begun(plan, arm, seed, out, commit, code, same):
    """What made a run: noted beside its folder when it begins; one that other code or settings have begun is not gone
    on with."""
    path,mine = out.with_suffix('.json'),json.loads(json.dumps(dict(commit=commit, code=code,
                                                                    options=run_options(plan, arm, seed))))
    if out.is_dir() and path.is_file():
        found = json.loads(path.read_text())
        other = (f'the code of commit {found["commit"]}' if found['code'] not in {code, *same}
                 else 'other settings than the plan has now' if found['options']!=mine['options'] else None)
        if other:
            raise SystemExit(f"{out} was begun with {other}: go on with those, delete the folder, or give another "
                             f"--runs")
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    from dropclass.core import write_json
    write_json(path, mine)
    return mine

def run_all(args, plan):
    "Work through the plan until it is done or the time is over."
    table,commit,code = args.results/f"{plan['name']}.csv",commit_of(),code_hash(data=plan['shared']['data'])
    same = same_codes(args.results, code)
    check_code(read_rows(table), code, same)
    done = {(o['arm'], int(o['seed'])) for o in read_rows(table)}
    todo = [(arm, seed) for arm,seed in plan['runs'] if (arm, seed) not in done
            and (not args.arms or arm in args.arms) and (not args.seeds or seed in args.seeds)]
    end,running,failed = time.monotonic()+60*args.minutes if args.minutes else float('inf'),{},[]
    print(f"{plan['title']}\n{len(done)} of {len(plan['runs'])} runs are done, {len(todo)} to do, {args.jobs} at "
          f"once; code {code}", flush=True)
    try:
        while (todo or running) and time.monotonic()<end:
            if todo and len(running)<args.jobs and code_hash(data=plan['shared']['data'])!=code:
                print(f"The code has changed since the start (commit {commit}, code {code}): {len(todo)} runs are not "
                      f"started", flush=True)
                failed,todo = failed+todo,[]
            while todo and len(running)<args.jobs:
                arm,seed = todo.pop(0)
                out = args.runs/plan['name']/f'{arm}-s{seed}'
                by = begun(plan, arm, seed, out, commit, code, same)
                running[arm,seed] = out,by,None if (out/'done').is_file() else start(args, plan, arm, seed, out)
                print(f"start  {arm} seed {seed}", flush=True)
            for (arm,seed),(out,by,process) in list(running.items()):
                if process and process.poll() is None: continue
                del running[arm,seed]
                if process and process.returncode:
                    failed.append((arm, seed))
                    print(f"failed {arm} seed {seed}: see {out.with_suffix('.log')}", flush=True)
                    continue
                row = keep(args.results, plan, arm, seed, out, by['commit'], by['code'])
                print(f"done   {arm} seed {seed}: mIoU {row['miou_'+row['path']]} rare {row['rare_'+row['path']]} in "
                      f"{row['seconds']:.0f} s", flush=True)
            time.sleep(args.poll)
    finally:
        for *_,process in running.values():
            if process and process.poll() is None: process.terminate()
        for *_,process in running.values():
            if process: process.wait()
    if todo or running:
        print(f"Time is over: {len(todo)+len(running)} runs are left; the same command goes on, running ones from "
              f"their last epoch", flush=True)
    if failed: raise SystemExit(1)

def first_epochs(args, plan, arm, root, out):
    "Train the first epochs of an arm with the code of a folder; gives its learning curve."
    import pandas as pd
    shutil.rmtree(out, ignore_errors=True)
    process,curve = start(args, plan, arm, 0, out, root),out/'history.csv'
    try:
        while True:
            ended,table = process.poll() is not None,pd.read_csv(curve) if curve.is_file() else []
            if len(table)>=args.epochs: break
            if ended:
                raise SystemExit(f"{arm} ended after {len(table)} epochs with the code in {root.name}, {args.epochs} "
                                 f"are to be compared (--epochs): see {out.with_suffix('.log')}")
            time.sleep(args.poll)
    finally:
        process.terminate()
        process.wait()
    return table[table.epoch<args.epochs]

def show_same(args, plan):
    "Compare this code with that of another folder, and note it beside the rows if all numbers are equal."
    other,data = args.same.resolve(),plan['shared']['data']
    codes,commits = ([f(o) for o in (other, ROOT)] for f in (lambda o: code_hash(o, data), commit_of))
    rows = read_rows(args.results/f"{plan['name']}.csv")
    arms = args.arms or list(dict.fromkeys(o['arm'] for o in rows))
    for arm in arms:
        with ThreadPoolExecutor(2) as pool:
            folders = [args.runs/'same'/f'{arm}-{code}' for code in codes]
            old,new = pool.map(partial(first_epochs, args, plan, arm), (other, ROOT), folders)
        if not old.equals(new):
            raise SystemExit(f"{arm}: the numbers differ, so rows of commit {commits[1]} need a table of their "
                             f"own\n{old}\n{new}")
        print(f"{arm}: {args.epochs} epochs, {old.notna().sum().sum()} numbers, all equal; the last training loss is "
              f"{old.train_loss.iloc[-1]}", flush=True)
    path = args.results/'same_code.json'
    notes = json.loads(path.read_text()) if path.is_file() else []
    note = dict(plan=plan['name'], codes=codes, commits=commits, arms=arms, epochs=args.epochs,
                date=date.today().isoformat())
    from dropclass.core import write_json
    write_json(path, [*notes, note])

def show(args, plan):
    "Print what is done and what is left."
    rows = {(o['arm'], int(o['seed'])):o for o in read_rows(args.results/f"{plan['name']}.csv")}
    print(f"{plan['title']}\n{len(rows)} of {len(plan['runs'])} runs are done")
    for arm in dict.fromkeys(o for o,_ in plan['runs']):
        cells = [f"s{s} "
                 f"{float(rows[a,s]['miou_'+rows[a,s]['path']]):.1f}/{float(rows[a,s]['rare_'+rows[a,s]['path']]):.1f}"
                 if (a,s) in rows else f's{s} -' for a,s in plan['runs'] if a==arm]
        print(f"{arm:<20} {'  '.join(cells)}   {plan['arms'][arm]['title']}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('plan', help='name of a plan beside this file, or a .json file')
    parser.add_argument('--data', type=Path, help='folder of a CamVid copy, or of the images of another data set')
    parser.add_argument('--weights', type=Path, help='folder of the file of trained weights that a plan names')
    parser.add_argument('--jobs', type=int, default=2, help='runs at the same time')
    parser.add_argument('--arms', nargs='*', help='only these arms')
    parser.add_argument('--seeds', nargs='*', type=int, help='only these seeds')
    parser.add_argument('--minutes', type=float, help='stop after this time; the rest can be resumed')
    parser.add_argument('--runs', type=Path, default=ROOT/'runs'/'camvid',
                        help='where run folders with weights and checkpoints go')
    parser.add_argument('--results', type=Path, default=ROOT/'results'/'camvid', help='where rows and small files go')
    parser.add_argument('--poll', type=float, default=2., help='seconds between looks at the running ones')
    parser.add_argument('--same', type=Path, metavar='OLD', help='compare with the code in this folder, and stop')
    parser.add_argument('--epochs', type=int, default=5, help='with --same: epochs to compare')
    parser.add_argument('--list', action='store_true', help='show what is done, and stop')
    parser.add_argument('--one', nargs=3, metavar=('ARM','SEED','OUT'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = read_plan(args.plan)
    if args.list: return show(args, plan)
    if args.data is None and plan['shared']['data']!='scenes': parser.error("give --data, the folder of the images")
    data = None if args.data is None else str(args.data)
    if args.weights is None and plan['shared'].get('weights_file'):
        parser.error(f"give --weights, the folder that holds {plan['shared']['weights_file']}")
    weights = None if args.weights is None else str(args.weights)
    if args.one: return train_one(plan, args.one[0], int(args.one[1]), data, weights, Path(args.one[2]))
    if args.same: return show_same(args, plan)
    for o in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError): signal.signal(o, lambda *_: sys.exit(143))
    with alone(args.runs/plan['name']): run_all(args, plan)

if __name__=='__main__': main()
