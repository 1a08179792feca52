"Class paste: what holds for every batch, in a Learner, beside other callbacks, and after a resume."
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage, TensorMask
from hypothesis import given, settings, strategies as st
from torch import nn

from dropclass.analysis.controls import ERASE_FILLS, EraseClassCallback, IgnoreLabelCallback, erase_classes
from dropclass.callback import DropClassCallback
from dropclass.core import VOID, step_generator
from dropclass.paste import ClassPasteCallback, count_labels, paste_classes, rarity_weights
from dropclass.rivals import FadeWeightsCallback
from dropclass.schedules import hold_ramp
from dropclass.testing import ToyNet, toy_batch, toy_dls, toy_learner

C = 4
OPTIONS = [dict(), dict(components=True), dict(scale=(.5,2.)), dict(feather=2), dict(shift=(0,0), flip=0),
           dict(components=True, scale=(.5,1.5), feather=1)]
HARD = [o for o in OPTIONS if 'feather' not in o]


def coded_batch(n=5, size=24, seed=0):
    "A batch whose channels are the label, the number of the image, and that of the pixel."
    _,y = toy_batch(n, C, size, seed)
    image = torch.arange(n).view(-1, 1, 1).expand_as(y)
    where = torch.arange(size*size).view(1, size, size).expand_as(y)
    return torch.stack([y, image, where], 1).double(),y


def weights_of(y, **options): return rarity_weights(count_labels(y, C).sum(0), **options)

def pasted(x, y, seed=0, weights=None, p=1., **options):
    options = {'min_pixels':1, 'max_share':1., 'components':False, **options}
    return paste_classes(x, y, weights_of(y) if weights is None else weights, step_generator(seed, 0), p=p, **options)


# ---- one batch

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), options=st.sampled_from(HARD))
def test_pixels_and_labels_move_together(seed, n, options):
    "Every pixel is the image's own, or one of a single other image, and then its label came along, and it was no void."
    x,y = coded_batch(n, seed=seed)
    x2,y2 = pasted(x, y, seed, **options)
    assert torch.equal(x2[:,0].long(), y2)
    for i in range(n):
        foreign = x2[i,1]!=i
        assert torch.equal(x2[i,:,~foreign], x[i,:,~foreign]) and torch.equal(y2[i,~foreign], y[i,~foreign])
        assert (y[i,foreign]!=VOID).all() and (y2[i,foreign]!=VOID).all()
        assert len(x2[i,1,foreign].unique())<=1 and len(y2[i,foreign].unique())<=1 # One donor, one class
    assert torch.equal(y2==VOID, y==VOID)


@pytest.mark.parametrize('options', OPTIONS)
def test_nothing_else_changes(options):
    "Outside the pasted pixels the images keep their bits, feathered or not; what was given is left alone."
    x,y = toy_batch(6, C, 32)
    kept = x.clone(),y.clone()
    hard,_ = coded_batch(6, 32)
    where = pasted(hard, y, **{**options, 'feather':0})[0][:,1]!=torch.arange(6).view(-1, 1, 1)
    assert where.any() and not where.all()
    x2,y2 = pasted(x, y, **options)
    still = ~where[:,None].expand_as(x)
    assert torch.equal(x2[still], x[still]) and torch.equal(y2[~where], y[~where])
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_feather_blends():
    "A feathered pixel lies between the old and the new one, and the labels are those without a feather."
    x,y = toy_batch(4, C, 32)
    (hard,y1),(soft,y2) = pasted(x, y),pasted(x, y, feather=2)
    assert torch.equal(y1, y2) and not torch.equal(hard, soft)
    low,high = torch.minimum(hard, x),torch.maximum(hard, x)
    assert ((soft>=low-1e-6)&(soft<=high+1e-6)).all()
    assert ((soft-x).abs()>=(hard-x).abs()/2-1e-6).all() # At least half of the piece


def test_nothing_to_paste():
    x,y = toy_batch(4, C, 16)
    one,void,single = y[:1],torch.full_like(y, VOID),torch.full_like(y, 2)
    cases = [(x, y, dict(p=0.)), (x[:1], one, {}), (x, void, dict(weights=torch.ones(C))),
             (x, y, dict(min_pixels=1000)), (x, y, dict(max_share=0.)),
             (x, single, dict(weights=torch.tensor([1.,1.,0.,1.])))]
    for images,labels,options in cases:
        for components in (False, True):
            x2,y2 = pasted(images, labels, components=components, **options)
            assert torch.equal(x2, images) and torch.equal(y2, labels)


