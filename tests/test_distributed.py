"""Several processes: the parameters, the counts and the folder of one. All of them talk over the loopback, through
gloo, on the CPU."""
import multiprocessing as mp
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip('accelerate')
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from functools import partial
from safetensors.torch import load_file

from dropclass.rivals import FadeWeightsCallback
from dropclass.analysis.ablations import ablated
from dropclass.core import VOID, step_generator
from dropclass.run.distributed import RankDL, over_ranks, split_dl
from dropclass.run.config import Config
from dropclass.run.experiment import RunRecorder, load_run, train_run
from dropclass.features import dropped_class, sample_keep_mask
from dropclass.head import split_paths
from dropclass.surgery import add_dropclass, get_head
from dropclass.fold import fold_dropclass
from dropclass.losses import dropclass_loss
from dropclass.metrics import evaluate, segmentation_metrics
from dropclass.ranks import is_first, joined, num_ranks, pixel_shares, shared_weights
from dropclass.testing import ToyNet, toy_batch

# 10 images on each of 2 ranks, two steps an epoch
TINY = Config(epochs=3, size=(32,48), bs=4, data_options=dict(n_train=20, n_valid=5), threads=1)
STEPS,JOINED = 5,8 # Steps; images in the joined batch


# ---- processes

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def rank_main(job, rank, world, port, folder):
    "What one process does: join the others, do the job, keep what it found."
    # accelerate would set 2
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    torch.set_num_threads(1)
    with joined(): torch.save(job(Path(folder)), Path(folder)/f'{rank}.pt')


def on_ranks(job, world, folder, timeout=100):
    "Run a job in several processes; what each of them found."
    folder.mkdir(exist_ok=True)
    context = mp.get_context('forkserver') # One server imports fastai, once, and forks before any thread is started
    context.set_forkserver_preload(['dropclass.run.distributed', 'dropclass.run.experiment', 'dropclass.data.scenes',
                                    'dropclass.testing'])
    port = free_port()
    jobs = [context.Process(target=rank_main, args=(job, r, world, port, str(folder)), daemon=True)
            for r in range(world)]
    for p in jobs: p.start()
    for p in jobs: p.join(timeout)
    for p in jobs:
        if p.is_alive(): p.kill()
    assert [p.exitcode for p in jobs]==[0]*world
    return [torch.load(folder/f'{r}.pt', weights_only=False) for r in range(world)]


# ---- five steps

class FrozenNorms(Callback):
    "Keeps every BatchNorm in evaluation mode."
    reads_pred = False # So that the variants below take the route that they name
    def before_train(self): self.freeze(self.model)
    @staticmethod
    def freeze(model):
        for o in model.modules():
            if isinstance(o, nn.modules.batchnorm._BatchNorm): o.eval()
    def before_backward(self): self.learn.loss = self.loss.float() # fastai's running mean takes no float64


def images(n, seed=0):
    "Labelled images whose classes are unevenly spread, in float64."
    x,y = toy_batch(n, seed=seed)
    y[::3] = y[::3].clamp(max=1) # Every third image lacks two classes
    y[1::5,4:] = VOID # and of every fifth most is void
    return list(zip(x.double(), y))


VARIANTS = {'fused':dict(), 'stacked':dict(fused=False), 'lam 0':dict(lam=0., drop_prob=0.), 'lam 1':dict(lam=1.),
            'lam 0, stacked':dict(lam=0., drop_prob=0., fused=False),
            'lam 1, stacked':dict(lam=1., fused=False), 'one path a step':dict(paths='sample'),
            'a class that is present':dict(draw='present'), 'all pixels':dict(normalize='all'),
            'weights in Eq. (6)':dict(masked_weights=True),
            'weights in Eq. (6), stacked':dict(masked_weights=True, fused=False), 'weights that fade':None,
            'weights that fade, a rank of void':None, 'plain':None, 'plain, a rank of void':None,
            'a rank of void':dict(), "fastai's context":dict(), "fastai's context, weights that fade":None}


def drop_class(options):
    "The callback, or the ablation that the options name."
    cls,options = ablated(options)
    return cls(**options)


