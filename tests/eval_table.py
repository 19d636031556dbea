"""Is a network measured as its training measured it? A line for every published recipe.

python tests/eval_table.py               recipe | what eval does by itself | plans equal | numbers equal
python tests/eval_table.py --networks    numbers of every network and every kind of measurement it has (slow)

Plans: what training hands to `infer.evaluate` against what `segkern eval` would, for a run folder, for a file
of weights, and against the recipe's fields read anew. Numbers: for each kind of measurement among the recipes
one training through the command line with a small network on generated streets (sizes made small), and
`segkern eval` of its folder without a word more; equal means the same float as in `results.json`."""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import segkern.models  # noqa: F401  papers register their recipes
from segkern.cli import main
from segkern.core import RECIPES
from segkern.infer.plan import plan_of
from segkern.infer.protocols import input_rule
from segkern.train import state

# kind of measurement -> a small network that is trained for it, and the recipe's fields made small
SMALL = {
    ("whole", "present"): ("dsanet", {}),
    ("whole", "all"): ("sanet_s", {}),
    ("whole", "nonzero"): ("s2fpn_r18", {}),
    ("sliding", "present"): ("segformer_b0", dict(crop="48x48", stride="32x32")),
    ("ade", "present"): ("segformer_b0_mmseg", dict(fit_size="120x40")),
    ("ade32", "present"): ("sasformer_icip_b0", dict(fit_size="120x40")),
    ("ade32_sliding", "present"): (
        "segnext_t",
        dict(fit_size="120x40", test_size="120x33", crop="48x48", stride="32x32"),
    ),
    ("square512", "present"): ("sasformer_sparse_b0", dict(crop="64x64")),
}


def kind(recipe):
    return recipe.protocol, recipe.miou


def as_the_recipe_says(recipe):
    "Arguments of an evaluation, read from the recipe's fields once more."
    told = dict(protocol=recipe.protocol, miou=recipe.miou)
    if "sliding" in recipe.protocol:
        told |= dict(window=recipe.crop, stride=recipe.stride)
    if recipe.protocol.startswith("ade"):
        told |= dict(size=recipe.test_size or recipe.fit_size)
    if recipe.protocol == "square512":
        told |= dict(size=recipe.crop)
    return told


def of_training(recipe):
    "Arguments that training hands to `evaluate`."
    seen = {}
    with patch.object(state, "evaluate", lambda model, data, **kw: seen.update(kw)):
        state.evaluation_of(recipe)(None, None)
    return seen


def run_folder(folder, recipe, options):
    "What a training by a recipe leaves of it."
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(recipe=recipe.to_dict())))
    seen = dict(dataset=recipe.dataset, split=recipe.val_split, options=options, arguments={})
    (folder / "env.json").write_text(json.dumps(dict(validation=seen)))
    return folder


def plans(folder):
    "(model, dataset) -> whether all ways to a plan agree, with the plan."
    found = {}
    for (model, dataset), recipe in sorted(RECIPES.items()):
        net = SimpleNamespace(name=model, dataset=dataset, options={}, rule=None)
        trained = SimpleNamespace(**{**vars(net), "rule": input_rule(recipe)})
        run = run_folder(folder / model / dataset, recipe, dict(order="sanet"))
        every = [plan_of(net), plan_of(trained), plan_of(net, dataset), plan_of(net, run=run)]
        told = of_training(recipe)
        equal = told == as_the_recipe_says(recipe)
        equal &= all(p.arguments() == told for p in every)
        equal &= all((p.dataset, p.split) == (dataset, recipe.val_split) for p in every)
        equal &= every[-1].options == dict(order="sanet")
        equal &= str(run) in every[-1].source and "the recipe of" in every[0].source
        found[model, dataset] = equal, every[0]
    return found


def command(*args):
    "A command line that must succeed."
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*map(str, args)])
    if code:
        raise RuntimeError(f"segkern {' '.join(map(str, args))}: {said.getvalue()}")
    return said.getvalue()


def measure(target, out, *args):
    "What `segkern eval` writes about a target."
    command("eval", target, "--device", "cpu", "--json", out, *args)
    return json.loads(Path(out).read_text())


def number(folder, protocol, miou, network=None):
    "Train by one kind of measurement, evaluate the folder: (what training wrote, what eval finds)."
    model, fields = SMALL[protocol, miou]
    model = network or model
    fields = dict(crop="48x64", batch=2, iterations=2, init="scratch") | fields
    fields |= dict(protocol=protocol, miou=miou)
    size = "48x64"
    if network:  # some take multiples of 32 only
        fields["crop"] = "64x64"
        size = "64x96"
    changed = [part for k, v in fields.items() for part in ("--set", f"{k}={v}")]
    data = ["--dataset", "streets", "-D", f"size={size}", "-D", "length=3", "--device", "cpu"]
    run = folder / f"{model}_{protocol}_{miou}"
    command("train", model, *data, *changed, "--eval-every", 1, "--out", run)
    wrote = json.loads((run / "results.json").read_text())
    best = measure(run, folder / "best.json")
    last = measure(run, folder / "last.json", "--last", 1)
    assert (best["protocol"], best["miou_over"]) == (protocol, miou), best
    return (wrote["best_miou"], wrote["miou"]), (best["miou"], last["miou"])


def of_every_network():
    "Numbers of every network and every kind of measurement among its recipes; the memory of a run is freed."
    every = sorted({(model, *kind(r)) for (model, _), r in RECIPES.items()})
    good = True
    for model, *k in every:
        with tempfile.TemporaryDirectory() as d:
            wrote, found = number(Path(d), *k, network=model)
        good &= wrote == found
        texts = [", ".join(f"{100 * v:.10f}" for v in pair) for pair in (wrote, found)]
        print(
            f"| {model} | {k[0]}, '{k[1]}' | {' | '.join(texts)} | {wrote == found} |", flush=True
        )
    return int(not good)


def main_table():
    "Print the table; the exit code is 1 where something differs."
    with tempfile.TemporaryDirectory() as d:
        planned = plans(Path(d) / "plans")
        kinds = sorted({kind(r) for r in RECIPES.values()})
        numbers = {k: number(Path(d), *k) for k in kinds}
    print("| kind of measurement | network | training wrote (best, last) | eval found | equal |")
    print("|---|---|---|---|---|")
    for k, (wrote, found) in numbers.items():
        texts = [", ".join(f"{100 * v:.10f}" for v in pair) for pair in (wrote, found)]
        print(f"| {k[0]}, '{k[1]}' | {SMALL[k][0]} | {' | '.join(texts)} | {wrote == found} |")
    print("\n| recipe | eval does | plans equal | numbers equal |\n|---|---|---|---|")
    good = True
    for (model, dataset), (equal, plan) in planned.items():
        wrote, found = numbers[plan.protocol, plan.miou]
        what = str(plan).rpartition(" (")[0]
        print(f"| {model} on {dataset} {plan.split} | {what} | {equal} | {wrote == found} |")
        good &= equal and wrote == found
    print(
        f"\n{len(planned)} recipes, {len(numbers)} kinds of measurement: {'all equal' if good else 'DIFFERENT'}"
    )
    return int(not good)


if __name__ == "__main__":
    sys.exit(of_every_network() if sys.argv[1:] == ["--networks"] else main_table())
