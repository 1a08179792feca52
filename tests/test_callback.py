"""DropClassCallback among fastai's own tools: savers, stoppers, loggers, predictions, export, U-Nets, networks that
return dicts, and interrupted fits."""
import copy
import csv
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import (Callback, CancelFitException, CrossEntropyLossFlat, CSVLogger, EarlyStoppingCallback,
                               FetchPredsCallback, GradientClip, Learner,
                               LossMetrics, OptimWrapper, Recorder, SaveModelCallback, SegmentationDataLoaders,
                               get_image_files, load_learner, minimum, params, ranger, resnet18,
                               unet_learner)
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dropclass.callback import DropClassCallback
from dropclass.history import PARTS
from dropclass.core import VOID
from dropclass.head import compensation_block
from dropclass.surgery import add_dropclass, get_head, remove_dropclass
from dropclass.metrics import segmentation_metrics
from dropclass.models import OutputAdapter, create_model
from dropclass.testing import ToyNet, toy_batch, toy_dls, toy_learner, test_same as same_bits

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*insecure.*', 'ignore:.*IPython.*')
same_bits.__test__ = False
COLUMNS = ['plain_loss', 'masked_loss', 'suppression_loss', 'valid_plain_loss', 'valid_drop_loss', 'drop_share']
CODES = ['road', 'car', 'sky', 'person']


def block(model): return [p.detach().clone() for p in get_head(model).compensation.parameters()]

def moved(before, model): return [not torch.equal(a, b) for a,b in zip(before, block(model))]

def fresh_block(model, seed=0):
    "The block as it is before the first step."
    return [p.detach() for p in compensation_block(get_head(model).classifier.in_channels, seed=seed).parameters()]

def assert_clean(learn, loss_func=None):
    "Nothing armed, nothing hooked in, no columns; evaluation and a plain training forward give N rows."
    head = get_head(learn.model)
    assert head.step is None
    assert not {o.name for o in learn.metrics}&set(COLUMNS)
    if loss_func is not None: assert learn.loss_func is loss_func

def rows_of(cb): return [(o['step'], o['lam'], o['drop_prob'], o['dropped_class']) for o in cb.rows]

def records(learn): return [dict(zip(learn.recorder.metric_names[1:], o)) for o in learn.recorder.values]


# ---- savers and stoppers

class Raise(Callback):
    "Makes one epoch's validation loss the best, by scaling the others up."
    order = 45
    def __init__(self, best): self.best = best
    def after_loss(self):
        if not self.training: self.learn.loss = self.loss*(1 if self.epoch==self.best else 10)


class Keep(Callback):
    "Keeps the state dict after each epoch."
    order = 70
    def before_fit(self): self.states = []
    def after_epoch(self): self.states.append(copy.deepcopy(self.model.state_dict()))


@pytest.mark.parametrize('best,predicts', [(0, 'plain'), (2, 'drop')])
@pytest.mark.parametrize('inside', [True, False])
def test_save_model_brings_the_best_epoch_back(tmp_path, best, predicts, inside):
    "Weights, head and the flag of the trained drop path are those of the best epoch."
    cb = DropClassCallback()
    learn = toy_learner(path=tmp_path, cbs=cb if inside else None)
    learn.fit(4, cbs=[SaveModelCallback(), Raise(best), keep := Keep()]+([] if inside else [cb]))
    head = get_head(learn.model)
    for k,v in learn.model.state_dict().items(): same_bits(v, keep.states[best][k])
    assert (head.predicts, bool(head.drop_trained))==(predicts, predicts=='drop')
    assert any((a!=keep.states[3][k]).any() for k,a in learn.model.state_dict().items())
    x,y = learn.dls.valid.one_batch()
    probe = toy_learner(seed=5).model
    add_dropclass(probe)
    probe.load_state_dict(torch.load(tmp_path/'models/model.pth', weights_only=True))
    same_bits(probe.eval()(x), learn.model.eval()(x))
    assert_clean(learn)


def test_save_model_every_epoch(tmp_path):
    "One file per epoch, each with the head, its flag and, if asked for, the optimizer's state of the block."
    learn = toy_learner(path=tmp_path)
    learn.fit(4, cbs=[DropClassCallback(), SaveModelCallback(every_epoch=True, with_opt=True), keep := Keep()])
    files = sorted(p.name for p in (tmp_path/'models').iterdir())
    assert files==[f'model_{i}.pth' for i in range(4)]
    for i,flag in enumerate([0., 0., 1., 1.]):
        state = torch.load(tmp_path/f'models/model_{i}.pth', weights_only=False)
        for k,v in state['model'].items(): same_bits(v, keep.states[i][k])
        assert state['model']['classifier.drop_trained']==flag
    learn.load('model_0', with_opt=True, weights_only=False)
    assert get_head(learn.model).predicts=='plain'
    learn.fit(1, cbs=DropClassCallback())


