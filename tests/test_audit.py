"The audit: reports of networks, Learners, runs and weights files; bad input; the page in a browser."
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from dropclass.analysis.context import HARBOUR, harbour, train_harbour
from dropclass.analysis.audit import RULES, audit, audit_advice, class_advice, pair_advice, picture_files
from dropclass.analysis.subjects import build_network, fit_names, load_network, open_images, open_model
from dropclass.core import VOID, ClassSpec
from dropclass.surgery import add_dropclass
from dropclass.metrics import class_iou, evaluate, mean_iou
from dropclass.models import SmallSegNet
from dropclass.prior import class_offsets, shift_classes
from dropclass.run.audit import audit_files
from dropclass.run.config import Config
from dropclass.run.experiment import load_run, train_run
from dropclass.testing import ToyNet, toy_batch, toy_learner

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def net(C=6, seed=0):
    "A network with random weights and running statistics of its own."
    torch.manual_seed(seed)
    model = SmallSegNet(C, width=4)
    for _ in range(3): model(torch.randn(4, 3, 32, 48))
    return model.eval()

@pytest.fixture(scope='module')
def batches(): return [harbour(4, seed=i) for i in range(3)]

@pytest.fixture(scope='module')
def one(batches): return audit(net(), batches, HARBOUR, progress=False)

@pytest.fixture(scope='module')
def two(batches): return audit(net(), batches, HARBOUR, other=net(seed=1), labels=('first','second'), progress=False)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two tiny runs on scenes."
    folder,common = tmp_path_factory.mktemp('runs'),dict(data='scenes', arch='small', epochs=1, bs=4, size=(32,48),
                                                         data_options=dict(n_train=8, n_valid=6))
    for method in ('plain','dropclass'):
        train_run(Config(method=method, **common), folder/method, progress=False, write=lambda o: None)
    return folder


