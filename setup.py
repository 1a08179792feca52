"Dependencies, extras and commands from settings.ini, the version from dropclass/__init__.py; everything else is in pyproject.toml"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
parser = ConfigParser(delimiters='=', interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']
init = (root/settings['lib_name']/'__init__.py').read_text(encoding='utf-8')

def lines(key):
    "The lines of a multi-line setting."
    return [line.strip() for line in settings[key].splitlines() if line.strip()]

suffix = '_requirements'
setup(
    version=re.search(r'^__version__ = "([^"]+)"', init, re.MULTILINE)[1],
    package_data={settings['lib_name']+'.analysis': ['*.json', '*.j2']},
    install_requires=lines('requirements'),
    extras_require={key[:-len(suffix)]: lines(key) for key in settings if key.endswith(suffix)},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': ['{0} = {0}._modidx:d'.format(settings['lib_name'])]},
)
