"Loaders, networks and names that are a little out of the ordinary, in the pages that look at trained networks."

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import PILMask
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import dropclass.run.experiment
from dropclass.analysis.context import colocation, inpaint, robustness_table
from dropclass.analysis.entanglement import classifier_weight, entanglement
from dropclass.analysis.figures import cam_layer, grad_cam, take_images
from dropclass.analysis.audit import audit, erased_example, measure_network
from dropclass.analysis.subjects import open_model
from dropclass.run.compare import difference_text
from dropclass.run.config import Config
from dropclass.run.experiment import Run
from dropclass.core import VOID, ClassSpec
from dropclass.stats import image_class_counts
from dropclass.surgery import add_dropclass
from dropclass.testing import ToyNet, toy_batch
from dropclass.analysis.widgets import drop_explorer


@pytest.fixture
def batch(): return toy_batch(4)


@pytest.mark.parametrize('layer', ['convolution', 'linear'])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*')
def test_weights_under_a_norm_are_those_of_the_next_forward(layer):
    "Weight norm renews the attribute in a forward only; a loaded checkpoint counts at once."
    class Tokens(ToyNet):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(8, 4)
        def forward(self, x): return self.classifier(self.backbone(x).movedim(1, -1)).movedim(-1, 1)
    net,x = (ToyNet() if layer=='convolution' else Tokens()),torch.randn(2, 3, 16, 16)
    weight_norm(net.classifier)
    with torch.no_grad(): net.classifier.weight_v.copy_(torch.randn_like(net.classifier.weight_v))
    before = classifier_weight(net, 'classifier')
    net(x)
    assert torch.equal(before, classifier_weight(net, 'classifier')) and before.shape==(4, 8)


def test_a_head_over_a_norm():
    net = ToyNet()
    weight_norm(net.classifier)
    head = add_dropclass(net)
    with torch.no_grad(): head.classifier.weight_v.copy_(torch.randn_like(head.classifier.weight_v))
    before = entanglement(net, 4).matrix()
    net.eval()(torch.randn(2, 3, 16, 16))
    assert torch.equal(before, entanglement(net, 4).matrix())


class Stream(IterableDataset):
    "Pairs that come one by one; nobody knows how many."
    def __init__(self, batch): self.batch = batch
    def __iter__(self): return iter(zip(*self.batch))


def test_a_stream_is_audited_without_a_bar(batch):
    found = audit(ToyNet(), DataLoader(Stream(batch), batch_size=2), 4)
    assert found.networks[0].context.images==4


def test_images_that_are_shuffled_have_no_numbers(batch):
    with pytest.raises(ValueError, match='does not shuffle'):
        take_images(DataLoader(TensorDataset(*batch), batch_size=2, shuffle=True), [0])
    with pytest.raises(ValueError, match='does not shuffle'):
        take_images(DataLoader(TensorDataset(*batch), batch_size=2, sampler=SubsetRandomSampler(range(4))), [0])
    assert torch.equal(take_images(DataLoader(TensorDataset(*batch), batch_size=2), [3])[3][0], batch[0][3])
    class Shuffles(list):
        def shuffle(self, seed): return self
    assert torch.equal(take_images(Shuffles([batch]), [3])[3][0], batch[0][3])


def test_the_explorer_says_which_path_it_shows(batch):
    net = ToyNet()
    head = add_dropclass(net)
    text = lambda: drop_explorer(net, [batch], ['a','b','c','d']).children[-1].value
    assert 'answers by the plain path' in text()
    head.mark_trained()
    assert 'answers by' not in text()


@pytest.mark.parametrize('inplace', [True, False])
def test_grad_cam_in_front_of_a_layer_that_overwrites_its_input(batch, inplace):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.act,self.last = nn.Conv2d(3, 8, 3, padding=1),nn.ReLU(inplace=inplace),nn.Conv2d(8, 4, 1)
        def forward(self, x): return self.last(self.act(self.first(x)))
    torch.manual_seed(0)
    net,(x, _) = Late().eval(),batch
    found = grad_cam(net, x, [0,1], layer='act', mask='all')
    # As written: A times the gradient of the score, summed over channels
    features = net.first(x).detach().requires_grad_()
    score = net.last(features.relu()).flatten(2).mean(2)
    for i,c in enumerate((0, 1)):
        gradient, = torch.autograd.grad(score[:,c].sum(), features, retain_graph=True)
        expected = (gradient.mean((2, 3), keepdim=True)*features).sum(1).relu().detach()
        expected = F.interpolate(expected[:,None], size=found.shape[-2:], mode='bilinear')[:,0]
        assert torch.corrcoef(torch.stack([found[:,i].flatten(), expected.flatten()]))[0,1]>.999


def test_networks_of_one_size_are_probed_with_their_images():
    class Fixed(ToyNet):
        def forward(self, x):
            if x.shape[-2:]!=(24, 40): raise RuntimeError('images of 24x40 only')
            return super().forward(x)
    net,x = Fixed(),torch.randn(1, 3, 24, 40)
    assert grad_cam(net, x, [0]).shape[-2:]==(12, 20) and cam_layer(net, probe=torch.cat([x, x])) is net.classifier
    drop_explorer(net, [(x, torch.zeros(1, 24, 40, dtype=torch.long))], ['a','b','c','d'])