@pytest.mark.parametrize('monitor', ['valid_drop_loss', 'valid_plain_loss', 'plain_loss'])
def test_early_stopping_on_our_columns(capsys, monitor):
    "Our columns can be monitored; a stopped fit is clean."
    learn,cb = toy_learner(lr=0.),DropClassCallback(lam=0., drop_prob=0.)
    learn.model.backbone[1].momentum = 0. # With lr=0 nothing changes, so nothing improves
    loss_func = learn.loss_func
    learn.fit(6, cbs=[cb, EarlyStoppingCallback(monitor=monitor, min_delta=1e-2, patience=2)])
    assert len(learn.recorder.values)==3 and 'early stopping' in capsys.readouterr().out
    assert cb.history.epoch.max()==2
    assert_clean(learn, loss_func)
    learn.fit(1, cbs=cb)
    assert len(cb.history)==4


# ---- losses

WEIGHT = torch.tensor([.5, 2., 1., 3.])

@pytest.mark.parametrize('loss_func',
                         [nn.CrossEntropyLoss(WEIGHT, ignore_index=VOID),
                          CrossEntropyLossFlat(axis=1, ignore_index=VOID, weight=WEIGHT)],
                         ids=['torch', 'fastai'])
@pytest.mark.parametrize('masked_weights', [None, True])
def test_class_weights_count_where_they_should(loss_func, masked_weights):
    """The plain loss is the weighted mean over its pixels, the masked one too if asked to, worked out from what the
    step saw."""
    class See(Callback):
        order = DropClassCallback.order-1 # Sees the drop logits before ours lets them go
        def after_loss(self):
            if self.training:
                self.seen.append((self.pred.detach().clone(), self.learn.drop_class.now.logits[1].detach().clone(),
                                  self.yb[0].clone()))
    see = See()
    see.seen = []
    cb = DropClassCallback(lam=.3, drop_prob=1., alpha=2., masked_weights=masked_weights)
    learn = toy_learner(loss_func=loss_func)
    learn.fit(1, cbs=[cb, see])
    for (logits,drop_logits,y),row in zip(see.seen, cb.rows):
        z,sums = row['dropped_class'],[]
        for o,ok in ((logits, y!=VOID), (drop_logits, (y!=VOID)&(y!=z))):
            labels = y.masked_fill(~ok, 0)
            weight = (WEIGHT[labels] if o is logits or masked_weights else 1.)*ok
            cost = -o.log_softmax(1).gather(1, labels[:,None])[:,0]
            sums.append(((weight*cost).sum()/weight.sum()).item())
        sup = drop_logits.softmax(1)[:,z].mean().item()
        assert [row[o] for o in PARTS]==pytest.approx([*sums, sup, .7*sums[0]+.3*sums[1]+2*sup], rel=1e-4)
    assert learn.loss_func is loss_func


# ---- predictions

@pytest.mark.parametrize('inside', [True, False])
def test_get_preds_and_validate_leave_the_fit_alone(inside):
    "After a fit, predictions are the model's own, with labels and without, and the history stays."
    cb = DropClassCallback()
    learn = toy_learner(cbs=cb if inside else None)
    learn.fit(3, cbs=None if inside else cb)
    history,values = cb.history,list(learn.recorder.values)
    want = learn.model.eval()(torch.stack([x for x,_ in learn.dls.valid.dataset])).detach()
    preds,targs = learn.get_preds()
    same_bits(preds, want, 1e-6)
    same_bits(targs, torch.stack([y for _,y in learn.dls.valid.dataset]))
    valid_loss = learn.validate()[0]
    assert valid_loss==pytest.approx(values[-1][1], rel=1e-5)
    bare = learn.dls.valid.new([(x,) for x,_ in learn.dls.valid.dataset])
    bare.n_inp = 1
    same_bits(learn.get_preds(dl=bare)[0], want, 1e-6)
    losses = learn.get_preds(with_loss=True)[2]
    same_bits(losses, F.cross_entropy(want, targs, ignore_index=VOID, reduction='none').flatten(1).mean(1), 1e-5)
    assert cb.history.equals(history)
    assert_clean(learn)


