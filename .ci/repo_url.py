"Write the repository's address, `repo_url` of settings.ini, to where nbdev, Quarto and readers look for it."
import re
import sys
from configparser import ConfigParser
from pathlib import Path

FILES = 'pyproject.toml', '_quarto.yml', 'nbs/nbdev.yml', 'nbs/index.ipynb'


def spread(root):
    "Replace the address that pyproject.toml has by the one of settings.ini."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(root/'settings.ini', encoding='utf-8')
    new = parser['DEFAULT']['repo_url']
    old = re.search(r'^Repository = "(.+)"$', (root/'pyproject.toml').read_text(encoding='utf-8'), flags=re.MULTILINE)[1]
    for file in (root/o for o in FILES):
        text = file.read_text(encoding='utf-8')
        if old!=new and old in text: file.write_text(text.replace(old, new), encoding='utf-8')


if __name__=='__main__': spread(Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parents[1]))
