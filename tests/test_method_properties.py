"Eq. (1) to (4) on random settings: the closed form against autograd, the factorised form against the literal one."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from dropclass.core import step_generator
from dropclass.features import average_kept, class_features, class_scale, drop_features, dropped_class, sample_keep_mask
from dropclass.importance import autograd_importance, conv_importance, exact_conv_importance, resize_adjoint

settings.register_profile('method', max_examples=60, deadline=None, derandomize=True)
settings.load_profile('method')

sides = st.integers(1, 9)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**16)


def rand(*shape, seed=0, grad=False):
    "Signed float64 numbers that depend on the seed alone; some are exactly 0."
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen, dtype=torch.float64)
    return (x*(torch.rand(shape, generator=gen)>.1)).requires_grad_(grad)


def resized(logits, out_size, align_corners=False):
    "Resize as a network does."
    if out_size is None: return logits
    return F.interpolate(logits, out_size, mode='bilinear', align_corners=align_corners)


def max_diff(a, b): return (a-b).abs().max().item()


# Eq. (1)

@given(sizes, sizes, st.booleans())
def test_adjoint_is_autograd(size, out_size, align_corners):
    x = torch.zeros(1, 1, *size, dtype=torch.float64, requires_grad=True)
    oracle, = torch.autograd.grad(resized(x, out_size, align_corners).mean(), x)
    m = resize_adjoint(size, out_size, align_corners)
    assert m.shape==size and abs(m.sum().item()-1)<1e-12
    assert max_diff(m, oracle[0,0])<1e-12


@st.composite
def heads(draw):
    "A convolution, a feature size that it can read, and a resize behind it."
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.one_of(st.sampled_from(['same', 'valid']), st.tuples(st.integers(0, 5), st.integers(0, 5))))
    reach = [d*(k-1) for d,k in zip(dilation, kernel)]
    size = tuple(draw(st.integers(r+1, r+6)) for r in reach)
    channels,num_classes = draw(st.integers(1, 4)),draw(st.integers(1, 4))
    conv = nn.Conv2d(channels, num_classes, kernel, padding=padding, dilation=dilation).double()
    conv.weight.data = rand(*conv.weight.shape, seed=draw(seeds))
    out_size = draw(st.one_of(st.none(), st.tuples(st.integers(1, 20), st.integers(1, 20))))
    return conv,size,out_size,draw(st.booleans())


@given(heads(), st.integers(1, 3))
def test_closed_form_is_autograd(head, n):
    conv,size,out_size,align_corners = head
    exact = exact_conv_importance(conv, size, out_size, align_corners)
    features = rand(n, conv.in_channels, *size, seed=1)
    oracle = autograd_importance(lambda o: resized(conv(o), out_size, align_corners), features)
    assert exact.shape==oracle.shape[1:]
    assert max_diff(exact, oracle)<1e-12


@given(heads(), seeds)
def test_closed_form_has_the_gradients_of_autograd(head, seed):
    conv,size,out_size,align_corners = head
    exact = exact_conv_importance(conv, size, out_size, align_corners)
    slow = autograd_importance(lambda o: resized(conv(o), out_size, align_corners),
                               rand(1, conv.in_channels, *size, seed=1), detach=False)[0]
    probe = rand(*exact.shape, seed=seed)
    a,b = (torch.autograd.grad((probe*o.relu()).sum(), conv.weight)[0] for o in (exact, slow))
    assert max_diff(a, b)<1e-12


@given(sizes, st.one_of(st.none(), sizes), st.booleans(), seeds)
def test_mean_form_of_a_1x1_is_the_spatial_mean(size, out_size, align_corners, seed):
    conv = nn.Conv2d(3, 4, 1).double()
    conv.weight.data = rand(4, 3, 1, 1, seed=seed)
    exact = exact_conv_importance(conv, size, out_size, align_corners).detach()
    mean = conv_importance(conv).detach()
    assert max_diff(exact.mean((-2,-1))*size[0]*size[1], mean)<1e-12


@given(st.integers(1, 7), st.integers(1, 7))
def test_mean_form_is_the_interior_of_the_exact_map(kernel, dilation):
    conv = nn.Conv2d(3, 4, kernel, padding=dilation*(kernel-1), dilation=dilation).double()
    exact = exact_conv_importance(conv, (5, 6))             # With full padding every tap reads every feature
    logit_size = [o+dilation*(kernel-1) for o in (5, 6)]
    mean = conv_importance(conv)[...,None,None]/(logit_size[0]*logit_size[1])
    assert max_diff(exact, mean)<1e-12


