"""The site, without Quarto: nbdev can build it and loses nothing, links lead somewhere, pictures have captions, every
page has a title, a promise and a place in the sidebar."""
import ast
import base64
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from configparser import ConfigParser
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

# Notebooks of modules that are larger than the rule of 200 KB, each with its own limit: many pictures of noisy images,
# or plots with many lines
LARGE = {'nbs/35_fused.ipynb': 225, 'nbs/61_analysis.context.ipynb': 230, 'nbs/71_run.compare.ipynb': 230,
         'nbs/analyses/30_evidence_scenes.ipynb': 600} # Every table and figure of the paper on one page
# Pages on which there is nothing to see: they are about files, commands and processes, and show those as text
NOTHING_TO_SEE = {'nbs/36_ranks.ipynb', 'nbs/51_stats.ipynb', 'nbs/69_run.config.ipynb',
                  'nbs/59_analysis.subjects.ipynb', 'nbs/70_run.experiment.ipynb',
                  'nbs/73_run.distributed.ipynb', 'nbs/75_run.audit.ipynb', 'nbs/78_run.demo.ipynb'}


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
    shown = [o.get('data', {}) for _,_,outputs in cells(path) for o in outputs]
    html = ''.join(''.join(o.get('text/html', '')) for o in shown)
    return re.findall(r'\]\(([^)\s]+)(?:\s+"[^"]*")?\)', text)+re.findall(r'(?:href|src)="([^"]+)"', text+html)


def slug(heading):
    "The anchor that Pandoc gives a heading."
    heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    heading = re.sub(r'[^\w\s.-]', '', heading.replace('`', ''))
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', heading))


def anchors(path):
    "All anchors of a page: headings, and ids given by hand."
    text = prose(path)
    headings = re.findall(r'^#{1,6}\s+(.+?)\s*#*$', text, flags=re.MULTILINE)
    return {*map(slug, headings), *re.findall(r'\{#([\w-]+)', text)}


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
    bad.write_text(json.dumps(dict(cells=[md('[a](good.ipynb#drop_class-eq.-2-a-part) ![b](none.png) '
                                             '[c](good.ipynb#nothing) [d](#here) [e](https://example.com) [f](/etc)\n',
                                             '```\n[g](code.md)\n```\n'), table])))
    global root
    before,root = root,tmp_path
    try: found = [o.split(':')[0] for o in broken(bad)]
    finally: root = before
    assert found==['none.png', 'good.ipynb#nothing', '#here', '/etc', 'gone.html']
    assert not title_faults('# Title\n\n> A promise\n\n- order: 2')
    for o in ('## Title\n\n> A promise', '# Title\n\nA promise', '# Title\n\n> A promise.',
              '# Title\n\n> A promise\n\nText.'):
        assert title_faults(o), o


def test_checks_see_what_nbdev_would_lose(tmp_path):
    "An introduction that is missing or a heading, work beside an import, a link in a link, a list that recurses."
    page,title = tmp_path/'page.ipynb','# Title\n\n> A promise'
    def notebook(*sources):
        kinds = ['markdown' if o[0] in '#W|' and o[:2]!='#|' else 'code' for o in sources]
        page.write_text(json.dumps(dict(cells=[dict(cell_type=k, source=[o]) for k,o in zip(kinds, sources)])))
        cells.cache_clear()
        return page
    assert not intro_faults(notebook('#| default_exp x', title, 'Words.'))
    for o in ((title, '## Heading\n\nWords.'), (title, '| a | b |'), (title, 'import os'), ('import os', title)):
        assert intro_faults(notebook(*o)), o
    fine = ['import os', '#| hide\nimport os, re\nfrom sys import path', '#| export\ndef f(): import os',
            'import nbdev; nbdev.nbdev_export()', '%time import os; os.getcwd()']
    wrong = ['import os\nos.getcwd()', 'def f(): import os', '#| export\nimport os\nx = 1',
             'with open(f) as o:\n    import os']
    assert list(crowded_imports(notebook(*fine, *wrong)))==wrong
    assert (links_in_links('see [the [`f`](/core.html#f) of core](00_core.ipynb)')
            and not links_in_links('[`f`](/core.html#f), [a](b)'))
    assert (recursive_globs(dict(contents='*.ipynb')) and recursive_globs([dict(contents=['./1*.ipynb', '2*.ipynb'])])
            and not recursive_globs(dict(contents='./*.ipynb')))


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
    if len(lines[2])>160 or lines[2].endswith('.'):
        return 'should promise in one line of at most 160 characters, without a full stop'
    lost = [o for o in lines[3:] if o and not re.match(r'- [\w-]+: \S', o)]
    return f'nbdev throws away what else the title cell says, so put it into the second cell: {lost[0]}' if lost else ''


