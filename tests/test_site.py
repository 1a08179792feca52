"The site, without Quarto: links and anchors lead somewhere, pictures exist and have captions, every page has a title, a promise and a place in the sidebar."
import base64
import importlib
import json
import os
import re
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

root = Path(__file__).parents[1]
nbs = root/'nbs'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))
api = [p for p in notebooks if p.parent==nbs and p.name!='index.ipynb']
landings = sorted(p for p in nbs.rglob('*.qmd') if not any(o[0] in '._' for o in p.relative_to(root).parts))
pages = [*notebooks, *landings, *(root/o for o in ('README.md', 'CHANGELOG.md'))]
name = lambda p: p.relative_to(root).as_posix()
per_page,per_notebook,per_api = (pytest.mark.parametrize('path', o, ids=name) for o in (pages, notebooks, api))

# Notebooks of modules that are larger than the rule of 200 KB, each with its own limit: many pictures of noisy images, or plots with many lines
LARGE = {'nbs/35_fused.ipynb': 220, 'nbs/20_head.ipynb': 215, 'nbs/61_analysis.context.ipynb': 230, 'nbs/71_run.compare.ipynb': 230,
         'nbs/analyses/30_evidence_scenes.ipynb': 600} # Every table and figure of the paper on one page
# Pages on which there is nothing to see: they are about files, commands and processes, and show those as text
NOTHING_TO_SEE = {'nbs/02_files.ipynb', 'nbs/36_ranks.ipynb', 'nbs/59_analysis.subjects.ipynb', 'nbs/70_run.experiment.ipynb',
                  'nbs/73_run.distributed.ipynb', 'nbs/75_run.audit.ipynb'}


@cache
def cells(path):
    "Cells of a notebook as (kind, source, outputs); of any other page one cell of text."
    if path.suffix!='.ipynb': return [('markdown', path.read_text(encoding='utf-8'), [])]
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [(o['cell_type'], ''.join(o['source']), o.get('outputs', [])) for o in nb['cells']]


def prose(path):
    "The text of a page without its code."
    text = '\n\n'.join(source for kind,source,_ in cells(path) if kind=='markdown')
    text = re.sub(r'\A---\n.*?^---$', '', text, flags=re.MULTILINE|re.DOTALL)
    return re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE|re.DOTALL)


def links(path):
    "Everything a page links to or embeds, in text and in stored tables."
    text = re.sub(r'`[^`\n]*`', lambda m: m[0] if '](' not in m[0] else '', prose(path))
    html = ''.join(''.join(o['data']['text/html']) for _,_,outputs in cells(path) for o in outputs if 'text/html' in o.get('data', {}))
    return re.findall(r'\]\(([^)\s]+)(?:\s+"[^"]*")?\)', text)+re.findall(r'(?:href|src)="([^"]+)"', text+html)


def slug(heading):
    "The anchor that Pandoc gives a heading."
    heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    heading = re.sub(r'[^\w\s.-]', '', heading.replace('`', ''))
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', heading))


def anchors(path):
    "All anchors of a page: headings, and ids given by hand."
    text = prose(path)
    return {slug(o) for o in re.findall(r'^#{1,6}\s+(.+?)\s*#*$', text, flags=re.MULTILINE)} | set(re.findall(r'\{#([\w-]+)', text))


def broken(path):
    "The links of a page that lead nowhere, each with the reason."
    for link in links(path):
        if re.match(r'[a-z][a-z+.-]*:', link): continue # The web, mail, data
        file,_,anchor = unquote(link).partition('#')
        target = (path.parent/file).resolve() if file else path
        if os.path.isabs(file): yield f'{link}: is no relative link'
        elif not target.exists(): yield f'{link}: no such file'
        elif not target.is_relative_to(root.resolve()): yield f'{link}: leaves the repository'
        elif anchor and target.suffix in ('.ipynb', '.qmd', '.md') and anchor not in anchors(target):
            yield f'{link}: no such heading, there are {sorted(anchors(target))}'


# ---- the checks can fail