def test_guessed_classes_are_counted_where_they_count(batch):
    "The mean of the report is over the classes that it says."
    x,y = batch
    found = audit(ToyNet(), [(x, torch.where(y>1, VOID, y))], 4, progress=False).to_dict()
    rows = [o['iou'][0] for o in found['classes'] if o['iou'][0] is not None]
    mean = found['means'][0]
    assert mean['classes']==len(rows) and abs(mean['iou'][0]-sum(rows)/len(rows))<1e-6


def test_pictures_of_a_report_with_blanks_in_its_name(batch, tmp_path):
    audit(ToyNet(), [batch], 4, progress=False).report(tmp_path/'my audit (v2).md')
    links = [o.split(')')[0] for o in (tmp_path/'my audit (v2).md').read_text().split('![](')[1:]]
    assert links and not any(set(o)&set(' (') for o in links)


@pytest.mark.parametrize('channels', [1, 3, 6])
def test_inpainting_any_number_of_channels(channels):
    pytest.importorskip('cv2')
    image,erased = torch.rand(channels, 16, 16),torch.zeros(16, 16, dtype=torch.bool)
    erased[4:8,4:8] = True
    found = inpaint(image, erased)
    assert found.shape==image.shape
    assert (found-image)[:,~erased].abs().max()<.01 and (found-image)[:,erased].abs().max()>.01


def test_masks_of_fastai_are_counted():
    masks = [PILMask.create(np.full((4, 4), i, dtype=np.uint8)) for i in range(3)]
    assert image_class_counts([(None, o) for o in masks], 3).tolist()==[[16,0,0],[0,16,0],[0,0,16]]


def test_all_void_has_no_robustness(batch):
    x,y = batch
    void = [(x, torch.full_like(y, VOID))]
    with pytest.raises(ValueError, match='all are void'): robustness_table(colocation(ToyNet(), void, 4))


def test_no_negative_zero():
    assert difference_text(pd.Series(dict(difference=-.01, low=-.04, high=-.001, pairs=3)))=='+0.0* [+0.0, +0.0]'


class OneSize(nn.Module):
    "A network with a parameter per pixel, as ViTs with a position embedding have."
    def __init__(self, x):
        super().__init__()
        self.position,self.net = nn.Parameter(torch.zeros(1, *x.shape[1:])),ToyNet()
    def forward(self, x): return self.net(x+self.position)


def test_networks_of_one_size_are_probed_with_the_images(batch):
    x,_ = batch
    odd = torch.randn(len(x), 3, 40, 24)
    data = [(odd, torch.randint(4, (len(x), 40, 24)))]
    net = OneSize(odd)
    found = measure_network(open_model(net, 4), data, progress=False)
    assert torch.equal(found.entangled.weight, net.net.classifier.weight.detach().flatten(1)) and not found.reason


def test_a_fill_may_be_an_array(batch):
    subject,colour = open_model(ToyNet(), 4),np.array([.5,.1,-.3])
    pictures = [erased_example(subject, [batch], colocation(subject, [batch], fill=o), o, least=-100.).shots['erased']
                for o in (colour, torch.tensor(colour))]
    assert torch.equal(*map(torch.as_tensor, pictures))


class Nameless:
    "A Learner of fastai whose data have no classes."
    def __init__(self, loss): self.model,self.dls,self.loss_func = ToyNet(),DataLoaders([]),loss


def test_learners_without_class_names_say_what_to_pass():
    with pytest.raises(ValueError, match='pass the class names'): open_model(Nameless(CrossEntropyLossFlat(axis=1)))
    assert open_model(Nameless(CrossEntropyLossFlat(axis=1)), 4).spec.names==('class 0','class 1','class 2','class 3')


def test_learners_that_ignore_a_class_say_what_to_pass():
    learn = Nameless(CrossEntropyLossFlat(axis=1, ignore_index=2))
    learn.dls.vocab = ['road','car','Void','sky']
    with pytest.raises(ValueError, match='ignores label 2, which is the class Void'): open_model(learn)
    assert open_model(learn, learn.dls.vocab).spec.ignore_index==VOID


def test_networks_of_runs_go_to_the_device(monkeypatch, tmp_path):
    "There may be no GPU here, so the meta device stands for one."
    class Saved(Run): # What `load_run` gives
        folder,spec = tmp_path/'run',ClassSpec(['road','car','sky','tree'])
        config,metrics = Config(),dict(pixel_counts=[1]*4)
        def __init__(self): pass
        def load_model(self): return ToyNet()
    assert [Saved().subject(device=o).device.type for o in ('meta', 'cpu')]==['meta', 'cpu']
    monkeypatch.setattr(dropclass.run.experiment, 'default_device', lambda: 'meta')
    assert open_model(Saved()).device.type=='meta'


def test_captions_of_widgets_count_plainly():
    "Labels of a Learner are fastai's own tensors, which print their type."
    import torch
    from dropclass.analysis.widgets import DropView, drop_caption
    from fastai.torch_core import TensorMask
    was,now = (DropView(TensorMask(torch.tensor(o)), None, None) for o in ([[0,0,1,2]], [[0,1,1,1]]))
    text = 'car: 2 pixels predicted with all of it, 1 now; 1 pixels changed between other classes'
    assert drop_caption(was, now, 0, 'car')==text
