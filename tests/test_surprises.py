"""Networks, losses and tools that do a little more than the usual: the callback and the head must train them, or say
why not."""
import copy
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from fastai.vision.all import (Callback, Datasets, FocalLossFlat, LabelSmoothingCrossEntropyFlat, Learner, SchedLin,
                               load_learner)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from dropclass.analysis.controls import IgnoreLabelCallback
from dropclass.rivals import FadeWeightsCallback, OhemLoss
from dropclass.analysis.ablations import DrawPresent, DrawRare, DrawWeighted
from dropclass.callback import DropClassCallback
from dropclass.core import VOID, check_num_classes, eval_mode
from dropclass.fused import resize_cross_entropy
from dropclass.head import split_paths
from dropclass.fold import fold_dropclass
from dropclass.losses import dropclass_loss
from dropclass.surgery import add_dropclass, get_head, inspect_classifier, make_probe, remove_dropclass, resize_behind
from dropclass.testing import ToyNet, toy_batch, toy_dls, toy_learner

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*insecure.*')


def block_weight(model): return get_head(model).compensation[0].weight.detach().clone()


# ---- the block and the optimizer

def test_a_typo_in_never_drop_leaves_the_network_as_it_was():
    "After the error nothing is left in the model, and the next fit trains the block."
    learn = toy_learner()
    with pytest.raises(ValueError, match='which is no class'): learn.fit(1, cbs=DropClassCallback(never_drop='clas 0'))
    assert get_head(learn.model) is None
    learn.fit(1, cbs=DropClassCallback(never_drop='class 0'))
    before = block_weight(learn.model)
    learn.fit(1, cbs=DropClassCallback())
    assert not torch.equal(before, block_weight(learn.model))


def test_a_head_added_by_hand_after_a_fit_is_trained():
    learn = toy_learner()
    learn.fit(1)
    add_dropclass(learn.model)
    before = block_weight(learn.model)
    learn.fit(1, cbs=DropClassCallback())
    assert not torch.equal(before, block_weight(learn.model))


class Late(ToyNet):
    "Layers that are registered behind the classifier."
    def __init__(self):
        super().__init__()
        self.late,self.aux = nn.Conv2d(8, 8, 1, bias=False),nn.BatchNorm2d(8)
    def forward(self, x):
        scores = self.classifier(self.aux(self.late(self.backbone(x))))
        return F.interpolate(scores, size=x.shape[-2:], mode='bilinear')


def test_the_optimizer_has_one_order_whenever_the_callback_comes(tmp_path):
    "fastai loads an optimizer's state by position."
    first,then = (toy_learner(model=Late(), path=tmp_path, cbs=o) for o in (None, DropClassCallback()))
    first.fit(1, cbs=DropClassCallback())
    first.save('late')
    then.load('late', weights_only=False)
    names = lambda learn: [n for p in learn.opt.all_params() for n,q in learn.model.named_parameters() if q is p[0]]
    assert names(first)==names(then) and len(names(first))==len(list(then.model.parameters()))
    momentum = lambda learn: learn.opt.state[learn.model.late.weight]['grad_avg']
    assert torch.equal(momentum(first), momentum(then))


# ---- tails that look like a plain resize at the first step

class Temperature(ToyNet):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1, 4, 1, 1))
    def forward(self, x): return super().forward(x)*self.temperature


class Refined(ToyNet):
    "A residual that begins as zero."
    def __init__(self):
        super().__init__()
        self.refine = nn.Conv2d(4, 4, 3, padding=1)
        for o in self.refine.parameters(): nn.init.zeros_(o)
    def forward(self, x): return (o := super().forward(x))+self.refine(o)


class Viewed(ToyNet):
    def forward(self, x): return super().forward(x).view(len(x), 4, *x.shape[-2:])


@pytest.mark.parametrize('make,options,route',
                         [(ToyNet, {}, 'fused'), (Temperature, {}, 'stacked: the tail learns'),
                          (Refined, dict(classifier='classifier'), 'stacked: the tail needs all channels'),
                          (Viewed, {}, 'stacked: the tail needs all channels')])