def test_single_class():
    "Where all pixels are of one class pixels move and labels stay."
    x,y = toy_batch(4, C, 16)
    single = torch.full_like(y, 2)
    x2,y2 = pasted(x, single, weights=torch.ones(C))
    assert torch.equal(y2, single) and not torch.equal(x2, x)


def test_limits():
    "A piece is no smaller and no larger than allowed, and `never` and an ignored class are not pasted."
    gen = torch.Generator().manual_seed(0)
    y = torch.zeros(6, 20, 20).long()
    y[:,:,10:15],y[:,:4,:4],y[:,10,0] = 1,2,3 # 100, 16 and 1 pixels of 400
    x = torch.randn(6, 3, 20, 20, generator=gen)
    cases = [(dict(), {0,1,2,3}), (dict(min_pixels=16), {0,1,2}), (dict(max_share=.25), {1,2,3}),
             (dict(min_pixels=17, max_share=.25), {1}), (dict(ignore_index=1), {0,2,3}),
             (dict(weights=weights_of(y, never=[0,2])), {1,3})]
    for options,expected in cases:
        found = set()
        for seed in range(60):
            x2,y2 = pasted(x, y, seed, **options)
            changed = (x2!=x).any(1)
            found |= set(y2[changed].tolist())
        assert found==expected, options


def test_scale_keeps_the_limit():
    "With a scale the limit holds for what is covered."
    y = torch.zeros(4, 40, 40).long()
    y[:,10:20,10:26] = 1 # A tenth of the image
    x = torch.randn(4, 3, 40, 40)
    options = dict(weights=torch.tensor([0.,1.]), scale=(.5,3.), max_share=.3)
    shares = torch.cat([(pasted(x, y, seed, **options)[0]!=x).any(1).float().mean((1,2)) for seed in range(40)])
    assert .25<shares.max()<=.32 and shares[shares>0].min()<.05


