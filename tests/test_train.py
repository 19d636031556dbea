"""The training loop: order, schedule, resume after a kill, full disks, refusals."""

import copy
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from segkern import train
from segkern.core import seeded
from segkern.core import RECIPES, STREETS, recipe_for
from segkern.models.sasformer_icip import SASFORMER_ICIP_ADE20K
from segkern.models.sasformer_sparse import SASFORMER_SPARSE_VOC, sparse_recipe
from segkern.models.segformer import SEGFORMER_ADE20K
from segkern.core.recipe import Recipe
from segkern.testing import assert_close, fixture
from segkern.train import (
    batches,
    fit,
    history,
    last_checkpoint,
    lr_at,
    optimizer_for,
    run_weights,
    save_checkpoint,
    step_keys,
)
from segkern.weights import read, read_safetensors
from train_toy import RECIPE, Discs, Toy, noisy, run, toy

HERE = Path(__file__).parent


def own_environment():
    "As many threads as this process has, and the package of this checkout."
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(HERE.parent)}


def start(out, mode):
    "The toy run in a process of its own."
    # left behind by in-process runs of other tests
    leaked = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(leaked)} | own_environment()
    command = [sys.executable, str(HERE / "train_toy.py"), str(out), "--mode", mode]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def same(a, b, path=""):
    "Bit-identical contents of two nested structures."
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, (path, a, b)