class Tags(html.parser.HTMLParser):
    "Checks that tags are balanced, and collects text, pictures and links."
    void = {'meta','img','br','link','input'}
    def __init__(self, page):
        super().__init__()
        self.open,self.text,self.images,self.ids,self.anchors = [],[],[],set(),[]
        self.feed(page)
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag=='img': self.images.append(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag=='a': self.anchors.append(attrs['href'])
        if tag not in self.void: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag, tag
    def handle_data(self, data): self.text.append(data)

def read(audit, folder):
    "Write all three reports and read them."
    audit.report(folder)
    return ((folder/f'report.{o}').read_text(encoding='utf-8') for o in ('html','md','json'))

# ---- the report

@pytest.mark.parametrize('which', ['one','two'])
def test_report_is_whole(which, request, tmp_path):
    page,text,data = read(request.getfixturevalue(which), tmp_path)
    tags,figures = Tags(page),json.loads(data)
    inside = re.sub(r'data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+|<a href="[^"]+"', '', page)
    assert not re.search(r'(https?:)?//(?!/)', inside) # Nothing is fetched
    assert tags.images and all(o['src'].startswith('data:image/') and o['alt'] for o in tags.images)
    assert len({o[1:] for o in tags.anchors if o[0]=='#'}&tags.ids)==8
    words = re.sub(r'data:image[^"]+', '', page).lower().replace('finance', '')
    assert 'nan' not in words and 'nan' not in text.lower()
    shown = ' '.join(tags.text)
    for o in figures['classes']:
        if not o['occurs']: continue
        for v in o['iou']: assert f'{v:.1f}' in shown and f'{v:.1f}' in text
    for o in figures['advice'][:3]: assert o['found'] in shown and o['found'] in text
    for kind in {o['kind'] for o in figures['advice']}:
        assert next(o['try'] for o in figures['advice'] if o['kind']==kind) in shown
    widths = [row.count('|') for row in text.splitlines() if row.startswith('|')]
    assert len(widths)>20
    for file in re.findall(r'!\[\]\((.*?)\)', text): assert (tmp_path/file).is_file()
    assert len(re.findall(r'!\[\]\((.*?)\)', text))==len(tags.images)

def test_markdown_tables_are_rectangular(two, tmp_path):
    text = two.report(tmp_path/'a.md')[0].read_text()
    for table in re.findall(r'(?:^\|.*\n)+', text, flags=re.M):
        rows = table.splitlines()
        assert len({o.count('|') for o in rows})==1, table
        assert re.fullmatch(r'\|(---\|)+', rows[1]) and len(rows)>2

def test_figures_are_those_of_the_library(two, batches):
    figures = two.to_dict()
    for o,seed in zip(figures['networks'], (0, 1)):
        confusion = evaluate(net(seed=seed), batches, 6)
        assert o['confusion']==confusion.tolist()
        assert o['miou']==pytest.approx(100*mean_iou(confusion))
    for o in figures['classes']:
        c = HARBOUR.names.index(o['name'])
        assert o['images']==sum(int((y==c).flatten(1).any(1).sum()) for _,y in batches)
        for i,seed in enumerate((0, 1)):
            if o['occurs']:
                assert o['iou'][i]==pytest.approx(100*float(class_iou(evaluate(net(seed=seed), batches, 6))[c]))
    means = {o['name']:o for o in figures['means']}
    assert means['mIoU']['iou']==[pytest.approx(o['miou']) for o in figures['networks']]
    assert means['rare mIoU']['iou']==[pytest.approx(o['rare_miou']) for o in figures['networks']]
    assert figures['robustness']['rows'][-1]['name']=='mIoU*'

def test_precision_and_recall(one, batches, tmp_path):
    "They are scikit-learn's, class by class, in the figures and in both reports."
    from sklearn.metrics import precision_score, recall_score
    true,said = torch.cat([y for _,y in batches]).flatten(),torch.cat([net()(x).argmax(1) for x,_ in batches]).flatten()
    page,text,data = read(one, tmp_path)
    for key,score in dict(precision=precision_score, recall=recall_score).items():
        values = 100*torch.tensor(score(true, said, labels=range(6), average=None, zero_division=float('nan')))
        for o in json.loads(data)['classes']:
            value = values[HARBOUR.names.index(o['name'])].item()
            assert o[key]==[None if value!=value else pytest.approx(value)], (key, o['name'])
            if value==value: assert f'{value:.1f}' in page and f'{value:.1f}' in text
        means = {o['name']:o[key][0] for o in json.loads(data)['means']}
        assert means['mIoU']==pytest.approx(values.nanmean().item())

def test_boundary_iou(one, batches, tmp_path):
    "Class by class, from erosions of SciPy's, in the figures and in both reports."
    from scipy.ndimage import binary_erosion
    (x,true),d = (torch.cat(o) for o in zip(*batches)),round(.02*math.hypot(32, 48))
    page,text,data = read(one, tmp_path)
    bands = lambda masks: np.array([o&~binary_erosion(o, np.ones((2*d+1,2*d+1))) for o in masks.numpy()])
    said = net()(x).argmax(1).where(true!=VOID, VOID)
    for o in json.loads(data)['classes']:
        a,b = (bands(labels==HARBOUR.names.index(o['name'])) for labels in (true, said))
        value = 100*(a&b).sum()/(a|b).sum() if (a|b).any() else None
        assert o['boundary_iou']==[value if value is None else pytest.approx(value)], o['name']
        if value is not None: assert f'{value:.1f}' in page and f'{value:.1f}' in text

def test_objects_by_size(batches, tmp_path):
    "Class by class, from OpenCV's components, in the figures and in both reports; the labels are moved by some pixels."
    import cv2
    model,moved = train_harbour(bias=1.),[(x, y.roll((2, 4), (1, 2))) for x,y in batches]
    x,true = (torch.cat(o) for o in zip(*moved))
    page,text,data = read(audit(model, moved, HARBOUR, progress=False), tmp_path)
    said,counts = model(x).argmax(1),{}
    for c,name in enumerate(HARBOUR.names):
        for truth,guess in zip((true==c).numpy(), (said==c).numpy()):
            n,parts = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
            for part in (parts==i for i in range(1, n)):
                size = 'small' if part.sum()<32**2 else 'medium' if part.sum()<96**2 else 'large'
                found = counts.setdefault((name, size), [0, 0])
                found[0] += 1
                found[1] += guess[part].mean()>=.5
    rows = {o['class']:o for o in json.loads(data)['objects'][0]}
    assert set(rows)=={name for name,_ in counts}
    for (name,size),(n,found) in counts.items():
        assert rows[name][size]==n and rows[name][f'{size} found %']==pytest.approx(100*found/n), (name, size)
        assert f'{100*found/n:.1f}' in page and f'{100*found/n:.1f}' in text

def test_calibration(batches, tmp_path):
    "The error is torchmetrics', for each network, and stands in both reports."
    models = dict(trained=train_harbour(bias=1.), random=net())
    from torchmetrics.functional.classification import multiclass_calibration_error
    x,y = (torch.cat(o) for o in zip(*batches))
    page,text,data = read(audit(models['trained'], batches, HARBOUR, other=models['random'], labels=(*models,),
                                progress=False), tmp_path)
    for o in json.loads(data)['networks']:
        error = 100*multiclass_calibration_error(models[o['label']](x), y, 6, n_bins=10, ignore_index=VOID).item()
        assert o['calibration_error']==pytest.approx(error, abs=1e-3)
        assert sum(s['pixels'] for s in o['calibration'])==pytest.approx(100)
        for report in (page, text): assert f"Expected calibration error of {o['label']}: {error:.1f} points" in report

def test_wrong_masks_are_named_first(world, tmp_path):
    "In one mask land and water have changed places; void pixels and images without any label say nothing."
    data = [(x, y.clone()) for x,y in world]
    data[1][1][3] = torch.where(data[1][1][3]==0, 2, torch.where(data[1][1][3]==2, 0, data[1][1][3]))
    data[0][1][:2] = VOID
    found = audit(train_harbour(bias=0.), data, HARBOUR, progress=False)
    page,text,plain = read(found, tmp_path)
    named = json.loads(plain)['doubtful']
    assert named[0]['image']=='image 11' and len(named)==5 and not {'image 0','image 1'}&{o['image'] for o in named}
    assert re.search(r'look at first.*?\| image 11 \|', text, re.S)
    assert re.search('look at first.*?image 11<', page, re.S)

def test_same_audit_same_page(batches, tmp_path):
    pages = [audit(net(), batches, HARBOUR, progress=False).report(tmp_path/f'{i}.html')[0].read_bytes()
             for i in range(2)]
    assert pages[0]==pages[1]

def test_names_are_escaped(batches, tmp_path):
    "A class that writes HTML, a cell, a picture from elsewhere, or to the terminal is only a name."
    spec = ClassSpec(('<b>land','a|b','"water"','car & co','![x](//y)','\x1b[31mcrane'))
    page,text,_ = read(audit(net(), batches, spec, progress=False), tmp_path)
    assert Tags(page) and '<b>land' not in page and '&lt;b&gt;land' in page
    assert '<b>land' not in text and '&lt;b>land' in text and '![x]' not in text
    assert not re.search(r'(?<!\\)a\|b', text) and 'a\\|b' in text and '\x1b' not in page+text

def test_nothing_is_written_over(one, tmp_path):
    one.report(tmp_path/'a.json')
    with pytest.raises(FileExistsError, match='a.json exists'): one.report(tmp_path/'a.json')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'report.md').write_text('mine')
    with pytest.raises(FileExistsError, match='report.md exists'): one.report(tmp_path/'b')
    assert [o.name for o in (tmp_path/'b').iterdir()]==['report.md'] and (tmp_path/'b'/'report.md').read_text()=='mine'
    assert one.report(tmp_path/'a.json', overwrite=True)==[tmp_path/'a.json']