def test_components():
    "One of two separate parts is pasted, and both get their turn."
    y = torch.zeros(2, 16, 16).long()
    y[:,2:6,2:6],y[:,10:12,10:12] = 1,1
    x = torch.randn(2, 3, 16, 16)
    still = dict(weights=torch.tensor([0.,1.]), shift=(0,0), flip=0)
    sizes = [((pasted(x, y, seed, components=True, **still)[0]!=x).any(1)).sum((1,2)).tolist() for seed in range(20)]
    assert {o for pair in sizes for o in pair}=={4,16}
    assert ((pasted(x, y, **still)[0]!=x).any(1)).sum((1,2)).tolist()==[20,20]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize('label_dtype', [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize('options', OPTIONS[:4])
def test_types_and_layout(dtype, label_dtype, options):
    x,y = toy_batch(4, C, 16)
    x = ((x-x.min())*20).to(dtype).to(memory_format=torch.channels_last)
    x2,y2 = pasted(x.as_subclass(TensorImage), y.to(label_dtype).as_subclass(TensorMask), **options)
    assert (x2.dtype, y2.dtype, x2.device)==(dtype, label_dtype, x.device) and type(x2) is type(y2) is torch.Tensor
    assert x2.is_contiguous(memory_format=torch.channels_last) and not torch.equal(y2, y)
    plain = pasted(x.contiguous(), y, **options)
    assert torch.equal(plain[0], x2) and torch.equal(plain[1], y2.long())


@pytest.mark.parametrize('channels', [1, 4])
def test_channels(channels):
    x,y = torch.randn(3, channels, 16, 20),toy_batch(3, C, 20)[1][:,:16]
    x2,y2 = pasted(x, y)
    assert x2.shape==x.shape and not torch.equal(y2, y)


def test_generator_decides():
    x,y = toy_batch(6, C, 32)
    torch.manual_seed(0)
    a = pasted(x, y, 1)
    torch.manual_seed(1)
    b,c = pasted(x, y, 1),pasted(x, y, 2)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    before = torch.get_rng_state()
    pasted(x, y)
    assert torch.equal(before, torch.get_rng_state()) # The global source is left alone


# ---- in a Learner

class Watch(Callback):
    "Keeps the batches as they were, or as they became."
    reads_pred = False
    def __init__(self, order): self.order,self.seen = order,[]
    def before_batch(self): self.seen.append((self.training, self.xb[0].clone(), self.yb[0].clone()))

def watched(cbs, n=2, p=1., **kwargs):
    "Train, and keep each batch before and after."
    paste = ClassPasteCallback(p, min_pixels=1, max_share=1.)
    before,after = Watch(paste.order-1),Watch(paste.order+.5)
    learn = toy_learner(cbs=[paste, before, after, *cbs], **kwargs)
    learn.dls.train.rng.seed(0)
    learn.fit(n)
    return learn,before.seen,after.seen


def test_trains_and_leaves_validation_alone():
    learn,before,after = watched([])
    for (training,x,y),(_,x2,y2) in zip(before, after):
        assert torch.equal(x, x2)==torch.equal(y, y2)==(not training)
    n = len(after)
    learn.validate(), learn.get_preds()
    assert all(torch.equal(a[1], b[1]) for a,b in zip(before[n:], after[n:])) and len(after)>n


def test_the_callback_is_the_function():
    "What a Learner trains on is what a plain loop with the same stream gets."
    learn,before,after = watched([])
    weights,train = learn.class_paste.weights,[o for o in zip(before, after) if o[0][0]]
    for step,((_,x,y),(_,x2,y2)) in enumerate(train):
        generator = step_generator(ClassPasteCallback.stream, step)
        want = paste_classes(x, y, weights, generator, p=1., min_pixels=1, max_share=1.)
        assert torch.equal(want[0], x2) and torch.equal(want[1], y2)


def test_ramp():
    _,before,after = watched([], n=4, p=hold_ramp(1, 0, until=.5, since=.4))
    changed = [not torch.equal(a[1], b[1]) for a,b in zip(before, after) if a[0]]
    assert all(changed[:7]) and not any(changed[8:])


class Stop(Callback):
    "Keeps what a resume needs, when an epoch is over."
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch!=self.at: return
        weights = {k:v.clone() for k,v in self.model.state_dict().items()}
        self.state = weights,self.dls.train.rng.getstate(),random.getstate(),torch.get_rng_state()

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [DropClassCallback(drop_prob=1.)]])
def test_resume_is_the_straight_run(cbs):
    "Two epochs, then two more in a new Learner, give the weights of four."
    def learner(): return toy_learner(opt_func=SGD, cbs=[ClassPasteCallback(hold_ramp(.9, .1)), Stop(1), *cbs()])
    straight = learner()
    straight.fit(4)
    model,rng,py,tor = straight.stop.state
    resumed = learner()
    resumed.model.load_state_dict(model)
    resumed.dls.train.rng.setstate(rng), random.setstate(py), torch.set_rng_state(tor)
    resumed.fit(4, start_epoch=2)
    there = resumed.model.state_dict()
    for k,a in straight.model.state_dict().items(): assert torch.equal(a, there[k]), k
    assert not torch.equal(straight.model.backbone[0].weight, model['backbone.0.weight'])


def test_seed_and_rank_decide(monkeypatch):
    "Another seed or rank draws otherwise; the same one draws alike."
    def labels(seed=0, rank=0, ranks=1):
        paste = ClassPasteCallback(1., pixel_counts=[1]*C, seed=seed)
        after = Watch(paste.order+.5)
        learn = toy_learner(cbs=[paste, after])
        learn.dls.train.rng.seed(0)
        with monkeypatch.context() as m:
            m.setattr('dropclass.paste.num_ranks', lambda: ranks)
            m.setattr('dropclass.paste.dist.get_rank', lambda: rank)
            learn.fit(1)
        return torch.stack([o[2] for o in after.seen if o[0]])
    a = labels()
    assert torch.equal(a, labels()) and torch.equal(labels(0, 1, 2), labels(0, 1, 2))
    others = [labels(1), labels(0, 0, 2), labels(0, 1, 2)]
    assert not any(torch.equal(a[1:], o[1:]) for o in others) and not torch.equal(others[1], others[2])


def test_beside_drop_class():
    "The class that is dropped and the pieces that are pasted do not depend on each other."
    alone,both = DropClassCallback(drop_prob=1.),DropClassCallback(drop_prob=1.)
    toy_learner(cbs=alone).fit(2)
    learn,before,after = watched([both])
    assert [o['dropped_class'] for o in alone.rows]==[o['dropped_class'] for o in both.rows]
    _,_,without = watched([])
    assert all(torch.equal(a[2], b[2]) for a,b in zip(after, without))
    assert both.route.startswith('fused') # Pasting does not keep it from the fused losses