def test_callback_added_to_a_learner_before_predictions():
    """With `learn.add_cb`, predictions before the first fit neither need an optimizer nor change the model; the fit
    then trains the block."""
    learn = toy_learner()
    want = learn.get_preds()[0]
    learn.add_cb(cb := DropClassCallback())
    same_bits(learn.get_preds()[0], want)
    learn.fit(2)
    assert all(moved(fresh_block(learn.model), learn.model)) and len(cb.history)==8
    assert_clean(learn)


def test_predictions_fetched_inside_a_fit():
    "A callback that predicts on another DataLoader after each validation does not disturb the validation columns."
    def columns(*cbs):
        learn = toy_learner(cbs=DropClassCallback())
        learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=cbs)
        return records(learn)
    other = toy_dls().train.new(shuffle=False)
    plain,fetched = columns(),columns(FetchPredsCallback(dl=other))
    for a,b in zip(plain, fetched): assert [a[k] for k in COLUMNS]==[b[k] for k in COLUMNS]


# ---- validation from small logits

class Watch(Callback):
    "Notes what the metrics are given."
    order,reads_pred = Recorder.order-1,False
    def __init__(self): self.preds = []
    def after_batch(self):
        if not self.training: self.preds.append(self.pred)

def watched(model=None, metrics=None, **options):
    "A fit of two epochs, the predictions of its validation, and the callback."
    cb,watch = DropClassCallback(**options),Watch()
    learn = toy_learner(model=model, cbs=[cb, watch], metrics=segmentation_metrics(4) if metrics is None else metrics)
    learn.dls.train.rng.seed(0)
    learn.fit(2)
    return learn,watch.preds,cb


def test_metrics_that_count_labels_get_labels():
    "Ours get labels, any other metric the logits of the path that predicts, and those have the same largest class."
    labels,logits = [watched(metrics=o)[1][-1] for o in (None, [*segmentation_metrics(4), pixel_share])]
    assert (labels.dtype, labels.shape, logits.shape)==(torch.int64, (4,16,16), (4,4,16,16))
    assert torch.equal(labels, logits.argmax(1))