def test_two_classes_of_the_same_file_name(batches, tmp_path):
    spec = ClassSpec(('a b','a-b','a_b','c','d','e'))
    found = audit(net(), batches, spec, progress=False, weak=6)
    assert len(picture_files(found))==sum(len(o.shots) for o in found.examples+found.erased)

def test_many_classes_stay_readable(tmp_path):
    x,y = torch.randn(2, 3, 16, 16),torch.randint(0, 60, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    page,_,data = read(audit(ToyNet(60), [(x, y)], 60, progress=False), tmp_path)
    assert '20 classes with smaller values are left out' in page
    assert len(json.loads(data)['networks'][0]['context'])==60

def test_weak_examples_are_the_worst(one, batches):
    x,y = (torch.cat(o) for o in zip(*batches))
    pred = net()(x).argmax(1)
    for e in one.examples:
        missed = ((y==e.label)&(pred!=e.label)).sum((1, 2))
        assert int(missed[e.image]) in missed.sort(descending=True).values[:2].tolist()
        assert e.text.startswith(f'{int(missed[e.image])} of {int((y[e.image]==e.label).sum())} ')

# ---- class bias, and what else is suggested

@pytest.fixture(scope='module')
def world(): return [harbour(8, bias=0., seed=100+i) for i in range(3)]

def pushed(tau, world):
    "A network that says rare classes too often, tau times."
    counts = torch.stack([(torch.cat([y for _,y in world])==c).sum() for c in range(6)])
    return shift_classes(train_harbour(bias=0.), class_offsets(counts=counts, tau=tau))

def test_a_class_bias_comes_first(world, tmp_path):
    "The gain is what `evaluate` finds on the other half, and classes are those with too many pixels."
    found = audit(pushed(2., world), world, HARBOUR, progress=False)
    bias = found.networks[0].bias
    page,text,data = read(found, tmp_path)
    first = json.loads(data)['summary'][0]
    assert first.startswith(f'This network over-predicts {bias.over[0]}') and '`dropclass-tune`' in first
    assert first in text and first.replace("'", '&#39;') in page and f'tau = {bias.tau:g} ' in first
    images,labels = (torch.cat(o)[1::2] for o in zip(*world))
    score = lambda tau: 100*mean_iou(evaluate(pushed(2.+tau, world), [(images, labels)], 6))
    assert bias.gain==pytest.approx(score(bias.tau)-score(0.), abs=.05) and bias.gain>1
    confusion = found.context.confusion
    assert all(confusion.sum(0)[HARBOUR.names.index(o)]>confusion.sum(1)[HARBOUR.names.index(o)] for o in bias.over)

def test_no_class_bias_no_word(world, two):
    assert audit(pushed(0., world), world, HARBOUR, progress=False).networks[0].bias is None
    assert not [o for o in two.to_dict()['summary'] if 'tau =' in o and o.startswith('This network')]

def test_class_weights_are_the_line(runs):
    "A Learner and a run say what they were trained with."
    learn = toy_learner()
    learn.loss_func = nn.CrossEntropyLoss(torch.tensor([1.,2.,3.,4.]))
    assert open_model(learn).class_weights().tolist()==[1,2,3,4] and open_model(ToyNet(4), 4).class_weights() is None
    assert load_run(runs/'plain').subject().class_weights() is None

def test_leaning_classes_lead_to_class_paste(batches, tmp_path):
    page,text,_ = read(audit(train_harbour(bias=1.), batches, HARBOUR, progress=False), tmp_path)
    links = [o for o in Tags(page).anchors if o[0]!='#']
    assert len(links)==1 and f'[Class paste]({links[0]})' in text and 'ClassPasteCallback' in text
    assert (Path(__file__).parents[1]/links[0].partition('/blob/main/')[2]).is_file()

# ---- advice

def test_advice_follows_its_rules(batches):
    "Every piece of advice is over its threshold, and what is over it is said."
    one = audit(train_harbour(steps=40), batches, HARBOUR, progress=False)
    network,co = one.networks[0],one.context
    shares = 100*one.pixel_counts.double()/one.pixel_counts.sum()
    falls = (100*co.fall()).flatten()
    rules = {**RULES, 'fall':float(falls[falls>0].median())} # So that about half of the falls are over it
    found = class_advice(network, shares, rules)+pair_advice(network, rules)
    fall = 100*co.fall()
    said = {(o['class'], round(o['size'], 3)) for o in found if o['kind']=='fall'}
    expected = {(HARBOUR.names[y], round(float(fall[x,y]), 3)) for x in range(6)
                for y in range(6) if fall[x,y]>=rules['fall']}
    assert said==expected and said
    weak = {o['class'] for o in found if o['kind'] in ('weak','rare')}
    assert weak=={HARBOUR.names[c] for c in range(6) if co.occurs[c] and 100*network.iou[c]<RULES['weak']}
    assert [o['class'] for o in found if o['kind']=='absent']==['crane']
    assert len(audit_advice(one))==len(class_advice(network, shares)+pair_advice(network))

def test_no_advice_for_a_perfect_network(tmp_path):
    class Perfect(nn.Module):
        def forward(self, x): return torch.stack([(x[:,0]==c).float() for c in range(3)], 1)
    y = torch.randint(0, 3, (12, 8, 8), generator=torch.Generator().manual_seed(0))
    found = audit(Perfect(), [(y[:,None].float().repeat(1, 3, 1, 1), y)], 3, fill=7., progress=False)
    assert not [o for o in audit_advice(found) if o['kind'] not in ('few',)]
    page,text,_ = read(found, tmp_path)
    assert 'Nothing stands out' in page and 'Nothing stands out' in text and 'None: every pixel is right' in page
    assert not found.examples and not found.erased

# ---- what can be audited

def test_learner():
    found = audit(toy_learner(), progress=False)
    assert found.images==4 and found.networks[0].label=='learner' and found.networks[0].entangled is not None

def test_learner_with_both_paths():
    learn = toy_learner()
    add_dropclass(learn.model).predict = 'drop'
    assert 'DropClass head, answers by the drop path' in audit(learn, progress=False).networks[0].about

def test_run_folders(runs, tmp_path):
    found = audit(load_run(runs/'plain'), other=load_run(runs/'dropclass'), progress=False)
    assert [o.label for o in found.networks]==['plain','dropclass'] and found.counts_are=='the training set'
    assert 'run dropclass (dropclass on scenes, epochs: 1)' in found.report(tmp_path/'r.md')[0].read_text()
    unbiased = audit(load_run(runs/'plain'), test='unbiased', progress=False)
    assert torch.equal(unbiased.context.confusion, load_run(runs/'plain').confusion('unbiased'))

def test_torch_dataloader_and_dict_output():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ToyNet(4).eval()
        def forward(self, x): return {'out':self.net(x)[...,::2,::2], 'aux':torch.zeros(())}
    x,y = toy_batch(6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    found = audit(Dict(), loader, ['a','b','c','d'], progress=False)
    assert found.images==found.total==6 and found.networks[0].entangled is not None

def test_model_and_random_state_are_left_alone(batches):
    model = net().train()
    state,random = {k:v.clone() for k,v in model.state_dict().items()},torch.get_rng_state()
    audit(model, batches, HARBOUR, progress=False)
    assert model.training and all(torch.equal(v, state[k]) for k,v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and all(o.grad is None for o in model.parameters())

@pytest.mark.parametrize('fill', ['noise','blur','inpaint', .5])
def test_other_fills(fill, batches, tmp_path):
    found = audit(net(), batches[:1], HARBOUR, fill=fill, progress=False)
    assert len(found.report(tmp_path/'x.html'))==1

def test_progress(batches):
    seen = []
    audit(net(), batches, HARBOUR, progress=lambda o: (seen.append(1) or x for x in o))
    assert len(seen)==3*len(batches) # Erased context, class bias, pictures

# ---- bad input

def test_class_counts_differ(batches):
    with pytest.raises(ValueError, match='scores 4 classes and the data have 6'):
        audit(ToyNet(4), batches, HARBOUR, progress=False)
    with pytest.raises(ValueError, match='target holds label'): audit(ToyNet(3), batches, 3, progress=False)
    with pytest.raises(ValueError, match='different classes'):
        audit(toy_learner(), other=toy_learner(num_classes=3), progress=False)
    with pytest.raises(ValueError, match='pass `spec`'): audit(ToyNet(4), batches)

def test_absent_class(one, tmp_path):
    page,text,data = read(one, tmp_path)
    row = next(o for o in json.loads(data)['classes'] if o['name']=='crane')
    assert not row['occurs'] and row['images']==0 and row['fall']==[None]
    assert 'never occurs in these images' in page and '| crane' in text and 'never occurs' in text
    for o in json.loads(data)['means']: assert None not in o['iou']

def test_absent_rare_half(tmp_path):
    "No class of the rarer half occurs: its mean is empty, not nan."
    class Const(nn.Module):
        def forward(self, x): return torch.stack([torch.ones_like(x[:,0]), x[:,0], *[torch.full_like(x[:,0], -9)]*2], 1)
    x,y = torch.rand(3, 3, 8, 8)*2,torch.randint(0, 2, (3, 8, 8))
    page,_,data = read(audit(Const(), [(x, y)], 4, pixel_counts=[5, 5, 1, 1], progress=False), tmp_path)
    assert [o['iou'] for o in json.loads(data)['means'] if o['name']=='rare mIoU']==[[None]]
    Tags(page)

def test_one_class_only(batches, tmp_path):
    with pytest.raises(ValueError, match='at least 2, got 1'): audit(ToyNet(4), batches, ['road'])
    x,_ = toy_batch()
    y = torch.zeros(len(x), 16, 16, dtype=torch.long) # One class in the data: nothing to lean on
    page,text,data = read(audit(ToyNet(4), [(x, y)], 4, progress=False), tmp_path)
    figures = json.loads(data)
    assert figures['data']['occurring']==1 and figures['networks'][0]['influences']=={'class 0':[]}
    assert page.count('never occurs in these images')==3

def test_two_classes():
    x,y = toy_batch(num_classes=2)
    found = audit(ToyNet(2), [(x, y)], 2, other=ToyNet(2), progress=False)
    assert found.k==1 and found.to_dict()['robustness']['rows'][-1]['name']=='mIoU*'

def test_all_void():
    x,y = toy_batch()
    with pytest.raises(ValueError, match='No pixel has a class'):
        audit(ToyNet(4), [(x, torch.full_like(y, VOID))], 4, progress=False)

def test_images_of_several_sizes(tmp_path):
    data = [toy_batch(2, size=16), toy_batch(3, size=24), tuple(o[0] for o in toy_batch(1, size=32))]
    found = audit(ToyNet(4), data, 4, progress=False)
    assert found.images==found.total==6 and found.sizes==('16x16','24x24','32x32')
    assert '16x16, 24x24, 32x32 pixels' in found.report(tmp_path/'a.md')[0].read_text()
    small,model = [(x, y[:,::2,::2]) for x,y in data[:2]],ToyNet(4)
    own = audit(model, small, 4, progress=False)
    assert own.sizes==('16x16 (labels 8x8)','24x24 (labels 12x12)')
    assert torch.equal(own.context.confusion, evaluate(model, small, 4))

def test_no_images():
    with pytest.raises(ValueError, match='`data` is empty'): audit(ToyNet(4), [], 4, progress=False)
    with pytest.raises(ValueError, match='only once'): audit(ToyNet(4), iter([toy_batch()]), 4)

def test_cut_short(batches, tmp_path):
    found = audit(net(), batches, HARBOUR, max_images=5, progress=False)
    assert found.images==5 and found.cut_short and all(e.image<5 for e in found.examples)
    for text in read(found, tmp_path): assert 'looked at 5 of 12 images' in text
    assert not audit(net(), batches, HARBOUR, max_images=12, progress=False).cut_short

def test_bad_run_folders(runs, tmp_path):
    half,newer,moved = (tmp_path/o for o in ('half','newer','moved'))
    for o in (half, newer, moved): shutil.copytree(runs/'plain', o)
    (half/'metrics.json').unlink()
    with pytest.raises(FileNotFoundError, match='not finished'): audit_files([half])
    config = json.loads((newer/'config.json').read_text())
    (newer/'config.json').write_text(json.dumps({**config, 'format':2}))
    with pytest.raises(ValueError, match='reads format 1'): audit_files([newer])
    metrics = json.loads((moved/'metrics.json').read_text())
    metrics['classes'][0] = 'lane'
    (moved/'metrics.json').write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match='was trained on the classes lane'): audit_files([moved])
    with pytest.raises(FileNotFoundError): audit_files([tmp_path/'nothing'])

def test_no_linear_classifier(batches, tmp_path):
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.centres = nn.Conv2d(3, 8, 3, padding=1),nn.Parameter(torch.randn(6, 8))
        def forward(self, x): return -(self.net(x)[:,None]-self.centres[None,:,:,None,None]).pow(2).sum(2)
    page,text,data = read(audit(Distances(), batches, HARBOUR, other=net(), labels=('odd','usual'), progress=False),
                          tmp_path)
    odd,usual = json.loads(data)['networks']
    assert (odd['entanglement'] is None and 'No convolution with 6 outputs' in odd['no_entanglement']
            and usual['entanglement'])
    assert 'Left out. No convolution with 6 outputs' in page and 'Left out.' in text
    assert odd['context'] and odd['confusion']

# ---- weights files

def test_torchvision_from_its_weights_file(tmp_path):
    "A plain state dict, auxiliary head and all, as torchvision trains it."
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
    torch.manual_seed(0)
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4, aux_loss=True).eval()
    save_file({k:v.contiguous() for k,v in model.state_dict().items()}, tmp_path/'deeplab.safetensors')
    x,y = toy_batch(2, size=64)
    arch = 'torchvision:deeplabv3_mobilenet_v3_large'
    assert torch.equal(load_network(tmp_path/'deeplab.safetensors', arch, 4)(x)['out'], model(x)['out'])
    # The same network under our name
    assert torch.equal(load_network(tmp_path/'deeplab.safetensors', 'deeplabv3_mobilenetv3', 4)(x), model(x)['out'])
    found = audit(load_network(tmp_path/'deeplab.safetensors', arch, 4), [(x, y)], 4, progress=False)
    assert found.networks[0].about.startswith('DeepLabV3') and found.networks[0].entangled.weight.shape==(4,256)
    with pytest.raises(ValueError, match=r"with 5 classes needs \(5,"):
        load_network(tmp_path/'deeplab.safetensors', arch, 5)
    with pytest.raises(ValueError, match="does not fit 'small'"):
        load_network(tmp_path/'deeplab.safetensors', 'small', 4)

@pytest.mark.parametrize('prefix', ['','module.','_orig_mod.','model.'])
def test_prefixes(prefix):
    own = ['backbone.weight','classifier.weight']
    given = {prefix+k:torch.zeros(1) for k in [*own,'aux_classifier.weight']}
    assert set(fit_names(given, own))==set(own)

def test_dropclass_weights(runs, tmp_path):
    "A run's weights file brings its head."
    run = load_run(runs/'dropclass')
    model,x = load_network(runs/'dropclass'/'weights.safetensors', 'small', 15),torch.randn(2, 3, 32, 48)
    assert torch.equal(model(x), run.load_model()(x))

@pytest.mark.parametrize('arch', ['timm:resnet18','smp:Unet:resnet18','torchvision:lraspp_mobilenet_v3_large'])
def test_other_libraries(arch, tmp_path):
    model = build_network(arch, 3).eval()
    save_file({k:v.contiguous() for k,v in model.state_dict().items()}, tmp_path/'w.safetensors')
    x,y = toy_batch(2, 3, size=64)
    assert audit(load_network(tmp_path/'w.safetensors', arch, 3), [(x, y)], 3, progress=False).images==2

def test_folders(tmp_path):
    from dropclass.data.camvid import write_toy_camvid
    dl,spec,counts = open_images(write_toy_camvid(tmp_path/'camvid'), size=(48,64))
    assert len(spec)==len(counts)==11 and len(dl.dataset)==3

def test_images_of_a_folder_are_shown_as_the_run_was_trained(tmp_path):
    "A run on other images of the same kind: its own size, unless another is given."
    from dropclass.data.camvid import write_toy_camvid
    data = write_toy_camvid(tmp_path/'camvid')
    run = train_run(Config(data='camvid', path=str(data), method='plain', arch='small', epochs=1, bs=2, size=(48,64)),
                    tmp_path/'run', progress=False, write=lambda o: None)
    own,other,given = (audit_files([run.folder], progress=False, **o)
                       for o in ({}, {'data':data}, {'data':data, 'size':(96,128)}))
    assert own.sizes==other.sizes and given.sizes!=own.sizes
    assert own.to_dict()['networks'][0]['miou']==other.to_dict()['networks'][0]['miou']

def test_labels_at_the_size_of_their_files(tmp_path):
    """A run that saw small images is measured as `evaluate` does with `full_size_dl`, and images are called by their
    files."""
    from dropclass.data.camvid import write_toy_camvid
    from dropclass.data.core import full_size_dl
    options = dict(data='camvid', path=str(write_toy_camvid(tmp_path/'camvid')), method='plain', arch='small', epochs=1,
                   bs=2)
    run = train_run(Config(size=(24,32), **options), tmp_path/'run', progress=False, write=lambda o: None)
    found,dls = audit(load_run(run.folder), progress=False),run.load_data()
    assert torch.equal(found.context.confusion,
                       evaluate(run.load_model(), full_size_dl(dls.valid), 11, dls.spec.ignore_index))
    labelled = sum(int((dls.valid.dataset.source.own_mask(i)!=dls.spec.ignore_index).sum()) for i in range(3))
    assert found.context.confusion.sum()==labelled and found.sizes==('24x32 (labels 48x64)',)
    assert {o['image'] for o in found.to_dict()['doubtful']}=={'000.png','001.png','002.png'}

def test_shuffled_images_are_refused(tmp_path):
    "A number names no image where the order changes from pass to pass."
    from dropclass.data.camvid import camvid_dls, write_toy_camvid
    dls = camvid_dls(write_toy_camvid(tmp_path), size=(48,64), bs=2)
    named = lambda dl: audit(ToyNet(11), dl, dls.spec, progress=False).names
    assert named(dls.valid)==['000.png','001.png','002.png']
    for shuffled in (dls.valid.new(shuffle=True), DataLoader(dls.valid.dataset, 2, shuffle=True)):
        with pytest.raises(ValueError, match='does not shuffle'): named(shuffled)

def test_two_networks_are_compared_on_classes_that_occur():
    "One stray pixel of a class that is in no image neither puts a network behind nor counts as a class."
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:,8:] = 1
    class Fixed(ToyNet):
        "Says the labels, and perhaps one stray pixel of the last class."
        def __init__(self, stray):
            super().__init__(3)
            self.stray = stray
        def forward(self, x):
            said = labels.clone()
            if self.stray: said[0,0,0] = 2
            logits = 9.*nn.functional.one_hot(said, 3).movedim(-1, 1).expand(len(x), -1, -1, -1)
            return logits+0*super().forward(x).mean()
    found = audit(Fixed(False), [(torch.rand(1, 3, 16, 16), labels)], ['road','car','boat'], other=Fixed(True),
                  labels=('A','B'), progress=False)
    said = found.to_dict()
    assert (said['means'][0]['classes']==2 and abs(said['means'][0]['difference'])<1
            and abs(said['networks'][1]['miou']-said['means'][0]['iou'][1])<1e-9)
    assert 'B is 0.4 points of mIoU behind A' in ' '.join(said['summary'])

