"Metrics against torchmetrics, over two processes, and in an exported Learner."
import multiprocessing as mp
import warnings

import pytest
import torch

from dropclass.core import VOID
from dropclass.metrics import (ConfusionCounts, CountsMetric, class_iou, confusion_matrix, evaluate, mean_iou,
                               pixel_accuracy, segmentation_metrics)
from dropclass.testing import ToyNet, toy_batch

torchmetrics = pytest.importorskip('torchmetrics')

def draw(seed, num_classes, absent, n=3, size=17):
    "Random logits and labels with void pixels, and classes that occur nowhere."
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, size, size+4, generator=gen)
    logits[:, list(absent)] = -100.
    kept = torch.tensor([c for c in range(num_classes) if c not in absent])
    target = kept[torch.randint(len(kept), (n, size, size+4), generator=gen)]
    target[torch.rand(target.shape, generator=gen)<.2] = VOID
    return logits,target

@pytest.mark.parametrize('seed,num_classes,absent', [(0,2,()), (1,5,(2,)), (2,12,(0,11)), (3,19,(3,4,7,15)), (4,19,())])
def test_equals_torchmetrics(seed, num_classes, absent):
    logits,target = draw(seed, num_classes, absent)
    kwargs = dict(num_classes=num_classes, ignore_index=VOID)
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(average='none', zero_division=torch.nan, **kwargs)
    accuracy = torchmetrics.classification.MulticlassAccuracy(average='micro', **kwargs)
    table = torchmetrics.classification.MulticlassConfusionMatrix(**kwargs)
    total = 0
    for rows in (slice(0,1), slice(1,None)): # two batches of different size
        for metric in (jaccard, accuracy, table): metric.update(logits[rows], target[rows])
        total = total+confusion_matrix(logits[rows], target[rows], num_classes)
    assert torch.equal(total, table.compute())
    iou = class_iou(total)
    assert iou.isnan().nonzero().flatten().tolist()==list(absent)
    assert torch.equal(iou.isnan(), jaccard.compute().isnan())
    torch.testing.assert_close(iou, jaccard.compute().double(), rtol=1e-6, atol=0, equal_nan=True)
    assert pixel_accuracy(total)==pytest.approx(float(accuracy.compute()), rel=1e-6)
    assert mean_iou(total)==pytest.approx(float(jaccard.compute().nanmean()), rel=1e-6)

def test_class_only_predicted_has_no_iou():
    "A class that is predicted but never true is 0 in torchmetrics; here it counts in no mean."
    pred,target = torch.tensor([[0,1,2]]),torch.tensor([[0,1,1]])
    options = dict(ignore_index=VOID, average='none', zero_division=torch.nan)
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(4, **options)
    iou = class_iou(confusion_matrix(pred, target, 4))
    expected = jaccard(pred, target).double()
    assert expected[2]==0 and iou[2:].isnan().all()
    torch.testing.assert_close(iou[:2], expected[:2])
    assert mean_iou(confusion_matrix(pred, target, 4))==expected[:2].mean()

def test_a_class_that_is_void_counts_in_no_mean():
    "Void as one of the classes, as fastai's CamVid has it: what torchmetrics' macro mean says, predicted or not."
    logits,target = draw(3, 5, ())
    target[target==4] = VOID
    target[target==VOID] = 4
    for predicted in (True, False):
        if not predicted: logits[:,4] = -100.
        jaccard = torchmetrics.classification.MulticlassJaccardIndex(5, ignore_index=4, average='macro')
        counts = confusion_matrix(logits, target, 5, ignore_index=4)
        assert (counts[:,4].sum()>0)==predicted
        assert mean_iou(counts, ignore_index=4)==pytest.approx(float(jaccard(logits, target)), rel=1e-6)
        miou = segmentation_metrics(5, ignore_index=4)[0]
        miou.counts.add(logits, target)
        assert miou.value==mean_iou(counts, ignore_index=4)

def test_no_metric_takes_a_diverged_network_for_class_0():
    logits,target = draw(0, 4, ())
    logits[0,:,3,3] = torch.nan
    learn = make_learner(segmentation_metrics(4))
    with torch.no_grad(): next(learn.model.parameters()).fill_(torch.nan)
    for count in (lambda: confusion_matrix(logits, target, 4), lambda: evaluate(learn.model, learn.dls.valid, 4),
                  learn.validate):
        with pytest.raises(ValueError, match='NaN.*diverged'): count()

