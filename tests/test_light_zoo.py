"The light hosts together: what they cost, what their optimizers do, what users are told."

import json

import pytest
import torch

from shared import need
from segkern.core import load_table
from segkern.models import claimed, cost, create_model, list_models
from segkern.core import recipe_for
from segkern.train import parameter_groups
from segkern.weights import map_key

ROWS = load_table("costs")["light"]
UNUSED = {
    "afformer_b": 256 * 256 + 2 * 256
}  # layers that the official count holds and nothing calls
LARGE = {"segnext_l", "vit_adapter_l", "cgrseg_l", "seaformer_l"}
BIG = [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in ROWS]


@pytest.mark.parametrize("name", BIG)
def test_costs_are_the_official_ones(name):
    row = ROWS[name]
    c = cost(name, 150, (512, 512))
    assert abs((c["params"] + UNUSED.get(name, 0)) / 1e6 - row["params_millions"]) < 6e-3 * (
        10 if row["params_millions"] > 100 else 1
    )
    assert (
        abs(c["paper_gmacs"] / row["gmacs_512x512"] - 1) < 0.01 and c["gmacs"] <= c["paper_gmacs"]
    )


@pytest.mark.parametrize("name", [n for n in BIG if "vit" not in str(n)])
def test_costs_with_the_classifier(name):
    row = ROWS[name]
    c = cost(f"{name}_ssa", 150, (512, 512))
    assert (
        abs((c["params"] + UNUSED.get(name, 0)) / 1e6 - row["ssa_params_millions"]) < 1e-3
        and abs(c["paper_gmacs"] / row["ssa_gmacs_512x512"] - 1) < 0.01
    )
    assert c["params"] - c["deployed"] >= 4 * create_width(name) ** 2


def create_width(name):
    with torch.device("meta"):
        return create_model(name, 150, seed=None).classifier.in_channels


def official_groups(keys, custom, factor=lambda key: 1.0):
    """mmcv's rule: the longest word that a name holds, of equal ones the first of the alphabet,
    decides over rate and decay."""
    words = sorted(sorted(custom), key=len, reverse=True)
    return {k: next((custom[w] for w in words if w in k), (1.0, 1.0)) for k in keys}


HEAD = (10.0, 1.0)
STILL = (1.0, 0.0)
CUSTOM = {
    "segnext_t": {"pos_block": STILL, "norm": STILL, "head": HEAD},
    "seaformer_b": {"pos_emb": STILL, "norm": STILL, "head": HEAD},
    "cgrseg_b": {"absolute_pos_embed": STILL, "norm": STILL, "head": HEAD},
}


@pytest.mark.parametrize("name", CUSTOM)
def test_groups_are_what_the_official_optimizer_does(name):
    golden = need(name)
    state = golden.state()
    recipe = recipe_for(name, "ade20k")
    with torch.device("meta"):
        model = create_model(name, 150, seed=None)
    rules = model.key_rules(state)
    ours = dict(model.named_parameters())
    want = {}
    for key, group in official_groups(state, CUSTOM[name]).items():
        target, _ = map_key(model.rename(key) if hasattr(model, "rename") else key, rules)
        for n in target if isinstance(target, tuple) else (target,):
            if n in ours:
                want[n] = group
    found = {
        n: (f, d / recipe.weight_decay)
        for (f, d), members in parameter_groups(model, recipe).items()
        for n, *_ in members
    }
    assert (
        set(want) == set(found)
        and {n: (want[n], found[n]) for n in want if want[n] != found[n]} == {}
    )
    assert len({*found.values()}) == 3


@pytest.mark.parametrize(
    "dataset, rate", [("ade20k", 0.95), ("coco_stuff10k", 0.9), ("pascal_context", 0.9)]
)
def test_layer_decay(dataset, rate):
    recipe = recipe_for("vit_adapter_l_ssa", dataset)
    with torch.device("meta"):
        model = create_model("vit_adapter_l", 150, seed=None)
    for (factor, decay), members in parameter_groups(model, recipe).items():
        for n, p, _ in members:
            parts = n.split(".")
            layer = (
                0
                if n.startswith(("encoder.pos_embed", "encoder.embed."))
                else int(parts[2]) + 1
                if n.startswith("encoder.blocks.")
                else 25
            )
            assert factor == pytest.approx(rate ** (25 - layer)) and decay == (
                0.05 if p.ndim > 1 else 0.0
            ), n


