"""Write README.md from nbs/index.ipynb: stored outputs only, hidden cells left out, pictures to nbs/images, links from the top folder.

`python .ci/readme.py [FOLDER]` works on the repository in FOLDER (default: the one this file is in).
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

NOTE = '<!-- Written by `make readme` from nbs/index.ipynb: edit the notebook, not this file. -->\n\n'


def directives(source):
    "The `#| name: value` lines at the head of a cell as a dict, and the source without them."
    head = re.match(r'(?:#\|.*\n?)*', source)[0]
    found = (line[2:].strip().partition(':') for line in head.splitlines())
    return {name.strip(): value.strip().strip('"') for name,_,value in found}, source[len(head):]


def visible_cells(cells):
    "The cells a reader should see, without directives, and the captions of their pictures in order."
    shown,captions = [],[]
    for cell in cells:
        flags = {}
        if cell.cell_type=='code': flags,cell.source = directives(cell.source)
        if 'hide' in flags: continue
        if flags.get('echo')=='false': cell.metadata.transient = {'remove_source': True}
        if cell.cell_type=='code' and not cell.outputs and 'echo' in flags: continue
        captions += [flags.get('fig-cap', '')]*sum('image/png' in o.get('data', {}) for o in cell.get('outputs', []))
        shown.append(cell)
    return shown,captions


def from_top(link):
    "A link of the notebook as seen from the top folder; web links and anchors stay."
    return link if re.match(r'[a-z]+:|#', link) else posixpath.normpath(posixpath.join('nbs', link))


def make_readme(root):
    "Text of the README, and its pictures as {path: bytes}."
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells,captions = visible_cells(nb.cells)
    config = Config()
    config.ExtractOutputPreprocessor.output_filename_template = 'images/readme_{cell_index}_{index}{extension}'
    text,resources = MarkdownExporter(config=config).from_notebook_node(nb)
    captions = iter(captions)
    text = re.sub(r'!\[[^]]*\]\((images/readme_[^)]*)\)', lambda m: f'![{next(captions)}]({m[1]})', text)
    parts = re.split(r'(^```.*?^```$)', text, flags=re.MULTILINE|re.DOTALL) # Code is not touched
    parts[::2] = [re.sub(r'(\]\()([^)\s]+)(\))', lambda m: m[1]+from_top(m[2])+m[3], part) for part in parts[::2]]
    text = re.sub(r'^[ \t]+$', '', ''.join(parts), flags=re.MULTILINE)
    text = re.sub(r'\n{3,}', '\n\n', text).strip()
    return NOTE+text+'\n', {f'nbs/{name}': data for name,data in resources.get('outputs', {}).items()}


def main(root):
    "Write the README and its pictures, remove pictures no longer used."
    text,pictures = make_readme(root)
    for old in (root/'nbs/images').glob('readme_*'):
        if f'nbs/images/{old.name}' not in pictures: old.unlink()
    for name,data in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')


if __name__=='__main__': main(Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parents[1]))