def test_all_void_and_one_image():
    counts = confusion_matrix(torch.randn(1, 3, 4, 4), torch.full((1,4,4), VOID), 3)
    assert counts.shape==(3,3) and counts.sum()==0
    assert torch.tensor(mean_iou(counts)).isnan()

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_integer_types(dtype):
    "uint8 labels must not overflow in label*C+prediction."
    target = torch.tensor([[18,17,VOID]], dtype=dtype)
    counts = confusion_matrix(torch.tensor([[18,0,1]], dtype=dtype), target, 19)
    assert counts[18,18]==1 and counts[17,0]==1 and counts.sum()==2

def test_other_void_label():
    counts = confusion_matrix(torch.tensor([0,1]), torch.tensor([0,-100]), 2, ignore_index=-100)
    assert counts.tolist()==[[1,0],[0,0]]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda():
    logits,target = draw(0, 19, (3,))
    counts = confusion_matrix(logits.cuda(), target.cuda(), 19)
    assert counts.is_cuda
    assert torch.equal(counts.cpu(), confusion_matrix(logits, target, 19))

def _rank(rank, path, results):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)
    logits,target = draw(7, 5, (2,), n=4)
    counts = ConfusionCounts(5)
    mine = slice(0,3) if rank==0 else slice(3,4)
    counts.add(logits[mine], target[mine])
    # the second reading must not add the ranks up once more
    first,again = CountsMetric(counts, 'miou', mean_iou).value,counts.total
    results.put((rank, first, again.tolist()))
    dist.destroy_process_group()

def test_sum_over_two_processes(tmp_path):
    ctx = mp.get_context('spawn')
    results = ctx.Queue()
    ranks = [ctx.Process(target=_rank, args=(r, tmp_path/'store', results)) for r in range(2)]
    for o in ranks: o.start()
    got = [results.get(timeout=120) for _ in ranks]
    for o in ranks: o.join(30)
    logits,target = draw(7, 5, (2,), n=4)
    expected = confusion_matrix(logits, target, 5)
    for _,value,counts in got:
        assert counts==expected.tolist()
        assert value==mean_iou(expected)

def _image(i): return toy_batch(n=1, seed=i)[0][0]
def _label(i): return toy_batch(n=1, seed=i)[1][0]

def make_learner(metrics, **kwargs):
    "A Learner on real fastai Datasets, which can be exported."
    from fastai.data.core import Datasets
    from fastai.learner import Learner
    torch.manual_seed(0)
    dls = Datasets(list(range(10)), [[_image],[_label]],
                   splits=[list(range(6)), list(range(6,10))]).dataloaders(bs=3, num_workers=0, device='cpu')
    learn = Learner(dls, ToyNet(4), torch.nn.CrossEntropyLoss(ignore_index=VOID), metrics=metrics, lr=.01, **kwargs)
    learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])
    learn.logger = lambda *args: None
    return learn

def test_exported_learner(tmp_path):
    from fastai.learner import load_learner
    learn = make_learner(segmentation_metrics(4, pixel_counts=[4,3,2,1]))
    learn.fit(1)
    counts = evaluate(learn.model, learn.dls.valid, 4)
    expected = [mean_iou(counts), mean_iou(counts, [3,2]), pixel_accuracy(counts)]
    assert list(learn.recorder.values[-1][2:])==pytest.approx(expected)
    learn.path = tmp_path
    learn.export('toy.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'toy.pkl')
    assert again.metrics[0].counts is again.metrics[2].counts
    dl = again.dls.test_dl(list(range(6,10)), with_labels=True)
    assert list(again.validate(dl=dl))[1:]==pytest.approx(expected)

def test_train_metrics_do_not_leak_into_validation():
    "Training and validation use the same metric objects, one after the other."
    learn = make_learner(segmentation_metrics(4))
    learn.recorder.train_metrics = True
    learn.fit(1)
    counts = evaluate(learn.model, learn.dls.valid, 4)
    names,values = learn.recorder.metric_names[1:-1],learn.recorder.values[-1]
    assert dict(zip(names, values))['valid_miou']==pytest.approx(mean_iou(counts))

def test_a_subset_of_the_metrics_counts_alone():
    metrics = segmentation_metrics(4)
    learn = make_learner(metrics[1:])
    learn.fit(2)
    assert learn.recorder.values[-1][-1]==pytest.approx(pixel_accuracy(evaluate(learn.model, learn.dls.valid, 4)))

def test_save_model_follows_the_metric(tmp_path):
    from fastai.callback.tracker import SaveModelCallback
    learn = make_learner(segmentation_metrics(4), path=tmp_path)
    learn.fit(3, cbs=SaveModelCallback(monitor='miou'))
    best = max(o[2] for o in learn.recorder.values)
    assert mean_iou(evaluate(learn.model, learn.dls.valid, 4))==pytest.approx(best)
