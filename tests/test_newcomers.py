"What users of other libraries bring: void among the class names, averaged weights, encoders of one size ..."
import numpy as np
import pytest
import torch
from copy import deepcopy
from fastai.callback.core import Callback
from fastai.losses import CrossEntropyLossFlat
from fastai.learner import Learner
from fastai.vision.data import SegmentationDataLoaders

from dropclass import ClassPasteCallback, class_counts, median_frequency_weights
from dropclass.analysis.ablations import DrawRare
from dropclass.analysis.audit import audit
from dropclass.analysis.subjects import iter_batches, learner_spec, open_model
from dropclass.analysis.widgets import drop_explorer
from dropclass.callback import DropClassCallback
from dropclass.data.core import open_image, write_toy_folder
from dropclass.models import SmallSegNet, create_model
from dropclass.prior import tune_prior
from dropclass.surgery import find_classifier, get_head, remove_dropclass
from dropclass.testing import ToyNet, toy_learner


def quiet_fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn


def test_a_class_that_never_comes_is_not_drawn_as_rare():
    cb,learn = DrawRare(drop_prob=1., lam=1.),toy_learner(num_classes=4)
    ds = learn.dls.train.dataset
    learn.dls.train.dataset = [(x, torch.where(y==3, 2, y)) for x,y in ds]
    quiet_fit(learn, 8, cbs=cb)
    drawn = set(cb.history.dropped_class.dropna())
    assert 'class 3' not in drawn and len(drawn)==3


# ---- fastai's CamVid: Void is the last name, and the loss ignores it

def camvid_like(path, outputs):
    write_toy_folder(path, 8, 5, (32,48), void=5)
    names = [f'c{i}' for i in range(5)]+['Void']
    mask = lambda o: path/'masks'/o.name
    dls = SegmentationDataLoaders.from_label_func(path, sorted((path/'images').iterdir()), mask, bs=4,
                                                  codes=names, device='cpu', num_workers=0)
    return Learner(dls, SmallSegNet(outputs, width=4), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=5),
                   cbs=DropClassCallback(drop_prob=1.))


@pytest.mark.parametrize('outputs', [5, 6])
def test_void_is_the_last_name(tmp_path, outputs):
    "With a channel of its own or without, it is not dropped; and it is no class of an analysis."
    learn = quiet_fit(camvid_like(tmp_path, outputs), 1)
    assert get_head(learn.model).num_classes==outputs
    assert learn.drop_class.names==[*(f'c{i}' for i in range(5)), 'Void'][:outputs]
    assert learn.drop_class.droppable==[0,1,2,3,4]
    assert learner_spec(learn).names==('c0','c1','c2','c3','c4')
    subject,(x, y) = open_model(learn),learn.dls.valid.one_batch()
    with torch.no_grad(): assert torch.equal(subject.model.eval()(x), learn.model.eval()(x)[:,:5])
    found = audit(learn, progress=False)
    assert found.spec.names==learner_spec(learn).names and found.networks[0].entangled is not None
    drop_explorer(learn)


@pytest.mark.parametrize('outputs', [5, 6])
def test_void_is_the_last_name_of_a_plain_network(tmp_path, outputs):
    learn = camvid_like(tmp_path, outputs)
    learn.remove_cb(learn.drop_class)
    remove_dropclass(learn.model)
    assert audit(learn, progress=False).context.confusion.shape==(5,5)
    drop_explorer(learn)
    assert find_classifier(learn.model, outputs) # The network itself is as it was


def test_a_wrong_number_of_outputs_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match='No convolution with 6 outputs'): camvid_like(tmp_path, 4)


# ---- the recommended training, with DataLoaders of fastai's own

def test_the_recipe_takes_dls_of_fastai(tmp_path):
    "Counts, weights, class paste and tuning ask the DataLoaders of a plain `from_label_func` for all they need."
    write_toy_folder(tmp_path, 12, 4, (32,48))
    mask = lambda o: tmp_path/'masks'/o.name
    dls = SegmentationDataLoaders.from_label_func(tmp_path, sorted((tmp_path/'images').iterdir()), mask, bs=4, seed=0,
                                                  codes=[f'c{i}' for i in range(4)], device='cpu', num_workers=0)
    labels = torch.stack([torch.from_numpy(np.array(y)) for _,y in dls.train_ds])
    counts,weights = class_counts(dls),median_frequency_weights(dls)
    assert counts.tolist()==[int((labels==c).sum()) for c in range(4)] and min(counts)>0
    assert torch.equal(counts, class_counts(dls.train_ds, 4)) and len(weights)==4
    loss = CrossEntropyLossFlat(axis=1, weight=weights, ignore_index=255)
    learn = quiet_fit(Learner(dls, SmallSegNet(4, width=4), loss), 1, cbs=ClassPasteCallback(never='c0'))
    found = learn.tune_prior()
    assert len(found.offsets)==4 and found.confusions[0].shape==(4,4)
    with pytest.raises(ValueError, match="`never` names 'c9'"):
        quiet_fit(learn, 1, cbs=ClassPasteCallback(never='c9'))


# ---- averaged weights

class Ema(Callback):
    "An average of the weights that is validated in the network's place."
    def before_fit(self): self.ema = deepcopy(self.learn.model)
    def after_step(self):
        with torch.no_grad():
            for e,m in zip(self.ema.parameters(), self.model.parameters()): e.lerp_(m, .5)
    def before_validate(self): self.keep,self.learn.model = self.learn.model,self.ema
    def after_validate(self): self.learn.model = self.keep


@pytest.mark.parametrize('late', [True, False])
def test_an_average_of_weights_is_validated(late):
    "The callback measures the network that validates: with a head of its own, or without one."
    cb,ema = DropClassCallback(lam=1., predict='drop'),Ema()
    learn = toy_learner(cbs=None if late else cb)
    if late: ema.order = -5 # Copies the network before it has a head
    quiet_fit(learn, 2, cbs=[ema, cb] if late else [ema])
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    head = get_head(ema.ema)
    assert (head is None)==late and (late or head.step is None)
    assert row['drop_share']==(0. if late else 1.)
    assert (row['valid_drop_loss']!=row['valid_drop_loss'])==late # NaN where nothing was measured


# ---- encoders of one size

def test_an_encoder_of_one_size_says_so_in_a_sentence():
    pytest.importorskip('timm')
    net = create_model('timm:swin_tiny_patch4_window7_224', 3).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="takes images of one size .*padded to 64x96: bring them"):
        net(torch.zeros(1, 3, 60, 92))


# ---- batches of dicts, as transformers and MONAI make them

def test_batches_may_be_dicts():
    batch = toy_learner().dls.valid.one_batch()
    (x,y),(a,b) = (next(iter_batches([o])) for o in (batch, dict(pixel_values=batch[0], labels=batch[1])))
    assert torch.equal(x, a) and torch.equal(y, b)
    net,named = ToyNet(),[dict(pixel_values=batch[0], labels=batch[1])]
    assert audit(net, named, list('abcd'), progress=False).images==len(x)
    assert tune_prior(net, named, counts=[4,3,2,1]).confusions[0].sum()==(y!=255).sum()


# ---- files that are not what they are called

def test_a_program_in_a_picture_is_not_run(tmp_path):
    "PostScript under another name: Pillow would start Ghostscript."
    (tmp_path/'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')
    with pytest.raises(ValueError, match='Cannot read .*a.png'): open_image(tmp_path/'a.png', load=False)
