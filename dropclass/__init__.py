"""Train semantic segmentation networks with random class drop, and see what their classes lean on"""

__version__ = "0.1.0"

import sys
from importlib import metadata


def _same_build(torch_version, vision_version, vision_requires):
    "Whether the metadata of the torch and torchvision wheels agree: same build tag, and the torch that torchvision asks for."
    from packaging.requirements import Requirement
    if torch_version.partition('+')[2] != vision_version.partition('+')[2]: return False
    wanted = [Requirement(o) for o in vision_requires or []]
    return all(o.specifier.contains(torch_version, prereleases=True) for o in wanted if o.name=='torch')


def _check_torchvision():
    "Explain in one sentence a torch and a torchvision that do not fit; importing torchvision (1.4 s) only where the metadata disagree."
    if 'torchvision' in sys.modules: return
    versions = {}
    try:
        versions = {o: metadata.version(o) for o in ('torch', 'torchvision')}
        if _same_build(*versions.values(), metadata.requires('torchvision')): return
    except metadata.PackageNotFoundError: pass # Installed in a way that leaves no metadata: only the import can tell
    try: import torchvision
    except ModuleNotFoundError: return
    except RuntimeError as e:
        if 'torchvision::' not in str(e): raise
        torch_version,vision_version = (versions.get(o, 'of unknown version') for o in ('torch', 'torchvision'))
        raise ImportError(f"torch {torch_version} and torchvision {vision_version} are from two different builds ({e}): install both "
            "together from one index with `pip install --force-reinstall torch torchvision`, adding the same `--index-url` for a CPU-only build") from e


_check_torchvision()
