"""The evidence: the paper's numbers, erased context against the naive way, entanglement, bias; on networks, Learners
and run folders."""
import json
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dropclass.analysis.bias import bias_scores, pair_confusions, proxy_values, rank_agreement, worst_confusions
from dropclass.analysis.context import (HARBOUR, PIXELS, colocation, erase, harbour, image_stats, load_colocation,
                                        make_fill,
                                        robustness_table, vulnerable_classes)
from dropclass.analysis.drop import compare_removals, drop_effect, load_drop_effect
from dropclass.analysis.entanglement import MEASURES, cosine_matrix, entanglement, entanglement_table, row_sums
from dropclass.analysis.paper import paper_checks, paper_data, paper_table
from dropclass.analysis.subjects import as_spec
from dropclass.core import VOID
from dropclass.surgery import add_dropclass
from dropclass.metrics import class_iou, evaluate
from dropclass.run.config import Config
from dropclass.run.experiment import load_run, train_run
from dropclass.testing import ToyNet, toy_batch, toy_learner

root = Path(__file__).parents[1]

# ---- the paper's tables

def test_paper_numbers_add_up():
    checks = paper_checks()
    assert len(checks)>200 and set(checks.table)=={1, 4, 5, 6}
    assert checks.recomputed.notna().all() and checks.allowed.between(.01, .5).all()
    assert (checks.off<=checks.allowed+1e-9).all(), checks[checks.off>checks.allowed]
    assert (checks[checks.table==1].off<.0501).all() # Table 1 is right to the last digit

def test_paper_slip_would_show(monkeypatch):
    data = json.loads(json.dumps(paper_data()))
    data['tables']['4']['rows'][1][5] += 3 # The baseline's I* of one class
    monkeypatch.setattr('dropclass.analysis.paper.paper_data', lambda: data)
    checks = paper_checks()
    assert (checks.off>checks.allowed+1e-9).sum()>=2

def test_paper_tables_share_their_classes():
    classes = set(paper_table(1).index[:19])
    assert classes==set(paper_table(4).index[:19])==set(paper_table(5).index)
    assert list(paper_table(1).index[:19])==list(paper_table(5).index) # Both by pixel share
    assert paper_table(1)['Cityscapes','pixels %'][:19].astype(float).is_monotonic_increasing
    for n in range(1, 7): assert paper_table(n).attrs['title'] and not paper_table(n).columns.duplicated().any()

def test_paper_table_is_a_copy():
    paper_table(2).loc['Ours','mIoU'] = 0.
    assert paper_table(2).loc['Ours','mIoU']==70.7

# ---- erased context

def naive(model, images, spec, fill, stats, seed=0):
    "Evaluate every image and every copy, one image at a time, with nothing shared."
    paint,C = make_fill(fill, stats, seed),len(spec)
    run = lambda change: sum(evaluate(model, [(change(x, y, i)[None], y[None])], C, spec.ignore_index)
                             for i,(x,y) in enumerate(images))
    return run(lambda x,y,i: x),torch.stack([run(lambda x,y,i: erase(x, y==c, paint, i)) for c in range(C)])

def wide_net(C, seed=0):
    "A network that looks around, with BatchNorm statistics of its own."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, C, 3, padding=1))
    net(torch.randn(4, 3, 16, 16))
    return net.eval()

def flipped(image, erased): return image.flip(0)

