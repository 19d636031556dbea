"""CamVid from scratch at 480x360, three networks one after the other: the first real accuracy of this code on a GPU.

    python3 tests/gpu_train.py --data FOLDER --out OUT [--budget 400] [--networks segformer_b0,segnext_t,pidnet_s]
    python3 tests/gpu_train.py --data FOLDER --out OUT --device cpu --tiny        a dry run on a few pictures

bf16, channels_last, the library's own recipes with as many steps as fit into the time. Writes train.json, curves.csv,
report.md, log.txt and NAME.safetensors (float16) for every network; one that is killed at its budget leaves its best
weights so far. The parent imports nothing but the standard library.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZE = (360, 480)
# from scratch; the recipes' own are for trained encoders
RATES = dict(segformer_b0=3e-4, segnext_t=3e-4, pidnet_s=1e-2)


class Held:
    "A dataset in memory: reading files would be half of the time."

    def __init__(self, dataset, count=None):
        self.dataset = dataset
        self.files = dataset.files[:count]
        self.items = [dataset[i] for i in range(len(self.files))]

    def __getattr__(self, name):
        # while it is copied to a loader's process
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def recipe_of(name, tiny):
    "The network's own recipe at this size, from scratch."
    from segkern.core import recipe_for

    own = recipe_for(name, "camvid")
    frame = (
        dict(base_size=SIZE[1])
        if own.base_size
        else dict(fit_size=(SIZE[1], SIZE[0]))
        if own.fit_size
        else {}
    )
    small = (
        dict(batch=2, crop=(64, 64), mixed_precision="no")
        if tiny
        else dict(batch=16, crop=SIZE, mixed_precision="bf16")
    )
    return own.replace(
        init="scratch",
        split="train",
        val_split="val",
        lr=RATES.get(name, own.lr),
        source="ours: from scratch",
        **frame,
        **small,
    )


def seconds_per_step(model, recipe, train_set, device, workers, out):
    "From two short runs, of which the first pays for compilation and warm-up."
    from segkern.train import fit

    times = []
    for steps in (10, 40):
        start = time.perf_counter()
        trial = recipe.replace(iterations=steps, warmup=0)
        fit(
            model,
            trial,
            train_set,
            None,
            out / f"trial{steps}",
            device=device,
            workers=workers,
            eval_every=0,
            save_every=0,
        )
        times.append(time.perf_counter() - start)
    return times[1] / 40  # an upper bound: it starts loaders too


def train(name, data, out, seconds, device, tiny):
    "One network, in this process."
    start = time.perf_counter()
    import torch
    import segkern
    from segkern.train import fit

    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    recipe = recipe_of(name, tiny)
    workers = 0 if tiny else min(8, os.cpu_count() or 1)
    sets = [
        Held(segkern.open_dataset("camvid", root=data, split=split), 4 if tiny else None)
        for split in ("train", "val")
    ]

    def new():
        return segkern.create_model(name, num_classes=11, dataset="camvid").to(
            device=device, memory_format=torch.channels_last
        )

    steps = 4
    if not tiny:
        each = seconds_per_step(new(), recipe, sets[0], device, workers, out)
        # the rest is for five evaluations
        steps = max(40, int(0.85 * (seconds - (time.perf_counter() - start)) / each))
    recipe = recipe.replace(iterations=steps, warmup=min(recipe.warmup, steps // 20))
    print(f"{name}: {steps} steps of {recipe.batch}", flush=True)
    model = new()
    every = max(1, steps // 5)
    found = fit(
        model,
        recipe,
        *sets,
        out / "run",
        device=device,
        workers=workers,
        eval_every=every,
        save_every=0,
        log_every=max(1, steps // 50),
        eval_args=dict(batch=1 if tiny else 8),
    )
    print(json.dumps(dict(found=str(found)[:500])), flush=True)


def collect(name, out, folder):
    "Weights in half precision, and what was measured, of a run that ended or was killed."
    from segkern.train import history, run_weights
    from segkern.weights import read_safetensors, write_safetensors

    run = out / "run"
    lines = history(run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    state, about = read_safetensors(run_weights(run))
    half = {k: t.half() if t.is_floating_point() else t for k, t in state.items()}
    write_safetensors(half, folder / f"{name}.safetensors", about)
    values = [
        dict(step=r["step"], miou=r["val"]["miou"], pixel_acc=r["val"]["pixel_acc"])
        for r in lines
        if "val" in r
    ]
    last = next((r for r in reversed(lines) if "val" in r), {}).get("val", {})
    best = max((v["miou"] or 0.0 for v in values), default=None)
    facts = dict(
        network=name,
        steps=lines[-1]["step"] if lines else 0,
        planned=config["recipe"]["iterations"],
        batch=config["recipe"]["batch"],
        best_miou=best,
        last=last,
        curve=lines,
        evaluations=values,
        finished=(run / "results.json").exists(),
    )
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def child(a, *options, seconds):
    "This program in another process; returns how it ended."
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--data",
        str(a.data),
        "--out",
        str(a.out),
        "--device",
        a.device,
        *options,
    ]
    if a.tiny:
        command.append("--tiny")
    env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", MPLBACKEND="Agg")
    with open(Path(a.out) / "log.txt", "ab") as log:
        try:
            code = subprocess.run(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=max(1.0, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            return "killed at its budget"
    return "finished" if code == 0 else f"failed with code {code}"


def write(out, rows):
    "train.json, curves.csv and the report."
    (out / "train.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [
        dict(
            network=r["network"],
            **{k: v for k, v in line.items() if k != "val"},
            miou=line.get("val", {}).get("miou"),
        )
        for r in rows
        for line in r.get("curve", ())
    ]
    names = list(dict.fromkeys(n for line in lines for n in line))
    with open(out / "curves.csv", "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, names, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
    text = [
        "# CamVid from scratch, 480x360, validation split",
        "|network|status|steps|best mIoU|last mIoU|pixel accuracy|seconds|",
        "|---|---|---|---|---|---|---|",
    ]

    def number(v):
        return "-" if v is None else f"{v:.4f}"

    for r in rows:
        last = r.get("last", {})
        steps = f"{r.get('steps', 0)} of {r.get('planned', '?')}"
        scores = [number(v) for v in (r.get("best_miou"), last.get("miou"), last.get("pixel_acc"))]
        text.append(
            "|" + "|".join([r["network"], r["status"], steps, *scores, f"{r['seconds']:.0f}"]) + "|"
        )
    (out / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return "\n".join(text)


def main(a):
    "Every network in a process of its own, killed at its share of the budget."
    import shutil
    import tempfile

    out = Path(a.out).resolve()
    start = time.monotonic()
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("", encoding="utf-8")
    names = a.networks.split(",")
    for i, name in enumerate(names):
        work = Path(tempfile.mkdtemp(prefix="segkern_train_"))
        began = time.monotonic()
        left = a.budget - (time.monotonic() - start)
        seconds = left / (len(names) - i) - 15  # what collecting takes
        status = child(
            a, "--one", name, "--work", str(work), "--seconds", str(seconds - 5), seconds=seconds
        )
        kept = child(a, "--collect", name, "--work", str(work), seconds=60)
        facts = (
            json.loads((work / "facts.json").read_text(encoding="utf-8"))
            if (work / "facts.json").exists()
            else {}
        )
        if kept != "finished":
            status += f"; weights were not written: {kept}"
        rows.append(dict(network=name, status=status, seconds=time.monotonic() - began) | facts)
        text = write(out, rows)
        shutil.rmtree(work, ignore_errors=True)
    print(text)
    return 0 if all(r["status"] in ("finished", "killed at its budget") for r in rows) else 1


def arguments():
    "The command line; --one and --collect are for the processes that it starts."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", required=True, help="CamVid's folder")
    p.add_argument("--out", default="runs/gpu_train")
    p.add_argument("--budget", type=float, default=400, help="seconds")
    p.add_argument("--networks", default=",".join(RATES))
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="four pictures, four steps, small crops")
    for name in ("--one", "--collect", "--work"):
        p.add_argument(name, default="", help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    return p.parse_args()


if __name__ == "__main__":
    args = arguments()
    if args.one:
        sys.exit(train(args.one, args.data, Path(args.work), args.seconds, args.device, args.tiny))
    if args.collect:
        sys.exit(collect(args.collect, Path(args.work), Path(args.out)))
    sys.exit(main(args))
