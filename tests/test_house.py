"""The house: a module imports only from floors below it and never in a circle, `import dropclass` is light, and lines
stay short."""
import ast
import importlib
import io
import json
import subprocess
import sys
import tokenize
from collections import Counter
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest

import dropclass

root = Path(__file__).parents[1]
package = root/'dropclass'

# ---- floors, the lowest first

FLOORS = dict(
    basis='core testing',
    method='importance features losses schedules fused',
    network='models head surgery fold ranks',
    measuring='metrics stats',
    training='learner history callback rivals paste prior',
    data='data',
    analysis='analysis',
    run='run')
FLOOR = {o: i for i,names in enumerate(FLOORS.values()) for o in names.split()}

# Imports from above that are still there; whoever mends one takes it out of this list
FROM_ABOVE = set()


def module_name(path, package):
    "'data.core' for PACKAGE/data/core.py."
    return '.'.join(path.relative_to(package).with_suffix('').parts).removesuffix('.__init__')


def imports(source, name, top, is_module):
    """All (module, name) that a source imports from its own package, inside functions too; the name is None for a whole
    module."""
    parent = f'{top}.{name}'.rpartition('.')[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found = [(o.name, None) for o in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name('.'*node.level+(node.module or ''), parent) if node.level else node.module
            found = [(f'{base}.{o.name}', None) if is_module(f'{base}.{o.name}') else (base, o.name)
                     for o in node.names]
        else: continue
        inside = [(module.removeprefix(f'{top}.'), o) for module,o in found if module.startswith(f'{top}.')]
        yield from (o for o in inside if o[0]!=name) # A module that is started may import itself


def read_package(package):
    "The imports of every module: name -> {(module, name)}."
    sources = {module_name(o, package): o.read_text(encoding='utf-8') for o in sorted(package.rglob('*.py'))}
    is_module = lambda o: o.removeprefix(f'{package.name}.') in sources
    return {k: set(imports(v, k, package.name, is_module)) for k,v in sources.items()}


def circles(graph):
    "Modules on or above a circle: what imports nothing that is left is taken away, until nothing changes."
    graph = {k: set(v) for k,v in graph.items()}
    while free := [k for k,v in graph.items() if not v&set(graph)]:
        for o in free: del graph[o]
    return sorted(graph)


def from_above(graph, floor):
    "Pairs (module, what it imports) where the second stands on a higher floor."
    level = lambda o: floor[o.partition('.')[0]]
    return {(k, o) for k,v in graph.items() for o in v if level(o)>level(k)}


def private(found):
    "Imports of names that belong to another module alone."
    return {(k, module, o) for k,v in found.items()
            for module,o in v if o and o.startswith('_') and not o.startswith('__')}


@pytest.fixture(scope='module')
def found(): return read_package(package)

@pytest.fixture(scope='module')
def graph(found): return {k: {module for module,_ in v} for k,v in found.items() if k not in ('__init__', '_modidx')}


def test_checks_see_what_is_wrong(tmp_path):
    "A house with every fault there is."
    house = tmp_path/'house'
    (house/'top').mkdir(parents=True)
    sources = {'__init__':'', 'top/__init__':'', 'alone':'import house.alone', 'base':'import ast',
               'low':'import house.top.high',
               'top/high':'from ..low import _secret, __all__\nfrom . import other',
               'top/other':'def f():\n    from house.top.high import a\n'}
    for name,text in sources.items(): (house/f'{name}.py').write_text(text)
    seen = read_package(house)
    graph = {k: {module for module,_ in v} for k,v in seen.items()}
    assert graph=={'__init__':set(), 'top':set(), 'alone':set(), 'base':set(),
                   'low':{'top.high'}, 'top.high':{'low','top.other'}, 'top.other':{'top.high'}}
    assert circles(graph)==['low', 'top.high', 'top.other']
    assert from_above(graph, dict(__init__=0, base=0, alone=0, low=0, top=1))=={('low', 'top.high')}
    assert private(seen)=={('top.high', 'low', '_secret')}


def test_every_module_has_a_floor(graph):
    assert {o.partition('.')[0] for o in graph}<=set(FLOOR)


def test_no_circle(graph):
    assert not circles(graph), "these modules import each other, perhaps inside functions"


def test_imports_come_from_below(graph):
    above = from_above(graph, FLOOR)
    assert not above-FROM_ABOVE, (
        "a module imports only from its own floor and those below: pass what it needs, or move it up")
    assert not FROM_ABOVE-above, "mended: take these out of FROM_ABOVE"


def test_no_private_names_of_others(found):
    assert not private(found), "a name that two modules use is public"


# ---- what an import costs

def loaded(code, *starts):
    "Modules that are loaded after some code ran in a new process."
    code += '\nimport sys, json; print(json.dumps(sorted(sys.modules)))'
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True,
                         check=True).stdout
    return [o for o in json.loads(out) if o.startswith(starts)]


def test_the_package_alone_loads_nothing():
    assert loaded('import dropclass', 'dropclass', 'torch', 'fastai', 'numpy', 'pandas')==['dropclass']


@pytest.mark.skipif(('callback', 'data.core') in FROM_ABOVE, reason="the callback still counts pixels by a data module")
def test_the_callback_needs_no_laboratory():
    assert not loaded('import dropclass.callback', 'dropclass.data', 'dropclass.analysis', 'dropclass.run')


# ---- names of the package itself

def test_names_of_the_package():
    "Every name that `dropclass` offers is that of its module, once the module is there; other names are an error."
    here = {name: module for name,module in dropclass.NAMES.items() if find_spec(f'dropclass.{module}')}
    assert len(here)>10
    for name,module in here.items():
        assert getattr(dropclass, name) is getattr(importlib.import_module(f'dropclass.{module}'), name)
    assert set(dropclass.NAMES)<=set(dropclass.__all__) and set(dropclass.__all__)<=set(dir(dropclass))
    with pytest.raises(AttributeError, match="no attribute 'add_dropclas'"): dropclass.add_dropclas


def test_names_do_not_hide_modules():
    assert not {o for o in dropclass.NAMES if find_spec(f'dropclass.{o}')}


# ---- lines

LIMIT = 120
# Modules are made of the notebooks, so of the package itself only what is written by hand is counted
NOTEBOOKS = [o for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root).parts)]
CODE = sorted([package/'__init__.py', *(root/'tests').rglob('*.py'), *(root/'benchmarks').rglob('*.py'), *NOTEBOOKS])
name_of = lambda o: o.relative_to(root).as_posix()