@pytest.mark.parametrize('fill', ['mean','noise','blur', 0.3, (.1,.2,.3), flipped],
                         ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('bs', [None, 1, 5])
def test_equals_the_naive_way(fill, bs):
    spec,batches = as_spec(6),[]
    for i,(n,C) in enumerate([(4, 5), (3, 3), (1, 2)]): # Class 5 never occurs, later images lack more
        batches.append(toy_batch(n, C, seed=i))
    batches[1][1][0] = VOID # An image without any label
    net = wide_net(6)
    co = colocation(net, batches, spec, fill, bs=bs, seed=3)
    confusion,erased = naive(net, [o for b in batches for o in zip(*b)], spec, fill, image_stats(batches), seed=3)
    assert torch.equal(co.confusion, confusion)
    assert torch.equal(co.erased, erased)
    assert co.erased.dtype==torch.int64
    presence = sum(torch.stack([(y==c).any() for c in range(6)]).long() for b in batches for y in b[1])
    assert torch.equal(co.presence, presence)
    assert co.passes==8+presence.sum() and co.naive_passes==8*7

def test_forward_passes_are_what_it_says():
    seen = []
    net = wide_net(4)
    net.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    co = colocation(net, [toy_batch(4, 2), toy_batch(4, 3, seed=1)], 4)
    assert sum(seen)==co.passes<co.naive_passes
    assert set(seen[:-1])=={4} # Full batches, but for the last

def test_images_of_several_sizes():
    batches = [toy_batch(2, 3, size=16), toy_batch(3, 3, size=24), toy_batch(2, 3, size=16, seed=4)]
    net = wide_net(3)
    co = colocation(net, batches, 3)
    confusion,erased = naive(net, [o for b in batches for o in zip(*b)], as_spec(3), 'mean', image_stats(batches))
    assert torch.equal(co.confusion, confusion) and torch.equal(co.erased, erased)

def test_model_is_left_as_it_was():
    net = wide_net(4)
    net.train()
    net[0].eval()
    state = {k:v.clone() for k,v in net.state_dict().items()}
    colocation(net, [toy_batch()], 4)
    assert net.training and not net[0].training and net[1].training
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_outputs_other_than_a_tensor():
    "A dict at a quarter of the size, as torchvision and transformers return it."
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide_net(4)
        def forward(self, x): return {'out':F.avg_pool2d(self.net(x), 4), 'aux':torch.zeros(())}
    co = colocation(Dict(), [toy_batch()], 4)
    assert co.confusion.sum()==(toy_batch()[1]!=VOID).sum()

def test_learner_is_its_validation_set():
    learn = toy_learner()
    a,b = colocation(learn),colocation(learn.model, list(learn.dls.valid), 4)
    assert torch.equal(a.erased, b.erased) and a.spec.names==tuple(learn.dls.vocab)

def test_cut_short():
    batches = [toy_batch(4, seed=i) for i in range(3)]
    co = colocation(wide_net(4), batches, 4, fill=0., max_images=5)
    assert co.images==5
    other = colocation(wide_net(4), [tuple(o[:5] for o in map(torch.cat, zip(*batches)))], 4, fill=0.)
    assert torch.equal(co.confusion, other.confusion) and torch.equal(co.erased, other.erased)

def test_progress_wraps_the_batches():
    seen = []
    colocation(wide_net(4), [toy_batch()]*3, 4, progress=lambda o: (seen.append(1) or x for x in o))
    assert len(seen)==3

def test_bad_input():
    net,batch = wide_net(4),toy_batch()
    with pytest.raises(ValueError, match='scores 4 classes and the data have 3'):
        colocation(net, [toy_batch(num_classes=3)], 3)
    with pytest.raises(ValueError, match='target holds label 3'): colocation(wide_net(3), [batch], 3)
    with pytest.raises(ValueError, match='at least 2, got 1'): colocation(net, [batch], ['road'])
    with pytest.raises(ValueError, match='`data` is empty'): colocation(net, [], 4, fill=0.)
    with pytest.raises(ValueError, match='only once'): colocation(net, iter([batch]), 4)
    with pytest.raises(ValueError, match='did you mean'): colocation(net, [batch], 4, fill='means')
    assert colocation(net, iter([batch]), 4, fill=0.).images==4 # A number needs no look ahead

@pytest.fixture(scope='module')
def two():
    "Two networks on the same images, of six classes one of which never occurs."
    batches = [harbour(8, seed=i) for i in range(2)]
    return [colocation(wide_net(6, seed), batches, HARBOUR, fill=0., label=f'net {seed}') for seed in (0, 1)]

@pytest.mark.parametrize('pixels', PIXELS)
def test_fall_from_first_principles(two, pixels):
    co,fall = two[0],two[0].fall(pixels)
    for x in range(6):
        a,b = co.confusion.clone(),co.erased[x].clone()
        if pixels=='same': a[x] = 0
        if pixels!='all': b[x] = 0
        for y in range(6):
            if x==y or 5 in (x, y): assert fall[x,y].isnan()
            else: assert fall[x,y]==pytest.approx(float(class_iou(a)[y]-class_iou(b)[y]), abs=1e-12)

@pytest.mark.parametrize('pixels', PIXELS)
@pytest.mark.parametrize('k', [1, 3])
def test_table_4_from_first_principles(two, pixels, k):
    base,other = two
    df = robustness_table(base, other, k, pixels)
    fall = base.fall(pixels).numpy()
    mean = {}
    for y in range(5):
        top = sorted((x for x in range(5) if x!=y), key=lambda x: -fall[x,y])[:k]
        for o in two:
            assert df.loc[HARBOUR.names[y],
                          (o.label,'I')]==pytest.approx(100*np.mean([o.iou_before(pixels)[x,y] for x in top]))
            assert df.loc[HARBOUR.names[y],
                          (o.label,'I*')]==pytest.approx(100*np.mean([o.iou_after(pixels)[x,y] for x in top]))
        mean[y] = np.mean([fall[x,y] for x in top])
    worst = sorted(mean, key=lambda y: -mean[y])[:3]
    assert vulnerable_classes(base, k, pixels)==worst
    names = [HARBOUR.names[o] for o in worst]
    for o in two:
        for c in ('I','I*','difference'):
            assert df.loc['mIoU', (o.label,c)]==pytest.approx(df.loc[list(HARBOUR.names[:5]), (o.label,c)].mean())
            assert df.loc['mIoU*', (o.label,c)]==pytest.approx(df.loc[names, (o.label,c)].mean())
    assert df.loc['crane', ('erased',f'top {k}')]=='never occurs' and df.loc['crane', base.label].isna().all()
    assert df.loc[['mIoU','mIoU*'], [o.label for o in two]].notna().all(axis=None)
    assert list(df.index[-2:])==['mIoU','mIoU*'] and len(df)==8

def test_i_is_the_ordinary_iou(two):
    df = robustness_table(*two)
    for o in two:
        np.testing.assert_allclose(df[o.label,'I'][list(HARBOUR.names[:5])].astype(float),
                                   100*class_iou(o.confusion)[:5])

def test_same_label_twice(two):
    df = robustness_table(two[0], two[0])
    assert df.attrs['labels']==['base','other'] and df['base'].equals(df['other'])

def test_kept_counts(two, tmp_path):
    again = load_colocation(two[0].save(tmp_path/'co.json'))
    assert robustness_table(again, two[1]).equals(robustness_table(*two))
    assert (tmp_path/'co.json').stat().st_size<20000

def test_pictures(two, tmp_path):
    from dropclass.analysis.context import plot_robustness
    for i,ax in enumerate([two[0].plot(), plot_robustness(robustness_table(*two)), entanglement(wide_net(4)).plot()]):
        ax.figure.savefig(tmp_path/f'{i}.png')
        assert ax.get_ylabel() or ax.get_xlabel() or ax.get_title()
    assert 'crane (never occurs)' in [o.get_text() for o in two[0].plot().get_yticklabels()]

def test_inpainting_by_a_library(monkeypatch):
    "OpenCV gets bytes and a mask; the erased pixels come back on the scale of the image."
    white = lambda pixels, mask, radius, how: np.where(mask[...,None]>0, 255, pixels).astype('uint8')
    monkeypatch.setitem(sys.modules, 'cv2', types.SimpleNamespace(INPAINT_TELEA=1, inpaint=white))
    image,erased = torch.linspace(-2, 2, 3*64).view(3, 8, 8),torch.eye(8)>0
    new = erase(image, erased, make_fill('inpaint'))
    assert torch.equal(new[:,~erased], image[:,~erased]) and torch.allclose(new[:,erased], torch.tensor(2.))
    monkeypatch.setitem(sys.modules, 'cv2', None)
    with pytest.raises(ImportError, match='opencv-python-headless'): erase(image, erased, make_fill('inpaint'))

def test_inpainting_for_real():
    image,erased = torch.rand(3, 16, 16)*.1+torch.tensor([-1.,0.,1.])[:,None,None],torch.zeros(16, 16, dtype=torch.bool)
    erased[6:9,6:9] = True
    hole = torch.where(erased, 5., image)
    new = erase(hole, erased, make_fill('inpaint'))
    assert (new-image)[:,erased].abs().max()<.2

# ---- Figures 2 and 4

CAPTUM = dict(attribute_to_layer_input=True, relu_attributions=True)

@pytest.mark.parametrize('layer', [None,'backbone.1'])
@pytest.mark.parametrize('mask', ['predicted','truth','all',(3, 5)], ids=str)
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_grad_cam_against_captum(kernel_size, mask, layer):
    "The same maps, at the input of the classifier and of an earlier layer."
    from captum.attr import LayerGradCam
    from dropclass.analysis.figures import cam_layer, cam_masks, grad_cam
    net,(x,y) = ToyNet(4, kernel_size=kernel_size).eval(),toy_batch()
    ours = grad_cam(net, x, range(4), mask, y, layer)
    masks = cam_masks(mask, net(x).detach(), range(4), y)
    score = lambda o: (net(o)*masks).sum((2, 3))/masks.sum((2, 3))
    for c in range(4):
        theirs = LayerGradCam(score, cam_layer(net, layer)).attribute(x, target=c, **CAPTUM)
        assert torch.allclose(ours[:,c], theirs[:,0], atol=1e-8, rtol=1e-4), c
    assert ours.amax()>0

@pytest.mark.parametrize('path', ['plain','drop','mean'])
def test_grad_cam_of_both_paths_against_captum(path):
    from captum.attr import LayerGradCam
    from dropclass.analysis.figures import grad_cam
    net,(x,_) = ToyNet(4),toy_batch()
    head = add_dropclass(net)
    head.predict = path
    net.train()(x) # Running statistics of the block
    net.eval()
    theirs = LayerGradCam(lambda o: net(o).mean((2, 3)), head).attribute(x, target=2, **CAPTUM)
    assert torch.allclose(grad_cam(net, x, [2], 'all')[:,0], theirs[:,0], atol=1e-9, rtol=1e-4)

def test_grad_cam_of_a_linear_classifier():
    "Channels come last, as in transformers."
    from dropclass.analysis.figures import grad_cam
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.classifier = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, 4)
        def forward(self, x): return self.classifier(self.net(x).relu().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    net,(x,_) = Last(),toy_batch()
    conv = nn.Conv2d(8, 4, 1)
    conv.weight.data,conv.bias.data = net.classifier.weight.data[...,None,None],net.classifier.bias.data
    other = nn.Sequential(net.net, nn.ReLU(), conv)
    assert torch.allclose(grad_cam(net, x, range(4), layer='classifier'), grad_cam(other, x, range(4)), atol=1e-7)

def test_grad_cam_leaves_nothing_behind():
    from dropclass.analysis.figures import grad_cam
    net,(x,_) = ToyNet(4).train(),toy_batch()
    state = {k:v.clone() for k,v in net.state_dict().items()}
    grad_cam(net, x, [0])
    assert net.training and all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert all(o.grad is None for o in net.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())

def test_differences_from_first_principles():
    from dropclass.analysis.figures import differences
    batches,nets = [toy_batch(3, seed=i) for i in range(3)],[wide_net(4, seed) for seed in (0, 1)]
    found = differences(*nets, batches, 4)
    assert found.counts.shape==(9,2,4,4) and found.labels==('base','other')
    x,y = (torch.cat(o) for o in zip(*batches))
    a,b = (net(x).argmax(1) for net in nets)
    for i in range(4):
        for j in range(4):
            expected = ((y==i)&(a==i)&(b==j)&(a!=b)).sum((1, 2))
            assert torch.equal(found.counts[:,0,i,j], expected)
    worst = found.images((0, 1), 9)
    pixels = [int(((((y[n]==0)&(a[n]+b[n]==1)&(a[n]!=b[n]))|((y[n]==1)&(a[n]+b[n]==1)&(a[n]!=b[n])))).sum())
              for n in worst]
    assert pixels==sorted(pixels, reverse=True) and all(pixels)

def test_boxes_cover_the_differences():
    from dropclass.analysis.figures import difference_boxes
    mask = torch.rand(40, 60, generator=torch.Generator().manual_seed(0))>.99
    covered = torch.zeros_like(mask)
    for top,left,bottom,right in difference_boxes(mask, k=99, least=1): covered[top:bottom,left:right] = True
    assert mask.any() and covered[mask].all()

def test_pictures_of_a_learner():
    "A DataLoader that normalises is undone."
    from dropclass.analysis.figures import to_picture
    from dropclass.data.scenes import scenes_dls
    dls = scenes_dls(n_train=4, n_valid=2, bs=2, size=(32,48))
    x,_ = dls.valid.one_batch()
    shown = to_picture(x, dls.valid)
    assert torch.allclose(shown[0].permute(2, 0, 1)*255, dls.valid.dataset[0][0].float(), atol=1e-2)

# ---- entanglement

def test_cosines_against_pytorch():
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).double()
    truth = F.cosine_similarity(weight[:,None], weight[None], dim=2)
    for measure,expected in zip(MEASURES,
                                (truth, truth.clamp(min=0),
                                 F.cosine_similarity(weight.relu()[:,None], weight.relu()[None], dim=2))):
        assert torch.allclose(cosine_matrix(weight, measure), expected, atol=1e-12)
        assert torch.allclose(row_sums(cosine_matrix(weight, measure)),
                              torch.stack([sum(expected[i,j] for j in range(7) if j!=i) for i in range(7)]), atol=1e-12)

