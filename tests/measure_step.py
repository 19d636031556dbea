"""Peak memory and time of one training step of the sparse SASFormer: labelled pixels only, with the affinity op, and
with stored maps.

Each form runs in a process of its own.
`python tests/measure_step.py --model sasformer_sparse_b0 --size 512 --out data/bench/cpu_sparse_step.csv`
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path


def stored(self, p, impl=None):
    "What the official code does: the averaged map of all blocks as a tensor, kept for the backward pass."
    maps = [
        ((q * self.scale) @ k.transpose(2, 3)).softmax(-1).mean(1) for q, k in zip(self.qs, self.ks)
    ]
    return (
        ((sum(maps) / len(maps)) @ p.flatten(2).transpose(1, 2))
        .transpose(1, 2)
        .unflatten(2, self.size)
    )


def step(form, model, size, threads):
    "One step in this process; prints peak and time."
    import resource
    import torch
    from segkern.models import create_model
    from segkern.ops.attention_maps import AttentionMaps

    torch.set_num_threads(threads)
    if form == "stored maps":
        AttentionMaps.propagate = stored
    m = create_model(model, 21, levels=0 if form == "labelled pixels only" else 4)
    x = torch.randn(1, 3, size, size)
    y = torch.full((1, size, size), 255)
    y[:, ::8, size // 4 : size // 2] = 3
    m(x[..., :64, :64], y[..., :64, :64])["loss"].backward()  # allocators, thread pools, gradients
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall = time.perf_counter()
    cpu = time.process_time()
    m(x, y)["loss"].backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            dict(
                peak_mb=peak - before,
                seconds=time.perf_counter() - wall,
                cpu_seconds=time.process_time() - cpu,
            )
        )
    )


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--model", default="sasformer_sparse_b0")
    a.add_argument("--size", type=int, default=512)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--repeats", type=int, default=3)
    a.add_argument("--out")
    a.add_argument("--form")
    o = a.parse_args()
    if o.form:
        return step(o.form, o.model, o.size, o.threads)
    import torch

    forms = ("labelled pixels only", "affinity op", "stored maps")
    rows = []
    runs = {f: [] for f in forms}
    for _ in range(o.repeats):
        for f in forms:
            out = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--form",
                    f,
                    "--model",
                    o.model,
                    "--size",
                    str(o.size),
                    "--threads",
                    str(o.threads),
                ],
                capture_output=True,
                text=True,
            )
            if out.returncode:
                raise SystemExit(out.stderr)
            runs[f].append(json.loads(out.stdout.splitlines()[-1]))

    def middle(f, k):
        return sorted(r[k] for r in runs[f])[len(runs[f]) // 2]

    base = middle(forms[0], "peak_mb")
    for f in forms:
        rows.append(
            dict(
                model=o.model,
                size=o.size,
                batch=1,
                form=f,
                peak_mb=round(middle(f, "peak_mb"), 1),
                over_labelled_only_mb=round(middle(f, "peak_mb") - base, 1),
                seconds=round(middle(f, "seconds"), 3),
                cpu_seconds=round(middle(f, "cpu_seconds"), 3),
                threads=o.threads,
                repeats=o.repeats,
                torch=torch.__version__,
                cpu=next(
                    (
                        line.split(":")[1].strip()
                        for line in Path("/proc/cpuinfo").read_text().splitlines()
                        if line.startswith("model name")
                    ),
                    platform.processor(),
                ),
                date=str(date.today()),
            )
        )
        print(rows[-1])
    if o.out:
        path = Path(o.out)
        old = [r for r in csv.DictReader(path.open())] if path.exists() else []
        old = [
            r
            for r in old
            if (r["model"], r["size"], r["threads"]) != (o.model, str(o.size), str(o.threads))
        ]
        with path.open("w", newline="") as f:
            w = csv.DictWriter(f, rows[0])
            w.writeheader()
            w.writerows(old + rows)


if __name__ == "__main__":
    main()