def intro_faults(path):
    "What is wrong with the two cells that open a notebook."
    (kind,title,_),(second,intro,_) = [o for o in cells(path) if not o[1].startswith('#| default_exp')][:2]
    if kind!='markdown': return 'the title cell comes first'
    if second!='markdown' or not re.match(r'[A-Za-z*`"]', intro): return 'the second cell introduces the page, in prose'
    return title_faults(title)


@per_notebook
def test_title_and_promise(path):
    "Title, one line of promise, and then text; a module's notebook says first which module it is."
    kinds = cells(path)
    if path in api:
        assert re.match(r'#\| default_exp [\w.]+$', kinds[0][1].split('\n')[0])
        assert kinds[0][1].split()[-1]==re.sub(r'^\d+_', '', path.stem)
    else:
        code = [source for kind,source,_ in kinds if kind=='code']
        exports = [o for o in code if '#| default_exp' in o or '#| export' in o]
        assert not exports, 'pages outside the reference export nothing'
    assert not intro_faults(path)


def crowded_imports(path):
    """Cells with an import and something else: nbdev executes them when it builds the site, where no cell before them
    ran but imports and exported ones."""
    imports = lambda nodes: [isinstance(o, (ast.Import, ast.ImportFrom)) for o in nodes]
    for kind,source,_ in cells(path):
        if kind!='code' or 'nbdev_export()' in source or source.lstrip()[:1] in '%!': continue
        body = ast.parse(source).body
        # Runs anyway, so imports inside its functions do no harm
        exported = re.search(r'^#\| export', source, flags=re.MULTILINE)
        if any(imports(body if exported else ast.walk(ast.Module(body, [])))) and not all(imports(body)): yield source


@per_notebook
def test_imports_stand_alone(path):
    "Imports stand in cells of their own."
    assert not list(crowded_imports(path))


def recursive_globs(listing):
    "Patterns of a list of pages that Quarto would look for in all folders."
    lists = listing if isinstance(listing, list) else [listing]
    return [glob for o in lists for glob in ([o['contents']] if isinstance(o['contents'], str) else o['contents'])
            if not glob.startswith('./')]


@pytest.mark.parametrize('path', landings, ids=name)
def test_front_matter(path):
    "A landing page has title and description, and its lists are not empty."
    front = yaml.safe_load(re.match(r'---\n(.*?)^---$', path.read_text(encoding='utf-8'),
                                    flags=re.MULTILINE|re.DOTALL)[1])
    assert front['title'] and front['description'] and not front['description'].endswith('.')
    lists = front.get('listing', [])
    if not isinstance(lists, list): lists = [lists]
    assert not recursive_globs(lists)
    for o in lists:
        found = [p for glob in ([o['contents']] if isinstance(o['contents'], str) else o['contents'])
                 for p in path.parent.glob(glob)]
        assert found or not list(path.parent.glob('*.ipynb')), f"nothing fits {o['contents']}"
        if 'id' in o: assert f"::: {{#{o['id']}}}" in path.read_text(encoding='utf-8')


def shown(path):
    "The outputs a reader sees, with the source of their cells."
    shown = [(source, outputs) for kind,source,outputs in cells(path) if kind=='code' and '#| hide' not in source]
    return [(source, o.get('data', {})) for source,outputs in shown for o in outputs]


@per_notebook
def test_something_to_see(path):
    "Every page has a picture, a plot or a table; the list of exceptions holds no page that has one."
    kinds = {'image/png', 'image/jpeg', 'image/svg+xml', 'text/html'}
    written = re.search(r'^\|[ :]*-+|^!\[', prose(path), flags=re.MULTILINE)
    sees = bool(written) or any(kinds & {*o} for _,o in shown(path))
    assert sees or name(path) in NOTHING_TO_SEE, 'no picture, plot or table'
    assert not sees or name(path) not in NOTHING_TO_SEE, 'take it off the list'


@per_notebook
def test_pictures(path):
    "Every picture has a caption that is a sentence, and is what it says it is."
    magic = {'image/png': b'\x89PNG', 'image/jpeg': b'\xff\xd8'}
    for source,data in shown(path):
        for kind in (o for o in data if o.startswith('image/')):
            caption = re.search(r'^#\| fig-cap: "(.+)"$', source, flags=re.MULTILINE)
            assert caption and len(caption[1])>20 and caption[1].endswith('.'), (
                f'no caption, or none that ends in a full stop:\n{source[:200]}')
            if kind in magic: assert base64.b64decode(''.join(data[kind])).startswith(magic[kind])