def test_three_columns_in_their_order():
    # Fixed before any comparison of trained networks
    assert MEASURES==('signed cosine','positive part','cosine of ReLU(W)')
    a,b = (entanglement(wide_net(5, seed), pixel_counts=[5,1,4,2,3], label=f'net {seed}') for seed in (0, 1))
    assert list(a.table().columns)==['pixels',*MEASURES]
    assert list(a.table().index)==['class 1','class 3','class 4','class 2','class 0','mean']
    both = entanglement_table(a, b)
    assert list(both.columns)==[(m, o) for m in MEASURES for o in ('net 0','net 1','difference')]
    assert np.allclose(both['signed cosine','difference'], a.table()['signed cosine']-b.table()['signed cosine'])

def test_entanglement_reads_the_right_layer():
    net = ToyNet(num_classes=4)
    before = entanglement(net).weight
    add_dropclass(net)
    assert torch.equal(entanglement(net).weight, before) # The shared classifier, not the block beside it
    assert torch.equal(entanglement(toy_learner(model=net)).weight, before)

def test_no_linear_classifier():
    class Ranks(nn.Module):
        "Scores classes by distance: no convolution has one output per class."
        def __init__(self):
            super().__init__()
            self.net,self.centres = nn.Conv2d(3, 6, 3, padding=1),nn.Parameter(torch.randn(4, 6))
        def forward(self, x): return -(self.net(x)[:,None]-self.centres[None,:,:,None,None]).pow(2).sum(2)
    with pytest.raises(ValueError, match='No convolution with 4 outputs'): entanglement(Ranks())
    assert colocation(Ranks(), [toy_batch()], 4).images==4 # Everything else is still there

