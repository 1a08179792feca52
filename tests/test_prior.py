"Class bias after training: the bias takes the shift in every network that can, and it goes wherever the weights go."
import copy
import pickle
import warnings

import pytest
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from safetensors.torch import load_model, save_model
from torch import nn

from dropclass.callback import DropClassCallback
from dropclass.core import VOID
from dropclass.surgery import add_dropclass, get_head
from dropclass.fold import fold_dropclass
from dropclass.metrics import confusion_matrix, evaluate, mean_iou
from dropclass.models import create_model
from dropclass.prior import (TAUS, PriorTuning, ShiftedOutput, class_offsets, counts_miou, grid_confusions,
                             prior_confusions, probe_logits, shift_classes, tune_prior, unshift_classes)
from dropclass.stats import median_frequency_weights
from dropclass.testing import ToyNet, toy_batch, toy_learner
from test_export import Tensor as LogitsOnly, trained
from test_zoo import C, logits, nets, offsets, over_pixels, shifted_by_offsets, weights

# What a shift does in the networks of every library is tested where they are built, in test_zoo


def test_classifier_is_found():
    "Without a name too; where none is found, the output takes it."
    model,(x,_) = create_model('hrnet_v1_w18', C).eval(),toy_batch(size=64)
    before = logits(model, x)
    assert shift_classes(model, offsets) is model and shifted_by_offsets(logits(model, x), before)
    net = next(o for o in nets if o.by_hand and o.classifier=='score')
    by_hand = net.build().eval()
    before = logits(by_hand, x)
    shifted = shift_classes(by_hand, offsets)
    assert isinstance(shifted, ShiftedOutput) and shifted_by_offsets(logits(shifted, x), before)


def test_outputs_of_other_libraries():
    "The shift of an output stays inside the kind of output that the network has."
    hf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = hf.SegformerConfig(num_labels=C, depths=[1,1,1,1], hidden_sizes=[8,16,24,32], decoder_hidden_size=16)
    model = hf.SegformerForSemanticSegmentation(config).eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    after = ShiftedOutput(model, offsets)(x)
    assert type(after) is type(before) and shifted_by_offsets(after.logits, before.logits)


def test_probabilities_are_refused():
    net = next(o for o in nets if o.name=='Unet, softmax last')
    model = net.build().eval()
    with pytest.raises(ValueError, match='returns probabilities'): shift_classes(model, offsets)
    with pytest.raises(ValueError, match='returns probabilities'): tune_prior(model, [toy_batch(size=64)], weights)


# ---- with a head

@pytest.mark.parametrize('path', ['plain', 'drop', 'mean'])
def test_head_and_fold(path):
    "One shift serves every path, folded afterwards or before."
    model,x = trained(lambda: create_model('small', C), path)
    other,before = fold_dropclass(copy.deepcopy(model)),logits(model, x)
    assert shift_classes(model, offsets) is model and shifted_by_offsets(logits(model, x), before)
    assert shift_classes(other, offsets, probe=x) is other
    for folded in (fold_dropclass(model), other):
        assert (logits(folded, x)-before-over_pixels(before)).abs().max()<1e-5*max(1, before.abs().max())
        assert get_head(folded) is None


def autograd_head():
    "A head whose importance needs autograd, behind it a sigmoid: the bias cannot take the shift."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 1), nn.Sigmoid()).eval()
    head = add_dropclass(model)
    assert head.form=='autograd'
    return model,torch.randn(2, 3, 16, 16)


def test_autograd_head():
    "Both paths are shifted, at the output; armed, too."
    model,x = autograd_head()
    before = probe_logits(model, x)
    assert len(before)==2 and not torch.equal(*before)
    shifted = shift_classes(model, offsets)
    assert isinstance(shifted, ShiftedOutput) and get_head(shifted) is get_head(model)
    for a,b in zip(before, probe_logits(shifted, x)): assert shifted_by_offsets(b, a)
    with get_head(shifted).dropping(torch.tensor([1.,0.,1.,1.])): both = shifted.train()(x)
    assert both.shape==(4, C, 16, 16) and shifted_by_offsets(both[:2], model.eval()(x))
    assert unshift_classes(shifted) is model


def test_training_goes_on():
    "A shifted network trains with DropClass, by the bias and by the output."
    for model in (ToyNet(), nn.Sequential(ToyNet(), nn.Hardtanh(-1, 1))):
        learn = toy_learner(model=model)
        learn.model = shift_classes(learn.model, 2*offsets)
        learn.fit(1, cbs=DropClassCallback())
        assert torch.tensor(learn.recorder.values[-1]).isfinite().all()


