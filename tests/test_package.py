"""The package as a whole: facts that stand twice agree, everything generated is what its source says, and the wheel
works."""
import configparser
import filecmp
import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10

root = Path(__file__).parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))


def run(*args, **kwargs):
    "Run a command, show its output when it fails."
    env = {**os.environ, **kwargs.pop('env', {})}
    env.pop('IN_TEST', None)
    res = subprocess.run([str(o) for o in args], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
                         **kwargs)
    assert res.returncode==0, f"{args} failed:\n{res.stdout}"
    return res.stdout


@pytest.fixture(scope='module')
def settings():
    "The settings.ini section."
    parser = configparser.ConfigParser(delimiters='=', interpolation=None)
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


@pytest.fixture(scope='module')
def project():
    "The [project] table of pyproject.toml."
    return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what the package is made from, so that no test writes into the checkout."
    dest = tmp_path_factory.mktemp('copy')
    for name in ('pyproject.toml', 'settings.ini', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', '_quarto.yml'):
        shutil.copy(root/name, dest)
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'llms.txt')
    for name in ('nbs', 'dropclass', '.ci'): shutil.copytree(root/name, dest/name, ignore=ignore, symlinks=True)
    return dest


@pytest.fixture(scope='module')
def wheel(copy):
    "The wheel, built without a network from a copy that has no build folders."
    run(sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-index', '--no-build-isolation', '-w', 'wheels',
        cwd=copy)
    return next((copy/'wheels').glob('*.whl'))


# ---- facts that stand twice

def test_version_has_one_home(settings, project):
    "dropclass/__init__.py holds it, settings.ini repeats it, no other file spells it as a version."
    import dropclass
    assert settings['version']==dropclass.__version__, (
        "after nbdev-bump-version, write the new version into settings.ini too")
    assert 'version' in project['dynamic'] and 'version' not in project
    assert not re.search(r'\d+\.\d+\.\d+', (root/'setup.py').read_text())


def test_repeated_fields_agree(settings, project):
    "What both settings.ini and pyproject.toml must say is the same."
    assert settings['lib_name']==project['name']
    assert settings['description']==project['description']
    assert settings['license']==project['license']
    assert settings['author']==project['authors'][0]['name']
    assert '>='+settings['min_python']==project['requires-python']
    assert [o.strip() for o in settings['keywords'].split(',')]==project['keywords']


def test_bounds_not_pins(settings):
    "Lower bounds only: an exact torch would not fit the torchvision of somebody's GPU."
    wanted = [o.strip() for key in settings if key.endswith('requirements')
              for o in settings[key].splitlines() if o.strip()]
    assert wanted and not [o for o in wanted if '==' in o or '<' in o or '~' in o]


def test_the_source_distribution_builds_the_same_wheel(copy, wheel, tmp_path):
    "`python -m build` makes the wheel out of the sdist, so all that setup.py reads must be in it."
    build = 'from setuptools import build_meta; print(build_meta.build_{}({!r}))'
    run(sys.executable, '-c', build.format('sdist', str(tmp_path)), cwd=copy)
    shutil.unpack_archive(next(tmp_path.glob('*.tar.gz')), tmp_path)
    run(sys.executable, '-c', build.format('wheel', str(tmp_path)),
        cwd=next(o for o in tmp_path.iterdir() if o.is_dir()))
    names = lambda file: {o for o in ZipFile(file).namelist() if not o.endswith('/RECORD')}
    assert names(next(tmp_path.glob('*.whl')))==names(wheel)


def test_metadata_of_the_wheel(wheel, settings, project):
    "The built metadata hold every fact once, from its own home."
    with ZipFile(wheel) as z: files = {o: z.read(o).decode() for o in z.namelist() if '.dist-info/' in o}
    part = lambda name: next(v for k,v in files.items() if k.endswith(name))
    meta = message_from_string(part('/METADATA'))
    assert meta['Name']==settings['lib_name'] and meta['Version']==settings['version']
    assert meta['Summary']==project['description'] and meta['Requires-Python']==project['requires-python']
    assert meta['License-Expression']=='Apache-2.0' and 'Apache License' in part('/licenses/LICENSE')
    extras = {o.removesuffix('_requirements') for o in settings if o.endswith('_requirements')}
    assert set(meta.get_all('Provides-Extra'))==extras
    core = [o for o in meta.get_all('Requires-Dist') if 'extra ==' not in o]
    assert sorted(core)==sorted(o.strip() for o in settings['requirements'].splitlines() if o.strip())
    commands = configparser.ConfigParser(delimiters='=')
    commands.read_string(part('/entry_points.txt'))
    names = ('train', 'compare', 'predict', 'demo', 'audit', 'tune')
    assert set(commands['console_scripts'])=={f'dropclass-{o}' for o in names}