def test_classifiers_that_are_added_up():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3, 4, 1),nn.Conv2d(3, 4, 1)
        def forward(self, x): return self.a(x)+self.b(x.flip(-1))
    net = Sum()
    weight = torch.cat([net.a.weight, net.b.weight], 1)[...,0,0]
    assert torch.equal(entanglement(net).weight, weight)
    add_dropclass(net)
    assert torch.equal(entanglement(net).weight, weight)

# ---- look-alikes and bias

def test_rank_agreement_against_pandas():
    values = pd.DataFrame(np.random.default_rng(0).normal(size=(12, 2)), columns=['fall','bias'])
    found = rank_agreement(values)
    for name in ('spearman','kendall'):
        assert found.correlation[name]==pytest.approx(values.fall.corr(values.bias, method=name))
    assert (found.classes==12).all()

def test_proxy_leaves_absent_classes_out(two):
    scores = bias_scores(two[0].confusion, two[1].confusion, HARBOUR)
    values = proxy_values(two[0], scores)
    assert set(values.index)==set(HARBOUR.names)-{'crane'} and values.notna().all(axis=None)

def test_confusions_sum_up():
    confusion = torch.randint(0, 50, (5, 5), generator=torch.Generator().manual_seed(0))
    worst = worst_confusions(confusion, 5, k=99)
    assert worst.pixels.sum()==confusion.sum()-confusion.diagonal().sum() and worst.share.is_monotonic_decreasing
    both = pair_confusions({'a':confusion}, 5, [(0, 1), (1, 0)])
    swapped = 100*float(confusion[0,1]+confusion[1,0])/float(confusion[:2].sum())
    assert both.a.iloc[0]==both.a.iloc[1]==pytest.approx(swapped)