def test_only_a_tail_that_stays_a_resize_is_left_out(make, options, route):
    learn,cb = toy_learner(model=make()),DropClassCallback(**options)
    learn.fit(1, cbs=cb)
    assert cb.route.startswith(route)


def test_a_parameter_behind_the_classifier_learns():
    "With the callback as without it; and its importance is not read off the kernel, which knows nothing of it."
    learn = toy_learner(model=Temperature())
    learn.fit(2, cbs=DropClassCallback())
    assert (learn.model.temperature-1).abs().min()>1e-3
    assert get_head(learn.model).form=='autograd' and add_dropclass(ToyNet()).form=='closed form'


# ---- losses, labels and outputs

@pytest.mark.parametrize('loss_func',
                         [LabelSmoothingCrossEntropyFlat(axis=1), FocalLossFlat(axis=1),
                          lambda p,t,reduction='mean': F.cross_entropy(p, t, reduction=reduction)])
def test_a_loss_without_ignore_index(loss_func):
    learn = toy_learner(loss_func=loss_func)
    for dl in learn.dls.loaders: dl.dataset = [(x, torch.where(y==VOID, 0, y)) for x,y in dl.dataset]
    learn.fit(2, cbs=(cb := DropClassCallback()))
    assert all(torch.isfinite(torch.tensor(cb.log.valid_losses())))


@pytest.mark.parametrize('void', [-100, -1])
@pytest.mark.parametrize('draw', [DropClassCallback, DrawPresent, DrawRare])
def test_negative_labels_of_void(void, draw):
    learn = toy_learner(loss_func=nn.CrossEntropyLoss(ignore_index=void))
    for dl in learn.dls.loaders: dl.dataset = [(x, torch.where(y==VOID, void, y)) for x,y in dl.dataset]
    learn.fit(1, cbs=(cb := draw(drop_prob=1.)))
    assert cb.history.total.notna().all()


@pytest.mark.parametrize('layer', [lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))])
def test_a_classifier_of_several_layers(layer):
    model = ToyNet()
    model.classifier = layer()
    learn = toy_learner(model=model)
    learn.fit(1, cbs=DropClassCallback(classifier='classifier'))
    before = block_weight(model)
    learn.fit(1, cbs=DropClassCallback())
    assert not torch.equal(before, block_weight(model))


Out = namedtuple('Out', 'logits aux')


class Returns(ToyNet):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
    def forward(self, x): return self.wrap(super().forward(x.to(self.classifier.weight.dtype)))


@pytest.mark.parametrize('wrap',
                         [lambda o: Out(o, o[:,:1]), lambda o: (o, None), lambda o: {'out':o, 'loss':o.mean()},
                          lambda o: [o, 'name']])
def test_outputs_with_more_than_logits(wrap):
    """Named tuples, None, scalars and text pass; only what has rows is split. The network asks its classifier for its
    weight, too."""
    model,(x, _) = Returns(wrap),toy_batch()
    head = add_dropclass(model)
    with head.dropping(torch.tensor([1.,0.,1.,1.])): plain,drop = split_paths(model(x), len(x))
    first = lambda o: o['out'] if isinstance(o, dict) else o[0]
    assert first(plain).shape==first(drop).shape==(4, 4, 16, 16) and not torch.equal(first(plain), first(drop))
    if isinstance(plain, tuple) and hasattr(plain, '_fields'): assert isinstance(drop, Out)


# ---- averaged, compiled and exchanged weights

def trained(epochs=2):
    learn = toy_learner(n=64)
    learn.fit(epochs, cbs=DropClassCallback())
    return learn


def test_an_average_of_the_weights_answers_by_the_same_path():
    """Averages copy buffers into each other, and the flag is one; the block's statistics are among those that
    `update_bn` makes anew."""
    learn = toy_learner(n=64)
    add_dropclass(learn.model)
    average = AveragedModel(learn.model)
    learn.fit(2, cbs=DropClassCallback())
    average.update_parameters(learn.model)
    assert get_head(average).predicts==get_head(learn.model).predicts=='drop'
    update_bn([x for x,_ in learn.dls.train], average)
    norm = get_head(average).compensation[1]
    assert norm.num_batches_tracked==16 and norm.running_mean.abs().max()>0
    x,_ = learn.dls.valid.one_batch()
    agree = (average.eval()(x).argmax(1)==learn.model.eval()(x).argmax(1)).float().mean()
    assert agree>.8, agree


