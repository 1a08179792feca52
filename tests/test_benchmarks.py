"Every benchmark script runs, on tiny images, and writes the table that its page reads."
import csv, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ('step_time', 'parts', 'memory', 'classes', 'image_size', 'schedule', 'fused_loss', 'data_loading', 'audit')

def columns(path):
    with open(path) as f: return csv.DictReader(f).fieldnames

@pytest.mark.slow
@pytest.mark.parametrize('name', SCRIPTS)
def test_benchmark_runs(tmp_path, name):
    subprocess.run([sys.executable, '-W', 'ignore', ROOT/'benchmarks'/'all.py', '--quick', '--only', name, '--folder', tmp_path], check=True, timeout=600)
    stored = ROOT/'results'/f'{name}.csv'
    assert columns(tmp_path/f'{name}.csv')==columns(stored)

def test_every_table_is_shown():
    "A table without a page is forgotten, and a page without a table fails."
    pages = ''.join(o.read_text() for o in [*(ROOT/'nbs'/'benchmarks').glob('*.ipynb'), ROOT/'nbs'/'35_fused.ipynb'])
    for name in SCRIPTS:
        assert (ROOT/'results'/f'{name}.csv').exists() and f'results/{name}.csv' in pages