def same_run(a, b):
    "Two finished runs agree in weights, averaged weights, optimizer, random states, losses and scores."
    a_last = last_checkpoint(a)
    b_last = last_checkpoint(b)
    for name in ("model.safetensors", "ema.safetensors"):
        same(read(a_last / name), read(b_last / name), name)
    one = read(a_last / "state.pt")
    two = read(b_last / "state.pt")
    for s in (one, two):
        s["state"].pop("seconds")
    same(one, two, "state")
    same(read_safetensors(run_weights(a)), read_safetensors(run_weights(b)), "best")

    def clean(out):
        return [{k: v for k, v in r.items() if k != "images_per_s"} for r in history(out)]

    assert clean(a) == clean(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing interrupts: folder, results, model."
    out = tmp_path_factory.mktemp("whole") / "run"
    model = toy()
    before = torch.get_rng_state()
    result = run(out, model)
    assert torch.equal(before, torch.get_rng_state())
    return out, result, model


# schedule and optimizer


def test_lr_matches_the_official_schedules():
    golden = fixture("s2fpn_misc").golden
    steps = [0, 1, 250, 499, 500, 501, 1000, 1001, 2000, 2001, 2999]
    r = STREETS.replace(iterations=3000, warmup=500, warmup_ratio=1 / 3, lr=0.1)
    recipes = dict(
        lr_poly=r.replace(lr=4e-3),
        lr_cosine=r.replace(schedule="cosine"),
        lr_multistep=r.replace(schedule="multistep", milestones=(1000, 2000)),
    )
    for name, recipe in recipes.items():
        assert_close(name, golden[name], [1000 * lr_at(recipe, t) for t in steps], 1e-6)
    plain = r.replace(lr=4e-3, warmup=0)
    assert_close(
        "lr_poly_helper",
        golden["lr_poly_helper"],
        [1000 * lr_at(plain, e * 300 + i) for e, i in ((0, 0), (1, 10), (9, 299))],
        1e-6,
    )


def test_openmmlab_counts_the_last_step_of_both_phases():
    """The values that mmengine's LinearLR and PolyLR give, as the paper's sheet lists them, and
    the formula at every corner."""

    def lr(t):
        return lr_at(SASFORMER_ICIP_ADE20K, t)

    for t, value in (
        (0, 6e-11),
        (1, 4.0087e-8),
        (749, 2.998e-5),
        (1500, 6e-5),
        (80_000, 3.02837e-5),
    ):
        assert lr(t) == pytest.approx(value, rel=2e-5)
    assert lr(159_999) == 0 and lr(1499) == pytest.approx(6e-5, rel=1e-12) and lr(200_000) == 0
    for t in (0, 3, 1498, 1499):
        assert lr(t) == pytest.approx(6e-5 * (1e-6 + (1 - 1e-6) * t / 1499), rel=1e-9)
    for t in (1500, 1501, 159_998):
        assert lr(t) == pytest.approx(6e-5 * (1 - (t - 1500) / 158_499), rel=1e-9)


def test_a_warmup_may_multiply_the_decay():
    for t in (0, 1, 1499, 1500, 90_000, 159_999):
        warm = 1e-6 + (1 - 1e-6) * t / 1500 if t < 1500 else 1
        assert lr_at(SEGFORMER_ADE20K, t) == pytest.approx(
            6e-5 * (1 - t / 160_000) * warm, rel=1e-9
        )
    assert lr_at(SASFORMER_SPARSE_VOC, 20_000) == pytest.approx(5e-3 * 0.75**0.9)
    cosine = STREETS.replace(schedule="cosine", warmup=0, iterations=100)
    assert [
        lr_at(cosine.replace(warmup_rule=rule), 50) / cosine.lr for rule in ("then", "times")
    ] == [pytest.approx(0.5)] * 2
    assert abs(lr_at(cosine.replace(warmup_rule="inclusive"), 99)) < 1e-12 < lr_at(cosine, 99)


@pytest.mark.parametrize("rule", ["then", "inclusive", "times"])
def test_short_warmups(rule):
    for warmup in (0, 1, 2):
        values = [
            lr_at(STREETS.replace(warmup=warmup, iterations=3, warmup_rule=rule), t)
            for t in range(4)
        ]
        assert all(0 <= v <= STREETS.lr for v in values) and values[3] == 0


def test_lr_refuses_unknown_schedules():
    with pytest.raises(ValueError, match="schedule is 'step'; known: poly"):
        lr_at(RECIPE.replace(schedule="step"), 9)


def test_optimizer_groups():
    model = toy()
    model.net[0][0].weight.requires_grad_(False)
    opt = optimizer_for(
        model,
        RECIPE.replace(
            optimizer="sgd", decay_norms=False, weight_decay=0.1, lr_mult=(("net.3", 10.0),)
        ),
    )
    assert (
        isinstance(opt, torch.optim.SGD)
        and sum(len(g["params"]) for g in opt.param_groups) == len(list(model.parameters())) - 1
    )
    found = {
        (g["factor"], g["weight_decay"]): {p.ndim for p in g["params"]} for g in opt.param_groups
    }
    assert found == {(1.0, 0.1): {4}, (1.0, 0.0): {1}, (10.0, 0.1): {4}, (10.0, 0.0): {1}}
    assert isinstance(optimizer_for(model, RECIPE.replace(optimizer="adam")), torch.optim.Adam)
    with pytest.raises(ValueError, match="no trained parameter starts with"):
        optimizer_for(model, RECIPE.replace(lr_mult=(("backbone.", 0.1),)))
    with pytest.raises(ValueError, match="optimizer is 'lion'; known: adam"):
        optimizer_for(model, RECIPE.replace(optimizer="lion"))


class Former(nn.Module):
    "Names as in our SegFormers."

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict(
            dict(
                norm1=nn.LayerNorm(4),
                attn=nn.ModuleDict(dict(q=nn.Linear(4, 4), norm=nn.LayerNorm(4))),
            )
        )

        def stage():
            return nn.ModuleDict(
                dict(
                    proj=nn.Conv2d(3, 4, 1),
                    proj_norm=nn.LayerNorm(4),
                    blocks=nn.ModuleList([block]),
                    norm=nn.LayerNorm(4),
                )
            )

        self.encoder = nn.ModuleDict(dict(stages=nn.ModuleList([stage(), stage()])))
        self.head = nn.ModuleDict(dict(fuse=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))
        self.classifier = nn.Conv2d(4, 2, 1)


def test_groups_by_patterns_of_names():
    """The first pattern that fits decides; heads decay whole, norms of the encoder do not, and
    OpenMMLab's stage norms do."""
    model = Former()

    def groups(r):
        return {
            n: (f, d)
            for (f, d), members in train.parameter_groups(model, r).items()
            for n, _, _ in members
        }

    nvlabs = groups(SEGFORMER_ADE20K)
    mmseg = groups(SASFORMER_ICIP_ADE20K)
    sparse = groups(SASFORMER_SPARSE_VOC)
    assert len(nvlabs) == len(list(model.parameters())) and set(sparse.values()) == {(1.0, 1e-4)}
    for name, found in nvlabs.items():
        assert found == (
            (10.0, 0.01)
            if not name.startswith("encoder.")
            else (1.0, 0.0)
            if "norm" in name
            else (1.0, 0.01)
        ), name
    assert {n for n in mmseg if mmseg[n] != nvlabs[n]} == {
        f"encoder.stages.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    assert mmseg["encoder.stages.0.norm.bias"] == (1.0, 0.01) and mmseg[
        "encoder.stages.0.blocks.0.attn.norm.weight"
    ] == (1.0, 0.0)
    opt = optimizer_for(model, SEGFORMER_ADE20K)
    assert isinstance(opt, torch.optim.AdamW) and sum(
        len(g["params"]) for g in opt.param_groups
    ) == len(nvlabs)
    table = str(train.group_table(model, SASFORMER_ICIP_ADE20K))
    assert (
        "encoder.stages.?.norm.*" in table and "6.00e-04" in table and "head.fuse.weight" in table
    )
    with pytest.raises(ValueError, match=r"no trained parameter is left for \['neck\.\*'\]"):
        optimizer_for(model, SEGFORMER_ADE20K.replace(groups=(("neck.*", 1.0, 1.0),)))


def test_recipes_are_found_and_survive_json():
    for model, dataset, crop, protocol in (
        ("segformer_b0", "ade20k", 512, "ade32"),
        ("segformer_b5", "cityscapes", 1024, "sliding"),
        ("segformer_b2_mmseg", "ade20k", 512, "ade"),
        ("sasformer_icip_b2", "cityscapes", 1024, "sliding"),
        ("sasformer_sparse_b4", "voc2012", 512, "square512"),
    ):
        r = recipe_for(model, dataset)
        assert r.crop == (crop, crop) and r.protocol == protocol and r.dataset == dataset
    assert (
        recipe_for("segformer_b0_mmseg", "cityscapes").warmup_rule == "inclusive"
        and recipe_for("segformer_b0", "cityscapes").warmup_rule == "times"
    )
    for r in RECIPES.values():
        assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    for model in (
        "s2fpn_r18",
        "sanet_s",
        "segformer_b0",
        "sasformer_icip_b0",
        "sasformer_sparse_b0",
    ):
        own = recipe_for(model, "folder", batch=3)
        streets = recipe_for(model, "streets")
        assert (
            own.batch == 3
            and not own.class_weights
            and own.data_options == ()
            and streets.crop == (96, 128)
        )
    camvid = recipe_for("s2fpn_r18", "camvid")
    assert (
        recipe_for("s2fpn_r18", "folder").replace(
            dataset="camvid",
            class_weights=True,
            split="trainval",
            val_split="test",
            source=camvid.source,
            # of the official script
            bn_eps=1e-3,
            miou="nonzero",
        )
        == camvid
    )
    with pytest.raises(
        ValueError, match="no recipe for model 's2fpn_r18' on dataset 'camvit'.*'camvid'"
    ):
        recipe_for("s2fpn_r18", "camvit")
    with pytest.raises(ValueError, match="0 to 4, got 5"):
        sparse_recipe(5)


# order and augmentation


def test_every_image_once_per_epoch():
    keys = [step_keys(22, 4, 3, t) for t in range(10)]
    assert len({i for step in keys[:5] for _, i in step}) == 20 and {
        e for step in keys[5:] for e, _ in step
    } == {1}
    assert [i for s in keys[:5] for _, i in s] != [i for s in keys[5:] for _, i in s]
    assert step_keys(22, 4, 4, 0) != keys[0]
    with pytest.raises(ValueError, match="22 images, fewer than a batch of 23"):
        step_keys(22, 23, 0, 0)


def test_batches_depend_on_the_step_only():
    torch.manual_seed(1)
    plain = list(batches(Discs(), noisy, RECIPE, seed=2))
    torch.manual_seed(5)
    for workers, first in ((2, 0), (0, 7)):
        other = list(batches(Discs(), noisy, RECIPE, seed=2, start=first, workers=workers))
        same(plain[first:], other)
    parts = [
        [list(batches(Discs(), noisy, RECIPE, seed=2, rank=r, world=2, accumulate=2))]
        for r in (0, 1)
    ]
    joined = torch.cat([parts[r][0][p][1] for p in (0, 1) for r in (0, 1)])
    assert torch.equal(joined, plain[0][1])
    with pytest.raises(ValueError, match="does not divide into 3 processes"):
        list(batches(Discs(), noisy, RECIPE, world=3))


# a run


def test_run_folder(whole):
    out, result, model = whole
    names = {
        p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != ".lock"
    }
    last = "checkpoints/step_00000024"
    kept = {f"{last}/{f}" for f in ("model.safetensors", "ema.safetensors", "state.pt")}
    assert {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "results.json",
        "checkpoints/last.json",
        "checkpoints/best.safetensors",
    } <= names
    assert {n for n in names if n.startswith("checkpoints/step")} == kept
    assert len([n for n in names if n.startswith("samples/")]) == 9
    lines = history(out)
    assert [r["step"] for r in lines if "loss" in r] == [*range(3, 25, 3)] and [
        r["step"] for r in lines if "val" in r
    ] == [8, 16, 24]
    assert (
        result["best_miou"] == max(r["val"]["miou"] for r in lines if "val" in r)
        and result["best_miou"] > 0.6
    )
    assert lines[0]["loss"] == pytest.approx(2 * lines[0]["half"]) and lines[0]["lr"] == lr_at(
        RECIPE, 2
    )
    assert json.loads((out / "results.json").read_text()) == result
    same(dict(model.state_dict()), read(out / result["last"]))
    state, meta = read_safetensors(run_weights(out))
    assert (
        meta["classes"] == Discs.classes
        and meta["model"] == "toy"
        and meta["format"] == "segkern"
        and meta["num_classes"] == 3
        and meta["step"] == result["best_step"]
    )
    assert (
        meta["preprocess"] == RECIPE.preprocess.to_dict() and model.preprocess == RECIPE.preprocess
    )
    assert model.class_weights.tolist() == Discs.class_weights
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_published_models_load_from_a_run(tmp_path):
    import segkern

    model = segkern.create_model("s2fpn_r18", num_classes=3)
    result = fit(
        model,
        RECIPE.replace(iterations=1, batch=2, crop=(64, 64), ema=0.0),
        Discs(),
        None,
        tmp_path / "run",
        device="cpu",
    )
    again = segkern.load(run_weights(tmp_path / "run"))
    same(dict(model.state_dict()), dict(again.state_dict()))
    assert (
        again.classes == Discs.classes
        and again.preprocess == RECIPE.preprocess
        and again.name == "s2fpn_r18"
        and result["miou"] is None
    )


def test_workers_do_not_change_the_run(whole, tmp_path):
    run(tmp_path / "run", workers=2)
    same_run(whole[0], tmp_path / "run")


def test_evaluating_does_not_change_the_run(whole, tmp_path):
    result = run(tmp_path / "run", eval_every=0, save_every=0)
    same(read(whole[0] / whole[1]["last"]), read(tmp_path / "run" / result["last"]))


def test_bn_eps_is_used_in_training_only(whole, tmp_path):
    result = run(tmp_path / "run", recipe=RECIPE.replace(bn_eps=1e-5))
    a = read(whole[0] / whole[1]["last"])
    b = read(tmp_path / "run" / result["last"])
    assert not torch.equal(a["net.0.0.weight"], b["net.0.0.weight"])


def test_accumulation_gives_the_same_gradients(tmp_path):
    recipe = RECIPE.replace(
        ema=0.0, bn_eps=1e-5, iterations=6, warmup=0, optimizer="sgd", class_weights=False
    )
    runs = [run(tmp_path / str(k), toy(norm=False), recipe, accumulate=k) for k in (1, 2)]
    a, b = (read(tmp_path / str(k) / r["last"]) for k, r in zip((1, 2), runs))
    for k in a:
        assert_close(k, a[k], b[k], 1e-5)


def test_kaiming_init_is_the_official_one():
    model = toy()
    with torch.no_grad():
        model.net[0][1].weight.fill_(3)
    train.kaiming_init(model, 1)
    w = model.net[1][0].weight
    assert torch.equal(model.net[0][1].weight, torch.ones(12)) and w.std().item() == pytest.approx(
        (2 / (9 * 12)) ** 0.5, rel=0.1
    )


def test_bf16_and_a_compiled_model(tmp_path):
    model = toy()
    compiled = torch.compile(model, backend="eager")
    recipe = RECIPE.replace(mixed_precision="bf16", iterations=4)
    result = fit(
        compiled, recipe, Discs(), Discs(5, "val"), tmp_path / "run", transform=noisy, device="cpu"
    )
    same(dict(model.state_dict()), read(tmp_path / "run" / result["last"]))
    assert "forward" not in model.__dict__ and model(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_only_void_trains_on(tmp_path):
    result = run(tmp_path / "run", train=Discs(void=True), recipe=RECIPE.replace(iterations=3))
    assert result["steps"] == 3 and all(
        torch.isfinite(v).all() for v in read(tmp_path / "run" / result["last"]).values()
    )


def test_tracker(tmp_path):
    run(tmp_path / "run", recipe=RECIPE.replace(iterations=3), tracker="tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(ImportError, match="needs the package neptune_of_old"):
        run(tmp_path / "other", tracker="neptune_of_old")


# killed runs


def test_kill_9_and_resume_is_bit_identical(whole, tmp_path, caplog):
    out = tmp_path / "run"
    p = start(out, "slow")
    deadline = time.time() + 60
    while not (out / "waiting").exists() and time.time() < deadline and p.poll() is None:
        time.sleep(0.05)
    if p.poll() is not None:
        pytest.fail(p.communicate()[0])
    assert (out / "waiting").exists()
    with pytest.raises(RuntimeError, match=f"run is being written by process {p.pid}"):
        run(out, resume=True)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    (out / "waiting").unlink()
    assert [r["step"] for r in history(out)][-1] == 12 and last_checkpoint(
        out
    ).name == "step_00000010"
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 13, "lo')
    with pytest.raises(FileExistsError, match="step_00000010.*resume=True"):
        run(out)
    run(out, resume=True)
    same_run(whole[0], out)
    assert "other conditions" not in caplog.text


def test_killed_while_saving(whole, tmp_path, caplog):
    "The checkpoint before is there; going on with another number of threads than before is said."
    out = tmp_path / "run"
    p = start(out, "rename")
    assert p.wait(60) == -signal.SIGKILL
    assert (
        list((out / "checkpoints").glob(".step_*")) and last_checkpoint(out).name == "step_00000010"
    )
    env = json.loads((out / "env.json").read_text())
    (out / "env.json").write_text(json.dumps(env | {"threads": 99}))
    run(out, resume=True, workers=2)
    said = f"run goes on under other conditions, so not bit for bit: threads 99 → {torch.get_num_threads()}"
    assert said in caplog.text
    same_run(whole[0], out)
    assert not list((out / "checkpoints").glob(".step_*"))


def test_full_disk_for_real(tmp_path):
    out = tmp_path / "run"
    p = start(out, "full")
    text = p.communicate(timeout=60)[0]
    assert p.returncode == 1 and text.count("cannot write") == 1
    assert all(
        words in text for words in ("step_00000015/model.safetensors", "MB free", "File too large")
    )
    assert last_checkpoint(out).name == "step_00000010" and not list(
        (out / "checkpoints").glob(".step_*")
    )
    assert run(out, toy(width=32), resume=True)["steps"] == 24


def full_disk(fail_at):
    "An `os.replace` that fails where the destination's name holds `fail_at`."
    replace = os.replace

    def f(src, dst):
        if fail_at in str(dst):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(src, dst)

    return f


@pytest.mark.parametrize("fail_at", ["step_00000010", "last.json"])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, fail_at):
    for step in (5, 10):
        if step == 10:
            monkeypatch.setattr(os, "replace", full_disk(fail_at))
        try:
            save_checkpoint(tmp_path / "run" / "checkpoints", step, {"state.pt": b"x" * step})
        except OSError as e:
            message = str(e)
    monkeypatch.undo()
    assert fail_at in message and "MB free" in message and "No space left" in message
    assert (last_checkpoint(tmp_path / "run") / "state.pt").read_bytes() == b"x" * 5
    save_checkpoint(tmp_path / "run" / "checkpoints", 10, {"state.pt": b"x" * 10})
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "last.json",
        "step_00000010",
    ]


def test_finished_run_is_not_trained_again(whole, tmp_path):
    out, result, model = whole
    again = toy()
    assert run(out, again, resume=True) == result
    same(dict(model.state_dict()), dict(again.state_dict()))
    with pytest.raises(FileExistsError, match="finished run"):
        run(out)


def test_resume_of_an_empty_folder_starts_at_zero(tmp_path):
    assert run(tmp_path / "run", recipe=RECIPE.replace(iterations=2), resume=True)["steps"] == 2


def test_resume_with_another_recipe_names_the_fields(whole):
    with pytest.raises(
        ValueError, match=r"recipe.lr is 0.02 there and 0.5 now; seed is 0 there and 1 now"
    ):
        run(whole[0], recipe=RECIPE.replace(lr=0.5), resume=True, seed=1)
    with pytest.raises(ValueError, match=r"model.parameters is .* there and .* now"):
        run(whole[0], toy(width=8), resume=True)


# refusals


class Poisoned(Toy):
    "In one step a picture holds a NaN, which reaches loss, gradients and statistics."

    def forward(self, x, target=None):
        return super().forward(
            x * float("nan") if target is not None and self.calls == 7 else x, target
        )


def poisoned():
    with seeded(0):
        return Poisoned()


def test_nan_names_step_rate_and_files(tmp_path):
    with pytest.raises(FloatingPointError) as e:
        run(tmp_path / "run", poisoned())
    names = [f"train/{i:03}.png" for _, i in step_keys(22, 4, 0, 7)]
    assert all(n in str(e.value) for n in names) and "loss is nan, half is nan" in str(e.value)
    assert f"step 8 (lr {lr_at(RECIPE, 7):.3g})" in str(
        e.value
    ) and "step_00000005 is untouched" in str(e.value)
    assert (
        last_checkpoint(tmp_path / "run").name == "step_00000005"
        and history(tmp_path / "run")[-1]["step"] == 6
    )
    assert run(tmp_path / "run", resume=True)["steps"] == 24


def recorded(monkeypatch, scaler=None):
    "A list of (step, weights and buffers, averages, optimizer) after every step, and the run itself."
    steps = []
    runs = []
    step = train.optimizer_step
    start_run = train.start_run

    def begin(out, model, recipe, train_set, acc, score):
        acc.scaler = scaler
        runs.append(start_run(out, model, recipe, train_set, acc, score))
        return runs[0]

    def snapshot(r):
        parts = r.model.state_dict(), r.ema.state_dict(), r.optimizer.state_dict()
        return copy.deepcopy(parts)

    def stepped(r):
        step(r)
        steps.append((r.state["step"] + 1, snapshot(r)))

    monkeypatch.setattr(train.loop, "start_run", begin)
    monkeypatch.setattr(train.loop, "optimizer_step", stepped)
    return steps, lambda: snapshot(runs[0])


RULES = {
    "sgd": dict(optimizer="sgd", momentum=0.9, lr=1e-3),
    "adam": dict(optimizer="adam"),
    "adamw": dict(optimizer="adamw"),
    "unclipped": dict(clip=0.0),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("rule", RULES)
def test_a_bad_loss_moves_nothing(tmp_path, monkeypatch, rule, scaled):
    """It is reported at the next line; until then weights, averages, statistics and optimizer are
    those of the step before."""
    steps, now = recorded(
        monkeypatch, torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    )
    with pytest.raises(FloatingPointError, match="loss is nan, half is nan at step 8 "):
        run(
            tmp_path / "run",
            poisoned(),
            RECIPE.replace(**RULES[rule]),
            save_every=0,
            eval_every=0,
            log_every=11,
        )
    assert [s for s, _ in steps] == list(range(1, 12))
    # the rate goes on in steps that change nothing
    for _, (*_, optimizer) in steps:
        for g in optimizer["param_groups"]:
            g.pop("lr")
    model, ema, optimizer = now()
    for g in optimizer["param_groups"]:
        g.pop("lr")
    same(dict(steps[6][1][0]), dict(model), "model")
    same(dict(steps[6][1][1]), dict(ema), "averages")
    same(steps[6][1][2]["state"], optimizer["state"], "optimizer")
    assert not torch.equal(steps[5][1][0]["net.3.weight"], model["net.3.weight"])


def test_a_bad_gradient_is_found_where_gradients_are_clipped(tmp_path):
    model = toy(
        hook=lambda n: n == 8 and model.net[3].weight.register_hook(lambda g: g * float("inf"))
    )
    with pytest.raises(
        FloatingPointError, match="gradient norm is (nan|inf) at step 4 .*nothing was saved"
    ) as e:
        run(tmp_path / "run", model, accumulate=2)
    assert all(f"train/{i:03}.png" in str(e.value) for _, i in step_keys(22, 4, 0, 3))
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_an_optimizer_that_cannot_skip_is_asked_first(tmp_path, monkeypatch):
    plain = train.optimizer_for

    def unfused(model, recipe):
        groups = plain(model, recipe).param_groups
        return torch.optim.SGD([dict(g, fused=False) for g in groups], lr=0.1)

    monkeypatch.setattr(train.step, "optimizer_for", unfused)
    with pytest.raises(FloatingPointError, match="loss is nan, half is nan at step 8 "):
        run(tmp_path / "run", poisoned(), RECIPE, save_every=0, eval_every=0, log_every=11)


class Questions(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: numbers, truth values and lists taken from
    tensors, copies to the host."""

    asked = {
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        *(f"__{n}__" for n in ("bool", "float", "int", "index", "contains")),
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.asked
        return func(*args, **(kwargs or {}))


class Numbers(TorchDispatchMode):
    "Counts numbers taken from tensors below Python."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def asked(monkeypatch, tmp_path, **recipe):
    "Questions per step, and in each settling."
    counts = {"forward_backward": [], "optimizer_step": [], "settle": []}

    def watched(name):
        plain = getattr(train, name)

        def inner(*args):
            with Questions() as above, Numbers() as below:
                plain(*args)
            counts[name].append(above.count + below.count)

        monkeypatch.setattr(train.loop, name, inner)

    for name in counts:
        watched(name)
    run(
        tmp_path / "run",
        recipe=RECIPE.replace(iterations=6, **recipe),
        save_every=0,
        eval_every=0,
        log_every=3,
    )
    return counts


@pytest.mark.parametrize("rule", RULES)
def test_no_question_to_the_device_between_two_lines(tmp_path, monkeypatch, rule):
    counts = asked(monkeypatch, tmp_path, **RULES[rule])
    assert counts["forward_backward"] == counts["optimizer_step"] == [0] * 6 and counts[
        "settle"
    ] == [1, 1]


def test_questions_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Watch, "keep", lambda self: bool(self.bad > 0) or self.bad.item())
    counts = asked(monkeypatch, tmp_path)
    assert min(counts["optimizer_step"]) >= 2 and counts["forward_backward"] == [0] * 6


def test_numbers_do_not_pile_up(tmp_path, monkeypatch):
    "A run that writes no line asks after 256 steps."
    lengths = []
    settle = train.settle
    monkeypatch.setattr(
        train.loop, "settle", lambda r: (lengths.append(len(r.watch.seen)), settle(r))
    )
    recipe = RECIPE.replace(iterations=260, clip=0.0, ema=0.0)
    run(tmp_path / "run", toy(width=2), recipe, save_every=0, eval_every=0, log_every=0)
    assert lengths == [256, 4] and history(tmp_path / "run")[0]["loss"] > 0


def test_a_checkpoint_with_nan_is_not_written(tmp_path):
    model = toy(
        hook=lambda n: n == 5 and model.net[3].weight.register_hook(lambda g: g * float("nan"))
    )
    with pytest.raises(FloatingPointError, match="not finite after step 5"):
        run(tmp_path / "run", model, recipe=RECIPE.replace(clip=0.0))
    assert last_checkpoint(tmp_path / "run") is None


def test_same_process_is_refused_too(tmp_path):
    with (
        train.run_lock(tmp_path),
        pytest.raises(RuntimeError, match="already being written by this process"),
    ):
        run(tmp_path)


def test_wrong_classes(tmp_path):
    with pytest.raises(ValueError, match="model has 4 classes, the training set 3"):
        run(tmp_path / "run", Toy(4))
    other = Discs(5, "val")
    other.classes = ["ground", "blue", "red"]
    with pytest.raises(ValueError, match="validation set has the classes"):
        run(tmp_path / "run", val=other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad", [dict(seed=-1), dict(accumulate=0), dict(eval_every=-1), dict(accumulate=3)]
)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError):
        run(tmp_path / "run", **bad)


def test_log_is_quiet_unless_asked(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO, "segkern"):
        run(tmp_path / "run", recipe=RECIPE.replace(iterations=3))
    text = capfd.readouterr()
    assert (
        text.out == ""
        and text.err == ""
        and "step 3/3" in caplog.text
        and "model.preprocess" not in caplog.text
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    one = run(tmp_path / "one", toy(norm=False), RECIPE.replace(bn_eps=1e-5, clip=0.0, ema=0.0))
    # left behind by in-process runs of other tests
    leaked = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(leaked)} | own_environment()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [*torchrun, str(HERE / "train_toy.py"), str(tmp_path / "two"), "--mode", "ddp"]
    done = subprocess.run(command, env=env, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    a = read(tmp_path / "one" / one["last"])
    b = read(tmp_path / "two" / two["last"])
    for k in a:
        assert_close(k, a[k], b[k], 1e-3)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    "Fields that a recipe did not have then hold their defaults; another value is another run."
    recipe = RECIPE.replace(iterations=4)
    run(tmp_path / "run", recipe=recipe)
    (tmp_path / "run" / "results.json").unlink()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for field in ("scale_range", "warmup_rule", "groups"):
        del config["recipe"][field]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="recipe.warmup_rule is 'then' there and 'times' now"):
        run(tmp_path / "run", recipe=recipe.replace(warmup_rule="times"), resume=True)
    assert run(tmp_path / "run", recipe=recipe, resume=True)["steps"] == 4


def test_resume_refuses_other_data(tmp_path):
    "The same number of pictures from another seed, or classes in another order, is another run."
    from segkern.data import open_dataset
    from segkern.models import create_model

    def data(**kw):
        return open_dataset("streets", size=(40, 48), length=8, **kw)

    recipe = RECIPE.replace(iterations=2, batch=2, crop=(32, 32), bn_eps=1e-5)

    def go(train, **kw):
        return fit(
            create_model("dsanet", 11, dataset="streets"),
            recipe,
            train,
            out=tmp_path / "run",
            device="cpu",
            save_every=1,
            **kw,
        )

    go(data())
    with pytest.raises(ValueError, match="data.options.seed is 0 there and 5 now"):
        go(data(seed=5), resume=True)
    other = data()
    other.classes = other.classes[::-1]
    with pytest.raises(ValueError, match="classes"):
        go(other, resume=True)
    assert go(data(), resume=True)["steps"] == 2


@pytest.mark.parametrize(
    "field,value",
    [
        ("init", "pretraned"),
        ("protocol", "sliced"),
        ("miou", "mean"),
        ("batch", 0),
        ("batch", -2),
        ("iterations", 0),
        ("crop", (0, 5)),
        ("flip", 2),
        ("scale_range", (2.0, 1.0)),
        ("aspect", (0.0, 1.0)),
        ("fit_size", (512,)),
        ("stride", (0, 4)),
        ("cat_max_ratio", 75),
        ("colour", "jitter"),
        ("groups", (("norm", 0.0),)),
        ("data_options", ("annotation",)),
        ("warmup_rule", "linear"),
    ],
)
def test_recipes_refuse_what_nobody_knows(field, value):
    with pytest.raises(ValueError, match=field):
        RECIPE.replace(**{field: value})
