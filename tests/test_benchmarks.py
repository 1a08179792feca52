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
    subprocess.run([sys.executable, '-W', 'ignore', ROOT/'benchmarks'/'all.py', '--quick', '--only', name, '--folder',
                    tmp_path], check=True, timeout=600)
    stored = ROOT/'results'/f'{name}.csv'
    assert columns(tmp_path/f'{name}.csv')==columns(stored)

def test_every_table_is_shown():
    "A table without a page is forgotten, and a page without a table fails."
    pages = ''.join(o.read_text() for o in [*(ROOT/'nbs'/'benchmarks').glob('*.ipynb'), ROOT/'nbs'/'35_fused.ipynb'])
    for name in (*SCRIPTS, 'validation', 'methods', 'compiled_loss'):
        assert (ROOT/'results'/f'{name}.csv').exists() and f'results/{name}.csv' in pages


def test_gpu_check_is_one_command(monkeypatch, capsys):
    "Steps and loss are measured on tiny images; a part that fails is named, and the others go on."
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import gpu_check
    def broken(minutes): raise RuntimeError("no such test")
    monkeypatch.setattr(gpu_check, 'check_tests', broken)
    monkeypatch.setattr(gpu_check, 'run', lambda *command, **options: print('$', *command))
    with pytest.raises(SystemExit): gpu_check.main(device='cpu', quick=True)
    said = capsys.readouterr().out
    assert 'tests failed: no such test' in said and said.rstrip().endswith('failed: tests')
    assert 'dropclass, stacked' in said and "authors' formula" in said
    assert 'fused_loss.py' in said
    with pytest.raises(SystemExit, match='--data needs --weights'): gpu_check.main(device='cpu', data='images')