def test_checks_see_what_is_wrong(tmp_path):
    "A page with every fault there is."
    md = lambda *source: dict(cell_type='markdown', source=list(source))
    good,bad = tmp_path/'good.ipynb',tmp_path/'bad.ipynb'
    good.write_text(json.dumps(dict(cells=[md('# A title\n', '\n', '## `drop_class`, Eq. (2): a part\n')])))
    table = dict(cell_type='code', source=[], outputs=[dict(data={'text/html': ['<a href="gone.html">x</a>']})])
    bad.write_text(json.dumps(dict(cells=[md('[a](good.ipynb#drop_class-eq.-2-a-part) ![b](none.png) [c](good.ipynb#nothing) [d](#here) [e](https://example.com) [f](/etc)\n', '```\n[g](code.md)\n```\n'), table])))
    global root
    before,root = root,tmp_path
    try: found = [o.split(':')[0] for o in broken(bad)]
    finally: root = before
    assert found==['none.png', 'good.ipynb#nothing', '#here', '/etc', 'gone.html']
    assert not title_faults('# Title\n\n> A promise\n\nText.') and title_faults('## Title\n\n> A promise') and title_faults('# Title\n\nA promise') and title_faults('# Title\n\n> A promise.')


# ---- pages

@per_page
def test_links(path):
    "Every link between pages, with its anchor, and every picture leads to something."
    assert not list(broken(path))


def title_faults(text):
    "What is wrong with a title cell."
    lines = text.split('\n')
    if not re.match(r'# \S', lines[0]): return 'does not start with `# Title`'
    if len(lines)<3 or lines[1] or not lines[2].startswith('> '): return 'has no `> promise` below its title'
    if len(lines[2])>160 or lines[2].endswith('.') or len(lines)>3 and lines[3]: return 'should promise in one line of at most 160 characters, without a full stop'
    return ''


@per_notebook
def test_title_and_promise(path):
    "Title, one line of promise, and then text; a module's notebook says first which module it is."
    kinds = cells(path)
    first = 1 if path in api else 0
    if path in api: assert re.match(r'#\| default_exp [\w.]+$', kinds[0][1].split('\n')[0]) and kinds[0][1].split()[-1]==re.sub(r'^\d+_', '', path.stem)
    else: assert not any('#| default_exp' in source or '#| export' in source for kind,source,_ in kinds if kind=='code'), 'pages outside the reference export nothing'
    assert kinds[first][0]=='markdown', 'the title cell comes first'
    assert not title_faults(kinds[first][1])


@pytest.mark.parametrize('path', landings, ids=name)
def test_front_matter(path):
    "A landing page has title and description, and its lists are not empty."
    front = yaml.safe_load(re.match(r'---\n(.*?)^---$', path.read_text(encoding='utf-8'), flags=re.MULTILINE|re.DOTALL)[1])
    assert front['title'] and front['description'] and not front['description'].endswith('.')
    lists = front['listing'] if isinstance(front['listing'], list) else [front['listing']]
    for o in lists:
        found = [p for glob in ([o['contents']] if isinstance(o['contents'], str) else o['contents']) for p in path.parent.glob(glob)]
        assert found or not list(path.parent.glob('*.ipynb')), f"nothing fits {o['contents']}"
        if 'id' in o: assert f"::: {{#{o['id']}}}" in path.read_text(encoding='utf-8')
    if path.stem=='reference':
        listed = {p for o in lists for glob in o['contents'] for p in nbs.glob(glob)}
        assert listed==set(api)


def shown(path):
    "The outputs a reader sees, with the source of their cells."
    return [(source, o.get('data', {})) for kind,source,outputs in cells(path) if kind=='code' and '#| hide' not in source for o in outputs]


@per_notebook
def test_something_to_see(path):
    "Every page has a picture, a plot or a table; the list of exceptions holds no page that has one."
    sees = bool(re.search(r'^\|[ :]*-+|^!\[', prose(path), flags=re.MULTILINE)) or any('image/png' in o or 'image/jpeg' in o or 'image/svg+xml' in o or 'text/html' in o for _,o in shown(path))
    assert sees or name(path) in NOTHING_TO_SEE, 'no picture, plot or table'
    assert not sees or name(path) not in NOTHING_TO_SEE, 'take it off the list'


@per_notebook
def test_pictures(path):
    "Every picture has a caption that is a sentence, and is what it says it is."
    for source,data in shown(path):
        for kind,magic in (('image/png', b'\x89PNG'), ('image/jpeg', b'\xff\xd8')):
            if kind not in data: continue
            caption = re.search(r'^#\| fig-cap: "(.+)"$', source, flags=re.MULTILINE)
            assert caption and len(caption[1])>20 and caption[1].endswith('.'), f'no caption, or none that ends in a full stop:\n{source[:200]}'
            assert base64.b64decode(''.join(data[kind])).startswith(magic)