def test_before_hidden_labels():
    "What looks at the labels sees the pasted ones: IgnoreLabelCallback hides a class in the pieces too."
    seen,hidden = (Watch(IgnoreLabelCallback.order+o) for o in (-.5, .5))
    learn,before,_ = watched([IgnoreLabelCallback(1.), seen, hidden])
    train = [(a[2], b[2], c[2]) for a,b,c in zip(before, seen.seen, hidden.seen) if a[0]]
    for z,(old,new,left) in zip(learn.ignore_label.ignored, train, strict=True):
        assert not torch.equal(old, new) and torch.equal(left, new.masked_fill(new==z, VOID))


def test_beside_fading_weights():
    loss = nn.CrossEntropyLoss(torch.tensor([1.,5.,1.,1.]), ignore_index=VOID)
    learn,_,_ = watched([FadeWeightsCallback()], loss_func=loss)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and len(learn.fade_weights.lams)==8


class AutocastBf16(Callback):
    "Mixed precision on a CPU, where fastai's own does nothing."
    order = 10
    def before_batch(self):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()
    def after_loss(self): self.context.__exit__(None, None, None)
    def after_cancel_batch(self): self.context.__exit__(None, None, None)

def test_autocast():
    learn,before,after = watched([AutocastBf16()])
    assert all(o[1].dtype==torch.float32 for o in after) and all(p.isfinite().all() for p in learn.model.parameters())
    _,_,full = watched([])
    assert all(torch.equal(a[1], b[1]) for a,b in zip(after, full))


def test_mixup_is_refused():
    learn = toy_learner(cbs=[ClassPasteCallback(), MixUp()])
    with pytest.raises(ValueError, match='MixUp blends the labels'): learn.fit(1)


def test_what_would_paste_nothing_is_refused():
    x,y = toy_batch(4)
    data = [(o, torch.rand(1, *o.shape[1:]), t) for o,t in zip(x, y)]
    dls = DataLoaders.from_dsets(data, data, bs=2, num_workers=0)
    class Two(ToyNet):
        def forward(self, x, depth): return super().forward(x)
    learn = Learner(dls, Two(C), nn.CrossEntropyLoss(ignore_index=VOID), cbs=ClassPasteCallback(pixel_counts=[1]*C))
    with pytest.raises(ValueError, match='this network reads 2'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='no other image'): toy_learner(bs=1, cbs=ClassPasteCallback()).fit(1)
    with pytest.raises(ValueError, match=f'2 entries for {C} classes'):
        toy_learner(cbs=ClassPasteCallback(pixel_counts=[1,2])).fit(1)
    learn = toy_learner(cbs=ClassPasteCallback())
    with pytest.raises(ValueError, match='2 ClassPasteCallbacks'): learn.fit(1, cbs=ClassPasteCallback())


def test_counts():
    "Counts are those of the training labels, by whatever way they come; names work in `never`."
    dls = toy_dls(num_classes=C)
    labels = torch.stack([y for _,y in dls.train.dataset])
    counts = torch.stack([(labels==c).sum() for c in range(C)])
    learn = toy_learner(cbs=ClassPasteCallback(never='class 1'))
    learn.fit(1)
    assert torch.equal(learn.class_paste.weights, rarity_weights(counts, never=[1]))
    given = toy_learner(cbs=ClassPasteCallback(never=torch.tensor([1]), pixel_counts=counts.tolist()))
    given.fit(1)
    assert torch.equal(given.class_paste.weights, learn.class_paste.weights)
    with pytest.raises(ValueError, match="never"): toy_learner(cbs=ClassPasteCallback(never='sky')).fit(1)
    learn = toy_learner(cbs=ClassPasteCallback())
    del learn.dls.vocab, learn.dls.c
    with pytest.raises(ValueError, match='pixel_counts'): learn.fit(1)


def test_counts_of_fastai_masks(tmp_path):
    "fastai's own DataLoaders have masks that are pictures, and names that stand elsewhere."
    import numpy as np
    from PIL import Image
    from fastai.vision.data import SegmentationDataLoaders
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16,20,3), dtype='uint8')).save(tmp_path/f'{i}.png')
        Image.fromarray(np.full((16,20), i%2, dtype='uint8')).save(tmp_path/f'{i}_P.gif')
    files = [tmp_path/f'{i}.png' for i in range(6)]
    options = dict(codes=np.array(['sky','boat','car']), bs=2, num_workers=0, valid_pct=.34, seed=0)
    dls = SegmentationDataLoaders.from_label_func(tmp_path, files, lambda o: o.parent/f'{o.stem}_P.gif', **options)
    cb = ClassPasteCallback(1., never='sky', max_share=1.)
    learn = toy_learner(num_classes=3, cbs=cb)
    learn.dls = dls
    learn.fit(1)
    assert cb.weights.tolist()==[0.,1.,0.]
    learn.path = tmp_path
    learn.export() # The callback keeps no data
    assert (tmp_path/'export.pkl').stat().st_size<200_000