def test_a_mixture_answers_by_the_path_that_has_most_of_it():
    a,b = ToyNet(),ToyNet()
    add_dropclass(a).mark_trained()
    head = add_dropclass(b)
    for share,path in ((.2, 'plain'), (.8, 'drop')):
        with torch.no_grad(): head.drop_trained.copy_(share*get_head(a).drop_trained)
        assert head.predicts==path
        again = ToyNet()
        add_dropclass(again)
        again.load_state_dict(b.state_dict())
        assert get_head(again).predicts==path


def test_a_plain_checkpoint_is_answered_by_the_plain_path():
    learn,plain = trained(),toy_learner(n=64)
    plain.fit(1)
    learn.model.load_state_dict(plain.model.state_dict())
    x,_ = learn.dls.valid.one_batch()
    assert torch.equal(learn.model.eval()(x), plain.model.eval()(x))


def test_a_compiled_network_stays_compiled():
    "The probes that look for the classifier do not use up the variants that `torch.compile` keeps."
    calls = []
    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)
        return run
    torch._dynamo.reset()
    learn = toy_learner(n=16)
    learn.model = torch.compile(learn.model, backend=backend)
    learn.fit(1, cbs=DropClassCallback())
    calls.clear()
    learn.fit(1, cbs=DropClassCallback())
    assert len(calls)>=5, f'{len(calls)} compiled calls in 4 steps and a validation'


# ---- the other callbacks

@pytest.mark.parametrize('make,kept', [(IgnoreLabelCallback, 'ignored'), (FadeWeightsCallback, 'lams')])
def test_predicting_is_no_fit(tmp_path, make, kept):
    images,masks = toy_batch(20)
    data = Datasets(range(20), [[images.__getitem__], [masks.__getitem__]], splits=[range(16), range(16, 20)])
    dls = data.dataloaders(bs=4, num_workers=0)
    dls.c = 4
    learn = Learner(dls, ToyNet(), nn.CrossEntropyLoss(weight=torch.tensor([1.,2.,3.,4.]), ignore_index=VOID),
                    path=tmp_path, cbs=(cb := make()))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    before = list(getattr(cb, kept))
    with learn.no_bar(): learn.get_preds()
    assert getattr(cb, kept)==before and len(before)==8
    learn.export('learner.pkl')
    other = load_learner(tmp_path/'learner.pkl')
    with other.no_bar(): assert other.get_preds(dl=toy_dls().valid)[0].shape==(4, 4, 16, 16)


def test_hidden_labels_of_small_integers():
    "fastai's own void label, -100, has no place in uint8."
    learn = toy_learner(loss_func=nn.CrossEntropyLoss(), cbs=(cb := IgnoreLabelCallback(drop_prob=1.)))
    for dl in learn.dls.loaders: dl.dataset = [(x, torch.where(y==VOID, 0, y).byte()) for x,y in dl.dataset]
    class Cast(nn.CrossEntropyLoss):
        def forward(self, p, t): return super().forward(p, t.long())
    learn.loss_func = Cast()
    learn.fit(1)
    assert len(cb.ignored)==4


# ---- what fastai does before a fit

@pytest.mark.parametrize('before', ['lr_find', 'load'])
def test_a_fit_after_lr_find_or_load(tmp_path, before):
    "Both leave an optimizer whose state is a plain dict."
    learn = toy_learner(path=tmp_path)
    if before=='lr_find':
        with learn.no_bar(): learn.lr_find(show_plot=False, num_it=5)
    else:
        learn.fit(1)
        learn.save('stage')
        learn.load('stage', weights_only=False)
    learn.fit(1, cbs=DropClassCallback())
    before = block_weight(learn.model)
    learn.fit(1, cbs=DropClassCallback())
    assert not torch.equal(before, block_weight(learn.model))


