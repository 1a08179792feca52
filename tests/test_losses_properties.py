"What must hold for every batch, not only for the examples in the notebook: losses and schedules."
import math, pickle
from functools import partial
from itertools import accumulate

import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from dropclass.core import VOID
from dropclass.losses import (cross_entropy_options, dropclass_loss, drop_path_losses, get_ignore_index, masked_target,
                              segmentation_loss, suppression_loss, total_loss)
from dropclass.schedules import as_schedule, epoch_pct, global_step, hold_ramp, schedule_value

few = settings(max_examples=40, deadline=None, derandomize=True)
unit = st.floats(0, 1)

@st.composite
def batches(draw, dtype=torch.float64):
    "A random batch: logits, labels with void, the dropped class (or None)."
    C,N,h,w = draw(st.integers(2, 6)),draw(st.integers(1, 3)),draw(st.integers(1, 4)),draw(st.integers(1, 4))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    target = torch.randint(C+1, (N, h, w), generator=gen)
    logits = draw(st.sampled_from([1., 5., 30.]))*torch.randn(N, C, h, w, generator=gen, dtype=dtype)
    return logits, target.masked_fill(target==C, VOID), draw(st.one_of(st.none(), st.integers(0, C-1)))

def keep_mask(num_classes, z):
    mask = torch.ones(num_classes)
    if z is not None: mask[z] = 0
    return mask

def loop_loss(logits, target, z, weight=None, eps=0., normalize='valid'):
    "Eq. (5) and (6) with class weights and label smoothing, pixel by pixel in plain Python."
    N,C,h,w = logits.shape
    weight = [1.]*C if weight is None else weight.tolist()
    total,hard_norm = 0.,0.
    for n in range(N):
        for u in range(h):
            for v in range(w):
                label = int(target[n,u,v])
                if label==VOID or label==z: continue
                row = logits[n,:,u,v].tolist()
                top = max(row)
                log_sum = top + math.log(sum(math.exp(o-top) for o in row))
                cost = [weight[c]*(log_sum-row[c]) for c in range(C)]
                total += (1-eps)*cost[label] + eps/C*sum(cost)
                hard_norm += weight[label]
    if normalize=='all': return total/(N*h*w)
    return total/hard_norm if hard_norm else 0.

@few
@given(batches(), st.booleans(), st.sampled_from([0., .1, 1.]), st.sampled_from(['valid', 'all']),
       st.sampled_from([True, False, None]))
def test_masked_loss_is_the_hand_loop(batch, weighted, eps, normalize, masked_weights):
    logits,target,z = batch
    weight = torch.linspace(.3, 2.5, logits.shape[1], dtype=torch.float64) if weighted else None
    ce = nn.CrossEntropyLoss(weight, ignore_index=VOID, label_smoothing=eps)
    want = loop_loss(logits, target, z, weight, eps, normalize)
    assert segmentation_loss(logits, target, ce, z, normalize).item()==pytest.approx(want, rel=1e-9, abs=1e-9)
    masked,sup = drop_path_losses(logits, target, keep_mask(logits.shape[1], z), ce, normalize, masked_weights)
    assert masked.item()==pytest.approx(loop_loss(logits, target, z, weight if masked_weights else None, eps,
                                                  normalize), rel=1e-9, abs=1e-9)
    assert sup.item()==pytest.approx(0. if z is None else logits.softmax(1)[:,z].mean().item(), rel=1e-9, abs=1e-12)

@few
@given(batches(), st.booleans(), st.sampled_from([0., .1]))
def test_masked_loss_and_gradient_are_pytorchs(batch, weighted, eps):
    logits,target,z = batch
    weight = torch.linspace(.3, 2.5, logits.shape[1], dtype=torch.float64) if weighted else None
    ce = nn.CrossEntropyLoss(weight, ignore_index=VOID, label_smoothing=eps)
    masked = masked_target(target, z)
    if (masked==VOID).all(): return
    a,b = logits.clone().requires_grad_(),logits.clone().requires_grad_()
    ours,theirs = segmentation_loss(a, target, ce, z),ce(b, masked)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)

@few
@given(batches(torch.float32), unit, unit)
def test_total_is_its_parts(batch, lam, lam2):
    logits,target,z = batch
    mask,ce = keep_mask(logits.shape[1], z),nn.CrossEntropyLoss(ignore_index=VOID)
    drop_logits = logits.flip(1)
    plain,(masked,sup) = segmentation_loss(logits, target, ce),drop_path_losses(drop_logits, target, mask, ce)
    want = (1-lam)*plain + lam*masked + 7*sup
    torch.testing.assert_close(dropclass_loss(logits, drop_logits, target, mask, lam, alpha=7., base_loss=ce), want)
    torch.testing.assert_close(total_loss(plain, masked, sup, lam, 7.), want)
    middle = total_loss(plain, masked, sup, (lam+lam2)/2, 7.) # Eq. (7) is linear in lambda
    torch.testing.assert_close(middle,
                               (total_loss(plain, masked, sup, lam, 7.)+total_loss(plain, masked, sup, lam2, 7.))/2)