def test_nothing_of_full_size_in_validation():
    "With many classes the largest tensor of a validation batch is far below the logits at full size."
    class Largest(TorchDispatchMode):
        numel = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for o in out if isinstance(out, (tuple,list)) else [out]:
                if isinstance(o, torch.Tensor): self.numel = max(self.numel, o.numel())
            return out
    class Look(Callback):
        order,reads_pred = -100,False
        def before_validate(self): self.mode = Largest().__enter__()
        def after_validate(self): self.mode.__exit__(None, None, None)
    C,N,n = 200,4,64
    learn = toy_learner(num_classes=C, size=n, cbs=[DropClassCallback(), Look()], metrics=segmentation_metrics(C))
    learn.fit(1)
    assert learn.look.mode.numel<=max(N*C*n*n//4, C*C+1)<N*C*n*n # The small logits


class Fickle(ToyNet):
    "Resizes one size of image otherwise than all others."
    def forward(self, x):
        logits = self.classifier(self.backbone(x))
        return F.interpolate(logits, x.shape[-2:], mode='nearest' if x.shape[-1]==24 else 'bilinear')

def test_another_tail_in_validation():
    "Where the images of validation meet another tail than those of training, both paths go through it."
    def fit(slow=False):
        torch.manual_seed(0)
        learn = toy_learner(model=Fickle(), cbs=(cb := DropClassCallback()), metrics=segmentation_metrics(4))
        learn.dls.loaders[1] = learn.dls.valid.new(list(zip(*toy_batch(8, size=24, seed=3))))
        learn.dls.train.rng.seed(0)
        if slow: cb.log.valid_resize = lambda: None
        learn.fit(2)
        assert cb.route.startswith('fused')
        return learn.recorder.values[-1][1:], learn.metrics[0].counts.total
    (a,counts),(b,want) = fit(),fit(True)
    assert a==b and torch.equal(counts, want)


def test_batches_behind_the_validation_get_logits():
    "A logger that runs a batch after the epoch, as TensorBoard's does, finds logits."
    class Logs(Callback):
        order,reads_pred = 60,False
        def after_epoch(self):
            self.learn.one_batch(0, self.dls.valid.one_batch())
            self.shape = self.pred.shape
    learn = toy_learner(cbs=[DropClassCallback(), Logs()], metrics=segmentation_metrics(4))
    learn.fit(1)
    assert learn.logs.shape==(4,4,16,16)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Ten small pictures with masks, as files: four classes, and void in a corner."
    path = tmp_path_factory.mktemp('street')
    for name in ('images', 'masks'): (path/name).mkdir()
    x,y = toy_batch(10, 4, size=32)
    for i in range(10):
        Image.fromarray(((x[i].permute(1, 2, 0)*40+128).clip(0, 255)).byte().numpy()).save(path/f'images/{i}.png')
        Image.fromarray(y[i].byte().numpy()).save(path/f'masks/{i}.png')
    return path


def street_dls(folder, bs=4):
    files,options = sorted(get_image_files(folder/'images')),dict(codes=CODES, bs=bs, num_workers=0, seed=0)
    return SegmentationDataLoaders.from_label_func(folder, files, label_func=MaskOf(folder), **options)


class MaskOf:
    "Mask of an image; a class, since an exported Learner must be able to name it."
    def __init__(self, path): self.path = path
    def __call__(self, o): return self.path/'masks'/o.name


def street_learner(folder, model=None, **kwargs):
    torch.manual_seed(0)
    learn = Learner(street_dls(folder), ToyNet() if model is None else model,
                    CrossEntropyLossFlat(axis=1, ignore_index=VOID), lr=1e-2, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = print
    return learn


@pytest.mark.parametrize('inside', [True, False])
def test_show_results_and_predict(folder, inside):
    "fastai draws what the model predicts, and predicts one file; class names come from the codes."
    import matplotlib.pyplot as plt
    cb = DropClassCallback(never_drop='sky')
    learn = street_learner(folder, cbs=cb if inside else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=None if inside else cb)
    assert cb.names==CODES and 'sky' not in set(cb.history.dropped_class) and cb.droppable==[0, 1, 3]
    learn.show_results(max_n=2, shuffle=False)
    assert len(plt.gcf().axes)==4
    plt.close('all')
    mask,labels,probs = learn.predict(folder/'images/3.png')
    assert labels.shape==(32, 32) and probs.shape==(4, 32, 32)
    same_bits(labels, probs.argmax(0))
    assert len(cb.history)==4
    assert_clean(learn)


@pytest.mark.parametrize('inside', [True, False])
def test_export_and_load_learner(folder, tmp_path, inside):
    "The exported file is small, holds no batch, and predicts the same; it can be trained on."
    cb = DropClassCallback(drop_prob=1.)
    learn = street_learner(folder, cbs=cb if inside else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=None if inside else cb)
    file = folder/'images/5.png'
    want = learn.predict(file)[2]
    learn.export(tmp_path/'a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size<150_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'a.pkl')
    with loaded.no_bar(): same_bits(loaded.predict(file)[2], want)
    assert get_head(loaded.model).predicts==get_head(learn.model).predicts=='drop'
    assert hasattr(loaded, 'drop_class')==inside
    if inside: assert loaded.drop_class.history.equals(cb.history)
    loaded.dls = learn.dls
    with loaded.no_bar(), loaded.no_logging(): loaded.fit(1, cbs=None if inside else DropClassCallback())
    assert not torch.equal(loaded.predict(file)[2], want)


# ---- networks

def unet(folder, **kwargs):
    torch.manual_seed(0)
    learn = unet_learner(street_dls(folder), resnet18, n_out=4, pretrained=False,
                         loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), lr=1e-3, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda *args: None
    return learn


def test_unet_head_comes_and_goes(folder):
    """The classifier of fastai's U-Net is found; the plain path gives the same bits, random state and keys stay, and
    removing leaves no trace."""
    learn = unet(folder)
    x = learn.dls.one_batch()[0]
    keys,conv = list(learn.model.state_dict()),learn.model.layers[-2][0]
    with torch.no_grad(): want = learn.model.eval()(x)
    state = torch.random.get_rng_state()
    head = add_dropclass(learn.model, probe=x[:2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert head.classifier is conv and head is learn.model.layers[-2][0] and not head.signed
    with torch.no_grad(): same_bits(learn.model(x), want)
    remove_dropclass(learn.model)
    assert learn.model.layers[-2][0] is conv and list(learn.model.state_dict())==keys
    with torch.no_grad(): same_bits(learn.model(x), want)


def test_unet_learner_trains(folder):
    "Frozen, the body stays and the block moves; then all of it moves; the class names come from the codes."
    learn,cb = unet(folder),DropClassCallback(probe=torch.randn(2, 3, 32, 32))
    body = learn.model.layers[0][0].weight.detach().clone()
    learn.freeze()
    learn.fit(1, cbs=cb)
    assert all(moved(fresh_block(learn.model), learn.model)) and cb.names==CODES
    same_bits(learn.model.layers[0][0].weight, body)
    learn.unfreeze()
    before = block(learn.model)
    learn.fit(1, cbs=cb)
    assert all(moved(before, learn.model)) and not torch.equal(learn.model.layers[0][0].weight, body)
    assert learn.get_preds()[0].shape==(2, 4, 32, 32)
    assert_clean(learn)


def test_unet_learner_fine_tunes(folder):
    "`fine_tune` fits twice with slices of rates: the block moves, and each fit has its own ramp."
    learn,cb = unet(folder),DropClassCallback(probe=torch.randn(2, 3, 32, 32))
    body,starts = learn.model.layers[0][0].weight.detach().clone(),[]
    learn.fine_tune(1, cbs=[cb, Callback(after_fit=lambda self: starts.append(cb.rows[0]['lam']))])
    assert starts==[0., 0.]
    assert all(moved(fresh_block(learn.model), learn.model)) and not torch.equal(learn.model.layers[0][0].weight, body)
    assert_clean(learn)


@pytest.mark.parametrize('name', ['fcn_resnet50', 'deeplabv3_mobilenet_v3_large'])
def test_networks_that_return_dicts(name):
    "torchvision's networks train behind an OutputAdapter, with and without DropClass, auxiliary classifier included."
    torch.manual_seed(0)
    build = getattr(torchvision.models.segmentation, name)
    net = build(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    learn = toy_learner(model=OutputAdapter(net), n=4, bs=2, size=32, lr=1e-3)
    learn.fit(1, cbs=(cb := DropClassCallback(lam=.5, probe=torch.randn(2, 3, 32, 32))))
    assert get_head(learn.model) is net.classifier[4]
    assert all(moved(fresh_block(learn.model), learn.model))
    assert learn.get_preds()[0].shape==(2, 4, 32, 32) and len(cb.history)==2
    assert_clean(learn)


def test_own_networks_do_not_warn():
    "No warning in a fit of a network of ours, whatever its attributes are called."
    learn = toy_learner(model=create_model('small', 4), n=4)
    assert hasattr(learn, 'head') # `learn.head` is the network's: the callback must not shadow it
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, cbs=DropClassCallback())


# ---- loggers

class Writer:
    "Stands in for TensorBoard's SummaryWriter and remembers."
    def __init__(self, log_dir=None): Writer.last,self.scalars = self,[]
    def add_scalar(self, name, value, step): self.scalars.append((name, float(value), step))
    def add_graph(self, model, *args): pass
    def close(self): pass


def test_tensorboard_gets_the_columns(monkeypatch):
    "The parts of the loss reach `add_scalar`, once per epoch, with the Recorder's values."
    for name in ('fastai.callback.tensorboard', 'tensorboard', 'torch.utils.tensorboard'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, 'tensorboard', types.ModuleType('tensorboard'))
    fake = types.ModuleType('torch.utils.tensorboard')
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', fake)
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = toy_learner()
    learn.fit(3, cbs=[DropClassCallback(), TensorBoardCallback(trace_model=False, log_preds=False)])
    sys.modules.pop('fastai.callback.tensorboard')
    got = {k:[v for n,v,_ in Writer.last.scalars if n==k] for k in COLUMNS}
    assert got=={k:[o[k] for o in records(learn)] for k in COLUMNS}
    assert all(len(v)==3 and np.isfinite(v).all() for v in got.values())


def test_wandb_gets_the_columns(monkeypatch):
    "The parts of the loss and the callback's options reach W&B."
    wandb,logged,config = types.ModuleType('wandb'),[],{}
    wandb.run = types.SimpleNamespace(step=0, summary={})
    wandb.config = types.SimpleNamespace(update=lambda o,**kwargs: config.update(o))
    wandb.log = lambda o,step=None: logged.append(o)
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    from fastai.callback.wandb import WandbCallback
    # fastai 2.8.12's own fails on any number with fastcore 2.2
    monkeypatch.setattr('fastai.callback.wandb._format_config', lambda o: o)
    learn = toy_learner()
    learn.fit(2, cbs=[DropClassCallback(alpha=3.), WandbCallback(log_preds=False)])
    sys.modules.pop('fastai.callback.wandb')
    rows = [o for o in logged if 'plain_loss' in o]
    assert [{k:o[k] for k in COLUMNS} for o in rows]==[{k:o[k] for k in COLUMNS} for o in records(learn)]
    assert config['DropClassCallback']['alpha']==3.


def test_csv_logger_and_train_metrics(tmp_path):
    "CSVLogger writes the columns; a Recorder that also shows training metrics works."
    learn = toy_learner(path=tmp_path, metrics=pixel_share)
    learn.recorder.train_metrics = True
    learn.fit(2, cbs=[DropClassCallback(), CSVLogger()])
    rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert len(rows)==2
    for row,o in zip(rows, records(learn)):
        for k in COLUMNS: assert float(row[f'valid_{k}'])==pytest.approx(o[f'valid_{k}'])
        assert float(row['train_pixel_share'])>0
    assert learn.metrics.attrgot('name')==['pixel_share']


def pixel_share(pred, target): return (pred.argmax(1)==target).float().mean()


class TwoPartLoss(nn.Module):
    "A cross-entropy that keeps its value, as `LossMetrics` expects."
    ignore_index,reduction = VOID,'mean'
    def forward(self, logits, target):
        self.ce = F.cross_entropy(logits, target, ignore_index=VOID, reduction=self.reduction)
        return self.ce


def test_loss_metrics_show_the_path_that_predicts():
    "LossMetrics reads the loss function after validation's own call: the value of the path that `valid_loss` is about."
    learn = toy_learner(loss_func=TwoPartLoss(), metrics=LossMetrics('ce'))
    learn.fit(4, cbs=DropClassCallback())
    for o in records(learn): assert o['ce']==pytest.approx(o['valid_loss'], rel=1e-5)
    assert {o['drop_share'] for o in records(learn)}=={0., 1.}


# ---- kinds of fit

def split(model): return [params(model.backbone),
                          [p for n,p in model.named_parameters() if not n.startswith('backbone')]]


@pytest.mark.parametrize('inside', [True, False])
def test_lr_find_restores_everything(inside, tmp_path):
    """After `lr_find` weights, random draws and columns are as before; the fit that follows is the one that would have
    been."""
    cb = DropClassCallback()
    def run(find):
        learn = toy_learner(path=tmp_path, cbs=cb if inside else None)
        if not inside: learn.fit(0, cbs=cb) # Brings the head in
        state = torch.random.get_rng_state()
        before = copy.deepcopy(learn.model.state_dict())
        if find: learn.lr_find(num_it=15, start_lr=1e-4, end_lr=1., show_plot=False, suggest_funcs=minimum)
        for k,v in learn.model.state_dict().items(): same_bits(v, before[k])
        assert_clean(learn)
        torch.random.set_rng_state(state)
        learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=None if inside else cb)
        return learn.model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a,b = run(True),run(False)
    for k in a: same_bits(a[k], b[k])


def test_one_cycle_with_a_slice_of_rates():
    "Two groups, two rates: the block is in the last group and learns with its rate."
    learn = toy_learner(splitter=split)
    learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=DropClassCallback())
    head = get_head(learn.model)
    assert len(learn.opt.param_lists)==2
    ids = {id(p) for p in learn.opt.param_lists[-1]}
    assert all(id(p) in ids for p in head.compensation.parameters())
    assert all(moved(fresh_block(learn.model), learn.model))
    assert sum(len(o) for o in learn.opt.param_lists)==len(list(learn.model.parameters()))


@pytest.mark.parametrize('inside', [True, False])
def test_wrapped_optimizer_frozen(inside):
    "A PyTorch optimizer behind OptimWrapper, frozen: the block moves, the backbone stays; unfreezing trains all."
    opt_func = lambda groups,**kwargs: OptimWrapper(groups, torch.optim.SGD, **kwargs)
    cb = DropClassCallback()
    learn = toy_learner(splitter=split, opt_func=opt_func, cbs=cb if inside else None)
    body = learn.model.backbone[0].weight.detach().clone()
    learn.freeze()
    learn.fit(1, cbs=None if inside else cb)
    assert all(moved(fresh_block(learn.model), learn.model))
    same_bits(learn.model.backbone[0].weight, body)
    learn.unfreeze()
    before = block(learn.model)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2), cbs=None if inside else cb)
    assert all(moved(before, learn.model)) and not torch.equal(learn.model.backbone[0].weight, body)


def test_block_is_trained_as_if_it_had_been_there():
    "Coming with the fit or with the Learner makes no difference: same optimizer options, same weights afterwards."
    a,b = toy_learner(wd=.1, wd_bn_bias=False),toy_learner(wd=.1, wd_bn_bias=False, cbs=DropClassCallback())
    a.create_opt()
    for learn,cbs in ((a, DropClassCallback()), (b, None)):
        learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=cbs)
    for (k,v),w in zip(a.model.state_dict().items(), b.model.state_dict().values()): same_bits(v, w)