# ---- tails and features that change with training

class Overwrites(ToyNet):
    def forward(self, x):
        logits = self.classifier(self.backbone(x))
        logits /= .1
        return F.interpolate(logits, size=x.shape[-2:], mode='bilinear')


class Drops(ToyNet):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout2d(.1)
    def forward(self, x):
        return F.interpolate(self.drop(self.classifier(self.backbone(x))), size=x.shape[-2:], mode='bilinear')


class DropsInAFunction(ToyNet):
    def forward(self, x):
        scores = F.dropout2d(self.classifier(self.backbone(x)), .5, self.training)
        return F.interpolate(scores, size=x.shape[-2:], mode='bilinear')


@pytest.mark.parametrize('make', [Overwrites, Drops, DropsInAFunction])
def test_a_tail_that_overwrites_or_is_random_is_not_left_out(make):
    learn,cb = toy_learner(model=make()),DropClassCallback()
    learn.fit(1, cbs=cb)
    assert cb.route.startswith('stacked: ')


def test_looking_at_the_tail_draws_no_random_numbers():
    "A dropout in front of the classifier does not send training another way when the route is chosen."
    class Before(ToyNet):
        def __init__(self):
            super().__init__()
            self.backbone.append(nn.Dropout(.5))
    model,(x, y) = Before().train(),toy_batch()
    add_dropclass(model)
    before = torch.get_rng_state()
    assert resize_behind(model, (x[:1],), y.shape[1:])=={'align_corners':False}
    assert torch.equal(torch.get_rng_state(), before)


class Beside(ToyNet):
    "Scores are added to the classifier's: they have no part in Eq. (1)."
    def __init__(self):
        super().__init__()
        self.edge,self.bias = nn.Conv2d(3, 4, 1),nn.Parameter(torch.zeros(4, 1, 1))
    def forward(self, x): return super().forward(x)+self.edge(x)+self.bias


def test_what_is_added_keeps_the_closed_form():
    forms = [inspect_classifier(o(), 'classifier', 4).form for o in (Beside, Temperature)]
    assert forms==['closed form', 'autograd']


class Gated(ToyNet):
    "Features that are a ReLU's at first, and something else once the gate has learned."
    def __init__(self):
        super().__init__()
        self.gate,self.more = nn.Parameter(torch.zeros(1)),nn.Conv2d(8, 8, 3, padding=1)
    def forward(self, x):
        features = self.backbone(x)
        return F.interpolate(self.classifier(features+self.gate*self.more(features)), size=x.shape[-2:],
                             mode='bilinear')


class Bicubic(ToyNet):
    "Overshoots below zero."
    def forward(self, x):
        return self.classifier(F.interpolate(self.backbone(x).sigmoid(), scale_factor=2, mode='bicubic'))


class Doubled(ToyNet):
    "A ReLU's features and a share of themselves: never negative."
    def forward(self, x):
        features = self.backbone(x)
        return self.classifier(features+features*features.sigmoid()/64)


class Alpha(ToyNet):
    def __init__(self):
        super().__init__()
        self.backbone.append(nn.AlphaDropout(.2))


@pytest.mark.parametrize('make,signed',
                         [(ToyNet, False), (Gated, True), (Bicubic, True), (Doubled, False), (Alpha, True)])
def test_features_are_unsigned_only_where_they_stay_so(make, signed):
    assert inspect_classifier(make(), num_classes=4).signed==signed


