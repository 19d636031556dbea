"""A toy dataset, model and training run for test_train.py; run as a script it is the process that gets killed."""

import argparse
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from segkern.core import IGNORE, seeded
from segkern.core import STREETS
from segkern.train import fit, generator

RECIPE = STREETS.replace(
    batch=4, iterations=24, lr=0.02, warmup=5, crop=(24, 32), ema=0.9, clip=5.0, bn_eps=1e-3
)


class Discs:
    "Small pictures of one disc, deterministic by index; the corner is void."

    name = "discs"
    classes = ["ground", "red", "blue"]
    class_weights = [1.0, 2.0, 3.0]
    palette = [[90, 90, 90], [200, 40, 40], [40, 40, 200]]

    def __init__(self, n=22, split="train", void=False):
        self.n = n
        self.split = split
        self.void = void
        self.files = [(f"{split}/{i:03}.png", None) for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        g = generator(0, i, len(self.split))
        y, x = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
        cy, cx, kind = (
            int(torch.randint(a, b, (), generator=g)) for a, b in ((6, 18), (6, 26), (1, 3))
        )
        target = torch.where((y - cy) ** 2 + (x - cx) ** 2 < 30, kind, 0).to(torch.uint8)
        image = torch.tensor(self.palette).T[:, target.long()] + torch.randint(
            -30, 30, (3, 24, 32), generator=g
        )
        image = image.clamp(0, 255).to(torch.uint8)
        target[:3, :3] = IGNORE
        return image, torch.full_like(target, IGNORE) if self.void else target


def noisy(image, target, g):
    "Normalise, flip half of the images, add noise: everything from the given generator."
    x = STREETS.preprocess(image) + torch.randn(image.shape, generator=g)
    return (x.flip(-1), target.flip(-1)) if torch.rand((), generator=g) < 0.5 else (x, target)


class Toy(nn.Module):
    "Three convolutions with batch norm and dropout."

    name = "toy"

    def __init__(self, k=3, width=12, norm=True, hook=None):
        super().__init__()
        self.num_classes = k
        self.hook = hook
        self.calls = 0

        def block(i, o, s):
            return nn.Sequential(
                nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o) if norm else nn.Identity(), nn.ReLU()
            )

        self.net = nn.Sequential(
            block(3, width, 2),
            block(width, width, 1),
            nn.Dropout(0.2 if norm else 0.0),
            nn.Conv2d(width, k, 1),
        )
        self.register_buffer("class_weights", None, persistent=False)

    def upsample(self, x, size):
        return F.interpolate(x, size, mode="bilinear")

    def predict(self, x, size=None):
        assert not self.training
        return self.upsample(self(x), size or x.shape[-2:]).argmax(1).to(torch.uint8)

    def forward(self, x, target=None):
        logits = self.net(x)
        if target is None:
            return logits
        self.calls += 1
        if self.hook:
            self.hook(self.calls)
        full = self.upsample(logits, target.shape[-2:])
        loss = F.cross_entropy(
            full, target.long(), self.class_weights, ignore_index=IGNORE, reduction="sum"
        )
        loss = loss / (target != IGNORE).sum().clamp(min=1)
        return dict(loss=loss, half=loss.detach() / 2)


def toy(**kw):
    "A toy with the same weights every time."
    with seeded(0):
        return Toy(**kw)


def run(out, model=None, recipe=RECIPE, train=None, val=None, **kw):
    "The training that the tests compare: 24 steps, a checkpoint every 5, an evaluation every 8."
    kw = dict(device="cpu", save_every=5, eval_every=8, log_every=3, transform=noisy) | kw
    return fit(model or toy(), recipe, train or Discs(), val or Discs(5, "val"), out, **kw)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("--mode", choices=["slow", "rename", "full", "ddp"])
    a = p.parse_args()
    # bits hold for one number of threads
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # waits in step 13 until it is killed from outside; its loader processes live on for a while
    if a.mode == "slow":
        run(
            a.out,
            toy(hook=lambda n: n == 13 and ((a.out / "waiting").touch(), time.sleep(60))),
            workers=2,
        )
    # dies between the temporary folder of the third checkpoint and its place
    if a.mode == "rename":
        replace = os.replace

        def deadly(src, dst):
            if "step_00000015" in str(dst):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(src, dst)

        os.replace = deadly
        run(a.out)
    if a.mode == "full":  # no file may grow beyond 20 kB from step 12 on

        def limit(n):
            return n == 12 and resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        try:
            run(a.out, toy(width=32, hook=limit))
        except OSError as e:
            sys.exit(f"stopped: {e}")
    if a.mode == "ddp":
        run(a.out, toy(norm=False), RECIPE.replace(bn_eps=1e-5, clip=0.0, ema=0.0))


if __name__ == "__main__":
    main()