def test_two_fits_give_two_histories():
    "A second fit with the same callback starts its ramp and its history anew, and draws the same classes."
    learn,cb = toy_learner(),DropClassCallback()
    learn.fit(3, cbs=cb)
    first = rows_of(cb)
    learn.fit(3, cbs=cb)
    assert rows_of(cb)==first and len(cb.history)==12
    learn.fit(1, cbs=cb)
    assert len(cb.history)==4 and cb.history.lam.max()<1
    assert get_head(learn.model).predicts=='drop' # Trained once, it stays so


def test_lookahead_keeps_its_copies_in_place():
    """An optimizer with a slow copy of each weight goes on when the block joins it in a later fit; at a rate of 0
    nothing moves."""
    class Late(ToyNet):
        "A layer registered behind the classifier, so that the block's weights push it back."
        def __init__(self):
            super().__init__()
            self.late = nn.Conv2d(8, 8, 1, bias=False)
        def forward(self, x):
            return F.interpolate(self.classifier(self.late(self.backbone(x))), size=x.shape[-2:], mode='bilinear')
    learn = toy_learner(model=Late(), opt_func=ranger)
    learn.fit(2)
    late = learn.model.late.weight.detach().clone()
    learn.fit(2, lr=0., cbs=DropClassCallback())
    torch.testing.assert_close(learn.model.late.weight.detach(), late, atol=1e-6, rtol=0)
    torch.testing.assert_close(block(learn.model)[0], fresh_block(learn.model)[0], atol=1e-6, rtol=0)