@given(st.integers(1, 4), st.integers(1, 6), seeds)
def test_no_sample_depends_on_its_neighbours(n, num_classes, seed):
    head = nn.Sequential(nn.Conv2d(3, num_classes, 3, padding=1), nn.BatchNorm2d(num_classes), nn.Dropout(.5),
                         nn.GELU())
    head,features = head.double(),rand(n, 3, 4, 5, seed=seed)
    whole,alone = autograd_importance(head, features),autograd_importance(head, features[:1])
    assert whole.shape==(n, num_classes, 3, 4, 5) and max_diff(alone, whole[:1])<1e-12
    assert all(o.training for o in head.modules()) and all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize('conv',
                         [nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, groups=2),
                          nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')])
def test_convolutions_without_closed_form_point_to_autograd(conv):
    with pytest.raises(ValueError, match='autograd_importance'): exact_conv_importance(conv, (5, 5))
    assert autograd_importance(conv, torch.rand(1, 4, 5, 5)).shape==(1, 4, 4, 5, 5)


# Eq. (2) to (4)

@st.composite
def drops(draw):
    "Signed features, an importance of any of the three shapes, and a keep mask."
    n,c,k = draw(st.integers(1, 3)),draw(st.integers(2, 7)),draw(st.integers(1, 5))
    size,seed = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),draw(seeds)
    shape = draw(st.sampled_from([(c,k), (c,k,*size), (n,c,k,*size)]))
    droppable = draw(st.one_of(st.none(), st.lists(st.integers(0, c-1), min_size=1, unique=True)))
    keep_mask = sample_keep_mask(c, draw(st.floats(0, 1)), step_generator(seed, 0), droppable)
    return rand(n, k, *size, seed=seed, grad=True),rand(*shape, seed=seed+1, grad=True),keep_mask


def by_the_book(features, importance, keep_mask, average):
    "Eq. (2) and (4) as a loop over classes, without the library."
    total = torch.zeros_like(features)
    for c,keep in enumerate(keep_mask.tolist()):
        one = importance[:,c] if importance.ndim==5 else importance[c]
        total = total + keep*F.relu(features*(one[:,None,None] if one.ndim==1 else one))
    return total/(len(keep_mask) if average=='all' else int(keep_mask.sum()))


@given(drops(), st.sampled_from(['all', 'kept']))
def test_factorised_is_literal_is_the_book(drop, average):
    features,importance,keep_mask = drop
    book = by_the_book(features, importance, keep_mask, average)
    literal = average_kept(class_features(features, importance), keep_mask, average)
    fast = drop_features(features, importance, keep_mask, average)
    assert fast.shape==features.shape
    probe = rand(*features.shape, seed=7)
    grads = [torch.autograd.grad((probe*o).sum(), (features, importance)) for o in (book, literal, fast)]
    for values in ((book, literal, fast), *zip(*grads)):
        for o in values[1:]: assert max_diff(values[0], o)<1e-12


@given(drops(), st.sampled_from(['all', 'kept']), st.sampled_from(['raw', 'unit']))
def test_nonnegative_features_need_no_second_term(drop, average, scale):
    features,importance,keep_mask = drop
    features = features.detach().abs()
    a,b = (drop_features(features, importance, keep_mask, average, scale, signed=o) for o in (True, False))
    assert max_diff(a, b)<1e-12


@given(drops(), st.sampled_from(['all', 'kept']))
def test_unit_scale_is_the_raw_one_up_to_a_constant_per_sample(drop, average):
    features,importance,keep_mask = drop
    raw,unit = (class_scale(importance.detach(), keep_mask, average, o) for o in ('raw', 'unit'))
    axes = (1,2,3) if importance.ndim==5 else tuple(range(raw[0].ndim))
    mean = raw[0].mean(axes, keepdim=True)
    factor = torch.where(mean>0, mean, torch.ones_like(mean))
    for a,b in zip(raw, unit): assert max_diff(a, b*factor)<1e-12
    assert ((unit[0].mean(axes)-1).abs()<1e-12).logical_or(mean.flatten()==0).all()


@given(drops())
def test_streamed_classes_are_the_stacked_ones(drop):
    features,importance,keep_mask = drop
    axis = 1 if importance.ndim==5 else 0
    streamed = drop_features(features, iter(importance.unbind(axis)), keep_mask)
    assert max_diff(streamed, drop_features(features, importance, keep_mask))<1e-12


@given(drops())
def test_a_dropped_class_leaves_no_trace(drop):
    features,importance,keep_mask = drop
    z = dropped_class(keep_mask)
    if z is None: return
    axis = 1 if importance.ndim==5 else 0
    changed = importance.detach().clone()
    changed.select(axis, z).add_(100.)
    assert torch.equal(drop_features(features, changed, keep_mask), drop_features(features, importance, keep_mask))


@given(st.integers(2, 40), st.floats(0, 1), seeds, seeds, st.data())
def test_keep_masks(num_classes, drop_prob, seed, step, data):
    droppable = data.draw(st.one_of(st.none(), st.lists(st.integers(0, num_classes-1), min_size=1, unique=True)))
    draw = lambda p: sample_keep_mask(num_classes, p, step_generator(seed, step), droppable)
    z,sure = dropped_class(draw(drop_prob)),dropped_class(draw(1.))
    assert dropped_class(draw(0.)) is None
    assert sure in (range(num_classes) if droppable is None else droppable)
    assert z in (None, sure)
    state = torch.get_rng_state()
    assert torch.equal(draw(drop_prob), draw(drop_prob)) and torch.equal(state, torch.get_rng_state())