def test_statistics_of_a_head_that_needs_the_tail():
    "`update_bn` works where the classifier's channels are not the classes."
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone,self.classifier,self.up = ToyNet().backbone,nn.Conv2d(8, 16, 1),nn.PixelShuffle(2)
        def forward(self, x): return self.up(self.classifier(self.backbone(x)))
    model,(x, _) = Shuffled(),toy_batch()
    head = add_dropclass(model, 4, classifier='classifier')
    head.mark_trained()
    update_bn([x, x], model)
    assert head.compensation[1].num_batches_tracked==2
    seen = []
    head.compensation[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(): model.eval()(x), model.train()(x)
    # BatchNorms before it differ by mode
    assert torch.allclose(seen[0].mean((0, 2, 3)), seen[1].mean((0, 2, 3)), rtol=.5, atol=.05)


def test_an_averaged_network_is_exported_as_it_answers():
    model,(x, _) = ToyNet(),toy_batch()
    head = add_dropclass(model)
    average = AveragedModel(model)
    head.mark_trained()
    average.update_parameters(model)
    average.eval()
    exported = torch.export.export(average.module, (x,)).module()
    assert torch.allclose(exported(x), average(x), atol=1e-5) and torch.allclose(average(x), model.eval()(x), atol=1e-5)


def test_a_teacher_that_is_copied_by_data():
    "Such a copy leaves no trace but the values; the mode is set before it is asked."
    student = ToyNet()
    head,teacher = add_dropclass(student),copy.deepcopy(student).eval()
    assert get_head(teacher).predicts=='plain'
    head.mark_trained()
    for a,b in zip(teacher.buffers(), student.buffers()): a.data.copy_(b.data)
    assert get_head(teacher.eval()).predicts=='drop'


def test_a_compiled_step_may_switch_the_mode():
    model,(x, _) = ToyNet(),toy_batch()
    add_dropclass(model)
    def step(x):
        model.eval()
        out = model(x)
        model.train()
        return out
    torch._dynamo.reset()
    assert torch.compile(step, backend='eager', fullgraph=True)(x).shape==(4, 4, 16, 16)


def test_networks_without_values():
    "The flag of a network on `meta` is kept; a buffer set by hand is seen."
    model = ToyNet().eval()
    head = add_dropclass(model)
    assert copy.deepcopy(model).to('meta')(torch.empty(1, 3, 16, 16, device='meta')).shape==(1, 4, 16, 16)
    head.mark_trained()
    head.drop_trained.zero_()
    head.mark_trained()
    assert head.predicts=='drop'


def test_outputs_that_cannot_be_split_say_so():
    class Output:
        def __init__(self, logits): self.logits = logits
    with pytest.raises(TypeError, match='`out.logits` say'): split_paths(Output(torch.zeros(4, 2)), 2)


# ---- what a second reader of the method found

class SeesTraining(Callback):
    "Compares prediction and labels after the step, as accuracies of training batches do."
    order = 55
    def after_batch(self):
        if self.training: self.right = (self.pred.argmax(1)==self.yb[0]).float().mean()


def test_callbacks_after_the_loss_see_what_they_see_without_us():
    learn = toy_learner(cbs=[SeesTraining(), DropClassCallback()])
    learn.fit(1)
    assert 0<=learn.sees_training.right<=1 and 'sees_training' in learn.drop_class.route


def _no_reduction(pred, target): return F.cross_entropy(pred, target.clamp(max=3))


@pytest.mark.parametrize('options', [dict(), dict(drop_prob=SchedLin(0, .1))])
def test_a_loss_that_cannot_mask_is_refused_before_the_first_step(options):
    cb,learn = DropClassCallback(**options),toy_learner(loss_func=_no_reduction)
    with pytest.raises(ValueError, match='one value per pixel'): learn.fit(1, cbs=cb)
    assert not cb.rows and get_head(learn.model) is None


def test_a_loss_that_cannot_mask_will_do_where_nothing_is_dropped():
    cb,learn = DropClassCallback(drop_prob=0),toy_learner(loss_func=_no_reduction)
    learn.fit(1, cbs=cb)
    assert len(cb.rows)>0


def test_draw_weights_are_counted_before_the_first_step():
    cb = DrawWeighted([1,2])
    with pytest.raises(ValueError, match='4 finite numbers'): toy_learner().fit(1, cbs=cb)
    assert not cb.rows


def test_numbers_of_numpy_are_numbers():
    assert check_num_classes(np.int64(4))==4 and type(check_num_classes(np.int64(4))) is int
    cb = DropClassCallback(never_drop=np.int64(1))
    toy_learner().fit(2, cbs=cb)
    assert 'class 1' not in set(cb.history.dropped_class)


def test_lines_do_not_lean_on_their_batch():
    "A 1-D network whose importance comes from autograd: a prediction is the same alone."
    class Lines(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.classifier = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU()),nn.Conv1d(4, 4, 1)
        def forward(self, x): return self.classifier(self.body(x)).sigmoid()
    net,x = Lines(),torch.randn(3, 1, 16)
    add_dropclass(net, predict='drop')
    net.eval()
    assert torch.allclose(net(x), torch.cat([net(o) for o in x.split(1)]), atol=1e-6)


def test_label_255_is_a_class_where_there_are_so_many():
    with pytest.raises(ValueError, match='give another `ignore_index`'):
        resize_cross_entropy(torch.randn(1, 300, 4, 4), torch.full((1, 8, 8), 255))
    found = resize_cross_entropy(torch.zeros(1, 300, 4, 4), torch.full((1, 8, 8), 255), ignore_index=-100)
    assert abs(found.item()-math.log(300))<1e-4


def test_hard_pixels_of_nothing():
    logits = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = OhemLoss()(logits, torch.full((1, 3, 3), VOID))
    loss.backward()
    assert loss==0 and not logits.grad.any()


def test_a_plain_fit_after_dropclass_answers_by_the_plain_path():
    "What trains is what predicts, in the second plain fit as in the first, and each says so."
    learn = toy_learner(n=16)
    for _ in range(2):
        learn.fit(2, cbs=DropClassCallback())
        assert get_head(learn.model).predicts=='drop'
        with pytest.warns(UserWarning, match='the plain path answers again'): learn.fit(1)
        assert get_head(learn.model).predicts=='plain'


# ---- what new users brought: does a drop reach its class?

def reach(model, head, x, c=1):
    "How much the drop path's logit of class c changes when the class is dropped, beside how much it varies."
    with torch.no_grad():
        out = []
        for keep in (1., 0.):
            keep_mask = torch.ones(4)
            keep_mask[c] = keep
            with eval_mode(model), head.dropping(keep_mask, in_eval=True):
                out.append(split_paths(model(x), len(x))[1][:,c])
    return ((out[0]-out[1]).abs().mean()/out[0].std()).item()


class Skips(ToyNet):
    "Scores of two levels are added at the size of the finer one, as in FCN-8s."
    def __init__(self):
        super().__init__()
        self.deep,self.score_deep = nn.Conv2d(8, 8, 3, stride=2, padding=1),nn.Conv2d(8, 4, 1)
    def forward(self, x):
        features = self.backbone(x)
        deep = self.score_deep(self.deep(features).relu())
        return self.classifier(features)+F.interpolate(deep, size=features.shape[2:], mode='bilinear')


class Lora(nn.Module):
    "A convolution with an adapter beside it."
    def __init__(self, base, rank=2, scale=4.):
        super().__init__()
        self.base,self.scale = base,scale
        self.a,self.b = nn.Conv2d(8, rank, 1, bias=False),nn.Conv2d(rank, 4, 1, bias=False)
    def forward(self, x): return self.base(x)+self.scale*self.b(self.a(x))


class Corrected(ToyNet):
    "A residual that has learned something."
    def __init__(self):
        super().__init__()
        self.refine = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        scores = self.classifier(self.backbone(x))
        return scores+self.refine(scores.relu())


def test_scores_of_several_sizes_are_no_one_classifier():
    "The error proposes none of them; one that is named all the same is called a part."
    with pytest.raises(ValueError, match='has several classifiers: score_deep, classifier') as error:
        add_dropclass(Skips())
    assert 'classifier=' not in str(error.value)
    with pytest.warns(UserWarning, match='passes score_deep: a drop there leaves the rest'):
        add_dropclass(Skips(), classifier='score_deep')


def test_an_adapter_and_its_convolution_are_one_classifier():
    model,(x, _) = ToyNet(),toy_batch()
    model.classifier = Lora(model.classifier)
    head = add_dropclass(model)
    assert model.classifier is head and head.form=='autograd' and reach(model, head, x)>.02
    partly = ToyNet()
    partly.classifier = Lora(partly.classifier)
    with pytest.warns(UserWarning, match='a drop there leaves'):
        partly_head = add_dropclass(partly, classifier='classifier.b')
    assert partly_head.compensation[0].in_channels==2 and head.compensation[0].in_channels==8


def test_a_refinement_is_not_the_classifier():
    model,(x, _) = Corrected(),toy_batch()
    head = add_dropclass(model)
    assert model.classifier is head and reach(model, head, x)>.02


def test_a_classifier_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            net = ToyNet()
            self.parts,self.classifier = nn.Sequential(net.backbone, net.classifier),net.classifier
        def forward(self, x): return self.parts(x)
    for name in (None, 'classifier', 'parts.1'):
        model,(x, _) = Twice(),toy_batch()
        keys,before = list(model.state_dict()),model.eval()(x)
        head = add_dropclass(model, classifier=name)
        assert model.classifier is model.parts[1] is head
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(model(x), before)
        assert list(remove_dropclass(model).state_dict())==keys and torch.equal(model(x), before)


def test_a_wrapped_network_is_refused():
    "The wrapper shares only the weights that it found."
    dist = torch.distributed
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ToyNet())
        with pytest.raises(ValueError, match='add the head first, then wrap'): add_dropclass(wrapped)
        assert get_head(wrapped) is None
    finally: dist.destroy_process_group()