def test_tail_probe_does_not_warn():
    "Looking at the tail in training mode is no training without a mask."
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = toy_learner(cbs=DropClassCallback())
        learn.fit(1)
    assert learn.drop_class.route.startswith('fused')


@pytest.mark.parametrize('event', ['after_loss','after_batch','after_pred'])
def test_inline_callbacks_get_the_prediction(event):
    "A function given as Callback(event=f) is heeded like a method of a class."
    seen = []
    learn = toy_learner(cbs=[DropClassCallback(),
                             Callback(**{event:lambda self: seen.append(self.pred.shape[-2:]) if self.training
                                         else None})])
    learn.fit(1)
    assert learn.drop_class.route.startswith('stacked') and set(seen)=={(16, 16)}


def test_two_classes_and_a_loss_without_pixels():
    "With two classes a loss that gives one value per class is refused before the first step, too."
    class PerClass:
        reduction = 'mean'
        def __call__(self, logits, target):
            losses = logits.transpose(0, 1).flatten(1).mean(1)
            return losses if self.reduction=='none' else losses.mean()
    cb = DropClassCallback(masked_weights=True)
    with pytest.raises(ValueError, match='must give one value per pixel'):
        toy_learner(2, loss_func=PerClass()).fit(1, cbs=cb)
    assert not cb.rows


