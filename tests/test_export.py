"""Away from training: a folded network is plain PyTorch, and what PyTorch writes (pickle, torch.export, ONNX,
safetensors) gives the same numbers."""
import copy
import csv
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from dropclass.surgery import add_dropclass, get_head, main_output

from dropclass.fold import fold_dropclass
from dropclass.models import create_model

C = 4
paths = ('plain', 'drop', 'mean')


def torchvision_fcn():
    from torchvision.models.segmentation import fcn_resnet50
    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=C, aux_loss=True)


def torchvision_lraspp():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=C)


def smp_unet():
    "A 3x3 classifier."
    smp = pytest.importorskip('segmentation_models_pytorch')
    return smp.Unet('resnet18', encoder_weights=None, classes=C)


def smp_linknet():
    smp = pytest.importorskip('segmentation_models_pytorch')
    return smp.Linknet('resnet18', encoder_weights=None, classes=C)


def signed_unet():
    "Features of either sign: no activation between the last normalisation and the classifier."
    model = smp_unet()
    model.decoder.blocks[-1].conv2[-1] = nn.Identity()
    return model


def segformer():
    hf = pytest.importorskip('transformers')
    sizes = dict(depths=[1,1,1,1], hidden_sizes=[8,16,24,32], decoder_hidden_size=16)
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=C, **sizes))


def volume_net(): return nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.LeakyReLU(),
                                       nn.Conv3d(6, C, 1))


networks = [torchvision_fcn, smp_unet, smp_linknet, signed_unet, segformer, volume_net]
papers = ['hrnet_v1_w18', 'hrnet_v2_w18', 'deeplabv3_mobilenetv3']


def trained(build, path='drop'):
    "A network with a head whose block has seen a training batch, and an image."
    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, *((1, 16, 16, 16) if build is volume_net else (3, 64, 64)))
    head = add_dropclass(model, C, probe=x, predict=path)
    with head.dropping(torch.tensor([1.,0.,1.,1.])), torch.no_grad(): model.train()(x)
    return model.eval(),x


def logits(model, x):
    with torch.no_grad(): return main_output(model(x))


def folded_by(path, model, x):
    "A copy of a network that answers by a path, folded, and equal to it."
    model = copy.deepcopy(model)
    get_head(model).predict = path
    before = logits(model, x)
    assert fold_dropclass(model) is model and get_head(model) is None
    assert (logits(model, x)-before).abs().max()<=1e-5*max(1, before.abs().max()), path
    return model


@pytest.mark.parametrize('build', networks, ids=lambda o: o.__name__)
def test_fold_is_equal_and_plain(build):
    "Same numbers, and no module of this package in the tree; hooks and attributes are gone too."
    model,x = trained(build)
    for folded in (folded_by(o, model, x) for o in paths):
        assert not [n for n,m in folded.named_modules() if type(m).__module__.startswith('dropclass')]
        if build is not segformer:
            assert b'dropclass' not in pickle.dumps(folded) # transformers' own hooks cannot be pickled


def test_fold_refuses_a_pair():
    model,x = trained(torchvision_lraspp)
    with pytest.raises(ValueError, match='joins 2 classifiers'): fold_dropclass(model)
    assert get_head(model) is not None, "a refusal leaves the model as it was"
    model,x = trained(torchvision_lraspp, 'plain')
    before = logits(model, x)
    assert torch.allclose(logits(fold_dropclass(model), x), before, atol=1e-6)


without_package = """
import sys
class Absent:
    def find_spec(self, name, *args):
        if name.split('.')[0]=='dropclass': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
try: import dropclass
except ModuleNotFoundError: pass
else: raise SystemExit('the package should be absent here')
model,x,expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad(): assert torch.equal(model(x), expected)
"""


def test_pickle_needs_no_package(tmp_path):
    "A whole folded model is read in a process where the package cannot be imported."
    model,x = trained(smp_unet)
    fold_dropclass(model)
    torch.save((model, x, logits(model, x)), tmp_path/'model.pt')
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    subprocess.run([sys.executable, '-W', 'ignore', '-c', without_package, str(tmp_path/'model.pt')], check=True,
                   env=env, cwd=tmp_path)