def training_context(variant, learn):
    "fastai's own or ours; fastai's sends the indices through a GPU, which is not there."
    if not variant.startswith("fastai's context") or num_ranks()==1: return over_ranks(learn, sync_bn=False)
    DistributedDL._broadcast = RankDL._broadcast
    return learn.distrib_ctx(sync_bn=False, cpu=True)


def five_steps(variant, ranks=1):
    "Train five steps on one process, on the batches that `ranks` processes see together, or on all of them."
    items,each = images(STEPS*JOINED),JOINED//max(ranks, num_ranks())
    if 'a rank of void' in variant:
        for _,y in items[:each]: y.fill_(VOID) # All that the first rank sees in the first step
    if num_ranks()==1:
        items = [items[r*STEPS*each+t*each+i] for t in range(STEPS) for r in range(ranks) for i in range(each)]
    bs = JOINED//num_ranks()
    dls = DataLoaders(DataLoader(items, bs=bs, drop_last=True), DataLoader(items[:5], bs=2))
    torch.manual_seed(0)
    model = ToyNet().double()
    options = VARIANTS[variant]
    cbs = [FrozenNorms(), *([FadeWeightsCallback()] if 'fade' in variant else []),
           *([] if options is None else [drop_class({'drop_prob':1., **options})])]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([.5, 1., 2., 3.]).double(), ignore_index=VOID)
    learn = Learner(dls, model, loss, lr=.05, opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)),
                    cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda *args: None
    with training_context(variant, learn): learn.fit(1)
    found = dict(model=model.state_dict(), loss=float(learn.recorder.values[-1][0]),
                 columns=list(learn.recorder.values[-1][2:]))
    if options is not None: found['dropped'] = list(learn.drop_class.history.dropped_class)
    return found


def plain_loop(ranks=1):
    "The same without fastai: the head in a network that PyTorch wraps, as the page on many machines has it."
    items,each = images(STEPS*JOINED),JOINED//ranks
    torch.manual_seed(0)
    model = ToyNet().double()
    head = add_dropclass(model, 4)
    FrozenNorms.freeze(model)
    net = DistributedDataParallel(model) if num_ranks()>1 else model
    opt,ce = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9),nn.CrossEntropyLoss(ignore_index=VOID)
    for step in range(STEPS):
        members = [dist.get_rank()] if num_ranks()>1 else range(ranks)
        x,y = (torch.stack([items[r*STEPS*each+step*each+i][k] for r in members for i in range(each)]) for k in (0,1))
        keep_mask,lam = sample_keep_mask(4, 1., step_generator(0, step)),step/STEPS
        with head.dropping(keep_mask): logits,drop_logits = split_paths(net(x), len(x))
        factor,lam_,alpha_ = shared_weights(lam, 10., *pixel_shares(y, ce, dropped_class(keep_mask)))
        (factor*dropclass_loss(logits, drop_logits, y, keep_mask, lam_, alpha_, ce)).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def all_variants(folder): return {**{o:five_steps(o) for o in VARIANTS}, 'loop':plain_loop(num_ranks())}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "What 4 ranks found, and how many they were; the runs below have 2."
    return on_ranks(all_variants, 4, tmp_path_factory.mktemp('steps')),4


@pytest.mark.parametrize('variant', VARIANTS)
def test_five_steps_equal_those_of_one_process_on_the_joined_batch(trained, variant):
    found,ranks = trained
    one = five_steps(variant, ranks)
    start = dict(ToyNet().double().named_parameters())
    for rank in found:
        assert rank[variant]['model'].keys()==one['model'].keys()
        for k,v in one['model'].items(): assert (rank[variant]['model'][k]-v).abs().max()<=1e-9, k
        assert abs(rank[variant]['loss']-one['loss'])<1e-5 # What is logged is the joined batch's too
        assert rank[variant]['columns'][:3]==pytest.approx(one['columns'][:3], abs=1e-5, nan_ok=True)
    if VARIANTS[variant] is not None:
        # The same classes, on all ranks and on one
        assert len({tuple(o[variant]['dropped']) for o in [*found, {variant:one}]})==1
        if 'lam 0' not in variant: assert None not in one['dropped'] and len(one['dropped'])==STEPS
    assert any((v-start[k]).abs().max()>1e-3 for k,v in one['model'].items() if k in start)