def test_a_pruned_classifier_drops_by_its_own_weight():
    "The drop path alone runs, right after a step has moved the weight that the mask is put on."
    model,(x, _) = ToyNet().train(),toy_batch()
    prune.l1_unstructured(model.classifier, 'weight', amount=.5)
    head = add_dropclass(model)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for _ in range(2):
        with head.dropping(torch.tensor([1.,0.,1.,1.]), only='drop'): model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        assert torch.equal(head.importance()[:,:,None,None], head.classifier.weight_orig*head.classifier.weight_mask)


@pytest.mark.parametrize('how', ['by name', 'with a size'])
def test_layers_that_are_called_in_other_ways(how):
    class Called(ToyNet):
        def __init__(self):
            super().__init__()
            if how=='with a size': self.classifier = nn.ConvTranspose2d(8, 4, 2, stride=2)
        def forward(self, x):
            if how=='with a size': return self.classifier(self.backbone(x), output_size=x.shape[2:])
            return F.interpolate(self.classifier(input=self.backbone(x)), size=x.shape[2:], mode='bilinear')
    torch.manual_seed(0)
    model,(x, _) = Called(),toy_batch()
    before = model.eval()(x)
    head = add_dropclass(model)
    assert torch.equal(model(x), before) and reach(model, head, x)>.02