# ---- where the weights go

def test_onnx(tmp_path):
    "A shifted, folded network as an ONNX file: equal to 1e-4."
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model,x = trained(lambda: create_model('small', C))
    before = logits(model, x)
    folded = LogitsOnly(fold_dropclass(shift_classes(model, offsets, probe=x))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(torch.export.export(folded, (x,)), (x,), tmp_path/'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path/'model.onnx'), providers=['CPUExecutionProvider'])
    answer, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(answer)-before-over_pixels(before)).abs().max()<=1e-4*max(1, before.abs().max())


def squashed(): return nn.Sequential(ToyNet(), nn.Hardtanh(-1, 1))
def bare(): return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, C, 1, bias=False))


@pytest.mark.parametrize('build', [ToyNet, squashed, bare])
def test_safetensors_and_pickle(build, tmp_path):
    "Weights of a shifted network load into another shifted one; where the bias takes it, into a plain one."
    torch.manual_seed(0)
    model,other,(x,_) = build().eval(),build().eval(),toy_batch()
    before = logits(model, x)
    model = shift_classes(model, offsets)
    save_model(model, str(tmp_path/'model.safetensors'))
    if build is not ToyNet: other = shift_classes(other, 2*offsets)
    load_model(other, str(tmp_path/'model.safetensors'))
    assert torch.equal(logits(other, x), logits(model, x)) and shifted_by_offsets(logits(other, x), before)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), x), logits(model, x))
    assert (b'dropclass.prior' in pickle.dumps(model))==(build is squashed), "no trace where the bias takes it"
    restored = unshift_classes(model)
    assert torch.equal(logits(restored, x), before) and list(restored.state_dict())==list(build().state_dict())


def test_undone_only_where_it_is_known():
    "A copy, a trained and a reloaded network are refused; what was shifted twice comes back to the bit."
    torch.manual_seed(0)
    model,(x,_) = ToyNet().eval(),toy_batch()
    before,state = logits(model, x),copy.deepcopy(model.state_dict())
    for _ in range(3): shift_classes(model, offsets)
    with pytest.raises(ValueError, match='has not shifted'): unshift_classes(copy.deepcopy(model))
    assert torch.equal(logits(unshift_classes(model), x), before)
    shift_classes(model, offsets)
    model.load_state_dict(state)
    with pytest.raises(ValueError, match='trained or loaded since'): unshift_classes(model)
    shift_classes(model, offsets) # From here on the loaded bias is the one to come back
    assert torch.equal(logits(unshift_classes(model), x), before)


def test_half_precision():
    "A bfloat16 network takes the shift in its bias, as well as its numbers allow."
    torch.manual_seed(0)
    model,x = ToyNet().eval().bfloat16(),toy_batch()[0].bfloat16()
    before = logits(model, x)
    assert shift_classes(model, offsets) is model
    assert (logits(model, x)-before-over_pixels(before)).abs().max()<.05


# ---- in a Learner

class First:
    "Images or labels of a list of pairs, by number; pickled without them."
    def __init__(self, items): self.items = items
    def __call__(self, i): return self.items[i]
    def __getstate__(self): return {'items':self.items[:1]}


def rare_learner(weight=weights, model=None):
    "A Learner on toy images most of whose pixels are of class 0."
    x,y = toy_batch(40, size=32, void=False)
    y = y.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(0))<.4, 0)
    dsets = Datasets(range(40), [[First(x)], [First(y)]], splits=[range(20), range(20, 40)])
    torch.manual_seed(0)
    loss = CrossEntropyLossFlat(axis=1, weight=weight, ignore_index=VOID)
    dls = DataLoaders.from_dsets(dsets.subset(0), dsets.subset(1), bs=5, num_workers=0)
    learn = Learner(dls, ToyNet(stride=1) if model is None else model, loss, lr=.05)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda *args: None
    return learn


def test_learner(tmp_path):
    "Weights are read off the loss; validation, predictions and the exported Learner are those of the shifted network."
    learn = rare_learner()
    learn.fit(3)
    trained_state = copy.deepcopy(learn.model.state_dict())
    found = learn.tune_prior()
    assert found.tau>0 and torch.equal(found.grid, class_offsets(weights, found.taus))
    assert torch.equal(evaluate(learn.model, learn.dls.valid, C), found.confusions[found.best])
    preds,targets = learn.get_preds(dl=learn.dls.valid)
    assert torch.equal(confusion_matrix(preds, targets, C), found.confusions[found.best])
    again = learn.tune_prior()
    assert again.tau==found.tau
    assert torch.equal(again.confusions, found.confusions), "it starts from the trained network"
    learn.export(tmp_path/'learn.pkl')
    x = toy_batch(2, size=32)[0]
    assert torch.equal(logits(load_learner(tmp_path/'learn.pkl').model.eval(), x), logits(learn.model.eval(), x))
    restored = unshift_classes(learn.model).state_dict()
    assert all(torch.equal(v, restored[k]) for k,v in trained_state.items())