def test_a_plain_loop_takes_the_same_steps(trained):
    found,ranks = trained
    one = plain_loop(ranks)
    for rank in found:
        for k,v in one.items(): assert (rank['loop'][k]-v).abs().max()<=1e-9, k


# ---- SyncBatchNorm

class TwoTails(nn.Module):
    "A network whose logits depend on the image behind the head too, so that its tail runs twice."
    def __init__(self):
        super().__init__()
        self.net,self.norm,self.skip = ToyNet(),nn.BatchNorm2d(4),nn.Conv2d(3, 4, 1)
    def forward(self, x): return self.norm(self.net(x))+self.skip(x)


@pytest.mark.parametrize('network', [ToyNet, TwoTails])
def test_synchronised_norms_change_no_number_on_one_process(network):
    "What a GPU run converts to before the fit, and keeps after it."
    torch.manual_seed(0)
    x,model = toy_batch()[0],network()
    head = add_dropclass(model, 4, classifier=None if network is ToyNet else 'net.classifier', predict='drop')
    keys,before = list(model.state_dict()),both_paths(model, head, x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(o, nn.SyncBatchNorm) for o in get_head(synced).modules())
    assert list(synced.state_dict())==keys
    for a,b in zip(both_paths(synced, get_head(synced), x), before): assert torch.equal(a, b)
    if get_head(synced).form=='autograd': return # Nothing to fold
    with torch.no_grad():
        out = synced.eval()(x)
        assert (fold_dropclass(synced)(x)-out).abs().max()<1e-5


def both_paths(model, head, x):
    "Logits of both paths, in training mode with frozen norms."
    FrozenNorms.freeze(model.train())
    with head.dropping(torch.tensor([1., 0., 1., 1.])): return [o.detach() for o in split_paths(model(x), len(x))]


# ---- shards

LENGTHS = [(n, bs, drop) for n in (1, 5, 8, 19) for bs in (1, 2, 4) for drop in (False, True)]


def count_images(folder):
    """Confusion matrices of several data sets, by `evaluate` and by the metrics of a fit, and how many batches each
    rank really had."""
    torch.manual_seed(0)
    model = ToyNet()
    counts,batches = {},{}
    for n in (1, 5, 6):
        data = toy_batch(n, seed=n)
        valid = DataLoader(list(zip(*data)), bs=2)
        counts[n] = evaluate(model, split_dl(valid), 4)
        train = DataLoader(list(zip(*toy_batch(8))), bs=2, drop_last=True)
        learn = Learner(DataLoaders(train, valid), model, nn.CrossEntropyLoss(ignore_index=VOID), lr=0.,
                        metrics=segmentation_metrics(4))
        learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
        learn.logger = lambda *args: None
        with over_ranks(learn): learn.fit(1, cbs=[FrozenNorms()])
        counts[f'fit {n}'] = learn.metrics[0].counts.total
    for n,bs,drop in LENGTHS:
        dl = split_dl(DataLoader(list(range(n)), bs=bs, drop_last=drop))
        batches[n,bs,drop] = (len(dl), len(list(dl)))
    return counts,batches


def test_every_image_counts_once(tmp_path):
    one,_ = count_images(tmp_path)
    for world in (2, 4):
        for counts,batches in on_ranks(count_images, world, tmp_path/str(world)):
            for k in one: assert torch.equal(counts[k], one[k]), k
            for k,(said,had) in batches.items(): assert said==had, (world, k)
    assert one[5].sum()==one['fit 5'].sum()==5*(256-4) # 4 pixels of each image are void


# ---- runs

class PowerCut(Callback):
    "Ends a fit in the middle of an epoch."
    order,reads_pred = RunRecorder.order+5,False
    def before_batch(self):
        if self.training and self.epoch==2 and self.iter==1: raise RuntimeError('power cut')


def mine(folder): return folder/f"run {os.environ['RANK']}" # A folder of its own for each rank shows who writes