def test_run_and_weights_side_by_side(runs):
    found = audit_files([runs/'plain'], [runs/'dropclass'/'weights.safetensors'], ['small'], progress=False)
    assert [o.label for o in found.networks]==['plain','weights'] and found.images==6

# ---- the command

def test_command(runs, tmp_path, command):
    code,out,err = command('audit', runs/'plain', '--max-images', 4, '--out', tmp_path/'a')
    assert code==0, err
    assert 'the weakest classes' in out.lower() and 'looked at 4 of 6 images' in out
    assert {o.name for o in (tmp_path/'a').glob('report.*')}=={'report.html','report.md','report.json'}
    code,_,err = command('audit', tmp_path/'nothing')
    assert code==2 and err.count('\n')==1 and 'is no run' in err
    code,_,err = command('audit', '--model', runs/'plain'/'weights.safetensors', '--data', 'scenes')
    assert code==2 and 'needs an architecture' in err

# ---- the page in a browser

@pytest.mark.skipif(chromium is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize('width', [360, 1280])
def test_page_fits_the_window(two, tmp_path, width):
    "Nothing but the tables' own scroll areas is wider than the window, and every picture is decoded."
    page = two.report(tmp_path/'r.html')[0].read_text()
    probe = """<iframe id=f style="width:%dpx;height:3000px;border:0"></iframe><script>
      const f = document.getElementById('f'); f.srcdoc = %s;
      f.onload = () => { const d = f.contentDocument, i = [...d.images];
        const seen = i.filter(o => o.complete && o.naturalWidth>0).length, tables = d.querySelectorAll('table').length;
        document.title = [d.documentElement.scrollWidth, i.length, seen, tables].join(' ') }</script>"""
    (tmp_path/'probe.html').write_text('<!doctype html><title>?</title>'
                                       +probe % (width, json.dumps(page).replace('</', '<\\/')), encoding='utf-8')
    res = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=8000',
                          f'--user-data-dir={tmp_path}/profile', '--dump-dom', f'file://{tmp_path}/probe.html'],
                          capture_output=True, text=True, timeout=120)
    scroll,images,decoded,tables = map(int, re.search(r'<title>(.*?)</title>', res.stdout)[1].split())
    assert scroll<=width and images==decoded>5 and tables>=6