class Checkpointed(ToyNet):
    "Computes its features and scores anew in the backward pass, of training or of any mode."
    def __init__(self, on=True, always=False, alone=False, reentrant=False):
        super().__init__()
        self.on,self.always,self.alone,self.reentrant = on,always,alone,reentrant
    def anew(self, f, x):
        on = self.on and (self.training or self.always)
        return checkpoint(f, x, use_reentrant=self.reentrant) if on else f(x)
    def scores(self, x): return self.classifier(self.backbone(x))
    def forward(self, x):
        scores = self.anew(self.classifier, self.backbone(x)) if self.alone else self.anew(self.scores, x)
        return F.interpolate(scores, size=x.shape[2:], mode='bilinear')


@pytest.mark.parametrize('alone', [True, False])
def test_activation_checkpointing_in_any_mode(alone):
    "A network that checkpoints in evaluation mode, too, is probed like one that never does."
    grads,(x, y) = [],toy_batch()
    for on in (False, True):
        torch.manual_seed(0)
        model,keep_mask = Checkpointed(on, always=True, alone=alone),torch.tensor([1.,0.,1.,1.])
        model.backbone[1].momentum = 0. # Or the batch would count twice
        head = add_dropclass(model)
        assert (head.form, head.tail, head.signed)==('closed form', None, False)
        with head.dropping(keep_mask, .5):
            dropclass_loss(*split_paths(model.train()(x), 4), y, keep_mask, .5).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.eval()(x).sum().backward() # As Grad-CAM does
    assert torch.equal(*grads)


