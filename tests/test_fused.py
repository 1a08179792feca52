"The fused losses are the literal ones: for any shape, ratio and option, and without a large tensor."
import os, subprocess, sys
from contextlib import nullcontext
from itertools import product
from unittest import mock

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dropclass.core import VOID
from dropclass.fused import (calm_threads, find_resize, full_precision, fuses, matrix_windows, resize_cross_entropy,
                             resize_dropclass_loss, resize_matrix, tile_numbers, tile_size)
from dropclass.losses import drop_path_losses, dropclass_loss, segmentation_loss

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

few = settings(max_examples=40, deadline=None, derandomize=True)
side = st.integers(1, 9)

def keep_mask(num_classes, z):
    mask = torch.ones(num_classes)
    if z is not None: mask[z] = 0
    return mask

def resize(logits, target, align_corners=False):
    return F.interpolate(logits, size=target.shape[1:], mode='bilinear', align_corners=align_corners)

def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)

def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)

@st.composite
def batches(draw):
    "Small logits of both paths, labels of another size with void, the dropped class (or None), and a tile."
    C,N,large = draw(st.integers(2, 6)),draw(st.integers(1, 3)),st.integers(1, 24)
    size,out_size = draw(st.tuples(side, side)),draw(st.tuples(large, large))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1., 5., 300.]))
    x,drop_x = (scale*torch.randn(2, N, C, *size, generator=gen, dtype=torch.float64)).unbind()
    target = torch.randint(C+1, (N, *out_size), generator=gen)
    z = draw(st.one_of(st.none(), st.integers(0, C-1)))
    kind = draw(st.sampled_from(['mixed', 'mixed', 'mixed', 'void', 'dropped']))
    target = {'mixed':target.masked_fill(target==C, VOID), 'void':torch.full_like(target, VOID),
              'dropped':torch.full_like(target, z or 0)}[kind]
    tile = draw(st.one_of(st.none(), st.tuples(st.integers(1, 10), st.integers(1, 10))))
    return x.requires_grad_(), drop_x.requires_grad_(), target, z, tile

@st.composite
def losses(draw, num_classes):
    "Settings of a cross-entropy."
    weight = draw(st.sampled_from([None, torch.linspace(.3, 2.5, num_classes, dtype=torch.float64),
                                   torch.arange(num_classes).double()]))
    return dict(weight=weight, label_smoothing=draw(st.sampled_from([0., .1, 1.])),
                ignore_index=draw(st.sampled_from([VOID, VOID, 0])))

def small_tiles(tile=None):
    "Sweep in tiles of so many rows and columns."
    return nullcontext() if tile is None else mock.patch('dropclass.fused.tile_size', lambda *args: tile)

@few
@given(batches(), st.data(), st.booleans(), st.sampled_from(['valid', 'all']))
def test_it_is_the_literal_form(batch, data, align_corners, normalize):
    x,drop_x,target,z,tile = batch
    options = data.draw(losses(x.shape[1]))
    if options['ignore_index']==0: target = target.masked_fill(target==VOID, 0)
    ce,mask = nn.CrossEntropyLoss(**options),keep_mask(x.shape[1], z)
    how = dict(normalize=normalize, align_corners=align_corners, **options)
    up,up_drop = (resize(o, target, align_corners) for o in (x, drop_x))

    want = segmentation_loss(up, target, ce, normalize=normalize)
    with small_tiles(tile): got = resize_cross_entropy(x, target, **how)
    close(got, want)
    close(gradient(got, x), gradient(want, x))

    masked_weights = data.draw(st.sampled_from([True, False, None]))
    want = dropclass_loss(up, up_drop, target, mask, .3, 10., ce, normalize, masked_weights)
    with small_tiles(tile): got,parts = resize_dropclass_loss(x, drop_x, target, z, .3, 10., masked_weights, **how)
    close(got, want)
    close(parts,
          torch.stack([segmentation_loss(up, target, ce, normalize=normalize),
                       *drop_path_losses(up_drop, target, mask, ce, normalize, masked_weights)]))
    close(gradient(got, x, drop_x), gradient(want, x, drop_x))