def smp_losses():
    smp = pytest.importorskip('segmentation_models_pytorch').losses
    return [smp.DiceLoss('multiclass', ignore_index=VOID), smp.FocalLoss('multiclass', ignore_index=VOID),
            smp.JaccardLoss('multiclass', ignore_index=VOID),
            smp.SoftCrossEntropyLoss(smooth_factor=0., ignore_index=VOID)]

def all_losses():
    from fastai.losses import CrossEntropyLossFlat
    weight = torch.tensor([.5, 1., 4.])
    ces = [nn.CrossEntropyLoss(w, ignore_index=VOID, label_smoothing=e) for w in (None, weight) for e in (0., .1)]
    return [None, *ces, CrossEntropyLossFlat(axis=1, ignore_index=VOID), partial(F.cross_entropy, ignore_index=VOID),
            *smp_losses()]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('label', [VOID, 1]) # everything void; only the dropped class left
def test_nothing_to_learn_is_zero_with_finite_gradients(label, dtype):
    for loss_func in all_losses():
        logits = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
        target = torch.full((2, 4, 4), label)
        masked,sup = drop_path_losses(logits, target, torch.tensor([1., 0., 1.]), loss_func)
        assert masked.item()==0 and masked.requires_grad, loss_func
        grad, = torch.autograd.grad(masked, logits, retain_graph=True)
        assert not grad.any(), loss_func
        total = dropclass_loss(logits, logits, target, torch.tensor([1., 0., 1.]), lam=.5, base_loss=loss_func)
        grad, = torch.autograd.grad(total, logits)
        assert grad.isfinite().all() and grad.any(), loss_func

@pytest.mark.parametrize('value', [float('inf'), 1e4, -1e4])
def test_nothing_to_learn_survives_extreme_logits(value):
    "A ruined drop path must not ruin a term that does not look at it."
    smp = pytest.importorskip('segmentation_models_pytorch')
    logits = torch.full((1, 3, 2, 2), value, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 2, 2), VOID), smp.losses.DiceLoss('multiclass', ignore_index=VOID))
    loss.backward()
    assert loss.item()==0 and not logits.grad.any()

