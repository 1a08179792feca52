"""Networks of every library people use: DropClass finds the classifier, trains a step, predicts, and comes out again
without a trace.

Networks are built from their configuration, with random weights; nothing is downloaded. Each row of
results/networks.csv is one of these
tests; set DROPCLASS_WRITE_TABLE=1 to write the file anew. The table is read by nbs/explanations/30_any_network.ipynb.
"""
import csv
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dropclass.features import sample_keep_mask
from dropclass.head import split_paths
from dropclass.fold import fold_dropclass
from dropclass.surgery import (add_dropclass, find_classifier, get_head, inspect_classifier, main_output,
                               remove_dropclass)
from dropclass.importance import resize_adjoint
from dropclass.losses import dropclass_loss
from dropclass.models import OutputAdapter, create_model
from dropclass.prior import ShiftedOutput, class_offsets, shift_classes, unshift_classes

C = 4 # Classes
table = Path(__file__).parents[1]/'results/networks.csv'
fields = ['library', 'network', 'classifier', 'kernel', 'follows', 'importance', 'paths', 'features', 'max_rel_error',
          'cosine']
rows = {}


# ---- the networks

@dataclass
class Net:
    "One row: how to build the network, and what is expected of it."
    library: str
    name: str
    build: object # A function without arguments
    classifier: object # Path that must be found
    form: str = 'closed form'
    shape: tuple = (2, 3, 64, 64)
    corners: bool = False # Does the resize behind the classifier align corners?
    by_hand: bool = False # Must be named, because nothing can be found
    marks: tuple = ()

    def __str__(self): return f'{self.library} {self.name}'


def torchvision_net(name, **kwargs):
    from torchvision.models import segmentation
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=C, **kwargs)


def fastai_unet(arch, **kwargs):
    from fastai.vision import models
    from fastai.vision.learner import create_unet_model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # weight_norm and spectral_norm are called deprecated
        return create_unet_model(arch_of(models, arch), C, (64, 64), pretrained=False, **kwargs)


def arch_of(models, name): return getattr(models, name, None) or getattr(models.xresnet, name)


def norm(kind):
    from fastai.layers import NormType
    return getattr(NormType, kind)


def smp_net(decoder, encoder='resnet18', **kwargs):
    smp = pytest.importorskip('segmentation_models_pytorch')
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=C, **kwargs)


def hf_net(name, **kwargs):
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, name+'Config')(num_labels=C, **kwargs)
    return OutputAdapter(getattr(transformers, name+'ForSemanticSegmentation')(config))


def hf_upernet(backbone, **kwargs):
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, backbone+'Config')(out_features=['stage1','stage2','stage3','stage4'], **kwargs)
    return hf_net('UperNet', backbone_config=config, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8)


def monai_net(name, dims=2, **kwargs):
    nets = pytest.importorskip('monai.networks.nets')
    return getattr(nets, name)(spatial_dims=dims, in_channels=1, out_channels=C, **kwargs)


