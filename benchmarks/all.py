"""Every benchmark, one after the other, each into its table under results/.

    python benchmarks/all.py                 about 12 minutes on two quiet cores
    python benchmarks/all.py --only step_time,memory
    python benchmarks/all.py --quick         tiny images, to try the scripts; tables go to a temporary folder
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastcore.script import call_parse, store_true

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    'step_time': ['--rounds', '5'],
    'parts': ['--rounds', '5'],
    'memory': [],
    'classes': ['--rounds', '5'],
    'image_size': ['--rounds', '5'],
    'schedule': ['--points', '20'],
    'fused_loss': ['--rounds', '5'],
    'data_loading': [],
    'audit': [],
}
QUICK = {
    'step_time': ['--archs', 'small', '--size', '32x64', '--rounds', '5'],
    'parts': ['--archs', 'small', '--size', '32x64', '--rounds', '5'],
    'memory': ['--archs', 'small', '--size', '32x64', '--variants', 'plain;dropclass'],
    'classes': ['--arch', 'small', '--size', '32x32', '--classes', '2,300'],
    'image_size': ['--arch', 'small', '--sizes', '32x64'],
    'schedule': ['--arch', 'small', '--size', '32x64', '--points', '5'],
    'fused_loss': ['--cases', '19', '--rounds', '3'],
    'data_loading': ['--rounds', '3', '--small'],
    'audit': ['--arch', 'small', '--images', '4'],
}


@call_parse
def main(
    only:str='', # Scripts to run, separated by commas; empty runs all
    threads:int=2, # Threads of PyTorch
    device:str='cpu', # Where to run: cpu or cuda; tables of a GPU get its name: step_time_cuda.csv
    folder:str='', # Where the tables go; empty is results/
    quick:store_true=False, # Only try the scripts?
):
    "Run the benchmarks."
    names = only.split(',') if only else list(SCRIPTS)
    unknown = [o for o in names if o not in SCRIPTS]
    if unknown: raise ValueError(f"There is no benchmark {unknown[0]!r}: choose of {', '.join(SCRIPTS)}")
    target = Path(folder) if folder else Path(tempfile.mkdtemp()) if quick else HERE.parent/'results'
    for name in names:
        start,suffix = time.perf_counter(),'' if device=='cpu' else f'_{device}'
        where = ['--threads',
                 '1,2' if name=='fused_loss'
                 and device=='cpu' else str(threads)]+([] if name=='audit' else ['--device', device])
        args = [*(QUICK if quick else SCRIPTS)[name], *where, '--csv', str(target/f'{name}{suffix}.csv')]
        print(f"\n{name} {' '.join(args)}", flush=True)
        subprocess.run([sys.executable, '-W', 'ignore', str(HERE/f'{name}.py'), *args], check=True)
        print(f'{time.perf_counter()-start:.0f} s', flush=True)