# ---- run folders

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two tiny runs on scenes."
    folder,common = tmp_path_factory.mktemp('runs'),dict(data='scenes', arch='small', epochs=1, bs=4, size=(32,48),
                                                         data_options=dict(n_train=8, n_valid=6))
    for method in ('plain','dropclass'):
        train_run(Config(method=method, **common), folder/method, progress=False, write=lambda o: None)
    return folder

def drop_counts(folder,
                test='valid'): return torch.tensor(json.loads((folder/'confusion.json').read_text())[test]['drop'])

def test_drop_effect_of_a_run(runs, tmp_path, monkeypatch, capsys):
    "The script asks a run as training did; measured runs are skipped."
    main = runpy.run_path(str(root/'benchmarks'/'drop_effect.py'))['main']
    def script(*more):
        monkeypatch.setattr(sys, 'argv', ['drop_effect.py', str(runs/'dropclass'), '--out', str(tmp_path), *more])
        main()
        return capsys.readouterr().out
    said = [script() for _ in range(2)]
    assert said[0].startswith('dropclass: recall') and not said[1]
    found = load_drop_effect(tmp_path/'dropclass.json')
    assert torch.equal(found.confusion, drop_counts(runs/'dropclass')) and found.images==6
    assert torch.equal(found.dropped.sum(2), found.confusion.sum(1).expand(15, 15))
    assert json.loads((tmp_path/'dropclass.json').read_text())[
        'config']==json.loads((runs/'dropclass'/'config.json').read_text())['hash']
    with pytest.raises(ValueError, match='plain has no DropClassHead'): drop_effect(load_run(runs/'plain'))
    for lines in (1, 0): assert script('--erase', 'mean').count('erased by mean')==lines
    assert len(compare_removals(found, load_colocation(tmp_path/'erased'/'dropclass-mean.json')))>20

