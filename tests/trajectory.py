"""Eight optimizer steps of the official trainers, repeated by ours.

`python tests/trajectory.py` shows how far apart they are.
"""

import contextlib
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from segkern.core import load_table, progress, recipe_for, Table
from segkern.models import create_model, s2fpn_blocks
from segkern.testing import fixture, make_input, relative_l2
from segkern.train.loop import set_rate
from segkern.train.start import prepare_model
from segkern.train.step import accelerator_for, forward_backward, optimizer_step, start_run
from segkern.weights import load_official

# fixture -> the model that our recipes know, the dataset of the recipe
RUNS = {
    "train_s2fpn_camvid": ("s2fpn_r18", "camvid"),
    "train_s2fpn_cityscapes": ("s2fpn_r18", "cityscapes"),
    "train_sanet_s": ("sanet_s", "cityscapes"),
    "train_sasformer_sparse": ("sasformer_sparse_b0", "voc2012"),
    "train_segformer_mmseg1": ("segformer_b0_mmseg", "ade20k"),
    "train_ssa_segformer_b0": ("segformer_b0_mmseg_ssa", "ade20k"),
}


def label_map(target, step, shape):
    "Ids of one step as the fixture's rule makes them: 255 without label; -1 and -2 where labels are sparse."
    b, _, h, w = shape
    block = target["block"]
    cells = (b, math.ceil(h / block), math.ceil(w / block))

    def spread(values):
        return values.repeat(block, 1).repeat(block, 2)[:, :h, :w]

    ids = np.random.RandomState(target["seeds"][step]).randint(0, target["classes"] + 1, cells)
    ids = spread(np.where(ids == target["classes"], 255, ids))
    ids[:, : target["ignore_rows"]] = 255
    if "keep_seeds" not in target:
        return torch.from_numpy(ids)
    kept = np.random.RandomState(target["keep_seeds"][step]).rand(*cells) < target["keep_share"]
    ids = np.where((ids == 255) | ~spread(kept), -1, ids)
    ids[:, :, w - target["pad_columns"] :] = -2
    return torch.from_numpy(ids)


def target_of(spec, step, shape):
    "What the network is told in one step; networks with boundaries get them as a second plane."
    ids = label_map(spec["target"], step, shape)
    if "edges" not in spec:
        return ids
    draw = np.random.RandomState(spec["edges"]["seeds"][step])
    edges = draw.rand(len(ids), *ids.shape[1:]) < spec["edges"]["share"]
    return torch.stack([ids, torch.from_numpy(edges).to(ids.dtype)], 1)


@contextlib.contextmanager
def precision(dtype):
    "New tensors have this type inside the block."
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def without_chance(model):
    "Every dropout of a network has probability 0."
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.p = 0.0
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.0
    return model


class Facts:
    "What a recipe wants to know about a dataset: its table."

    def __init__(self, name):
        table = load_table(name)
        self.name = name
        self.classes = table["classes"]
        self.palette = table.get("palette")
        self.class_weights = table.get("class_weights")

    def __len__(self):
        return 960  # whole batches: the fixtures count steps as the schedule does