def code_cells(path):
    "The source of a file, or of each code cell of a notebook."
    text = path.read_text(encoding='utf-8')
    if path.suffix!='.ipynb': return [text]
    cells = [''.join(o['source']) for o in json.loads(text)['cells'] if o['cell_type']=='code']
    return [o.replace('import nbdev; nbdev.nbdev_export()', '') for o in cells] # As nbdev writes it into every notebook


def semicolons(source):
    "Lines with a semicolon between statements; one at the end of a cell only keeps Jupyter silent."
    source = source.rstrip().removesuffix(';')
    try: tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError): return [] # A cell of shell commands
    return [o.start[0] for o in tokens if o.type==tokenize.OP and o.string==';']


def line_faults(path):
    "Lines that are too long, and statements behind a semicolon."
    faults = []
    for cell in code_cells(path):
        lines = cell.splitlines()
        # A caption is one line
        faults += [f'{len(o)} characters: {o.strip()[:60]}' for o in lines if len(o)>LIMIT
                   and not o.startswith('#| fig-cap')]
        faults += [f'semicolon: {lines[i-1].strip()[:60]}' for i in semicolons(cell)]
    return faults


def test_line_checks_see_what_is_wrong(tmp_path):
    file = tmp_path/'a.py'
    file.write_text('x = 1; y = 2\nz = ";"\n'+'w'*121+'\n')
    assert line_faults(file)==['121 characters: '+'w'*60, 'semicolon: x = 1; y = 2']
    file.write_text('plot();')
    assert not line_faults(file)


@pytest.mark.parametrize('path', CODE, ids=name_of)
def test_lines(path):
    "At most 120 characters and one statement."
    faults = line_faults(path)
    assert not faults, '\n'.join(faults)