@few
@given(side, st.integers(1, 40), st.booleans(), st.integers(1, 12))
def test_windows_cover_every_weight(size, out_size, align_corners, step):
    matrix = resize_matrix(size, out_size, align_corners)
    again = torch.zeros_like(matrix)
    for out,inp,block in matrix_windows(matrix, step): again[out,inp] += block
    assert torch.equal(again, matrix)
    x = torch.arange(float(size))[None,None]
    close(matrix@x[0,0], F.interpolate(x, size=out_size, mode='linear', align_corners=align_corners)[0,0], 1e-5)

@pytest.mark.parametrize('align_corners,eps', list(product([False, True], [0., .2])))
def test_gradcheck(align_corners, eps):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 2, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (1, 4, 5), generator=gen)
    target[0,0] = VOID
    weight = torch.tensor([.5, 1., 2.], dtype=torch.float64)
    how = dict(weight=weight, label_smoothing=eps, align_corners=align_corners)
    with small_tiles((3, 5)):
        torch.autograd.gradcheck(lambda x: resize_cross_entropy(x, target, **how), x)
        torch.autograd.gradcheck(lambda x: resize_dropclass_loss(x, 2*x, target, 1, .6, **how)[0], x)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_summed_in_float32(dtype, autocast):
    gen = torch.Generator().manual_seed(0)
    half = (3*torch.randn(2, 7, 16, 16, generator=gen)).to(dtype).requires_grad_()
    full = half.detach().double().requires_grad_()
    target = torch.randint(7, (2, 64, 64), generator=gen)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss,(_,*parts) = resize_dropclass_loss(None, half, target, 2, lam=1.)
        # as a gradient scaler does; unscaled, most gradients are below half's smallest number
        (2**14*loss).backward()
    want = drop_path_losses(resize(full, target), target, keep_mask(7, 2))
    (2**14*sum(want)).backward()
    assert loss.dtype==torch.float32 and half.grad.dtype==dtype
    for a,b in zip((loss, *parts), (sum(want), *want)): assert abs(a.item()-b.item())<=2e-6*abs(b.item())
    assert (half.grad-full.grad).norm()<=torch.finfo(dtype).eps*full.grad.norm()

def test_overflow_shows_in_loss_and_gradient():
    "A gradient scaler finds infinite logits by the gradient, and skips the step."
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float16)
    x[0,1,2,2] = float('inf')
    loss = resize_cross_entropy(x.requires_grad_(), torch.zeros(1, 16, 16, dtype=torch.long))
    loss.backward()
    assert not loss.isfinite() and not x.grad.isfinite().all()