@per_page
def test_alternative_text(path):
    "A picture in the text says in words what it shows."
    assert not re.findall(r'!\[\s*\]\([^)]*\)|<img(?![^>]*\balt="[^"]+")[^>]*>', prose(path))


@pytest.mark.skipif(not shutil.which('pandoc'), reason='pandoc is not installed')
def test_captions_are_read_aloud():
    "On the site a picture's caption is its alternative text too, unless it has one."
    show = lambda md: subprocess.run(['pandoc', '-t', 'html', '-L', nbs/'alt.lua'], input=md, text=True,
                                     capture_output=True, check=True).stdout
    assert 'fig-alt="Loss of `f`."'.replace('`', '') in ' '.join(show('![Loss of `f`.](a.png)').split())
    assert 'fig-alt="own"' in show('![c](a.png){fig-alt="own"}') and 'fig-alt' not in show('![](a.png)')


@per_notebook
def test_stored_outputs(path):
    "No warning of the machine that ran the page is stored, nor a path on it."
    outputs = [o for _,_,outputs in cells(path) for o in outputs]
    assert not [o
                for o in outputs
                if o.get('name')=='stderr'], (
        'a warning is stored: take its cause away or filter it, and run the page again')
    found = re.findall(r'(?:/home|/root|/tmp|/usr|/work|/Users)/[\w./-]*|[\w./-]*site-packages[\w./-]*',
                       json.dumps([{k:v for k,v in o.get('data', o).items() if not k.startswith('image/')}
                                   for o in outputs]))
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


def test_sections_have_one_name():
    """Sidebar, bar and landing page call a section the same; the tables of the reference are the sections of the
    sidebar, with the same pages."""
    bar = yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents']
    sections = {o['href']: o for o in bar if not isinstance(o, str)}
    top = yaml.safe_load((root/'_quarto.yml').read_text())['website']['navbar']['left']
    assert [(o['text'], o['href']) for o in top]==[(o['section'], o['href']) for o in sections.values()]
    front = {href: yaml.safe_load((nbs/href).read_text().split('---\n')[1]) for href in sections}
    assert {href: o['title'] for href,o in front.items()}=={href: o['section'] for href,o in sections.items()}
    heads = dict(re.findall(r'^## (.+)$[^#]*?^::: \{#(\w+)\}', (nbs/'reference.qmd').read_text(), flags=re.MULTILINE))
    pages = {o['id']: sorted(p.name for glob in o['contents'] for p in nbs.glob(glob))
             for o in front['reference.qmd']['listing']}
    assert {name: pages[o]
            for name,o in heads.items()}=={o['section']: sorted(o['contents'])
                                           for o in sections['reference.qmd']['contents']}


def test_site_settings():
    "Files that the settings name are there, the footer says the version, readers can search, and the sidebar is ours."
    import dropclass
    config = yaml.safe_load((root/'_quarto.yml').read_text())
    site = config['website']
    assert site['search'] and config['metadata-files']==['nbdev.yml', 'sidebar.yml']
    for o in (config['format']['html']['css'], site['favicon'], site['image'], *config['filters'], '404.qmd'):
        assert (nbs/o).is_file(), o
    assert site['page-footer']['left']==f'dropclass {dropclass.__version__}', (
        'after nbdev-bump-version, write the new version into _quarto.yml too')


# ---- the repository's address

def repo_url():
    "The address that settings.ini gives."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']['repo_url']


def test_one_repository_address():
    "Where nbdev and Quarto read the address, it is the one of settings.ini."
    from dropclass._modidx import d
    project = (root/'pyproject.toml').read_text(encoding='utf-8')
    footer = yaml.safe_load((root/'_quarto.yml').read_text())['website']['page-footer']['right']
    site = yaml.safe_load((nbs/'nbdev.yml').read_text())['website']
    found = re.search(r'^Repository = "(.+)"$', project,
                      flags=re.MULTILINE)[1],site['repo-url'],d['settings']['git_url']
    assert set(found)=={repo_url()}, 'run `make nbs`'
    assert f"({repo_url()}/blob/{site['repo-branch']}/LICENSE)" in footer, 'run `make nbs`'


def test_a_new_address_is_spread(tmp_path):
    "`make nbs` writes a new address of settings.ini everywhere."
    tool = runpy.run_path(str(root/'.ci/repo_url.py'))
    for o in ('settings.ini', *tool['FILES']):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        text = (root/o).read_text(encoding='utf-8')
        (tmp_path/o).write_text(text.replace(repo_url(), 'https://example.org/a/b') if o=='settings.ini' else text,
                                encoding='utf-8')
    tool['spread'](tmp_path)
    for o in tool['FILES']:
        text = (tmp_path/o).read_text(encoding='utf-8')
        assert (repo_url() not in text
                and text==(root/o).read_text(encoding='utf-8').replace(repo_url(), 'https://example.org/a/b'))
    assert ('https://example.org/a/b' in (tmp_path/'_quarto.yml').read_text()
            and 'https://example.org/a/b' in (tmp_path/'pyproject.toml').read_text())