class Replay:
    "A training of ours that is shown what an official one was shown."

    def __init__(self, name, dtype=torch.float64):
        self.golden = fixture(name)
        spec = self.golden.spec
        model, dataset = RUNS[name]
        self.recipe = recipe_for(model, dataset, iterations=spec["recipe"]["iterations"])
        facts = Facts(dataset)
        with precision(dtype):
            net = create_model(model, spec["variant"]["classes"])
            prepare_model(net, self.recipe, facts)
            net = without_chance(net.to(dtype))
            self.report = load_official(net, self.golden.state())
            acc = accelerator_for("cpu", self.recipe)
            self.run = start_run(Path("."), net, self.recipe, facts, acc)
        self.net = net
        self.dtype = dtype
        self.start = {n: v.clone() for n, v in net.state_dict().items()}
        self.first_gradient = {}

    def step(self, s):
        "One step by the functions of `fit`: its rates, losses and gradient norm."
        spec = self.golden.spec
        run = self.run
        run.state["step"] = spec["iterations"][s]
        x = make_input(*spec["input"][s][1:]).to(self.dtype)
        y = target_of(spec, s, x.shape)
        set_rate(run)
        rates = {id(p): g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
        seen = []
        hook = run.net.register_forward_hook(lambda mod, inputs, out: seen.append(out))
        forward_backward(run, torch.arange(len(x)), x, y)
        hook.remove()
        grads = {n: p.grad for n, p in self.net.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        if not s:
            self.first_gradient = {n: g.norm().item() for n, g in grads.items()}
        optimizer_step(run)
        losses = {k: v.item() for k, v in seen[0].items() if torch.is_tensor(v)}
        return rates, losses, norm

    def steps(self, count):
        "The first steps, with no chance in functions either."
        with mock.patch.object(s2fpn_blocks, "DROPOUT", 0.0), precision(self.dtype):
            self.net.train()
            return [self.step(s) for s in range(count)]

    def names(self):
        "Official key -> our names; one that is split has several."
        found = {}
        for key, name in self.report.loaded:
            found.setdefault(key, []).extend(name if isinstance(name, tuple) else [name])
        return found

    def update(self, key):
        "How far the tensors of an official key have moved, end to end."
        now = self.net.state_dict()
        return torch.cat([(now[n] - self.start[n]).flatten() for n in self.names()[key]])


def parts_of(name, losses):
    "The losses in the order in which the fixture lists them."
    if name == "train_sanet_s":
        semantic = 0.4 * losses["aux"] + losses["logits"]
        return [semantic, 20 * losses["boundary"], losses["logits_boundary"]]
    return [losses[p] for p in fixture(name).spec["parts"]]


def relative(got, want):
    "The largest relative difference of two lists of numbers."
    got, want = np.asarray(got), np.asarray(want)
    return float(np.max(np.abs(got - want) / np.maximum(np.abs(want), 1e-300)))


def compared(name):
    "Worst relative differences in double; updates as a whole, and number by number."
    replay = Replay(name)
    f = replay.golden
    steps = replay.steps(len(f.spec["iterations"]))
    params = dict(replay.net.named_parameters())
    rates = []
    for column, group in enumerate(f.spec["groups"]):
        used = [n for k in group["keys"] for n in replay.names().get(k, ()) if n in params]
        rates += [
            relative(rate[id(params[n])], f.golden["lr"][s, column])
            for s, (rate, _, _) in enumerate(steps)
            for n in used
        ]
    names = f.spec["names"]
    place = {key: i for i, key in enumerate(names)}
    silent = 1e-12 * f.golden["grad_norm"][0]
    own = replay.names()

    def counts(key):
        "A tensor that moves, and not by rounding alone."
        first = f.golden["grad0_norm"][place[key]]
        return f.golden["delta_norm"][place[key]] > 0 and not first <= silent

    moved = [k for k in names if counts(k)]
    if lost := [k for k in moved if k not in own]:
        raise AssertionError(f"the official training moves {lost[:3]}, which we do not have")
    parts = [parts_of(name, losses) for _, losses, _ in steps]
    sampled = {
        k: (replay.update(k)[:: sample["stride"]], f.golden[f"delta:{k}"])
        for k, sample in f.spec["samples"].items()
        if k in moved
    }
    return {
        "fixture": name.removeprefix("train_"),
        "rates": max(rates),
        "loss": relative([losses["loss"] for _, losses, _ in steps], f.golden["loss"]),
        "parts": relative(parts, f.golden["parts"][:, : len(parts[0])]),
        "gradient norm": relative([n for *_, n in steps], f.golden["grad_norm"]),
        "updates": max(
            relative(replay.update(k).norm(), f.golden["delta_norm"][place[k]]) for k in moved
        ),
        "numbers": max(relative_l2(torch.from_numpy(w), g) for g, w in sampled.values()),
        "tensors": len(moved),
    }


def single_precision(name):
    "The worst relative difference of the losses in float32, over the steps that are meaningful there."
    replay = Replay(name, torch.float32)
    count = replay.golden.spec["fp32_steps"]
    losses = [losses["loss"] for _, losses, _ in replay.steps(count)]
    return relative(losses, replay.golden.golden["loss"][:count])


def main():
    torch.set_num_threads(1)
    rows = []
    for name in progress(list(RUNS), "trajectories"):
        row = {**compared(name), "loss in float32": single_precision(name)}
        rows.append({k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()})
    print(Table(rows))


if __name__ == "__main__":
    main()
