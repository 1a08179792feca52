"""Half precision, gradient scaling and `torch.compile`: what the paths compute in fewer bits is summed in float32, and
an overflow never reaches the weights."""
import copy, shutil

import pytest, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from torch.nn import functional as F

from dropclass.callback import DropClassCallback
from dropclass.history import PARTS
from dropclass.core import VOID
from dropclass.fused import resize_dropclass_loss
from dropclass.head import split_paths
from dropclass.surgery import add_dropclass
from dropclass.losses import drop_path_losses, dropclass_loss, segmentation_loss
from dropclass.testing import ToyNet, toy_batch, toy_learner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
HALF = [torch.bfloat16, torch.float16]
C,Z = 4,1

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

class CPUAutocast(Callback):
    "What fastai's MixedPrecision is on a GPU: the model and the losses of a batch run under autocast."
    order,reads_pred = MixedPrecision.order,False
    def __init__(self, dtype): self.dtype,self.seen = dtype,set()
    def before_batch(self):
        self.handle = self.learn.drop_class.drop_head.classifier.register_forward_hook(
            lambda m,args,out: self.seen.add(out.dtype))
        self.cast = torch.autocast('cpu', self.dtype)
        self.cast.__enter__()
    def leave(self):
        if self.cast is None: return
        self.cast.__exit__(None, None, None)
        self.handle.remove()
        self.cast = None
    def before_backward(self):
        assert self.loss_grad.dtype==torch.float32
        self.leave()
    def after_batch(self): self.leave()

class LossKinds(Callback):
    "Notes the type of the loss that is differentiated."
    reads_pred,order = False,DropClassCallback.order+1
    def before_fit(self): self.seen = set()
    def after_loss(self):
        if self.training: self.seen.add(self.loss_grad.dtype)

def keep_mask(z=Z):
    mask = torch.ones(C)
    mask[z] = 0
    return mask

def fit(dtype, fused):
    "Two epochs of the toy Learner under autocast; None is float32."
    cb = DropClassCallback(fused=fused)
    casting = CPUAutocast(dtype or torch.bfloat16)
    learn = toy_learner(cbs=cb)
    learn.dls.train.rng.seed(0) # Both trainings see the same batches
    learn.fit(2, cbs=casting if dtype else None)
    return learn,cb,casting.seen


# ---- autocast on a CPU

@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'stacked'])
def test_bf16_autocast_through_the_callback(fused):
    want,full,_ = fit(None, fused)
    learn,cb,seen = fit(torch.bfloat16, fused)
    assert cb.route.startswith('fused' if fused else 'stacked')
    assert seen=={torch.bfloat16} # It was bf16 that was trained and validated
    assert all(o.dtype==torch.float32 for o in learn.model.parameters())
    parts,exact = (torch.tensor([[row[o] for o in PARTS] for row in h.rows]) for h in (cb, full))
    torch.testing.assert_close(parts[0], exact[0], rtol=.02, atol=0., equal_nan=True) # Eight bits in each product
    assert not torch.equal(parts[0], exact[0])
    torch.testing.assert_close(parts.nanmean(0), exact.nanmean(0), rtol=.1, atol=.05) # Two trainings drift apart
    for a,b in zip(learn.recorder.values[-1][:2], want.recorder.values[-1][:2]): assert a==pytest.approx(b, rel=.1)

def loop_loss(model, head, x, y, fused):
    "Loss of a plain loop, and the logits of both paths."
    with head.dropping(keep_mask(), .5, small_only=fused) as step: out = model(x)
    if fused:
        logits,drop_logits = step.small
        return resize_dropclass_loss(logits, drop_logits, y, Z, .5)[0], logits, drop_logits
    logits,drop_logits = split_paths(out, len(x))
    return dropclass_loss(logits, drop_logits, y, keep_mask(), .5), logits, drop_logits

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'stacked'])
def test_plain_loop_sums_half_logits_in_float32(dtype, fused):
    "The loss is that of the same half-precision logits in double precision, to float32's last bits."
    model,(x,y) = ToyNet(C),toy_batch()
    head = add_dropclass(model, C)
    with torch.autocast('cpu', dtype): loss,logits,drop_logits = loop_loss(model, head, x, y, fused)
    assert (loss.dtype,logits.dtype,drop_logits.dtype)==(torch.float32, dtype, dtype)
    up = lambda o: F.interpolate(o.double(), size=y.shape[1:], mode='bilinear') if fused else o.double()
    want = dropclass_loss(up(logits), up(drop_logits), y, keep_mask(), .5)
    assert loss.item()==pytest.approx(want.item(), rel=2e-6)
    loss.backward()
    assert all(p.grad.dtype==torch.float32 and p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('dtype', HALF)
def test_a_million_pixels_do_not_saturate_a_sum(dtype):
    "bf16 cannot count beyond 256 and float16 not beyond 65504: the terms must be added in float32."
    logits = torch.zeros(1, C, 256, 256, dtype=dtype).repeat(1, 1, 4, 4)
    target = torch.zeros(1, 1024, 1024, dtype=torch.long)
    for loss in (segmentation_loss(logits, target), drop_path_losses(logits, target, keep_mask())[0],
                 resize_dropclass_loss(logits[...,:256,:256], None, target, None, 0.)[0]):
        assert loss.dtype==torch.float32 and loss.item()==pytest.approx(torch.tensor(4.).log().item(), rel=1e-4)


# ---- gradient scaling

def scaled_steps(fused, spoil):
    "Two steps with a gradient scaler on a CPU, the first of them spoiled; weights after each, and the scales."
    model,(x,y) = ToyNet(C),toy_batch()
    head = add_dropclass(model, C)
    opt,scaler = torch.optim.SGD(model.parameters(), lr=.1),torch.amp.GradScaler('cpu', init_scale=2.**10)
    weights,scales,losses = [copy.deepcopy(list(model.parameters()))],[],[]
    for i in range(2):
        with torch.autocast('cpu', torch.float16): loss,*_ = loop_loss(model, head, x*(spoil if i==0 else 1.), y, fused)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        weights.append(copy.deepcopy(list(model.parameters())))
        scales.append(scaler.get_scale())
        losses.append(loss.item())
    return weights,scales,losses

@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'stacked'])
def test_an_overflow_is_skipped_and_never_written(fused):
    weights,scales,losses = scaled_steps(fused, spoil=float('inf'))
    assert not torch.tensor(losses[0]).isfinite() and scales==[2.**9, 2.**9]
    assert all(torch.equal(a, b) for a,b in zip(weights[0], weights[1])) # Not a bit, in the block neither
    assert all(o.isfinite().all() for o in weights[2]) or not torch.tensor(losses[1]).isfinite()