def test_second_callback_takes_over_the_head():
    "A new callback uses the head that is there, and changes only the options it was given."
    learn = toy_learner()
    learn.fit(1, cbs=DropClassCallback(scale='raw', average='kept'))
    head,before = get_head(learn.model),block(learn.model)
    learn.fit(1, cbs=DropClassCallback(average='all'))
    assert get_head(learn.model) is head and sum(m is head for m in learn.model.modules())==1
    assert (head.scale, head.average)==('raw', 'all')
    assert all(moved(before, learn.model))
    assert sum(len(o) for o in learn.opt.param_lists)==len(list(learn.model.parameters()))


def test_gradient_clipping_sees_the_total():
    "The clipped norm is that of all gradients, the block's included."
    class Norm(Callback):
        order = GradientClip.order+1
        def before_step(self):
            self.norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    norm = Norm()
    norm.norms = []
    learn = toy_learner()
    learn.fit(2, cbs=[DropClassCallback(lam=.5), GradientClip(.01), norm])
    assert len(norm.norms)==8 and norm.norms==pytest.approx([.01]*8, rel=1e-3)
    assert all(moved(fresh_block(learn.model), learn.model))


# ---- odd batches

def test_batches_of_one():
    "One image per batch, in training and validation: paths are never broadcast into each other."
    cb = DropClassCallback(drop_prob=1.)
    learn = toy_learner(n=3, bs=1)
    learn.fit(2, cbs=cb)
    assert np.isfinite(cb.history[['plain', 'masked', 'suppression', 'total']].to_numpy()).all()
    assert learn.get_preds()[0].shape==(1, 4, 16, 16)
    assert all(moved(fresh_block(learn.model), learn.model))