@pytest.mark.parametrize('name,kept', [('camvid', 'camvid/cpu'), ('scenes', 'scenes/options')])
def test_stored_drop_effects_belong_to_their_runs(name, kept):
    "With nothing dropped they count what the run counted, but for a few pixels at the edge of rounding."
    files = sorted((root/'results'/f'{name}_drop').glob('*.json'))
    assert len(files)>3
    for file in files:
        folder = root/'results'/kept/file.stem
        assert json.loads(file.read_text())['config']==json.loads((folder/'config.json').read_text())['hash']
        a,b = load_drop_effect(file).confusion,drop_counts(folder)
        assert (a-b).abs().sum()<1e-4*b.sum(), file.name

def test_analyses_of_run_folders(runs):
    plain,dropclass = (load_run(runs/o) for o in ('plain','dropclass'))
    base,other = (colocation(o, max_images=4) for o in (plain, dropclass))
    df = robustness_table(base, other)
    assert df.attrs['labels']==['plain','dropclass'] and df.loc['mIoU', ('plain','I*')]>=0
    full = colocation(plain)
    assert full.passes==full.images+int(full.presence.sum())
    scores = bias_scores(plain.confusion('valid'), plain.confusion('unbiased'), plain.spec)
    assert len(scores)==15 and len(proxy_values(full, scores))>=3
    table = entanglement_table(entanglement(plain), entanglement(dropclass))
    assert len(table)==16
    pixels = entanglement(plain).table().pixels
    assert pixels[:-1].is_monotonic_increasing and pixels[:-1].sum()==pytest.approx(100)

def test_counts_are_those_of_the_run(runs):
    run = load_run(runs/'dropclass')
    for path in ('plain','drop'):
        for test in ('valid','unbiased'):
            assert torch.equal(colocation(run.subject(path), test=test, fill=0.).confusion, run.confusion(test, path))

def test_wrong_run_folders(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match='no run'): load_run(tmp_path)
    half = tmp_path/'half'
    shutil.copytree(runs/'plain', half)
    (half/'metrics.json').unlink()
    with pytest.raises(FileNotFoundError, match='not finished'): load_run(half)
    newer = tmp_path/'newer'
    shutil.copytree(runs/'plain', newer)
    config = json.loads((newer/'config.json').read_text())
    (newer/'config.json').write_text(json.dumps({**config, 'format':2}))
    with pytest.raises(ValueError, match='reads format 1'): load_run(newer)
    moved = tmp_path/'moved' # Trained on other classes than its configuration builds now
    shutil.copytree(runs/'plain', moved)
    metrics = json.loads((moved/'metrics.json').read_text())
    metrics['classes'][0] = 'lane'
    (moved/'metrics.json').write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match='was trained on the classes lane'): colocation(load_run(moved))
    with pytest.raises(ValueError, match="must be one of 'plain', got 'drop'"): load_run(runs/'plain').subject('drop')
    with pytest.raises(ValueError, match='not measured on the same images'):
        robustness_table(*(colocation(load_run(runs/o), max_images=n) for o,n in (('plain', 2), ('dropclass', 3))))