class Tensor(nn.Module):
    "Logits only, as exporters like it; no part of the package."
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        out = self.model(x)
        return out if isinstance(out, torch.Tensor) else out['out'] if 'out' in out else out['logits']


ours = ['hrnet_v1_w18', 'deeplabv3_mobilenetv3', 'unet:resnet18']
exported = [torchvision_fcn, smp_unet, signed_unet, segformer,
            *[pytest.param(lambda o=o: create_model(o, C), id=o) for o in ours]]


@pytest.mark.parametrize('build', exported, ids=lambda o: getattr(o, '__name__', None))
def test_export_and_onnx(build, tmp_path):
    """torch.export and ONNX Runtime agree with the folded model; so does the export of the model with its head, which
    needs no folding."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model,x = trained(build)
    with_head = torch.export.export(Tensor(model).eval(), (x,)).module()(x).detach()
    folded = Tensor(fold_dropclass(model)).eval()
    expected = logits(folded, x)
    scale = max(1, expected.abs().max().item())
    assert (with_head-expected).abs().max()<=1e-5*scale
    program = torch.export.export(folded, (x,))
    assert (program.module()(x)-expected).abs().max()<=1e-5*scale
    assert 'dropclass' not in str(program.graph)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(program, (x,), tmp_path/'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path/'model.onnx'), providers=['CPUExecutionProvider'])
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(found)-expected).abs().max()<=1e-4*scale


@pytest.mark.parametrize('folded', [False, True], ids=['with head', 'folded'])
@pytest.mark.parametrize('build', [smp_unet, pytest.param(lambda: create_model(papers[0], C), id=papers[0])],
                         ids=lambda o: getattr(o, '__name__', None))
def test_safetensors(build, folded, tmp_path):
    "Weights go out and come in, with the head and folded."
    model,x = trained(build, 'auto')
    get_head(model).mark_trained()
    other,_ = trained(build, 'auto')
    get_head(other).mark_trained()
    if folded: model,other = fold_dropclass(model),fold_dropclass(other)
    expected = logits(model, x)
    with torch.no_grad():
        for p in other.parameters(): p.add_(1)
    assert not torch.allclose(logits(other, x), expected, atol=1e-2)
    save_model(model, str(tmp_path/'model.safetensors'))
    load_model(other, str(tmp_path/'model.safetensors'))
    assert torch.allclose(logits(other, x), expected, atol=1e-5)


@pytest.mark.parametrize('arch', papers)
def test_fold_of_the_papers_networks(arch):
    "Equal to 1e-5, and what was the head is plain PyTorch."
    model,x = trained(lambda: create_model(arch, C))
    own = {type(m) for m in create_model(arch, C).modules()}
    for folded in (folded_by(o, model, x) for o in paths):
        assert {type(m) for m in folded.modules()
                if type(m).__module__.startswith('dropclass')}<=own, "only what the network had before"


def test_benchmark_of_inference(tmp_path):
    "The script runs, checks that folding changes nothing, and writes the columns that the stored table has."
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, '-W', 'ignore', root/'benchmarks/inference.py', '--archs', 'small', '--size',
                    '32x64', '--rounds', '7', '--classes', '5', '--csv', tmp_path/'new.csv'], check=True)
    read = lambda path: list(csv.DictReader(open(path, newline='', encoding='utf-8')))
    new,stored = read(tmp_path/'new.csv'),read(root/'results/inference.csv')
    assert list(new[0])==list(stored[0]) and [o['variant'] for o in new]==['plain','head','folded']
    assert int(new[2]['parameters'])-int(new[0]['parameters'])==32*32+32, "one convolution with a bias"
    assert float(new[2]['gmac'])>float(new[0]['gmac']) and float(new[0]['wall_ratio_median'])==1
    assert {o['arch'] for o in stored}==set(papers)
