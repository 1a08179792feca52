"Shared by all tests: no network, in this process and in every Python process a test starts."
import os
import signal
import sys
from pathlib import Path

offline = str(Path(__file__).parent/'offline')
places = [offline, *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]
os.environ['PYTHONPATH'] = os.pathsep.join(dict.fromkeys(places))
signal.signal(signal.SIGINT, signal.default_int_handler) # A shell lets its background jobs ignore Ctrl-C; tests send it
os.environ.setdefault('MPLBACKEND', 'agg')
if not getattr(sys.modules.get('sitecustomize'), '__file__', '').startswith(offline): # None yet, or the machine's own
    sys.modules.pop('sitecustomize', None)
    sys.path.insert(0, offline)
    import sitecustomize # noqa: F401