def test_rates_of_the_configurations():
    def rate(name):
        return [recipe_for(name, d).lr for d in ("ade20k", "coco_stuff10k", "pascal_context")]

    assert (
        rate("segnext_l_ssa") == [6e-5] * 3
        and rate("seaformer_b") == [2.5e-4, 2e-4, 2e-4]
        and rate("seaformer_l_ssa") == [2.5e-4] * 3
    )
    assert (
        rate("afformer_b_ssa") == [3e-4] * 3
        and rate("vit_adapter_l_ssa") == [2e-5] * 3
        and recipe_for("cgrseg_l_ssa", "ade20k").lr == 1.2e-4
    )
    # CGRSeg has one configuration; the others are derived from it, and say so
    derived = recipe_for("cgrseg_b_ssa", "coco_stuff10k")
    assert derived.lr == 1.2e-4 and derived.source.startswith("derived from cgrseg_b_ssa's recipe")
    for name in ("segnext_t_ssa", "seaformer_l", "afformer_b", "vit_adapter_l"):
        for d, steps, crop in (
            ("ade20k", 160_000, 512),
            ("coco_stuff10k", 80_000, 512),
            ("pascal_context", 80_000, 480),
        ):
            r = recipe_for(name, d)
            assert (
                r.iterations,
                r.crop,
                r.batch,
                r.power,
                r.warmup,
                r.warmup_ratio,
                r.optimizer,
            ) == (steps, (crop, crop), 16, 1.0, 1500, 1e-6, "adamw")
            assert r.weight_decay == (0.05 if "vit" in name else 0.01) and r.mixed_precision == "no"
    vit = {d: recipe_for("vit_adapter_l", d) for d in ("ade20k", "coco_stuff10k", "pascal_context")}
    assert [(r.protocol, r.stride, r.test_size) for r in vit.values()] == [
        ("ade32_sliding", (341, 341), ())
    ] * 2 + [("ade32_sliding", (320, 320), (4096, 520))]
    assert (
        vit["ade20k"].preprocess.mean == (0.5, 0.5, 0.5)
        and vit["coco_stuff10k"].preprocess.mean[0] == 0.485
    )


def test_claims():
    "What is claimed is told apart from what is counted."
    assert (
        claimed("cgrseg_b_ssa")["gmacs"] == 7.6
        and cost("cgrseg_b_ssa", 150, (512, 512))["paper_gmacs"] > 1.1 * 7.6
    )
    assert (
        claimed("s2fpn_r18") == {}
        and claimed("segnext_t")["gmacs"] == 7
        and "README" in claimed("segnext_t_ssa")["source"]
    )


def test_models_are_listed():
    hosts = [
        "segnext_t",
        "segnext_l",
        "seaformer_b",
        "seaformer_l",
        "afformer_b",
        "cgrseg_b",
        "cgrseg_l",
        "vit_adapter_l",
    ]
    assert {*hosts, *[f"{h}_ssa" for h in hosts]} <= {*list_models()}


def test_the_table_of_costs(capsys):
    from segkern.cli.app import main

    assert main(["models", "seaformer_b*", "--cost", "--dataset", "ade20k", "--json"]) in (0, None)
    rows = json.loads(capsys.readouterr().out)
    assert (
        [r["model"] for r in rows] == ["seaformer_b", "seaformer_b_ssa"]
        and rows[1]["claimed GMACs"] == 1.8
        and rows[1]["counted/claimed"] > 1.1
    )
    assert main(["models", "seaformer_b", "--cost", "--dataset", "pascal_context", "--json"]) in (
        0,
        None,
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert "claimed GMACs" not in row and row["params [M]"] < rows[0]["params [M]"]
