"""A paper of one's own becomes first-class by `register` alone: every door of the library opens to it.

What a paper touches: its notebook (here a module, `TOY`), and the line where `segkern.models` imports it."""

import importlib
import json
import sys

import nbformat
import pytest
import torch

import segkern
from segkern import cli
from segkern.core import RECIPES, recipe_for
from segkern.models import claimed, cost
from segkern.models.registry import MODELS

TOY = """
from torch import nn

from segkern.core import IMAGENET, Recipe, STREETS
from segkern.models import register, SegModel
from segkern.models.base import dataset_table
from segkern.weights.rules import Rule


class ToyNet(SegModel):
    "Two convolutions and a classifier."

    stride = 4

    def __init__(self, name, num_classes, dataset=None, pretrained=False, width=16):
        super().__init__(name, num_classes, IMAGENET, dataset_table(num_classes, dataset))
        self.width = width
        first = nn.Conv2d(3, width, 3, 2, 1)
        second = nn.Conv2d(width, width, 3, 2, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def feature(self, x):
        return self.body(x)

    @property
    def options(self):
        return {"width": self.width}

    def key_rules(self, state):
        return [Rule(r"backbone\\.", "body."), Rule(r"head\\.", "classifier.")]


streets = STREETS.replace(preprocess=IMAGENET, iterations=30, batch=4, class_weights=False)
ade20k = Recipe("ade20k", IMAGENET, crop=(64, 64), protocol="ade32", fit_size=(128, 64))
register(
    "toynet",
    ToyNet,
    recipes=(streets, ade20k),
    adaptive_recipes=(),
    claims=dict(params_millions=0.01, gmacs=0.1, source="a test"),
)
"""

PAPER = [
    ("code", ["parameters"], 'variant = "toynet"\nscale = "smoke"\nout = "runs/toynet"\nseed = 0'),
    ("markdown", [], "# A toy\n> Two convolutions are enough."),
    ("code", [], "import sys\nsys.path.insert(0, FOLDER)\nimport segkern, toynet"),
    (
        "code",
        ["results"],
        "from segkern.reproduce import record\n"
        "m = segkern.create_model(variant, 11)\n"
        "rows = [dict(claim='classes', claimed=11, measured=m.num_classes)]\n"
        "record(out, 'toynet', variant, rows, seconds=1.0, scale=scale, seed=seed)",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def toynet(tmp_path_factory):
    "The module, imported once, and taken back out of the tables afterwards."
    folder = tmp_path_factory.mktemp("toynet")
    (folder / "toynet.py").write_text(TOY)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("toynet")
    sys.path.remove(str(folder))
    del sys.modules["toynet"]
    for table in (MODELS, RECIPES):
        for key in [k for k in table if "toynet" in str(k)]:
            del table[key]


def run(*args):
    "A command line that succeeds."
    assert cli.main([str(a) for a in args]) == 0, args


def test_it_is_short():
    assert len(TOY.strip().splitlines()) < 60


def test_names_and_recipes():
    assert {"toynet", "toynet_ssa"} <= set(segkern.list_models())
    assert len(segkern.create_model("toynet", 11, dataset="streets").classes) == 11
    assert recipe_for("toynet", "folder").crop == (64, 64)
    assert recipe_for("toynet_ssa", "streets").iterations == 30
    with pytest.raises(ValueError, match="did you mean toynet"):
        segkern.create_model("toynett")


def test_official_file_and_cost():
    m = segkern.create_model("toynet", 11, seed=1)
    places = (("body.", "backbone."), ("classifier.", "head."))
    official = {}
    for key, value in m.state_dict().items():
        for ours, theirs in places:
            key = key.replace(ours, theirs)
        official[key] = value
    other = segkern.create_model("toynet", 11, seed=2)
    segkern.load_official(other, official)
    assert torch.equal(other.classifier.weight, m.classifier.weight)
    assert cost("toynet", 11, (64, 64))["params"] == sum(p.numel() for p in m.parameters())
    assert claimed("toynet")["source"] == "a test"


@pytest.mark.parametrize("name", ["toynet", "toynet_ssa"])
def test_from_training_to_labels(name, tmp_path, capsys):
    "Train, evaluate, predict and explain on the command line; the adaptive classifier too."
    folder = tmp_path / name
    few = ("--set", "iterations=4", "--set", "batch=2", "-D", "size=64x96", "--device", "cpu")
    run("train", name, "--dataset", "streets", "--out", folder, *few)
    measured = json.loads((folder / "results.json").read_text())
    assert measured
    small = ("-D", "size=64x96", "--device", "cpu")
    run("eval", folder, "--dataset", "streets", "--limit", "2", *small)
    picture = tmp_path / "picture.png"
    image = segkern.open_dataset("streets", size=(64, 96))[0][0]
    from torchvision.io import write_png

    write_png(image, str(picture))
    run("predict", folder, picture, "--out", tmp_path / "labels", "--device", "cpu")
    assert list((tmp_path / "labels").rglob("*.png"))
    run("explain", "heat", folder, picture, "--class", "0", "--out", tmp_path / "heat.png")
    capsys.readouterr()
    run("models", "toynet*")
    assert "toynet_ssa" in capsys.readouterr().out
    loaded = segkern.load(next(folder.rglob("*.safetensors")))
    assert loaded.name == name and loaded.options["width"] == 16


def test_paper_run(toynet, tmp_path):
    "A notebook of one's own runs headlessly and lands in the report."
    from segkern.reproduce import reproduce

    nb = nbformat.v4.new_notebook()
    nb.metadata["kernelspec"] = dict(name="python3", language="python", display_name="Python 3")
    folder = str(next(p for p in sys.path if p.endswith("toynet0")))
    for kind, tags, text in PAPER:
        make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        cell = make(text.replace("FOLDER", repr(folder)))
        cell.metadata["tags"] = tags
        nb.cells.append(cell)
    (tmp_path / "papers").mkdir()
    nbformat.write(nb, tmp_path / "papers" / "toynet.ipynb")
    report = reproduce(["toynet"], out=tmp_path / "runs", papers_dir=tmp_path / "papers", jobs=1)
    assert report["failed"] == 0, report["papers"]["toynet"]["error"]
    stored = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert stored["papers"]["toynet"]["variant"] == "toynet"
