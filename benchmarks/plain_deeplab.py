"""Train torchvision's DeepLabV3 on scenes with plain PyTorch, and leave nothing but its weights.

    python benchmarks/plain_deeplab.py --out runs/deeplab.safetensors

Nothing of DropClass takes part in the training: it makes a network as anybody might have one, to audit from its weights
file alone:

    dropclass-audit --model runs/deeplab.safetensors --arch torchvision:deeplabv3_mobilenet_v3_large --data scenes
    --size 64x96
"""
import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from dropclass.data.scenes import scenes_dls


def settle_norms(model, batches):
    """Average the norms' statistics over the training images: MobileNet's momentum of 0.01 is made for far longer
    trainings."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        for x,_ in batches: model.train()(x.as_subclass(torch.Tensor))


def main():
    "Train and save."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--images', type=int, default=240)
    parser.add_argument('--size', type=int, nargs=2, default=(64,96), metavar=('HEIGHT','WIDTH'))
    args = parser.parse_args()
    torch.manual_seed(0)
    dls = scenes_dls(n_train=args.images, n_valid=8, size=tuple(args.size), bs=8, scale=(.75,1.5))
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=dls.c, aux_loss=True).train()
    steps = args.epochs*len(dls.train)
    opt = torch.optim.AdamW(model.parameters())
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=steps)
    for epoch in range(args.epochs):
        total = 0.
        for x,y in dls.train:
            x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
            out = model(x)
            loss = sum(w*F.cross_entropy(out[k], y, ignore_index=255) for k,w in (('out', 1.), ('aux', .4)))
            loss.backward()
            opt.step()
            opt.zero_grad()
            sched.step()
            total += loss.item()
        print(f"epoch {epoch+1}/{args.epochs}  loss {total/len(dls.train):.3f}", flush=True)
    settle_norms(model, dls.train)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k:v.contiguous() for k,v in model.state_dict().items()}, args.out)


if __name__=='__main__': main()