def test_commands_exist(settings):
    "Every console command names a function that is there."
    for line in filter(None, map(str.strip, settings['console_scripts'].splitlines())):
        module,function = line.split('=')[1].strip().split(':')
        assert callable(getattr(importlib.import_module(module), function)), line


# ---- what is generated is what its source says

def test_one_directive_exports_a_cell():
    "nbdev heeds the first of two, and what the second was meant for is missing from `__all__`."
    for nb in notebooks:
        for cell in json.loads(nb.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type']=='code':
                assert sum(o.startswith('#| export') for o in cell['source'])<2, f"{nb.name}: {cell['id']}"


def test_modules_are_what_the_notebooks_say(copy):
    """Exporting into a copy without modules gives every file of dropclass/, and no other: no hand edit, no forgotten
    export, no orphan."""
    modules = lambda o: {p.relative_to(o/'dropclass').as_posix() for p in (o/'dropclass').rglob('*.py')}
    for old in (copy/'dropclass').rglob('*.py'):
        if old.name!='__init__.py': old.unlink()
    run(sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    new,old = modules(copy),modules(root)
    assert new==old, f"not from any notebook: {sorted(old-new)}; not exported yet: {sorted(new-old)}; run `make nbs`"
    _,differ,errors = filecmp.cmpfiles(copy/'dropclass', root/'dropclass', new, shallow=False)
    assert not differ and not errors, (
        f"differ from their notebooks: {differ+errors}; edit the notebook and run `make nbs`")


def test_readme_is_what_the_index_says(tmp_path):
    "README.md and its pictures equal what `make readme` would write."
    text,pictures = runpy.run_path(str(root/'.ci/readme.py'))['make_readme'](root)
    assert (root/'README.md').read_text(encoding='utf-8')==text, (
        "README.md is not what nbs/index.ipynb says; run `make readme`")
    assert {p.relative_to(root).as_posix() for p in (root/'nbs/images').glob('readme_*')}==set(pictures)
    for name,data in pictures.items(): assert (root/name).read_bytes()==data, f"{name} is stale; run `make readme`"


readme_setup = """
import torch
from dropclass.testing import toy_dls
dls = toy_dls(n=4, bs=2, num_classes=12, size=32)
tune_dl = dls.valid
"""
readme_checks = """
assert learn.recorder.values and all(torch.isfinite(torch.tensor(o)) for o in learn.validate())
"""


def test_readme_code_runs(tmp_path, monkeypatch):
    "All examples train as they stand, only smaller, with no pretrained weights, on toy data."
    blocks = re.findall(r'^```python\n(.*?)^```$', (root/'README.md').read_text(encoding='utf-8'),
                        flags=re.MULTILINE|re.DOTALL)
    assert len(blocks)==1
    code = '\n'.join([readme_setup, *blocks, readme_checks])
    for old,new in {'resnet34,': 'resnet18, pretrained=False,', 'fine_tune(20,': 'fine_tune(1,'}.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {'__name__': 'readme'})


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(root/'nbs').as_posix())
def test_notebook_is_clean_and_executed(path):
    "Nothing for nbdev-clean to do, no error stored, and at least one output where there is code to show."
    from nbdev.clean import _nbdev_clean
    before = path.read_text(encoding='utf-8')
    nb = json.loads(before)
    _nbdev_clean(nb)
    assert nb==json.loads(before), "run `make nbs`"
    outputs = [o for cell in nb['cells'] for o in cell.get('outputs', [])]
    assert not [o for o in outputs if o['output_type']=='error']
    drawn = any('plt.' in ''.join(cell['source']) and '#| echo: false' in ''.join(cell['source'])
                for cell in nb['cells'])
    assert outputs or not drawn, "committed without its outputs; run `make outputs`"


