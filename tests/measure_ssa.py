"""CPU time of SSAClassifier: the classifier as written and ours, and the teacher's step with loops over classes and
vectorised.

`python tests/measure_ssa.py --out data/bench/cpu_ssa.csv`; forms take turns in one process, one thread,
processor time, medians.
"""

import argparse
import csv
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from segkern.core import seeded
from segkern.backbones.blocks import set_literal
from segkern.losses.distill import boundary_cells, response_distillation
from segkern.models.ssa import SSAClassifier


def loops(net, feat, pos, y):
    "The teacher and its response loss class by class, as the reference does."
    w = net.seg.weight[:, :, 0, 0]
    b = net.basis.weight
    k = net.num_classes
    rows = feat.permute(0, 2, 3, 1)
    places = pos.permute(0, 2, 3, 1)
    sem = torch.stack([rows[y == c].mean(0) if (y == c).any() else w[c].detach() for c in range(k)])
    spa = torch.stack(
        [
            torch.stack(
                [
                    places[i][y[i] == c].mean(0) if (y[i] == c).any() else b[c].detach()
                    for c in range(k)
                ]
            )
            for i in range(len(y))
        ]
    )
    g = net.teacher.content(torch.cat([sem, w], -1))[None]
    h = net.teacher.place(torch.cat([spa, b.expand(len(y), -1, -1)], -1))
    z = net.teacher.out(g + h)
    f = (feat + pos).flatten(2)

    def unit(t, d):
        return t / (t.norm(dim=d, keepdim=True) + 1e-12)

    t = 15 * (unit(z, 2) @ unit(f, 1)).unflatten(2, feat.shape[2:])
    q = t.detach().softmax(1)
    e = boundary_cells(y)
    ok = y != 255
    goal = (q + F.one_hot(torch.where(ok, y, 0), k).permute(0, 3, 1, 2)) / 2
    ce = -(goal * t.log_softmax(1)).sum(1)
    weight = -(q * (q + 1e-12).log()).sum(1) * ok
    parts = [
        sum(
            (ce * weight)[(y == c) & m].sum() / (weight[(y == c) & m].sum() + 1e-12)
            for m in (e, ~e)
        )
        / 2
        for c in y.unique()
        if c != 255
    ]
    return t.mean() + sum(parts) / len(parts)


def ours(net, feat, pos, y):
    "The same with sums by class."
    t, *_ = net.teacher_output(feat, pos, y)
    return t.mean() + response_distillation(t, t.detach(), y)


def race(contenders, repeats):
    "Median processor seconds of each."
    seconds = {n: [] for n in contenders}
    for _ in range(repeats):
        for n, f in contenders.items():
            start = time.process_time()
            f()
            seconds[n].append(time.process_time() - start)
    return {n: statistics.median(s) for n, s in seconds.items()}


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--out")
    a.add_argument("--repeats", type=int, default=3)
    o = a.parse_args()
    torch.set_num_threads(1)
    rows = []
    size = (128, 128)
    for c, k in ((256, 150), (512, 150), (256, 19)):
        with seeded(0):
            net = SSAClassifier(k, c).eval()
            feat = torch.randn(1, c, *size)

        def run(literal):
            with torch.inference_mode():
                set_literal(net, literal)(feat)

        def plain():
            with torch.inference_mode():
                net.seg(feat)

        found = race(
            {"1x1 convolution": plain, "as written": lambda: run(True), "ours": lambda: run(False)},
            o.repeats,
        )
        rows += [
            dict(what="classifier, batch 1", classes=k, channels=c, form=n, seconds=round(v, 4))
            for n, v in found.items()
        ]
    with seeded(0):
        net = SSAClassifier(150, 256)
        feat = torch.randn(4, 256, *size)
        y = torch.randint(0, 150, (4, 16, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def step(f):
        x = feat.clone().requires_grad_()
        f(net, x, net.pos(x), y).backward()

    found = race({"loops over classes": lambda: step(loops), "ours": lambda: step(ours)}, o.repeats)
    rows += [
        dict(
            what="teacher step, batch 4, forward and backward",
            classes=150,
            channels=256,
            form=n,
            seconds=round(v, 3),
        )
        for n, v in found.items()
    ]
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    rows = [
        dict(
            **r,
            size="128x128",
            threads=1,
            repeats=o.repeats,
            torch=torch.__version__,
            cpu=cpu,
            date=str(date.today()),
        )
        for r in rows
    ]
    for r in rows:
        print(r)
    if o.out:
        with open(o.out, "w", newline="") as f:
            w = csv.DictWriter(f, rows[0])
            w.writeheader()
            w.writerows(rows)


if __name__ == "__main__":
    main()