def runs(folder):
    "A whole run, one that is cut and resumed, and what is refused."
    found,lines = {},[]
    train = partial(train_run, progress=False, write=lines.append)
    for name in ('whole', 'cut', 'occupied'): (folder/name).mkdir(exist_ok=True)
    found['result'] = type(train(TINY, mine(folder/'whole'))).__name__
    found['lines'] = len(lines)
    try: train(TINY, mine(folder/'cut'), cbs=[PowerCut()])
    except RuntimeError: pass
    torch.rand(3) # The world goes on between the two halves
    train(TINY, mine(folder/'cut'), resume=True)
    if is_first():
        (folder/'occupied'/'run 0').mkdir()
        (folder/'occupied'/'run 0'/'a').write_text('b')
    try: train(TINY, mine(folder/'occupied'))
    except FileExistsError as e: found['refused'] = str(e)
    return found


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    return folder,on_ranks(runs, 2, folder)


def test_only_the_first_rank_writes_and_prints(folders):
    folder,found = folders
    assert [o['result'] for o in found]==['Run', 'NoneType']
    assert [o['lines'] for o in found]==[3, 0]
    assert [o.name for o in (folder/'whole').iterdir()]==['run 0']==[o.name for o in (folder/'cut').iterdir()]
    assert all('is not empty, it holds a' in o['refused'] for o in found)


def test_run_of_two_ranks_resumes_bit_for_bit(folders):
    folder,_ = folders
    whole,cut = (folder/o/'run 0' for o in ('whole', 'cut'))
    a,b = (load_file(o/'weights.safetensors') for o in (whole, cut))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert load_run(whole).history.equals(load_run(cut).history)
    assert (whole/'confusion.json').read_text()==(cut/'confusion.json').read_text()


def test_resuming_with_another_number_of_processes_is_refused(folders):
    folder,_ = folders
    (folder/'cut'/'run 0'/'metrics.json').unlink()
    with pytest.raises(ValueError, match='by 2 processes, now there are 1'):
        train_run(TINY, folder/'cut'/'run 0', resume=True, progress=False)


def test_run_counts_what_its_weights_predict(folders):
    "The sums over ranks in the folder are those of one process with the same weights."
    from dropclass.run.experiment import make_data
    run = load_run(folders[0]/'whole'/'run 0')
    counts = evaluate(run.load_model(), make_data(TINY).valid, len(run.spec))
    assert torch.equal(run.confusion('valid'), counts)
    assert run.history.miou.iloc[-1]==pytest.approx(run.metrics['tests']['valid'][run.predicts]['miou'])


# ---- commands

LAUNCHERS = {'torchrun':['torch.distributed.run', '--standalone', '--local-addr', 'localhost', '--nproc-per-node', '2'],
             'accelerate':['accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', '2']}


@pytest.mark.parametrize('launcher', ['torchrun', pytest.param('accelerate', marks=pytest.mark.slow)])
def test_launchers_start_dropclass_train(tmp_path, launcher):
    out,(module,*options) = tmp_path/'run',LAUNCHERS[launcher]
    if launcher=='accelerate': options += ['--main_process_port', str(free_port())]
    command = ['dropclass.run.cli', 'scenes', '--epochs', '2', '--bs', '4', '--size', '32x48', '--data-options',
               'n_train=20,n_valid=5', '--threads', '1', '--out', str(out)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'GLOO_SOCKET_IFNAME':'lo'}
    res = subprocess.run([sys.executable, '-m', module, *options, '-m', *command], env=env, text=True,
                         capture_output=True, timeout=120)
    assert res.returncode==0, res.stderr
    assert len(re.findall('^Training dropclass on scenes.*2 processes', res.stdout, re.M))==1
    assert len(re.findall(r'^epoch +\d/2', res.stdout, re.M))==2
    one = train_run(replace(TINY, epochs=1), tmp_path/'one', progress=False, write=lambda o: None)
    run = load_run(out)
    assert list(run.history)==list(one.history)
    assert sorted(o.name for o in out.iterdir())==sorted(o.name for o in one.folder.iterdir())
    assert sorted(o.name for o in tmp_path.iterdir())==['one', 'run']