def test_a_refused_second_tuning_changes_nothing():
    "Whether the shift is in a bias, in one that the layer did not have, or behind the network."
    for model in (None, bare(), squashed()):
        learn = rare_learner(model=model)
        learn.tune_prior(taus=[1.])
        learn.model = shift_classes(learn.model, offsets) # Whatever tau was found
        before,x = copy.deepcopy(learn.model.state_dict()),toy_batch(2, size=32)[0]
        answer = logits(learn.model.eval(), x)
        with pytest.raises(ValueError, match='one finite number'): learn.tune_prior(weights=[-1.]*C)
        after = learn.model.state_dict()
        assert after.keys()==before.keys() and all(torch.equal(v, after[k]) for k,v in before.items())
        assert torch.equal(logits(learn.model.eval(), x), answer)
        learn.tune_prior(taus=[1.]) # And the shift can still be taken back


def test_a_bias_that_tuning_adds_is_not_trained():
    "No optimizer knows it, so its gradients would add up and count in a clipped norm."
    learn = rare_learner(model=bare())
    learn.model = shift_classes(learn.model, offsets)
    learn.fit(1)
    bias = learn.model[-1].bias
    assert bias.grad is None and torch.equal(bias, offsets)


def test_silence_about_a_class_without_labels_is_no_gain():
    "One stray pixel of a class that no tuning image holds: silencing it must not look like a gain."
    class Fixed(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = nn.Parameter(out)
        def forward(self, x): return self.out.expand(len(x), -1, -1, -1)
    labels = torch.tensor([[[0,0,1,1]]])
    # The third pixel is called class 2, else 0
    scores = torch.tensor([[[[3.,3.,1.,0.]],[[0.,0.,0.,2.]],[[0.,0.,2.,0.]]]])
    batches = [(torch.zeros(1, 3, 1, 4), labels)]*12
    found = tune_prior(Fixed(scores), batches, [1.,1.,9.], taus=[2.])
    assert found.scores.tolist()==pytest.approx([(1+1/2)/2, (2/3+1/2)/2]) and found.tau==0


def test_compiled_networks_are_tuned():
    "fastai's batches are of a tensor class that a compiled network stumbles over."
    learn = rare_learner()
    plain = tune_prior(learn.model, learn.dls.valid, weights)
    compiled = torch.compile(learn.model, backend='eager')
    assert torch.equal(tune_prior(compiled, learn.dls.valid, weights).confusions, plain.confusions)


@pytest.mark.parametrize('dl,says', [([], 'holds no batch'), ([(torch.zeros(1, 3, 8, 8),)], 'with_labels=True')])
def test_nothing_to_tune_on(dl, says):
    with pytest.raises(ValueError, match=says): tune_prior(ToyNet(), dl, weights)
    with pytest.raises(ValueError, match='holds 0 alone'): tune_prior(ToyNet(), [toy_batch(2)], weights, taus=[0.])


def test_learner_whose_output_is_shifted():
    "A tail that squashes: the Learner goes on with a network around its own."
    learn = rare_learner(model=nn.Sequential(ToyNet(stride=1), nn.Hardtanh(-2, 2)))
    learn.fit(3)
    found = learn.tune_prior(taus=[1., 1.5])
    own = learn.model.model
    assert isinstance(learn.model, ShiftedOutput)
    assert torch.equal(evaluate(learn.model, learn.dls.valid, C), found.confusions[found.best])
    learn.tune_prior(taus=[1., 1.5])
    assert learn.model.model is own, "shifted once, not twice"
    learn.fit(1)


def test_learner_without_weights():
    "The remedy is named; with counts it goes the other way, and more rare pixels are predicted."
    learn = rare_learner(None)
    learn.fit(3)
    with pytest.raises(ValueError, match='There are no class weights: give `weights`.*or.*`counts`'): learn.tune_prior()
    pixels = sum(y.flatten().bincount(minlength=C) for _,y in learn.dls.train)
    found = learn.tune_prior(counts=pixels, taus=[0,.5])
    rare = found.confusions.sum(1)[:,1:].sum(1)
    assert rare[1]>rare[0]


def test_learner_whose_weights_hold_a_zero():
    "The package's own weights are 0 for a class without training pixels: it stays where it is, the others move."
    x,y = toy_batch(8, size=32, void=False)
    learn = rare_learner(median_frequency_weights(list(zip(x, y.where(y!=2, 0))), C))
    learn.fit(1)
    bias = learn.model.classifier.bias.detach().clone()
    found = learn.tune_prior(taus=[-1.,1.], metric=lambda right, labelled, predicted: -predicted[...,0])
    moved = learn.model.classifier.bias.detach()-bias
    assert found.tau and (moved!=0).tolist()==[True, True, False, True] and abs(moved.sum())<1e-5


# ---- counting

@pytest.mark.parametrize('shape', [(1,2,7,5), (3,19,40,50), (2,6,200,200), (2,4,6,5,4)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_counts_are_those_of_shifted_logits(shape, dtype):
    "The slow form, image by image and tau by tau; half precision is counted in float32, as the loss does."
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=gen).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=gen)
    target[target==1] = VOID
    grid = class_offsets(torch.rand(shape[1], generator=gen)+.05, TAUS)
    found = grid_confusions(logits, target, grid)
    wide = logits.float() if dtype is torch.bfloat16 else logits
    for n in range(shape[0]):
        for t,o in enumerate(grid):
            shifted = wide[n:n+1]+o.to(wide).view(1, -1, *[1]*(len(shape)-2))
            assert torch.equal(found[n,t], confusion_matrix(shifted, target[n:n+1], shape[1]))


def test_padding_of_a_distributed_loader():
    "Images that only fill up the last batch are counted nowhere."
    class Padded(list): rank,world_size,n,n_padded,i = 0,1,3,4,4
    x,y = toy_batch(4)
    torch.manual_seed(0)
    model,grid = ToyNet(),class_offsets(weights, TAUS)
    counts,images = prior_confusions(model, Padded([(x, y)]), grid, per_image=True)
    assert torch.equal(counts, prior_confusions(model, [(x[:3], y[:3])], grid)) and len(images)==3


def test_all_void_and_one_image():
    x,y = toy_batch(1)
    assert not prior_confusions(ToyNet(), [(x, torch.full_like(y, VOID))], class_offsets(weights, TAUS)).any()
    void = [(x, torch.full_like(y, VOID))]
    with pytest.raises(ValueError, match='images are void'): tune_prior(ToyNet(), void, weights)
    with pytest.warns(UserWarning, match='with 1 images'): found = tune_prior(ToyNet(), [(x, y)], weights)
    assert found.held_out_gain()!=found.held_out_gain() # nan
    assert 'nan' not in repr(found) and repr(found).endswith('the choice is a guess.')


def test_resamples_and_folds_by_hand():
    "Both against loops over images; the metric is a mean over classes, so sums come before ratios."
    torch.manual_seed(0)
    right = torch.randint(40, 50, (7, 3, 1, 4)) # Nearly alike for all tau, so that the folds choose differently
    images = torch.cat([right, torch.full_like(right, 60), torch.full_like(right, 55)], 2)
    found = PriorTuning((0.,.5,1.), torch.zeros(3, 4), torch.zeros(3, 4, 4), images, counts_miou, 'miou', [2,3])
    gen,rows = torch.Generator().manual_seed(0),[]
    for picks in torch.randint(7, (200,7), generator=gen):
        scores = [counts_miou(*sum(images[i,t] for i in picks.tolist())) for t in range(3)]
        rows.append(torch.stack(scores)-scores[0])
    assert torch.allclose(found.resampled_gains(), torch.stack(rows), atol=1e-12)
    picked,chosen = 0,set()
    for fold in ([0,1],[2],[3,4],[5],[6]):
        rest = [i for i in range(7) if i not in fold]
        best = max(range(3), key=lambda t: counts_miou(*images[rest,t].sum(0)))
        picked = picked+images[fold,best].sum(0)
        chosen.add(best)
    assert len(chosen)>1
    assert abs(found.held_out_gain()-float(counts_miou(*picked)-counts_miou(*images[:,0].sum(0))))<1e-12


def test_what_is_read_has_no_negative_zero():
    "Small losses round to 0; stored offsets keep their sign."
    images = torch.full((20, 2, 3, 2), 100_000)
    images[:,1,0,0] -= 1
    found = PriorTuning((0.,1.), class_offsets([1.,2.], (0.,1.)), torch.tensor([[[20000,0],[0,20000]]]*2), images,
                        counts_miou, 'miou', [1])
    assert torch.signbit(found.grid[0]).any() and not torch.signbit(found.offsets).any()
    found.choose = lambda scores: 1
    assert '-0.0' not in repr(found) and 'Leave the network as it is: with 20 images' in repr(found)