class Sizes(TorchDispatchMode):
    "Names of all operations, and bytes of every tensor they make."
    def __init__(self):
        super().__init__()
        self.nbytes,self.names = [],[]
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        self.nbytes += [o.untyped_storage().nbytes()
                        for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        return out

@pytest.fixture
def one_thread():
    "An observer of operations sees those of its own thread only."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('C,size,out_size',
                         [(19, (32, 64), (256, 512)), (150, (16, 16), (128, 128)), (5, (200, 200), (50, 50))])
def test_no_large_tensor_is_made(C, size, out_size):
    x,drop_x = torch.randn(2, 2, C, *size).unbind()
    target = torch.randint(C, (2, *out_size))
    leaves = [o.clone().requires_grad_() for o in (x, drop_x)]
    def peak(f):
        with Sizes() as sizes: f().backward()
        return max(sizes.nbytes)
    fused = peak(lambda: resize_dropclass_loss(*leaves, target, 3, .5)[0])
    with calm_threads('cpu'): rows,cols = tile_size(C, size, out_size, tile_numbers('cpu'))
    allowed = 4*max(x.numel(), 2*target.numel(), C*rows*cols, 2**17)
    assert fused<=allowed
    if C*out_size[0]*out_size[1]<x.numel(): return
    literal = peak(lambda: dropclass_loss(*[resize(o, target) for o in leaves], target, keep_mask(C, 3), .5))
    assert literal>=4*2*C*out_size[0]*out_size[1]>2*allowed

@pytest.mark.usefixtures('one_thread')
def test_steps_without_a_backward_pass_make_no_gradient():
    x,target = torch.randn(1, 19, 16, 16, requires_grad=True),torch.randint(19, (1, 64, 64))
    with torch.no_grad(), Sizes() as ops: free = resize_cross_entropy(x, target)
    with Sizes() as all_ops: resize_cross_entropy(x, target)
    assert not any('scatter' in o for o in ops.names) and any('scatter' in o for o in all_ops.names)
    assert not free.requires_grad
    assert not resize_cross_entropy(x.detach(), target).requires_grad
    assert torch.equal(free, resize_cross_entropy(x, target).detach())

def test_backward_twice_and_scaled():
    x,target = torch.randn(1, 4, 5, 5, requires_grad=True),torch.randint(4, (1, 9, 9))
    loss = resize_cross_entropy(x, target)
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    again, = torch.autograd.grad(4*loss, x)
    close(again, 4*first)

def test_second_derivative_is_refused():
    x,target = torch.randn(1, 4, 5, 5, requires_grad=True),torch.randint(4, (1, 9, 9))
    for loss in (resize_cross_entropy(x, target), resize_dropclass_loss(None, x, target, 1, lam=1.)[0]):
        with pytest.raises(RuntimeError, match='no second derivative'): torch.autograd.grad(loss, x, create_graph=True)

def test_labels_out_of_range_fail_as_in_pytorch():
    x,target = torch.randn(1, 4, 5, 5),torch.full((1, 9, 9), 4)
    for f in (lambda t: resize_cross_entropy(x, t), lambda t: F.cross_entropy(resize(x, t), t, ignore_index=VOID)):
        for label in (4, -100, -1):
            with pytest.raises(IndexError, match=f'Target {label} is out of bounds'):
                f(target.masked_fill(target==4, label))

def test_any_integer_labels_any_memory_format_any_subclass():
    from fastai.torch_core import TensorImage, TensorMask
    x,target = torch.randn(2, 4, 5, 5),torch.randint(4, (2, 9, 9))
    target[0,0] = VOID
    want = resize_cross_entropy(x, target)
    assert torch.equal(resize_cross_entropy(x, target.byte()), want)
    close(resize_cross_entropy(x.to(memory_format=torch.channels_last),
                               target.transpose(1, 2).contiguous().transpose(1, 2)), want, 1e-6)
    got = resize_cross_entropy(TensorImage(x), TensorMask(target))
    assert type(got) is torch.Tensor and torch.equal(got, want)

def test_a_weight_of_zero_costs_no_gradient_but_keeps_its_value():
    x,target = torch.randn(1, 4, 5, 5, requires_grad=True),torch.randint(4, (1, 9, 9))
    total,parts = resize_dropclass_loss(x, 2*x, target, None, lam=0.)
    close(total, parts[0])
    close(parts[1], segmentation_loss(resize(2*x, target), target), 1e-5)
    close(gradient(total, x), gradient(resize_cross_entropy(x, target), x))

@pytest.mark.parametrize('value', ['highest', 'high', 'medium'])
def test_precision_of_products_comes_back(value):
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        with pytest.raises(KeyError), full_precision('cpu'):
            assert torch.get_float32_matmul_precision()=='highest' and not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision()==value
    finally: torch.set_float32_matmul_precision(old)

@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'),
                    reason='older PyTorch has one switch only')
def test_precision_set_by_the_newer_switches_comes_back():
    matmul = torch.backends.cuda.matmul
    old = matmul.fp32_precision
    matmul.fp32_precision = 'tf32'
    try:
        with full_precision('cpu'): assert matmul.fp32_precision=='ieee'
        assert matmul.fp32_precision=='tf32'
    finally: matmul.fp32_precision = old

@pytest.mark.parametrize('n', [1, 2, 3])
def test_threads_come_back_and_change_nothing(n):
    x,target = torch.randn(1, 7, 40, 40, dtype=torch.float64, requires_grad=True),torch.randint(7, (1, 160, 160))
    want,threads = resize_cross_entropy(x, target),torch.get_num_threads()
    try:
        torch.set_num_threads(n)
        got = resize_cross_entropy(x, target)
        close((got, *gradient(got, x)), (want, *gradient(want, x)))
        with pytest.raises(KeyError), calm_threads('cpu'): raise KeyError
        assert torch.get_num_threads()==n
    finally: torch.set_num_threads(threads)