def test_reentrant_checkpointing_trains_but_cannot_be_probed():
    grads,(x, y) = [],toy_batch()
    for on in (False, True):
        torch.manual_seed(0)
        model,keep_mask = Checkpointed(on, alone=True, reentrant=True),torch.tensor([1.,0.,1.,1.])
        head = add_dropclass(model)
        with head.dropping(keep_mask, .5):
            dropclass_loss(*split_paths(model.train()(x), 4), y, keep_mask, .5).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match='checkpoint with `use_reentrant=False`'):
        add_dropclass(Checkpointed(alone=True, reentrant=True, always=True))


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_a_head_that_needs_its_tail_is_refused(reentrant):
    class Squashed(Checkpointed):
        def forward(self, x): return super().forward(x).sigmoid()
    model,(x, _) = Squashed(alone=True, reentrant=reentrant),toy_batch()
    head = add_dropclass(model.train())
    assert head.form=='autograd'
    with head.dropping(torch.ones(4)), pytest.raises(RuntimeError, match='checkpoint the backbone alone'):
        model(x).sum().backward()


def test_activation_checkpointing_in_a_loop():
    "The head must be armed when it is computed again, else the error says so."
    grads,(x, y) = [],toy_batch()
    for on in (False, True):
        torch.manual_seed(0)
        model,keep_mask = Checkpointed(on),torch.tensor([1.,0.,1.,1.])
        model.backbone[1].momentum = 0. # Or the batch would count twice
        head = add_dropclass(model)
        with head.dropping(keep_mask, .5):
            dropclass_loss(*split_paths(model.train()(x), 4), y, keep_mask, .5).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        with head.dropping(keep_mask, .5): loss = dropclass_loss(*split_paths(model(x), 4), y, keep_mask, .5)
        if on:
            with pytest.raises(RuntimeError, match='call `loss.backward\\(\\)` inside'): loss.backward()
    assert torch.equal(*grads)


@pytest.mark.parametrize('fused', [True, False])
def test_activation_checkpointing_with_the_callback(fused):
    parts = []
    for on in (False, True):
        torch.manual_seed(0)
        learn,cb = toy_learner(model=Checkpointed(on)),DropClassCallback(fused=fused)
        learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=cb)
        names = ('plain','masked','suppression','total')
        parts.append(torch.tensor([[float(o[k]) for k in names] for o in cb.rows]).nan_to_num())
        assert cb.route.startswith('fused' if fused else 'stacked') and get_head(learn.model).step is None
    assert torch.equal(*parts)


def test_a_folded_classifier_answers_as_a_layer():
    "Some networks ask their classifier for its type or stride while they run; copies and casts ask their own."
    class Asks(ToyNet):
        def forward(self, x):
            assert self.classifier.stride==(1,1)
            return super().forward(x.to(self.classifier.weight.dtype))
    model,(x, _) = Asks().eval(),toy_batch()
    add_dropclass(model, predict='drop')
    before = model(x)
    fold_dropclass(model)
    twin = copy.deepcopy(model).double()
    assert torch.allclose(model(x), before, atol=1e-5) and torch.allclose(twin(x).float(), before, atol=1e-5)
    assert twin.classifier.weight is twin.classifier[-1].weight and len(model.classifier.state_dict())==4


def test_volumes_are_probed_small():
    assert make_probe(nn.Conv3d(1, 4, 3)).shape==(2, 1, 16, 16, 16)


def test_one_channel_leaves_no_head_behind():
    "A network with one channel is refused before the first step, and stays as it was."
    dls = toy_dls()
    for o in ('c', 'vocab'):
        if o in vars(dls): delattr(dls, o)
    learn = Learner(dls, ToyNet(1), nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match='at least 2, got 1'): learn.fit(1, cbs=DropClassCallback())
    assert get_head(learn.model) is None