def test_last_batch_of_another_size():
    "The means of the validation columns weigh images alike, also when the last batch is short."
    learn = toy_learner(cbs=DropClassCallback(predict='plain'))
    learn.dls.loaders[1] = learn.dls.valid.new(learn.dls.valid.dataset+list(zip(*toy_batch(1, seed=7, void=False))))
    seen = []
    learn.fit(1,
              cbs=Callback(after_loss=lambda self: None if self.training
                           else seen.append((len(self.pred), self.loss.item()))))
    row = records(learn)[0]
    assert [n for n,_ in seen]==[4, 1]
    assert row['valid_plain_loss']==pytest.approx((4*seen[0][1]+seen[1][1])/5, rel=1e-5)
    assert row['valid_plain_loss']==pytest.approx(row['valid_loss'], rel=1e-5)


def test_void_batch_in_validation():
    "A validation batch without labels has no loss; the columns average the others."
    def row(*extra):
        learn = toy_learner(cbs=DropClassCallback())
        some = learn.dls.valid.dataset
        learn.dls.loaders[1] = learn.dls.valid.new([*some, *extra])
        learn.dls.train.rng.seed(0)
        learn.fit(1)
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())
        return records(learn)[0]
    void = [(x, torch.full((16, 16), VOID)) for x in toy_batch(4, seed=3)[0]]
    want,got = row(),row(*void)
    assert np.isnan(got['valid_loss']) # fastai's own
    assert {k:got[k] for k in COLUMNS}==pytest.approx({k:want[k] for k in COLUMNS}, rel=1e-6)


# ---- interrupted fits

class Interrupt(Callback):
    "Presses Ctrl-C at an event of the second batch."
    def __init__(self, event, training, order): self.when,self.train,self.order = event,training,order
    def press(self):
        if self.training==self.train and (self.iter==1 or not self.train): raise KeyboardInterrupt
    def before_batch(self): self.press() if self.when=='before_batch' else None
    def after_pred(self): self.press() if self.when=='after_pred' else None
    def before_step(self): self.press() if self.when=='before_step' else None


MOMENTS = [('before_batch', True, 6), ('after_pred', True, 4), ('before_step', True, 6), ('before_batch', False, 6),
           ('after_pred', False, 4)]

@pytest.mark.parametrize('event,training,order', MOMENTS)
@pytest.mark.parametrize('inside', [True, False])
def test_keyboard_interrupt(event, training, order, inside):
    """Ctrl-C in mid-epoch: predictions, the next fit, and a fit without the callback all work as on an untouched
    Learner."""
    cb = DropClassCallback()
    learn = toy_learner(cbs=cb if inside else None)
    loss_func = learn.loss_func
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[Interrupt(event, training, order)]+([] if inside else [cb]))
    x = torch.stack([x for x,_ in learn.dls.valid.dataset])
    same_bits(learn.get_preds()[0], learn.model.eval()(x), 1e-6)
    if not inside:
        assert len(learn.validate())==1 # The loss, and no stale column
        assert_clean(learn, loss_func)
    learn.fit(2, cbs=None if inside else cb)
    assert len(cb.history)==8
    if inside: learn.remove_cb(cb)
    with pytest.warns(UserWarning, match='without a keep mask'): learn.fit(1)
    assert learn.recorder.metric_names==['epoch', 'train_loss', 'valid_loss', 'time']
    assert_clean(learn, loss_func)


def test_copies_of_an_interrupted_model_are_disarmed(tmp_path):
    "A copy or an export made right after Ctrl-C, with no prediction in between, answers one row per image."
    learn = toy_learner(cbs=DropClassCallback(), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt('before_batch', False, 60))
    x = torch.stack([x for x,_ in learn.dls.valid.dataset])
    assert get_head(learn.model).step is not None # Else this shows nothing
    copied = copy.deepcopy(learn.model)
    torch.save(learn.model, tmp_path/'model.pt')
    for model in (copied, torch.load(tmp_path/'model.pt', weights_only=False)):
        assert get_head(model).step is None
        assert model.eval()(x).shape==(len(x), 4, 16, 16)


def test_cancelled_fit_is_clean():
    "fastai's own way to stop a fit in mid-epoch."
    class Cancel(Callback):
        def after_pred(self):
            if self.training and self.iter==2: raise CancelFitException
    learn,cb = toy_learner(),DropClassCallback()
    learn.fit(2, cbs=[cb, Cancel()])
    assert len(cb.history)==2
    assert_clean(learn)
    assert learn.get_preds()[0].shape==(4, 4, 16, 16)


def test_a_subclass_beside_the_callback_is_refused():
    class Mine(DropClassCallback): pass
    learn = toy_learner(cbs=DropClassCallback())
    with pytest.raises(ValueError, match='2 DropClassCallbacks'): learn.fit(1, cbs=Mine())