def test_wrong_options_fail_at_once():
    for name,value in dict(shift=.5, flip=2, scale=(0,1), max_share=3, feather=-1, p=2).items():
        with pytest.raises(ValueError, match=f'`{name}`'): ClassPasteCallback(**{name:value})
    with pytest.raises(TypeError, match='sizes'): ClassPasteCallback(sizes=2)
    x,y = toy_batch(2, C, 8)
    with pytest.raises(ValueError, match='same size'): paste_classes(x, y[:,None], torch.ones(C))
    with pytest.raises(TypeError, match='integers'): paste_classes(x, y.float(), torch.ones(C))
    for counts in ([[1,2]], [-1,1]):
        with pytest.raises(ValueError, match='pixel_counts'): rarity_weights(counts)
    with pytest.raises(ValueError, match='No class is left'): rarity_weights([5,0], never=[0])
    with pytest.raises(ValueError, match='never'): rarity_weights([5,1], never=[2])


# ---- erasing

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), fill=st.sampled_from(ERASE_FILLS), keep=st.booleans())
def test_erasing_takes_one_class(seed, n, fill, keep):
    "All pixels of one class of an image change, with the labels that were asked for, and nothing else does."
    x,y = toy_batch(n, C, 16, seed)
    x2,y2 = erase_classes(x, y, weights_of(y), step_generator(seed, 0), 1., fill, keep, min_pixels=1, max_share=1.)
    erased = (x2!=x).any(1)
    assert torch.equal(y2, y if keep else y.masked_fill(erased, VOID))
    for i in range(n):
        gone = y[i,erased[i]].unique()
        assert len(gone)==(0 if fill=='image' and n==1 else 1) and not (gone==VOID).any()
        assert torch.equal(erased[i], torch.isin(y[i], gone))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize('fill', ERASE_FILLS)
def test_erasing_keeps_types(dtype, fill):
    x,y = toy_batch(3, C, 16)
    x = ((x-x.min())*20).to(dtype).to(memory_format=torch.channels_last)
    x2,y2 = erase_classes(x, y.to(torch.uint8), weights_of(y), step_generator(0, 0), 1., fill, max_share=1.)
    assert (x2.dtype, y2.dtype)==(dtype, torch.uint8) and not torch.equal(x2, x)
    assert x2.is_contiguous(memory_format=torch.channels_last)


def test_erase_and_paste_in_one_fit():
    "Both draw for themselves, and the erased pixels are void for the loss."
    learn,before,after = watched([EraseClassCallback(1., min_pixels=1, max_share=1.)])
    train = [(a,b) for a,b in zip(before, after) if a[0]]
    assert all(not torch.equal(a[2], b[2]) for a,b in train)
    assert all((b[2]==VOID).sum()>(a[2]==VOID).sum() for a,b in train)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert ClassPasteCallback.stream!=EraseClassCallback.stream


def test_erasing_needs_a_void():
    def loss(logits, target): return nn.functional.cross_entropy(logits, target.clamp(max=3))
    with pytest.raises(ValueError, match='cannot be void'): toy_learner(loss_func=loss, cbs=EraseClassCallback()).fit(1)
    toy_learner(loss_func=loss, cbs=EraseClassCallback(keep_labels=True)).fit(1)
    with pytest.raises(ValueError, match='fill'): EraseClassCallback(fill='paint')
    with pytest.raises(ValueError, match='MixUp blends'): toy_learner(cbs=[EraseClassCallback(), MixUp()]).fit(1)


# ---- the benchmark

@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    root = Path(__file__).resolve().parent.parent
    options = ['--arch', 'small', '--size', '32x64', '--rounds', '5', '--csv', str(tmp_path/'t.csv')]
    command = [sys.executable, '-W', 'ignore', str(root/'benchmarks'/'paste_step.py'), *options]
    subprocess.run(command, check=True, timeout=300)
    assert (tmp_path/'t.csv').read_text().splitlines()[0]==(root/'results'/'paste_step.csv').read_text().splitlines()[0]
