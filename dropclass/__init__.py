"""Train semantic segmentation networks with random class drop, and see what their classes lean on"""

__version__ = "0.1.0"

import sys
from importlib import import_module, metadata

# What a user needs, by the module that holds it. A name is imported when it is first asked for: this module stays light
_OFFERS = dict(
    core='ClassSpec step_generator',
    features='sample_keep_mask',
    losses='dropclass_loss',
    head='split_paths',
    surgery='add_dropclass get_head remove_dropclass',
    fold='fold_dropclass',
    models='create_model',
    metrics='evaluate',
    stats='class_counts median_frequency_weights',
    callback='DropClassCallback',
    rivals='FadeWeightsCallback',
    paste='ClassPasteCallback paste_classes',
    prior='tune_prior shift_classes unshift_classes',
    **{'analysis.audit':'audit', 'run.config':'Config', 'run.experiment':'train_run load_run'})
NAMES = {name: module for module,names in _OFFERS.items() for name in names.split()}
__all__ = ['__version__', *NAMES]


def __getattr__(name):
    "Import a name from its module, once (PEP 562)."
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = globals()[name] = getattr(import_module(f'{__name__}.{NAMES[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})


def _same_build(torch_version, vision_version, vision_requires):
    "Do the metadata of the two wheels agree: the same build tag, and the torch that torchvision asks for?"
    from packaging.requirements import Requirement
    if torch_version.partition('+')[2] != vision_version.partition('+')[2]: return False
    wanted = [Requirement(o) for o in vision_requires or []]
    return all(o.specifier.contains(torch_version, prereleases=True) for o in wanted if o.name=='torch')


def _check_torchvision():
    """Say in one sentence that torch and torchvision do not fit; import torchvision (1.4 s) only where the metadata
    disagree."""
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
        raise ImportError(
            f"torch {torch_version} and torchvision {vision_version} are from two different builds ({e}): "
            "install both together from one index with `pip install --force-reinstall torch torchvision`, "
            "adding the same `--index-url` for a CPU-only build") from e


_check_torchvision()