@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'stacked'])
def test_scaling_changes_no_step_that_is_finite(fused):
    weights,scales,losses = scaled_steps(fused, spoil=1.)
    assert scales==[2.**10, 2.**10] and losses[1]<losses[0]
    assert all(not torch.equal(a, b) for a,b in zip(weights[0], weights[1]))

def test_the_scaler_of_a_learner_skips_an_overflow():
    "Through the callback: a batch whose loss is not finite leaves no trace in the weights, and the fit goes on."
    class Scaled(Callback):
        order,reads_pred = MixedPrecision.order,False
        def before_fit(self): self.scaler,self.seen = torch.amp.GradScaler('cpu', init_scale=2.**10),[]
        def weights(self): return [p.detach().clone() for p in self.model.parameters()]
        def before_batch(self):
            if self.training and not self.seen: self.learn.xb = (self.xb[0]*float('inf'),)
        def before_backward(self):
            self.before = self.weights()
            self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self):
            self.scaler.unscale_(self.opt)
            over = any(o.item()
                       for o in self.scaler._per_optimizer_states[id(self.opt)]['found_inf_per_device'].values())
            self.scaler.update()
            if over: raise CancelStepException
        def after_cancel_step(self): self.learn.opt.zero_grad()
        def after_batch(self):
            if self.training: self.seen.append((self.loss.item(), self.before, self.weights()))
    scaled,cb = Scaled(),DropClassCallback()
    cb.both_paths = False
    learn = toy_learner(cbs=cb)
    learn.fit(1, cbs=scaled)
    (first,before,after),*others = scaled.seen
    assert not torch.tensor(first).isfinite() and all(torch.equal(a, b) for a,b in zip(before, after))
    for loss,before,after in others:
        assert torch.tensor(loss).isfinite() and not all(torch.equal(a, b) for a,b in zip(before, after))
    assert scaled.scaler.get_scale()==2.**9 and all(p.isfinite().all() for p in learn.model.parameters())


# ---- on a GPU

@needs_gpu
@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'stacked'])
def test_mixed_precision_of_fastai(how, fused):
    cb = DropClassCallback(fused=fused)
    learn = toy_learner(cbs=[cb, LossKinds()])
    learn.dls.to('cuda')
    learn.model.cuda()
    getattr(learn, how)().fit(2)
    assert cb.route.startswith('fused' if fused else 'stacked')
    assert learn.loss_kinds.seen=={torch.float32} and cb.history.total.notna().all()
    assert all(p.isfinite().all() and p.dtype==torch.float32 for p in learn.model.parameters())

@needs_gpu
@pytest.mark.parametrize('dtype', HALF)
def test_gpu_loop_sums_half_logits_in_float32(dtype):
    model,(x,y) = ToyNet(C).cuda(),[o.cuda() for o in toy_batch()]
    head = add_dropclass(model, C)
    with torch.autocast('cuda', dtype): loss,logits,drop_logits = loop_loss(model, head, x, y, True)
    up = lambda o: F.interpolate(o.double(), size=y.shape[1:], mode='bilinear')
    assert loss.item()==pytest.approx(dropclass_loss(up(logits), up(drop_logits), y, keep_mask(), .5).item(), rel=1e-5)


# ---- torch.compile

# Inductor writes C++ and takes minutes
BACKENDS = ['aot_eager']
if shutil.which('g++') or shutil.which('c++'): BACKENDS.append(pytest.param('inductor', marks=pytest.mark.slow))

@pytest.mark.parametrize('backend', BACKENDS)
def test_compiled_model_and_head_agree(backend):
    "Forward, loss and gradients of both paths, with two masks in turn."
    torch.compiler.reset()
    model,(x,y) = ToyNet(C),toy_batch()
    add_dropclass(model, C)
    twin = copy.deepcopy(model)
    compiled,heads = torch.compile(twin, backend=backend),[m.classifier for m in (model, twin)]
    for z in (Z, 2):
        losses = []
        for run,head in zip((model, compiled), heads):
            with head.dropping(keep_mask(z)): out = run(x)
            losses.append(dropclass_loss(*split_paths(out, len(x)), y, keep_mask(z), .5))
            losses[-1].backward()
        assert losses[1].item()==pytest.approx(losses[0].item(), rel=1e-5)
        for a,b in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