def step_on(threads, x, target, **how):
    "Loss, parts and gradient of a step on a number of threads."
    old = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total,parts = resize_dropclass_loss(x, 2*x, target, 3, .5, **how)
        return total.detach(), parts, *gradient(total, x)
    finally: torch.set_num_threads(old)

@pytest.mark.parametrize('grad', [True, False])
def test_two_threads_give_the_bits_of_one(grad):
    x,target = torch.randn(2, 19, 64, 64, requires_grad=True),torch.randint(19, (2, 256, 256))
    assert tile_size(19, (64, 64), (256, 256))[0]<256 # several bands
    if not grad:
        with torch.inference_mode(): one,two = [resize_cross_entropy(x, target) for _ in range(2)]
        assert torch.equal(one, two)
        return
    for a,b in zip(step_on(1, x, target), step_on(2, x, target)): assert torch.equal(a, b)

@pytest.mark.parametrize('scale', [1., 30., 1e4])
def test_logits_of_any_size_in_float32(scale):
    "Where the exponentials of shifted small logits could vanish, every tile is shifted anew."
    gen = torch.Generator().manual_seed(0)
    x,target = scale*torch.randn(1, 5, 8, 8, generator=gen),torch.randint(5, (1, 64, 64), generator=gen)
    leaf,exact = x.clone().requires_grad_(),x.double().requires_grad_()
    got,want = resize_cross_entropy(leaf, target),F.cross_entropy(resize(exact, target), target)
    close(got.double(), want, 1e-5)
    assert (gradient(got, leaf)[0].double()-gradient(want, exact)[0]).norm()<=1e-5*gradient(want, exact)[0].norm()

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_threads_start_anew_after_a_fork():
    "A forked process has none of its parent's threads; waiting for them would take forever."
    code = """import os, signal
from dropclass.fused import map_bands
squares = lambda: list(map_bands(lambda o: o*o, range(8), workers=2))
want,pid = squares(),os.fork()
if pid==0:
    signal.alarm(60) # nobody else would end it
    os._exit(0 if squares()==want else 1)
assert os.waitpid(pid, 0)[1]==0"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=100)

def test_fastai_losses_can_be_fused():
    from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
    x,target = torch.randn(2, 4, 5, 5),torch.randint(4, (2, 9, 9))
    weight = torch.tensor([1., 2., 3., 4.])
    loss = CrossEntropyLossFlat(axis=1, weight=weight, ignore_index=VOID, label_smoothing=.1)
    close(resize_cross_entropy(x, target, **fuses(loss)), loss(resize(x, target), target), 1e-6)
    assert fuses(FocalLossFlat(axis=1)) is None

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_find_resize(dtype):
    x = (5*torch.randn(2, 4, 8, 8)).to(dtype)
    up = lambda **kwargs: F.interpolate(x, size=(32, 32), **kwargs)
    assert find_resize(x, up(mode='bilinear'))=={'align_corners':False}
    assert find_resize(x, up(mode='bilinear', align_corners=True))=={'align_corners':True}
    assert find_resize(x, up(mode='nearest')) is None and find_resize(x, up(mode='bicubic')) is None
    assert find_resize(x, up(mode='bilinear').softmax(1)) is None and find_resize(x, x[:,:2]) is None

def test_it_compiles():
    x,target = torch.randn(1, 4, 5, 5, requires_grad=True),torch.randint(4, (1, 9, 9))
    compiled = torch.compile(lambda x: resize_cross_entropy(2*x, target), backend='aot_eager')
    losses = compiled(x),resize_cross_entropy(2*x, target)
    close(*losses, 1e-6)
    close(*[gradient(o, x) for o in losses], 1e-6)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same():
    gen = torch.Generator().manual_seed(0)
    x,target = 3*torch.randn(2, 19, 32, 64, generator=gen),torch.randint(19, (2, 128, 256), generator=gen)
    old,torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32,True
    try:
        a,b = x.clone().requires_grad_(),x.cuda().requires_grad_()
        losses = [resize_dropclass_loss(None, o, target.to(o.device), 3, lam=1.)[0] for o in (a, b)]
    finally: torch.backends.cuda.matmul.allow_tf32 = old
    for o in losses: o.backward()
    close(losses[1].cpu(), losses[0], 1e-5)
    assert (a.grad-b.grad.cpu()).norm()<=1e-5*a.grad.norm()