@per_notebook
def test_stored_outputs(path):
    "No warning of the machine that ran the page is stored, nor a path on it."
    outputs = [o for _,_,outputs in cells(path) for o in outputs]
    assert not [o for o in outputs if o.get('name')=='stderr'], 'a warning is stored: take its cause away or filter it, and run the page again'
    found = re.findall(r'(?:/home|/root|/tmp|/usr|/work|/Users)/[\w./-]*|[\w./-]*site-packages[\w./-]*', json.dumps([{k:v for k,v in o.get('data', o).items() if not k.startswith('image/')} for o in outputs]))
    assert not found


@per_notebook
def test_size(path):
    "A page opens quickly: a module's notebook has at most 200 KB, any other page 400 KB, but for those listed."
    limit = LARGE.get(name(path), 200 if path in api else 400)
    assert path.stat().st_size<=1024*limit


# ---- the sidebar

def sidebar():
    "Pages of the sidebar in order, the landing pages of its sections, and those of the bar above."
    config = yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents']
    top = yaml.safe_load((root/'_quarto.yml').read_text())['website']['navbar']
    listed,heads = [],[]
    def walk(items):
        for o in items:
            if isinstance(o, str): listed.append(o)
            else:
                heads.append(o.get('href'))
                walk(o['contents'])
    walk(config)
    return listed,[o for o in heads if o],[o['href'] for o in top.get('left', [])]


def test_sidebar():
    "Each entry is there, no notebook is missing or named twice, each folder's landing page heads its section."
    listed,heads,top = sidebar()
    assert not [o for o in [*listed, *heads, *top] if not (nbs/o).is_file()]
    assert sorted(listed)==sorted(p.relative_to(nbs).as_posix() for p in notebooks)
    folders = {p.parent for p in notebooks}-{nbs}
    assert {f'{o.name}/index.qmd' for o in folders}<=set(heads) and 'reference.qmd' in heads
    assert {o for o in heads if '/' in o}=={f'{o.name}/index.qmd' for o in folders}


def test_search_is_on():
    "Readers can search, and the sidebar is ours."
    config = yaml.safe_load((root/'_quarto.yml').read_text())
    assert config['website']['search'] and config['metadata-files']==['nbdev.yml', 'sidebar.yml']
    assert (nbs/config['format']['html']['css']).is_file()


# ---- from paper to code

def test_paper_to_code():
    "Every function that the table names exists in the module whose notebook it links to, and is explained there."
    page = nbs/'explanations/15_paper_to_code.ipynb'
    rows = re.findall(r'\[`([\w.]+)`\]\(\.\./(\w+)\.ipynb(?:#[^)]*)?\)', prose(page))
    assert len(rows)>25
    for function,stem in rows:
        module = importlib.import_module('dropclass.'+re.sub(r'^\d+_', '', stem))
        found = module
        for part in function.split('.'): found = getattr(found, part)
        assert callable(found) or isinstance(found, (int, property)), function
        assert any(re.search(rf'^(?:class|def) {function.split(".")[-1]}\b|^{function} =', source, flags=re.MULTILINE) for _,source,_ in cells(nbs/f'{stem}.ipynb')), f'{function} is not defined in {stem}'


# ---- what continuous integration does

@pytest.mark.parametrize('case', ['no network', 'not root', 'installs', 'is there'])
def test_ci_run(tmp_path, case):
    "A browser that cannot be had is said and never stops the run; one that is there is not installed again."
    def tool(name, body):
        (tmp_path/name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path/name).chmod(0o755)
    for o in ('dirname', 'mktemp', 'grep', 'tail', 'rm', 'timeout'): (tmp_path/o).symlink_to(shutil.which(o))
    tool('id', 'echo 1000' if case=='not root' else 'echo 0')
    tool('make', 'echo "made $*"')
    tool('apt-get', 'echo "E: Failed to fetch" >&2; exit 100' if case=='no network' else f'echo "$*" >> {tmp_path}/calls')
    if case=='is there':
        for o in ('chromium', 'chromedriver'): tool(o, '')
    res = subprocess.run(['/bin/sh', root/'.ci/run'], env={'PATH': str(tmp_path)}, text=True, capture_output=True)
    assert (res.returncode, res.stdout)==(0, 'made test\n'), res.stderr
    reason = {'no network': 'apt-get could not install Chromium (E: Failed to fetch)', 'not root': 'installing it takes root'}.get(case)
    assert reason in res.stderr if reason else not res.stderr
    assert (tmp_path/'calls').exists()==(case=='installs')
    assert (root/'.ci/run').stat().st_mode & stat.S_IXUSR