def test_quarto_files(copy):
    "nbs/_quarto.yml is a relative link to the one at the top, and nbdev.yml is what nbdev would write."
    assert os.readlink(root/'nbs/_quarto.yml')==os.path.join('..', '_quarto.yml')
    run(sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=copy)
    assert (copy/'nbs/nbdev.yml').read_text()==(root/'nbs/nbdev.yml').read_text()
    assert os.readlink(copy/'nbs/_quarto.yml')==os.path.join('..', '_quarto.yml')


# ---- the wheel

def test_wheel_installs_and_imports(wheel, tmp_path):
    "Installed alone into an empty folder, far from nbs/, every module imports; neither notebooks nor tests come along."
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel)
    packed = {p.name for p in (tmp_path/'site').iterdir() if not p.name.endswith('.dist-info')}-{'bin'}
    assert packed=={'dropclass'}
    tables = 'dropclass/analysis/paper_tables.json'
    assert (tmp_path/'site'/tables).read_bytes()==(root/tables).read_bytes()
    code = ("import dropclass, importlib, pkgutil; names = [o.name for o in pkgutil.walk_packages(dropclass.__path__, "
            "'dropclass.')]\n"
            "for o in names: importlib.import_module(o)\n"
            "print(dropclass.__file__, *names)")
    path = os.pathsep.join([str(tmp_path/'site'), os.environ['PYTHONPATH']])
    *_,last = run(sys.executable, '-W', 'ignore', '-c', code, cwd=tmp_path, env={'PYTHONPATH': path}).splitlines()
    file,*names = last.split()
    assert file.startswith(str(tmp_path/'site'))
    assert {'dropclass.core', 'dropclass.data.core', 'dropclass.run.cli'}<={*names}


# ---- import dropclass

def fake_torchvision(folder, version, body):
    "Put a torchvision of our own, metadata included, into `folder`."
    (folder/'torchvision').mkdir()
    (folder/'torchvision/__init__.py').write_text(body)
    (folder/f'torchvision-{version}.dist-info').mkdir()
    metadata = f'Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\nRequires-Dist: torch\n'
    (folder/f'torchvision-{version}.dist-info/METADATA').write_text(metadata)


def import_with(folder):
    "Import dropclass in a process where `folder` comes first."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(root), os.environ['PYTHONPATH']])}
    return subprocess.run([sys.executable, '-c', 'import dropclass, sys; print("torchvision" in sys.modules)'],
                          text=True, capture_output=True, env=env)


def test_torchvision_trap_is_explained(tmp_path):
    "A torchvision of another build ends in one sentence that says what to install."
    fake_torchvision(tmp_path, '0.21.0+other', 'raise RuntimeError("operator torchvision::nms does not exist")')
    res = import_with(tmp_path)
    last = res.stderr.strip().splitlines()[-1]
    assert res.returncode!=0 and last.startswith('ImportError: torch ')
    assert 'torchvision 0.21.0+other' in last and 'operator torchvision::nms does not exist' in last
    assert 'pip install --force-reinstall torch torchvision' in last


def test_torchvision_of_another_build_that_works(tmp_path):
    "Metadata that disagree are no error by themselves: what counts is whether torchvision imports."
    fake_torchvision(tmp_path, '0.21.0+other', '')
    res = import_with(tmp_path)
    assert res.returncode==0 and res.stdout.strip()=='True', res.stderr


def test_other_torchvision_errors_stay_themselves(tmp_path):
    "An error that is not the trap is not explained away."
    fake_torchvision(tmp_path, '0.21.0+other', 'raise RuntimeError("out of paper")')
    assert import_with(tmp_path).stderr.strip().endswith('RuntimeError: out of paper')


# ---- no network

def test_network_is_blocked():
    "Names and addresses elsewhere fail at once, here and in processes started from here; this machine stays reachable."
    import sitecustomize
    with pytest.raises(sitecustomize.NetworkBlocked, match='weights=None'):
        socket.create_connection(('example.com', 80), timeout=5)
    with pytest.raises(sitecustomize.NetworkBlocked), socket.socket() as s: s.connect(('203.0.113.1', 80))
    code = "import urllib.request as u; u.urlopen('http://example.com')"
    res = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)
    assert 'NetworkBlocked' in res.stderr.splitlines()[-1]
    with socket.socket() as server, socket.socket() as client:
        server.bind(('localhost', 0))
        server.listen()
        client.connect(server.getsockname())
