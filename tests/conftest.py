"Shared by all tests: no network, in this process and in every Python process a test starts; and the commands."
import io
import os
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

offline = str(Path(__file__).parent/'offline')
places = [offline, *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]
os.environ['PYTHONPATH'] = os.pathsep.join(dict.fromkeys(places))
signal.signal(signal.SIGINT, signal.default_int_handler) # A shell lets its background jobs ignore Ctrl-C; tests send it
os.environ.setdefault('MPLBACKEND', 'agg')
if not getattr(sys.modules.get('sitecustomize'), '__file__', '').startswith(offline): # None yet, or the machine's own
    sys.modules.pop('sitecustomize', None)
    sys.path.insert(0, offline)
    import sitecustomize # noqa: F401

COMMANDS = ('train', 'compare', 'predict', 'demo', 'audit', 'tune')
# What pip writes for a console script
SCRIPT = "import sys\nfrom dropclass.run.cli import {0}\nif __name__=='__main__': sys.exit({0}())\n"


@pytest.fixture(scope='session')
def scripts(tmp_path_factory):
    "Folder of the console scripts."
    folder = tmp_path_factory.mktemp('bin')
    for o in COMMANDS: (folder/f'dropclass-{o}.py').write_text(SCRIPT.format(o))
    return folder


@pytest.fixture(scope='session')
def command(scripts):
    "Run a command as a script in this process, which has fastai already: (exit code, stdout, stderr)."
    def _run(name, *args):
        out,err = io.StringIO(),io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, 'argv', [f'dropclass-{name}', *map(str, args)])
            with pytest.raises(SystemExit) as e:
                runpy.run_path(str(scripts/f'dropclass-{name}.py'), run_name='__main__')
        return e.value.code or 0, out.getvalue(), err.getvalue()
    return _run