# ---- the pages as nbdev hands them to Quarto

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A copy in which `nbdev-proc-nbs` ran: its output, and the cells of each page."
    dest = tmp_path_factory.mktemp('site')
    for o in ('pyproject.toml', 'settings.ini', '_quarto.yml'): shutil.copy(root/o, dest)
    for o in ('nbs', 'dropclass'):
        shutil.copytree(root/o, dest/o, symlinks=True,
                        ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    (dest/'quarto').write_text('#!/bin/sh\n') # nbdev only asks whether it is there, and would go and fetch it
    (dest/'quarto').chmod(0o755)
    path = {o: os.pathsep.join([*map(str, own), os.environ[o]])
            for o,own in (('PATH', [dest]), ('PYTHONPATH', [root/'tests/offline', dest]))}
    res = subprocess.run([Path(sys.executable).with_name('nbdev-proc-nbs')], cwd=dest, env={**os.environ, **path},
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert res.returncode==0, res.stdout[-3000:]
    cells.cache_clear()
    return res.stdout,{p: cells(dest/'_proc'/p.relative_to(nbs)) for p in notebooks}


def test_nbdev_builds_every_page(built):
    "No cell that runs at rendering fails, and nbdev has nothing to say about imports."
    assert 'Found cells containing imports' not in built[0]


def links_in_links(text):
    "Links whose text holds another one: what becomes of a link written around a name that nbdev links itself."
    return re.findall(r'\[[^][]*\[[^][]*\]\([^()]*\)[^][]*\]\(', text)


def texts(page):
    "Every piece of Markdown of a built page: written, and shown by `show_doc`."
    for kind,source,outputs in page:
        if kind=='markdown': yield source
        for o in outputs: yield ''.join(o.get('data', {}).get('text/markdown', []))


@per_notebook
def test_built_page(path, built):
    """Title and promise have become front matter, no link stands in a link, no default prints as an address, every
    source link starts at the repository's address."""
    page = built[1][path]
    front = yaml.safe_load(page[0][1].strip().strip('-'))
    assert f"# {front['title']}\n\n> {front['description']}" in [source for _,source,_ in cells(path)]
    text = '\n\n'.join(texts(page))
    assert not links_in_links(text)
    assert not re.findall(r'.* at 0x[0-9a-f]{6,}', text)
    sources = re.findall(r'\[source\]\(([^)]*)\)', text)
    assert not [o for o in sources if not o.startswith(f'{repo_url()}/blob/main/dropclass/')]
    defines = r'#\| export\b.*\n(.*\n)*(def|class) [a-zA-Z]'
    assert bool(sources)==any(re.match(defines, source) for kind,source,_ in cells(path) if kind=='code')


# ---- from paper to code

def test_paper_to_code():
    "Every function that the tables name exists, and nbdev links it to the page that explains it."
    from dropclass._modidx import d
    linked = {name.removeprefix(f'{module}.') for module,names in d['syms'].items() for name in names}
    rows = [[o.strip() for o in line.strip('|').split('|')]
            for line in prose(nbs/'explanations/15_paper_to_code.ipynb').splitlines() if line.startswith('|')]
    found,columns = [],[]
    for row in rows:
        if row[0] in ('paper', 'equation', 'in the paper'):
            columns = [i for i,o in enumerate(row) if o in ('made by', 'function', 'as written, for comparison')]
        else: found += [name for i in columns for name in re.findall(r'`(\w+)`', row[i])]
    assert len(found)>60 and not set(found)-linked


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
    tool('apt-get',
         'echo "E: Failed to fetch" >&2; exit 100' if case=='no network' else f'echo "$*" >> {tmp_path}/calls')
    if case=='is there':
        for o in ('chromium', 'chromedriver'): tool(o, '')
    res = subprocess.run(['/bin/sh', root/'.ci/run'], env={'PATH': str(tmp_path)}, text=True, capture_output=True)
    assert (res.returncode, res.stdout)==(0, 'made test\n'), res.stderr
    reason = {'no network': 'apt-get could not install Chromium (E: Failed to fetch)',
              'not root': 'installing it takes root'}.get(case)
    assert reason in res.stderr if reason else not res.stderr
    assert (tmp_path/'calls').exists()==(case=='installs')
    assert (root/'.ci/run').stat().st_mode & stat.S_IXUSR