@few
@given(batches(torch.float32), st.booleans())
def test_fastai_wrapper_is_pytorchs_loss(batch, weighted):
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import TensorImage, TensorMask
    logits,target,z = batch
    weight = torch.linspace(.3, 2.5, logits.shape[1]) if weighted else None
    flat = CrossEntropyLossFlat(axis=1, weight=weight, ignore_index=VOID)
    ce = nn.CrossEntropyLoss(weight, ignore_index=VOID)
    mask = keep_mask(logits.shape[1], z)
    ours = drop_path_losses(TensorImage(logits), TensorMask(target), mask, flat)
    theirs = drop_path_losses(logits, target, mask, ce)
    assert all(type(o) is torch.Tensor for o in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    if (target!=VOID).any():
        torch.testing.assert_close(segmentation_loss(logits, target, flat),
                                   flat(logits, target).as_subclass(torch.Tensor))

@few
@given(batches(torch.float32), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_float32_of_the_same_numbers(batch, dtype):
    logits,target,z = batch
    mask,half = keep_mask(logits.shape[1], z),logits.to(dtype)
    ours,want = drop_path_losses(half, target, mask),drop_path_losses(half.float(), target, mask)
    assert all(o.dtype is torch.float32 for o in ours)
    torch.testing.assert_close(ours, want, rtol=0, atol=0)
    with torch.autocast('cpu', dtype=dtype): cast = drop_path_losses(half, target, mask)
    torch.testing.assert_close(cast, want, rtol=0, atol=0)

def test_a_large_half_precision_picture_does_not_overflow():
    "70000 pixels: a float16 sum would be infinite."
    logits = torch.zeros(1, 4, 250, 280, dtype=torch.float16)
    masked,sup = drop_path_losses(logits, torch.zeros(1, 250, 280, dtype=torch.uint8), keep_mask(4, 2))
    assert masked.item()==pytest.approx(math.log(4), rel=1e-4) and sup.item()==pytest.approx(.25, rel=1e-4)

@few
@given(batches())
def test_only_the_suppression_reaches_the_dropped_pixels(batch):
    logits,target,z = batch
    if z is None: return
    leaf = logits.clone().requires_grad_()
    masked,sup = drop_path_losses(leaf, target, keep_mask(logits.shape[1], z))
    grad, = torch.autograd.grad(masked, leaf, retain_graph=True)
    gone = ((target==z)|(target==VOID))[:,None].expand_as(grad)
    assert not grad[gone].any()
    grad, = torch.autograd.grad(sup, leaf)
    assert (grad[:,z]>=0).all() # a descent step never raises the dropped logit

@few
@given(batches(torch.float32), st.sampled_from(['valid', 'all']))
def test_losses_without_ignore_index_leave_pixels_out(batch, normalize):
    "fastai's focal loss, which flattens transposed, against a masked mean of its formula."
    from fastai.losses import FocalLossFlat
    logits,target,z = batch
    target = target.masked_fill(target==VOID, 0)
    focal = FocalLossFlat(axis=1, gamma=2.)
    logp = logits.log_softmax(1).gather(1, target[:,None])[:,0]
    pixels = -(1-logp.exp())**2*logp
    left = pixels if z is None else pixels[target!=z]
    want = left.mean() if normalize=='valid' else left.sum()/target.numel()
    if left.numel()==0: want = torch.tensor(0.)
    got = drop_path_losses(logits, target, keep_mask(logits.shape[1], z), focal, normalize)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert focal.reduction=='mean'

def test_dropped_pixels_of_other_losses_do_not_count():
    "Whatever the model says at the dropped pixels, the masked loss is the same."
    torch.manual_seed(0)
    logits,target = torch.randn(2, 3, 8, 8),torch.randint(3, (2, 8, 8))
    other = torch.where((target==1)[:,None], torch.randn(2, 3, 8, 8), logits)
    for loss_func in all_losses():
        a,b = (segmentation_loss(o, target, loss_func, dropped_class=1) for o in (logits, other))
        torch.testing.assert_close(a, b)
        a,b = (segmentation_loss(o, target, loss_func) for o in (logits, other))
        assert (a-b).abs()>1e-3, loss_func

def test_a_failing_loss_gets_its_reduction_back():
    class Broken(nn.Module):
        reduction = 'mean'
        def forward(self, logits, target): raise RuntimeError('broken')
    loss_func = Broken()
    with pytest.raises(RuntimeError, match='broken'):
        segmentation_loss(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), loss_func, 1)
    assert loss_func.reduction=='mean'

def test_own_wrappers_and_subclasses_keep_their_meaning():
    from fastai.losses import CrossEntropyLossFlat
    class Doubled(CrossEntropyLossFlat):
        def __call__(self, *args, **kwargs): return 2*super().__call__(*args, **kwargs)
    logits,target = torch.randn(1, 3, 4, 4),torch.randint(3, (1, 4, 4))
    doubled,ce = Doubled(axis=1, ignore_index=VOID),nn.CrossEntropyLoss(ignore_index=VOID)
    assert get_ignore_index(doubled)==VOID and cross_entropy_options(doubled) is None
    torch.testing.assert_close(segmentation_loss(logits, target, doubled, 1),
                               2*segmentation_loss(logits, target, ce, 1))

def test_losses_and_schedules_need_no_fastai():
    import subprocess, sys
    code = ("import sys, dropclass.losses, dropclass.schedules; "
            "assert not [m for m in sys.modules if m.split('.')[0]=='fastai']")
    subprocess.run([sys.executable, '-c', code], check=True)

@few
@given(st.integers(1, 1000), st.integers(1, 50), st.data())
def test_per_epoch_is_the_authors_step_function(n_epochs, steps, data):
    epoch,i = data.draw(st.integers(0, n_epochs-1)),data.draw(st.integers(0, steps-1))
    pct = global_step(epoch, steps, i)/(n_epochs*steps)
    assert epoch_pct(pct, n_epochs)==epoch/n_epochs
    assert epoch_pct(1., n_epochs)==(n_epochs-1)/n_epochs
    assert schedule_value(as_schedule(lambda t: t), pct, per_epoch=True, n_epochs=n_epochs)==epoch/n_epochs

@pytest.mark.parametrize('n_epochs,steps', [(22, 1), (2, 6), (7, 13), (30, 50)])
def test_per_epoch_survives_summed_up_floats(n_epochs, steps):
    "fastai adds 1/(n_epochs*steps) after each batch; the sum may fall short of an epoch's start."
    for pcts in ([k/(n_epochs*steps) for k in range(n_epochs*steps)],
                 list(accumulate([0.]+[1/(n_epochs*steps)]*(n_epochs*steps-1)))):
        assert [epoch_pct(p, n_epochs) for p in pcts]==[(k//steps)/n_epochs for k in range(n_epochs*steps)]

@few
@given(unit, unit, unit, unit, unit)
def test_hold_ramp_stays_between_its_ends(start, end, a, b, pct):
    since,until = min(a, b),max(a, b)
    if since==until: return
    ramp = pickle.loads(pickle.dumps(as_schedule(hold_ramp(start, end, until, since))))
    assert min(start, end)-1e-9<=schedule_value(ramp, pct)<=max(start, end)+1e-9
    if pct<=since: assert ramp(pct)==pytest.approx(start)
    if pct>=until: assert ramp(pct)==pytest.approx(end)

@few
@given(st.floats(allow_nan=True, allow_infinity=True))
@example(math.nan)
@example(1.0001)
@example(-.0001)
def test_schedules_refuse_what_is_outside(value):
    if -1e-6<=value<=1+1e-6: assert 0<=schedule_value(value, .5)<=1
    else:
        with pytest.raises(ValueError, match=r'must stay in \[0,1\]'): schedule_value(value, .5)
        with pytest.raises(ValueError, match=r'must stay in \[0,1\]'): as_schedule(value)
