"""A dataset of one's own goes through every door by its registration alone."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern.cli import main
from segkern.core import files, load_table
from segkern.data import DATASETS, check, open_dataset, register, registry
from segkern.data.streets import Streets
from segkern.models.base import dataset_table
from segkern.core import recipe_for

TABLE = {
    "classes": ["meadow", "pond", "hut"],
    "palette": [[90, 150, 60], [40, 90, 180], [150, 60, 50]],
    "class_weights": [1.0, 2.0, 4.0],
}

# what a user writes: a class that says where pictures and masks lie, and one line
MODULE = """
from pathlib import Path

from segkern.data import SegDataset, register
from segkern.core import load_table


class Farm(SegDataset):
    "Aerial pictures of a farm."

    def __init__(self, root, split="train", season="summer"):
        if split not in ("train", "val"):
            raise ValueError(f"farm has the splits train and val, got '{split}'")
        folder = Path(root) / season / split
        files = [(p, p.with_suffix(".png")) for p in sorted(folder.glob("*.bmp"))]
        t = load_table("farm")
        super().__init__("farm", split, files, t["classes"], t["palette"], t["class_weights"])


register("farm", Farm, "train val", about="a farm from above", table=Path(__file__).with_name("farm.json"))
"""


def draw(root, counts=(("train", 6), ("val", 2)), size=(48, 64)):
    "Meadows with a pond and a hut at random places."
    rng = np.random.RandomState(0)
    for split, n in counts:
        folder = root / "summer" / split
        folder.mkdir(parents=True)
        for i in range(n):
            mask = np.zeros(size, np.uint8)
            for label in (1, 2):
                y, x = (rng.randint(s - 16) for s in size)
                mask[y : y + 16, x : x + 16] = label
            picture = np.array(TABLE["palette"], np.uint8)[mask] + rng.randint(0, 40, (*size, 3))
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.bmp")
            Image.fromarray(mask).save(folder / f"{i}.png")


@pytest.fixture
def farm(tmp_path, monkeypatch):
    "The folder of a registered dataset; afterwards segkern has forgotten it."
    (tmp_path / "farm_data.py").write_text(MODULE)
    (tmp_path / "farm.json").write_text(json.dumps(TABLE))
    draw(tmp_path / "data")
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(registry._ENTRIES), dict(files._TABLES)
    importlib.import_module("farm_data")
    yield tmp_path / "data"
    del sys.modules["farm_data"]
    for now, before in zip((registry._ENTRIES, files._TABLES), known):
        now.clear()
        now.update(before)


def test_opens_and_checks(farm):
    ds = open_dataset("farm", farm, "val")
    assert (
        len(ds) == 2 and ds.classes == TABLE["classes"] and ds[0][1].unique().tolist() == [0, 1, 2]
    )
    report = check("farm", farm)
    assert report.ok and report.splits == {"train": 6, "val": 2} and min(report.counts) > 0
    assert "farm" in DATASETS and DATASETS["farm"].about == "a farm from above"
    with pytest.raises(ValueError, match="farm: got an unexpected keyword argument 'colour'"):
        open_dataset("farm", farm, colour="red")
    with pytest.raises(ValueError, match="Did you mean 'farm'"):
        open_dataset("fram", farm)


def test_table_and_recipe(farm):
    assert load_table("farm") == TABLE and dataset_table(3, "farm")["palette"] == TABLE["palette"]
    model = segkern.create_model("dsanet", num_classes=3, dataset="farm")
    assert model.classes == TABLE["classes"]
    recipe = recipe_for("s2fpn_r18", "farm")
    assert recipe.dataset == "farm" and recipe == recipe_for("s2fpn_r18", "folder").replace(
        dataset="farm"
    )


def test_command_line(farm, tmp_path, capsys):
    "Check, train, score: nothing but the name is said."
    assert main(["data", "check", "farm", str(farm)]) in (0, None)
    assert "no problems" in capsys.readouterr().out
    (farm / "summer" / "val" / "1.png").unlink()
    assert main(["data", "check", "farm", str(farm)]) == 1
    assert "1.png" in capsys.readouterr().out
    draw(tmp_path / "whole")
    plan = "--set iterations=3 --set batch=2 --set crop=(48,64) --set warmup=0 --set init=scratch".split()
    place = ["--dataset", "farm", "--root", str(tmp_path / "whole"), "--device", "cpu"]
    run = tmp_path / "run"
    code = main(
        ["train", "dsanet", *place, *plan, "--out", str(run), "--set", "class_weights=true"]
    )
    assert code in (0, None), capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["name"] == config["recipe"]["dataset"] == "farm"
    assert json.loads((run / "results.json").read_text())["steps"] == 3
    net = segkern.load(next((run / "checkpoints").glob("best.safetensors")))
    assert net.classes == TABLE["classes"] and net.dataset == "farm"
    code = main(["eval", str(run / "checkpoints" / "best.safetensors"), *place])
    assert code in (0, None), capsys.readouterr().err
    assert "hut" in capsys.readouterr().out


def test_names_are_kept_apart(farm):
    with pytest.raises(ValueError, match="'streets' is Streets already"):
        register("streets", type("Other", (), {}))
    assert DATASETS["streets"].make.__name__ == "Streets"
    register("farm", DATASETS["farm"].make, "train", table=TABLE)
    assert DATASETS["farm"].splits == ("train",) and load_table("farm") == TABLE
    with pytest.raises(ValueError, match="at least one split"):
        register("field", Streets, "")
    with pytest.raises(ValueError, match="under 'classes'"):
        register("field", Streets, table={"classes": ["a", "a"]})
    assert "field" not in DATASETS


def test_without_a_table(farm):
    "Classes may depend on options: then they are known once the dataset is open."

    def make(root, split="train"):
        return open_dataset("streets", split=split, length=2, size=(16, 16))

    register("town", make, needs_root=True)
    assert torch.is_tensor(open_dataset("town", "anywhere")[0][0])
    with pytest.raises(FileNotFoundError, match="without a table"):
        load_table("town")
    assert recipe_for("s2fpn_r18", "town").dataset == "town"
