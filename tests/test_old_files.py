"""Files that version 0.1.0 wrote load and continue: a run of DSANet that was interrupted at step 2 of 3, its weights
filled with constants. What 0.1.0 itself made of them stands in `expected.json` of the archive."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import segkern
from segkern import cli
from segkern.cli.arguments import parse_overrides
from segkern.core import Recipe, recipe_for
from segkern.train import last_checkpoint, run_weights

ARCHIVE = Path(__file__).parent / "fixtures" / "files_0_1_0" / "run.tar.xz"
OPTIONS = "--set iterations=3 --set batch=2 --set crop=32x32 --device cpu -D size=32x48".split()


@pytest.fixture
def run(tmp_path):
    "The old run folder, unpacked."
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


@pytest.fixture
def expected(run):
    return json.loads((run / "expected.json").read_text())


def test_the_archive_is_small():
    assert ARCHIVE.stat().st_size < 200_000


def test_weights_load(run, expected):
    assert expected["version"] == "0.1.0"
    picture = torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)
    for path in (run / "checkpoints" / "best.safetensors", run_weights(run)):
        m = segkern.load(path)
        assert m.name == "dsanet" and m.num_classes == 11 and len(m.classes) == 11
        logits = m(picture).detach()
        assert logits[0, :, 0, 0].tolist() == pytest.approx(
            [expected["logits of every class"]] * 11
        )
        assert float(logits.mean()) == pytest.approx(expected["mean"], rel=1e-4)


def test_the_run_continues(run, expected):
    "The optimizer's state and the order of pictures are those of 0.1.0: the third loss is the one it had."
    assert last_checkpoint(run).name == "step_00000002"
    command = ["train", "dsanet", "--dataset", "streets", "--out", str(run), "--resume", *OPTIONS]
    assert cli.main(command) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    third = next(line for line in lines if line["step"] == 3 and "loss" in line)
    assert third["loss"] == pytest.approx(expected["loss of step 3"], rel=1e-4)
    assert json.loads((run / "results.json").read_text())["steps"] == 3


def as_text(value):
    "A value of `config.json` as one types it behind `--set`."
    if isinstance(value, list):
        return ",".join(map(str, value)) if value and not isinstance(value[0], list) else None
    return str(value)


def test_every_field_of_then_is_one_of_now(run):
    "The recipe of an old run is read whole; its names can be given with --set."
    old = json.loads((run / "config.json").read_text())["recipe"]
    now = Recipe.from_dict(old)
    assert len(old) == 52 and set(old) <= set(now.to_dict())
    # what a recipe has learnt to say since then is silent
    later = [f for f in dataclasses.fields(now) if f.name not in old]
    assert all(getattr(now, f.name) == f.default for f in later)
    given = {name: as_text(value) for name, value in old.items()}
    named = [n for n in given if given[n] and n not in ("dataset", "preprocess")]
    fields = parse_overrides([f"{name}={given[name]}" for name in named])
    recipe = recipe_for("s2fpn_r18", "streets", **fields)
    assert len(fields) > 40 and all(getattr(recipe, name) == fields[name] for name in named)


def test_commands_take_the_old_folder(run, tmp_path):
    "A folder of an old run is a checkpoint for `eval` and `convert`."
    small = ("-D", "size=32x48", "--device", "cpu", "--limit", "2")
    assert cli.main(["eval", str(run), "--dataset", "streets", *small]) == 0
    copy = shutil.copy(run / "checkpoints" / "best.safetensors", tmp_path / "alone.safetensors")
    assert segkern.load(copy).palette == segkern.load(run_weights(run)).palette