class DecodeHead(nn.Module):
    "Shaped as mmsegmentation's: channels in, `conv_seg` behind a dropout."
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(16, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.conv_seg,self.dropout = nn.Conv2d(channels, C, 1),nn.Dropout2d(.1)
    def forward(self, x): return self.conv_seg(self.dropout(self.convs(x)))


class Segmentor(nn.Module):
    "Shaped as mmsegmentation's EncoderDecoder: one decode head or a cascade, and a list of auxiliary heads."
    def __init__(self, cascade=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.decode_head = nn.ModuleList([DecodeHead(8), DecodeHead(12)]) if cascade else DecodeHead(12)
        self.auxiliary_head = nn.ModuleList([DecodeHead(8)])
    def forward(self, x):
        features = self.backbone(x)
        heads = self.decode_head if isinstance(self.decode_head, nn.ModuleList) else [self.decode_head]
        grow = lambda o: F.interpolate(o, size=x.shape[2:], mode='bilinear', align_corners=False)
        *others,logits = [grow(o(features)) for o in heads]
        return {'out':logits, **{f'aux_{i}':grow(o(features)) for i,o in enumerate(self.auxiliary_head)},
                **{f'cascade_{i}':o for i,o in enumerate(others)}}


class ByHand(nn.Module):
    "A user's own three lines: no convolution scores the classes."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.score = nn.Linear(12, C)
    def forward(self, x): return self.score(self.body(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shuffle_net(): return nn.Sequential(nn.Conv2d(3, 12, 3, stride=4, padding=1), nn.ReLU(),
                                        nn.Sequential(nn.Conv2d(12, 16*C, 3, padding=1), nn.PixelShuffle(4)))


small = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
             patch_size=16)
pyramid = dict(depths=[1,1,1,1], hidden_sizes=[8,16,24,32])
unet = dict(channels=(8, 12, 16), strides=(2, 2))
swin = dict(feature_size=12, depths=(1,1,1,1), num_heads=(1,1,1,1))
square,cube,brick = (2, 1, 64, 64),(2, 1, 16, 16, 32),(1, 1, 32, 32, 64)
_tv,_fa,_smp,_hf,_mo = 'torchvision','fastai','segmentation_models_pytorch','transformers','MONAI'
_seg,_last = 'segmentation_head.0','layers.12.0'

nets = [
    Net(_tv, 'FCN ResNet-50', lambda: torchvision_net('fcn_resnet50', aux_loss=True), 'classifier.4'),
    Net(_tv, 'DeepLabV3 ResNet-50', lambda: torchvision_net('deeplabv3_resnet50', aux_loss=False), 'classifier.4'),
    Net(_tv, 'DeepLabV3 MobileNetV3', lambda: torchvision_net('deeplabv3_mobilenet_v3_large', aux_loss=True),
        'classifier.4'),
    Net(_tv, 'LR-ASPP MobileNetV3', lambda: torchvision_net('lraspp_mobilenet_v3_large'),
        ('classifier.low_classifier','classifier.high_classifier')),
    Net(_fa, 'U-Net resnet18', lambda: fastai_unet('resnet18'), _last),
    Net(_fa, 'U-Net resnet34, self-attention', lambda: fastai_unet('resnet34', self_attention=True), _last),
    Net(_fa, 'U-Net xresnet18, no last cross', lambda: fastai_unet('xresnet18', last_cross=False), 'layers.10.0'),
    Net(_fa, 'U-Net squeezenet1_1', lambda: fastai_unet('squeezenet1_1'), 'layers.8.0', marks=[pytest.mark.slow]),
    Net(_fa, 'U-Net resnet18, BatchNorm last', lambda: fastai_unet('resnet18', norm_type=norm('Batch')), _last,
        'autograd'),
    Net(_fa, 'U-Net resnet18, weight norm', lambda: fastai_unet('resnet18', norm_type=norm('Weight')), _last),
    Net(_fa, 'U-Net resnet18, spectral norm', lambda: fastai_unet('resnet18', norm_type=norm('Spectral')), _last),
    Net(_fa, 'U-Net resnet18, y_range', lambda: fastai_unet('resnet18', y_range=(-4,4)), _last, 'autograd'),
    *[Net(_smp, o, lambda o=o: smp_net(o), _seg, corners=True)
      for o in ('Unet','UnetPlusPlus','MAnet','Linknet','FPN','PSPNet','DeepLabV3','DeepLabV3Plus','UPerNet',
                'Segformer')],
    Net(_smp, 'PAN', lambda: smp_net('PAN'), _seg, shape=(2, 3, 128, 128), corners=True), # Too deep for 64 pixels
    Net(_smp, 'DPT', lambda: smp_net('DPT', 'tu-vit_tiny_patch16_224', dynamic_img_size=True),
        'segmentation_head.head.4', corners=True),
    Net(_smp, 'Unet, labels too', lambda: smp_net('Unet', aux_params=dict(classes=3)), _seg),
    Net(_smp, 'Unet, softmax last', lambda: smp_net('Unet', activation='softmax2d'), _seg, 'autograd'),
    Net(_smp, 'FPN, sigmoid last', lambda: smp_net('FPN', activation='sigmoid'), _seg, 'autograd'),
    Net(_hf, 'SegFormer',
        lambda: hf_net('Segformer', depths=[1,1,1,1], hidden_sizes=[8,16,24,32], decoder_hidden_size=16),
        'model.decode_head.classifier'),
    Net(_hf, 'UperNet ConvNeXt', lambda: hf_upernet('ConvNext', **pyramid), 'model.decode_head.classifier'),
    Net(_hf, 'UperNet Swin',
        lambda: hf_upernet('Swin', embed_dim=6, depths=[1,1,1,1], num_heads=[1,1,1,1], image_size=64, window_size=4),
        'model.decode_head.classifier'),
    Net(_hf, 'DPT',
        lambda: hf_net('DPT', **small, backbone_out_indices=[0,1,2,3], neck_hidden_sizes=[8,16,24,32],
                       fusion_hidden_size=16), 'model.head.head.4', corners=True),
    Net(_hf, 'BEiT', lambda: hf_net('Beit', **small, out_indices=[0,1,2,3]), 'model.decode_head.classifier'),
    Net(_hf, 'Data2VecVision', lambda: hf_net('Data2VecVision', **small, out_indices=[0,1,2,3]),
        'model.decode_head.classifier'),
    Net(_hf, 'MobileViT', lambda: hf_net('MobileViT', image_size=64), 'model.segmentation_head.classifier.convolution'),
    Net(_hf, 'MobileViTV2', lambda: hf_net('MobileViTV2', image_size=64, width_multiplier=.5),
        'model.segmentation_head.classifier.convolution'),
    Net(_mo, 'BasicUNet 2D', lambda: monai_net('BasicUNet', features=(8,)*6), 'final_conv', shape=square),
    Net(_mo, 'BasicUNet 3D', lambda: monai_net('BasicUNet', 3, features=(8,)*6), 'final_conv', shape=cube),
    Net(_mo, 'UNet 2D', lambda: monai_net('UNet', **unet), 'model.2.conv', 'autograd', square),
    Net(_mo, 'UNet 3D', lambda: monai_net('UNet', 3, **unet), 'model.2.conv', 'autograd', cube),
    Net(_mo, 'UNet 2D, residual units', lambda: monai_net('UNet', num_res_units=2, **unet), 'model.2.0.conv',
        'autograd', square),
    Net(_mo, 'UNet 3D, residual units', lambda: monai_net('UNet', 3, num_res_units=1, **unet), 'model.2.0.conv',
        'autograd', cube),
    Net(_mo, 'SwinUNETR 2D', lambda: monai_net('SwinUNETR', **swin), 'out.conv.conv', shape=square),
    Net(_mo, 'SwinUNETR 3D', lambda: monai_net('SwinUNETR', 3, **swin), 'out.conv.conv', shape=brick),
    Net(_mo, 'UNETR 2D',
        lambda: monai_net('UNETR', img_size=64, feature_size=8, hidden_size=48, mlp_dim=32, num_heads=4),
        'out.conv.conv', shape=square),
    Net(_mo, 'SegResNet 2D', lambda: monai_net('SegResNet', init_filters=8), 'conv_final.2.conv', shape=square),
    Net(_mo, 'AttentionUnet 2D', lambda: monai_net('AttentionUnet', **unet), 'model.2.conv', shape=square),
    Net('mmsegmentation-shaped', 'decode head', Segmentor, 'decode_head.conv_seg'),
    Net('mmsegmentation-shaped', 'cascade', lambda: Segmentor(True), 'decode_head.1.conv_seg'),
    Net('dropclass', 'hrnet_v1_w18', lambda: create_model('hrnet_v1_w18', C), 'classifier'),
    Net('dropclass', 'hrnet_v2_w18', lambda: create_model('hrnet_v2_w18', C), 'classifier'),
    Net('dropclass', 'deeplabv3_mobilenetv3', lambda: create_model('deeplabv3_mobilenetv3', C), 'model.classifier.4'),
    Net('dropclass', 'timm:resnet18', lambda: create_model('timm:resnet18', C), 'classifier'),
    Net('dropclass', 'timm:convnext_atto', lambda: create_model('timm:convnext_atto', C), 'classifier'),
    Net('dropclass', 'unet:resnet18', lambda: create_model('unet:resnet18', C), 'model.'+_last),
    Net('dropclass', 'small', lambda: create_model('small', C), 'classifier'),
    Net('your own', 'Linear over pixels', ByHand, 'score', by_hand=True),
    Net('your own', 'PixelShuffle, module named', shuffle_net, '2', 'autograd', by_hand=True),
    Net('your own', 'PixelShuffle, convolution named', shuffle_net, '2.0', 'autograd', by_hand=True),
]


# ---- what every network must do

def images_of(net): return torch.randn(net.shape, generator=torch.Generator().manual_seed(1))


def labels_of(net): return torch.randint(C, (net.shape[0], *net.shape[2:]), generator=torch.Generator().manual_seed(2))


def train_step(model, head, x, y, keep_mask):
    """One DropClass step with the auxiliary outputs under a plain loss of their own; returns the two paths and the
    total loss."""
    model.train()
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    with head.dropping(keep_mask, lam=.5): out = model(x)
    plain,drop = split_paths(out, len(x))
    logits,drop_logits = main_output(plain),main_output(drop)
    loss = dropclass_loss(logits, drop_logits, y, keep_mask, lam=.5)
    aux = [o for k,o in plain.items() if k!='out'] if isinstance(plain, dict) else []
    for o in aux:
        assert len(o)==len(x), "an auxiliary head must not be doubled"
        loss = loss+.4*F.cross_entropy(o, y)
    loss.backward()
    for name,part in (('classifier', head.classifier), ('compensation', head.compensation)):
        assert any(p.grad is not None and p.grad.abs().max()>0 for p in part.parameters()), f"no gradient in the {name}"
    opt.step()
    return logits,drop_logits,loss


def brute_force(model, names, x):
    """Eq. (1) by autograd through the untouched network: gradients of the mean class scores at the classifier's own
    input, (N,C,K,...); and the size of its output.

    Where two classifiers are added, the features of one run on through the backbone to the other; A is what the
    classifiers read, so there the graph is cut.
    """
    layers,seen = [model.get_submodule(o) for o in names],{}
    def note(m, args, out): seen[m] = args[0],out
    cut = lambda m,args: args[0].detach().requires_grad_()
    handles = [m.register_forward_hook(note) for m in layers]
    if len(names)>1: handles += [m.register_forward_pre_hook(cut) for m in layers]
    try: out = main_output(model(x))
    finally:
        for o in handles: o.remove()
    first = lambda o,m: o.transpose(1, -1) if isinstance(m, nn.Linear) else o
    grads = []
    for c in range(C):
        score = out[:,c].flatten(1).mean(1).sum()
        at = torch.autograd.grad(score, [seen[m][0] for m in layers], retain_graph=True)
        grads.append(torch.cat([first(o, m) for o,m in zip(at, layers)], 1))
    return torch.stack(grads, 1),tuple(first(seen[layers[-1]][1], layers[-1]).shape[2:])


def tail_map(size, out_size, corners):
    "What each position of the logits adds to the mean of the resized ones."
    if size==out_size: return torch.full(size, 1/torch.Size(size).numel(), dtype=torch.float64)
    return resize_adjoint(size, out_size, corners)


def closed_form(layers, m):
    "Eq. (1) without autograd, (1,C,K,...): each class's weight, run backwards over the map `m` of the tail."
    parts = []
    for o in layers:
        if isinstance(o, nn.Linear):
            parts.append(o.weight[(None,...)+(None,)*m.dim()]*m)
            continue
        back = {2:F.conv_transpose2d, 3:F.conv_transpose3d}[m.dim()]
        parts.append(torch.stack([back(m[None,None], o.weight[c:c+1], padding=o.padding, dilation=o.dilation)
                                  for c in range(C)], 1))
    return torch.cat(parts, 2)


def disturb_norms(model):
    "Give every BatchNorm statistics that are not those of a fresh one."
    gen = torch.Generator().manual_seed(3)
    for m in model.modules():
        if getattr(m, 'running_var', None) is not None:
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=gen)*.1)
            m.running_var.copy_(.5+torch.rand(m.running_var.shape, generator=gen))


def used_importance(model, head, x):
    "The importance that a prediction by the drop path works with, (N,C,K,...) or (C,K)."
    seen,own = [],head.importance
    def note(features):
        found = own(features)
        seen.append(found if isinstance(found, torch.Tensor) else torch.stack(list(found), 1))
        return seen[-1] if isinstance(found, torch.Tensor) else iter(seen[-1].unbind(1))
    head.importance,head.predict = note,'drop'
    with torch.no_grad(): model(x)
    del head.importance
    return seen[-1].detach()


def check_eq1(model, names, x, corners):
    """Compare the head's importance with brute force in float64; returns the largest relative error and the smallest
    cosine of the mean form."""
    model,x = model.double().eval(),x.double()
    disturb_norms(model)
    expected,size = brute_force(model, names, x)
    assert expected.abs().flatten(2).sum(2).min()>1e-6, "Eq. (1) is noise"
    layers = [model.get_submodule(o) for o in names]
    head = add_dropclass(model, classifier=names, probe=x)
    found = used_importance(model, head, x)
    relative = lambda a,b: ((a-b).abs().max()/b.abs().max()).item()
    if head.form=='autograd': return relative(found, expected),float('nan')
    mean = expected.flatten(3).sum(3)
    found = found.expand_as(mean)
    assert relative(found, mean)<(1e-10 if all(getattr(o, 'kernel_size', (1,))[0]==1 for o in layers) else .2)
    closed = closed_form(layers, tail_map(size, tuple(x.shape[2:]), corners)).detach()
    return relative(closed, expected),F.cosine_similarity(found, mean, dim=2).min().item()


weights = torch.tensor([.1, .9, 2., 8.])
offsets = class_offsets(weights, .75)
at_output = {'U-Net resnet18, BatchNorm last', 'U-Net resnet18, y_range', 'FPN, sigmoid last',
             'PixelShuffle, module named', 'PixelShuffle, convolution named',
             'UNet 2D, residual units', 'UNet 3D, residual units'} # Behind the last two stands a sum


def logits(model, x):
    with torch.no_grad(): return main_output(model(x)).clone()


def over_pixels(x): return offsets.to(x).view(-1, *[1]*(x.dim()-2))


def shifted_by_offsets(after, before):
    "Do two predictions differ by the offsets, to 1e-6 of their size?"
    return ((after-before-over_pixels(before)).abs().max()<=1e-6*max(1, after.abs().max())).item()


def check_shift(model, net, x):
    "Shifted bias = shifted logits, in a network that is the same but for one vector; undone to the bit."
    disturb_norms(model) # A fresh BatchNorm changes nothing
    before,state,pieces = logits(model, x),{k:v.clone() for k,v in model.state_dict().items()},list(model.modules())
    shifted = shift_classes(model, offsets, net.classifier, probe=x)
    assert shifted_by_offsets(logits(shifted, x), before)
    assert isinstance(shifted, ShiftedOutput)==(net.name in at_output)
    if shifted is model:
        assert list(model.modules())==pieces
        changed = [k for k,v in model.state_dict().items() if k not in state or not torch.equal(v, state[k])]
        assert len(changed)==1 and changed[0].endswith('bias')
    assert unshift_classes(shifted) is model and torch.equal(logits(model, x), before)
    assert list(model.state_dict())==list(state) and all(torch.equal(v, state[k]) for k,v in model.state_dict().items())


def kernel_of(layer):
    size = getattr(layer, 'kernel_size', None)
    if size is None: return type(layer).__name__
    return 'x'.join(map(str, size))+(' transposed' if 'Transpose' in type(layer).__name__ else '')


@pytest.mark.parametrize('net', [pytest.param(o, marks=o.marks, id=str(o)) for o in nets])
def test_network(net):
    """Find, train a step, predict, load a plain checkpoint, take out: the logits are the old ones to the bit. Then the
    class bias, and Eq. (1)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = net.build().eval()
    x,y = images_of(net),labels_of(net)
    with torch.no_grad(): before = main_output(model(x)).clone()
    if net.by_hand:
        with pytest.raises(ValueError, match='name the layer'): find_classifier(model, probe=x)
    state = {k:v.clone() for k,v in model.state_dict().items()}
    facts = inspect_classifier(model, net.classifier if net.by_hand else None, probe=x)
    names = (net.classifier,) if isinstance(net.classifier, str) else net.classifier
    assert facts.names==names and facts.form==net.form
    layer = model.get_submodule(names[-1])
    head = add_dropclass(model, C, classifier=names if net.by_hand else None, probe=x)
    assert head.num_classes==C

    logits,drop_logits,loss = train_step(model, head, x, y, torch.tensor([1.,0.,1.,1.]))
    assert logits.shape==drop_logits.shape==(len(x), C, *x.shape[2:]) and loss.isfinite()
    assert not torch.equal(logits, drop_logits)
    model.eval()
    assert head.predicts=='drop'
    with torch.no_grad():
        dropped = main_output(model(x)).clone()
        head.predict = 'plain'
        plain = main_output(model(x))
    assert dropped.shape==plain.shape==before.shape and dropped.isfinite().all() and not torch.equal(dropped, plain)

    model.load_state_dict(state)
    remove_dropclass(model)
    with torch.no_grad(): assert torch.equal(main_output(model(x)), before)
    assert list(model.state_dict())==list(state) and get_head(model) is None

    if net.name!='Unet, softmax last': check_shift(model, net, x) # Probabilities are refused, see test_prior
    error,cosine = check_eq1(model, names, x, net.corners)
    assert error<1e-10
    assert not cosine<.9
    paths,features = 'stacked' if facts.stacks else 'tail runs twice','signed' if facts.signed else '>= 0'
    values = [net.library, net.name, ' + '.join(names), kernel_of(layer), facts.follows, facts.form, paths, features,
              f'{error:.0e}', '' if cosine!=cosine else f'{cosine:.4f}']
    rows[str(net)] = dict(zip(fields, values))


# ---- more than one row each

def unet_with_residual_tail():
    torch.manual_seed(0)
    model = monai_net('UNet', num_res_units=2, **unet).eval()
    return model,'model.2.1.conv.unit0.conv'


@pytest.mark.parametrize('n', [1, 2])
def test_residual_tail_runs_twice(n):
    """MONAI's UNet adds the un-stacked scores behind its last convolution; a batch of one would broadcast silently.
    Compared with Eq. (1), (2) and (4) done by hand."""
    model,name = unet_with_residual_tail()
    model,x = model.double(),torch.randn(n, 1, 64, 64, dtype=torch.float64)
    grads,_ = brute_force(model, (name,), x)
    expected = model(x).detach()
    with pytest.warns(UserWarning, match='of what the prediction knows of an image passes'):
        head = add_dropclass(model, classifier=name)
    for p in head.compensation[1].parameters(): nn.init.normal_(p)
    keep_mask = torch.tensor([1.,0.,1.,1.], dtype=torch.float64)
    calls = []
    handle = next(m for m in model.model[0].modules()
                  if isinstance(m, nn.Conv2d)).register_forward_pre_hook(lambda *o: calls.append(1))
    with head.dropping(keep_mask, in_eval=True): logits,drop_logits = split_paths(model(x), n)
    handle.remove()
    assert len(calls)==1, "what stands before the head runs once"
    assert torch.equal(logits, expected)

    def by_hand(conv, args, out):
        weighted = (args[0][:,None]*grads).relu()*keep_mask.view(1, -1, 1, 1, 1)
        dropped = weighted.sum(1)/C
        unit = (grads.relu()*keep_mask.view(1, -1, 1, 1, 1)).sum(1).mean((1,2,3), keepdim=True)/C
        return conv._conv_forward(head.compensation(dropped/unit), conv.weight, conv.bias)
    remove_dropclass(model)
    handle = model.get_submodule(name).register_forward_hook(by_hand)
    assert (drop_logits-model(x)).abs().max()<1e-10
    handle.remove()
    assert torch.equal(model(x), expected) and not model._forward_hooks


def test_norm_behind_counts_with_running_statistics():
    "In training mode too, where Eq. (1) through the batch statistics would be 0 for every class."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, C, 1, bias=False), nn.BatchNorm2d(C)).double()
    disturb_norms(model)
    conv,norm = model[2],model[3]
    norm.momentum = 0. # The plain path comes first and would move the statistics
    nn.init.normal_(norm.weight)
    expected = (norm.weight/(norm.running_var+norm.eps).sqrt())[:,None]*conv.weight.flatten(1)/64**2
    head = add_dropclass(model)
    seen,own = [],head.importance
    def note(features):
        seen.append(torch.stack(list(own(features)), 1))
        return iter(seen[-1].unbind(1))
    head.importance = note
    before,x = norm.num_batches_tracked.item(),torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.train()
    with head.dropping(torch.tensor([1.,0.,1.,1.])): out = model(x)
    assert (seen[0]-expected.detach()[None,:,:,None,None]).abs().max()<1e-10*expected.abs().max()
    assert norm.num_batches_tracked==before+2, "once per path, and not for the importance"
    for o in out.split(2): assert o.mean((0,2,3)).allclose(norm.bias), "each path has batch statistics of its own"


def test_tail_is_forgotten_after_an_error():
    "A forward that raises leaves no recording behind."
    model,name = unet_with_residual_tail()
    with pytest.warns(UserWarning): head = add_dropclass(model, classifier=name)
    x,keep_mask = torch.randn(2, 1, 64, 64),torch.tensor([1.,0.,1.,1.])
    model.train()
    with pytest.raises(RuntimeError), head.dropping(keep_mask): model(torch.randn(2, 7, 64, 64))
    with head.dropping(keep_mask): assert model(x).shape==(4, C, 64, 64)
    assert not head.tail.replay.outputs and head.tail.call is None


def mask_former(name):
    transformers = pytest.importorskip('transformers')
    swin = transformers.SwinConfig(embed_dim=6, depths=[1,1,1,1], num_heads=[1,1,1,1], image_size=64, window_size=4,
                                   out_features=['stage1','stage2','stage3','stage4'])
    if name=='OneFormer': # Wants a task beside the images
        sizes = dict.fromkeys(('hidden_dim','conv_dim','mask_dim','dim_feedforward','encoder_feedforward_dim',
                               'text_encoder_width'), 32)
        config = transformers.OneFormerConfig(backbone_config=swin, num_labels=C, num_queries=5, num_attention_heads=2,
            encoder_layers=1, decoder_layers=2, text_encoder_num_layers=1, task_seq_len=9, is_training=False, **sizes)
        return transformers.OneFormerForUniversalSegmentation(config)
    if name=='MaskFormer':
        decoder = transformers.DetrConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                                          decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
                                          num_queries=5)
        config = transformers.MaskFormerConfig(backbone_config=swin, decoder_config=decoder, fpn_feature_size=32,
                                               mask_feature_size=32, num_labels=C)
        return transformers.MaskFormerForInstanceSegmentation(config)
    config = transformers.Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                                            encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        encoder_feedforward_dim=16, dim_feedforward=16, num_queries=5, num_labels=C)
    return transformers.Mask2FormerForUniversalSegmentation(config)


@pytest.mark.parametrize('adapter', [False, True], ids=['as it is', 'in the adapter'])
@pytest.mark.parametrize('name', ['MaskFormer', 'Mask2Former', 'OneFormer'])
def test_mask_transformers_are_refused(name, adapter):
    "They predict masks and a class for each: the error says why that is no place for DropClass."
    torch.manual_seed(0)
    model = mask_former(name).eval()
    with pytest.raises(ValueError, match='predicts a set of masks'):
        add_dropclass(OutputAdapter(model) if adapter else model)


@pytest.mark.parametrize('net',
                         [o
                          for o in nets
                          if o.name in ('U-Net resnet18, y_range', 'LR-ASPP MobileNetV3', 'SegFormer',
                                        'UNet 2D, residual units')], ids=str)
def test_callback(net):
    "The same by the callback: two batches, a validation, predictions by the drop path."
    from dropclass.callback import DropClassCallback
    from dropclass.testing import toy_batch
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    torch.manual_seed(0)
    model = net.build()
    model = OutputAdapter(model) if net.library==_tv else model
    x,y = toy_batch(n=4, num_classes=C, size=64)
    batches = [(x[i:i+2][:,:net.shape[1]].contiguous(), y[i:i+2]) for i in (0, 2)]
    dls = DataLoaders.from_dsets(*[[(a, b) for xs,ys in batches for a,b in zip(xs, ys)]]*2, bs=2, num_workers=0)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), train_bn=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=DropClassCallback(lam=.6, drop_prob=1.))
    head = get_head(learn.model)
    assert head.predicts=='drop' and torch.tensor([o for o in learn.recorder.values[-1]]).isfinite().all()
    with learn.no_bar(), learn.no_logging(): preds,_ = learn.get_preds(dl=dls.valid)
    assert preds.shape==(4, C, 64, 64) and preds.isfinite().all()


def test_hub_checkpoints_hold_the_classifier(tmp_path):
    """`save_pretrained` and `from_pretrained` know nothing of the head: the plain path's prediction comes back. Folded
    layers they would lose, and that is said."""
    torch.manual_seed(0)
    model,x = next(o for o in nets if o.name=='SegFormer').build().model.eval(),torch.randn(2, 3, 64, 64)
    add_dropclass(model, C, predict='drop')
    get_head(model).predict = 'plain'
    model.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(type(model).from_pretrained(tmp_path).eval()(x).logits, model(x).logits)
    get_head(model).predict = 'drop'
    with pytest.warns(UserWarning, match='random classifier'): fold_dropclass(model)


def test_deep_supervision_trains():
    "MONAI's DynUNet returns the scores of several levels as one tensor, in training only."
    model = monai_net('DynUNet', kernel_size=[3]*4, strides=[1,2,2,2], upsample_kernel_size=[2]*3, filters=[8,12,16,20],
                      deep_supervision=True, deep_supr_num=2)
    head,x,y = add_dropclass(model.train(), C),torch.randn(2, 1, 64, 64),torch.randint(C, (2, 64, 64))
    keep_mask = torch.tensor([1.,0.,1.,1.])
    with head.dropping(keep_mask, .5): logits,drop_logits = split_paths(model(x), 2)
    assert logits.shape==drop_logits.shape==(2, 3, C, 64, 64)
    assert not torch.equal(logits[:,0], drop_logits[:,0]) and torch.equal(logits[:,1:], drop_logits[:,1:])
    dropclass_loss(logits[:,0], drop_logits[:,0], y, keep_mask, .5).backward()
    assert head.compensation[0].weight.grad.abs().max()>0


def test_sampled_masks_train():
    "The four lines of a plain loop, on a model that returns a dict with an auxiliary output."
    torch.manual_seed(0)
    model = Segmentor()
    head = add_dropclass(model)
    for step in range(3):
        x,y = torch.randn(2, 3, 64, 64),torch.randint(C, (2, 64, 64))
        logits,drop_logits,loss = train_step(model, head, x, y, sample_keep_mask(C, step/2))
        assert loss.isfinite()


def test_table_is_current():
    """results/networks.csv says what the tests above found. DROPCLASS_WRITE_TABLE=1 writes it, when all have run, slow
    ones included."""
    if not rows: pytest.skip('no network ran')
    found = {o:rows[o] for o in map(str, nets) if o in rows}
    if os.environ.get('DROPCLASS_WRITE_TABLE') and len(rows)==len(nets):
        with open(table, 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, fields, lineterminator='\n')
            writer.writeheader()
            writer.writerows(found.values())
    with open(table, newline='', encoding='utf-8') as f:
        stored = {f"{o['library']} {o['network']}":o for o in csv.DictReader(f)}
    assert list(stored)==[str(o) for o in nets] and len(stored)>=40, "stale: run with DROPCLASS_WRITE_TABLE=1"
    for name,row in found.items():
        for k in fields:
            if k=='cosine': assert abs(float(row[k] or 0)-float(stored[name][k] or 0))<.02
            elif k!='max_rel_error':
                assert row[k]==stored[name][k], f"{name}: {k} is stale, run with DROPCLASS_WRITE_TABLE=1"
