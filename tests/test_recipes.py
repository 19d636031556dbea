"""Every network has a recipe for every dataset, published or derived; files and names choose one."""

import json

import pytest

from segkern.cli.recipe import chosen_recipe
from segkern.core import Recipe, recipe_for
from segkern.core.recipe_file import NAMED
from segkern.core.recipe_start import (
    DERIVED,
    kind_of,
    nearest_dataset,
    PIPELINES,
    WITHOUT_QUIRKS,
)
from segkern.data import DATASETS
from segkern.infer.protocols import protocol_of, settings_for
from segkern.models import list_models
from segkern.train.schedule import lr_at

NAMES = list_models(all=True)


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_every_network_on_every_dataset(dataset):
    splits = DATASETS[dataset].splits
    for name in NAMES:
        r = recipe_for(name, dataset)
        assert r.dataset == dataset and {r.split, r.val_split} <= set(splits), (name, r)
        # what training and validation ask a recipe
        assert lr_at(r, 0) > 0 and protocol_of(r.protocol).name == r.protocol
        settings = settings_for(r)
        if "window" in settings:
            step = settings["stride"] or (1, 1)
            assert all(s <= w for s, w in zip(step, settings["window"])), (name, r)
        assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
        if r.source.startswith(DERIVED):
            assert not r.class_weights and r.data_options == (), (name, r)
            assert f"{name}'s recipe for " in r.source and "changed" in r.source


def test_a_derived_recipe_keeps_what_belongs_to_the_network():
    changed_by_data = {"dataset", "source", "split", "val_split", "data_options", "class_weights"}
    changed_by_data |= {"preprocess", "edge_frame", "crop", "fit_size", "base_size", "batch"}
    changed_by_data |= {"protocol", "stride", "test_size", "iterations"}
    # how an official script deviates from what everybody means
    changed_by_data |= set(WITHOUT_QUIRKS)
    count = 0
    for name in NAMES:
        for dataset in PIPELINES:
            r = recipe_for(name, dataset)
            if not r.source.startswith(DERIVED):
                continue
            count += 1
            whose = r.source.split(" (")[0].rsplit(" ", 1)[1]
            start = recipe_for(name, whose)
            assert not start.source.startswith(DERIVED)
            different = {k for k, v in r.to_dict().items() if v != start.to_dict()[k]}
            assert all(getattr(r, k) == v for k, v in WITHOUT_QUIRKS.items())
            assert different <= changed_by_data, (name, dataset, different - changed_by_data)
            if kind_of(whose) != kind_of(dataset):
                assert r.crop == PIPELINES[dataset]["crop"]
                assert r.protocol == PIPELINES[dataset]["protocol"]
    assert count > 200


def test_published_before_ours_and_the_same_kind_first():
    def start(name, dataset):
        return recipe_for(name, dataset).source.split(" (")[0].rsplit(" ", 1)[1]

    assert start("upernet_swin_t", "cityscapes") == "ade20k"  # its CamVid is ours
    assert start("s2fpn_r18", "gtav") == "cityscapes" == start("s2fpn_r18", "ade20k")
    assert start("segformer_b0", "voc2012") == "ade20k"
    assert start("sasformer_sparse_b0", "camvid") == "voc2012"
    assert nearest_dataset("gtav", {"streets": recipe_for("dsanet", "streets")}) is None


def test_cityscapes_of_the_hosts():
    "As their own projects published it: rate, protocol."
    rows = {
        "segnext_t": (6e-5, "sliding"),
        "segnext_l_ssa": (6e-5, "sliding"),
        "seaformer_b": (3e-4, "whole"),
        "seaformer_l_ssa": (2.5e-4, "whole"),
        "afformer_b": (4e-4, "whole"),
        "cgrseg_l": (1.2e-4, "sliding"),  # derived
    }
    for name, (lr, protocol) in rows.items():
        r = recipe_for(name, "cityscapes")
        assert (r.lr, r.protocol) == (lr, protocol)
        assert (r.crop, r.fit_size, r.batch) == ((1024, 1024), (2048, 1024), 8)
        assert r.iterations == 160_000 and r.weight_decay == 0.01
        assert r.source.startswith(DERIVED) == name.startswith("cgrseg")
    sgd = recipe_for("ocrnet_hr48", "cityscapes")
    assert (sgd.optimizer, sgd.lr, sgd.lr_min, sgd.crop) == ("sgd", 1e-2, 1e-4, (512, 1024))


def test_refusals_name_the_file_the_field_and_the_nearest(tmp_path):
    path = tmp_path / "mine.json"
    for said, words in (
        ({"learning_rat": 1}, "no field 'learning_rat'"),
        ({"iteratons": 1}, "did you mean 'iterations'"),
        ({"optimizer": "adamv"}, "did you mean 'adam"),
        ({"protocol": "slidin"}, "did you mean 'sliding'"),
        ({"lr": "fast"}, "the field 'lr' wants a number"),
        ({"crop": [0, 4]}, "crop must be"),
        ({"from": ["segformer_b9", "camvid"]}, "no recipe for model 'segformer_b9'"),
        ({"dataset": "camvid"}, "it is for 'camvid'"),
    ):
        path.write_text(json.dumps(said))
        with pytest.raises(ValueError) as e:
            chosen_recipe("s2fpn_r18", "gtav", str(path), [], [])
        text = str(e.value)
        assert text.startswith(str(path)) and words in text and "\n" not in text, text
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        chosen_recipe("s2fpn_r18", "gtav", "nowhere.json", [], [])


def test_round_trip_of_every_published_recipe(tmp_path):
    path = tmp_path / "r.json"
    for name in ("s2fpn_r18", "sanet_s", "segformer_b0", "sasformer_sparse_b0", "vit_adapter_l"):
        for dataset in DATASETS:
            r = recipe_for(name, dataset)
            path.write_text(json.dumps(r.to_dict()))
            assert chosen_recipe(name, "", str(path), [], [])[0] == r
            options = ["levels=2"] if name.startswith("sasformer") else []
            assert chosen_recipe(name, dataset, str(path), ["lr=7"], options)[0].lr == 7.0


def test_one_class_is_refused(tmp_path, capsys):
    "For every network, and on the command line: a folder whose only class is one."
    import torch
    from PIL import Image

    from segkern.cli import main
    from segkern.models import create_model

    for name in NAMES:
        with pytest.raises(ValueError, match="num_classes=1.*num_classes=2"):
            create_model(name, 1)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
            value = torch.zeros(32, 32, *([3] if kind == "images" else []), dtype=torch.uint8)
            Image.fromarray(value.numpy()).save(tmp_path / kind / split / "a.png")
    data = ["--dataset", "folder", "--root", str(tmp_path), "-D", "classes=('thing',)"]
    assert main(["train", "dsanet", *data, "--out", str(tmp_path / "run")]) == 1
    assert "num_classes=2" in capsys.readouterr().err


def test_tree_energy_recipes_are_reachable(tmp_path, capsys):
    "All six, by name; one trains a step."
    from segkern.cli import main

    names = [n for n in NAMED if n.startswith("tree_")]
    assert len(names) == 6
    for name in names:
        assert main(["recipe", "show", name]) in (0, None)
        assert "tree_weight" in capsys.readouterr().out
        assert "without host" in NAMED[name].about
    small = (
        "--set iterations=1 --set batch=2 --set crop=64x64 --set init=scratch --set protocol=whole"
    )
    path = tmp_path / "r.json"
    r = NAMED["tree_cityscapes_r101"].recipe
    path.write_text(json.dumps({k: v for k, v in r.to_dict().items() if k != "dataset"}))
    tree = ["-M", "tree_weight=0.4", "-M", "tree_sigma=0.002", "-M", "width=16"]
    run = ["--dataset", "streets", "--recipe", str(path), *small.split(), "--no-eval"]
    data = ["-D", "length=2", "-D", "size=64x64", "-D", "annotation=scribble", "--device", "cpu"]
    out = ["--out", str(tmp_path / "run")]
    code = main(["train", "sasformer_sparse_b0", *run, *tree, *data, *out])
    assert code in (0, None), capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["lr"] == 5e-3 and config["model"]["options"]["tree_weight"] == 0.4
    with pytest.raises(ValueError, match="name one of sasformer_sparse_"):
        chosen_recipe("s2fpn_r18", "", names[0], [], [])


@pytest.mark.parametrize("options", [{}, {"tree_weight": 0.4}])
def test_the_sparse_losses_in_half_precision(options):
    "As published: fp16 autocast and a scaled loss; a processor can compute it, only not train by it."
    import torch
    from segkern.data import open_dataset
    from segkern.data.transform import transform_for
    from segkern.models import create_model
    from segkern.train.start import prepare_model

    data = open_dataset("streets", size=(64, 64), length=2, annotation="scribble")
    recipe = recipe_for("sasformer_sparse_b0", "streets", crop=(64, 64))
    net = create_model("sasformer_sparse_b0", num_classes=11, **options)
    prepare_model(net, recipe, data)
    generator = torch.Generator().manual_seed(0)
    pairs = [transform_for(recipe)(*data[i], generator) for i in range(2)]
    x, target = (torch.stack(parts) for parts in zip(*pairs))
    losses, gradients = [], []
    for half in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        net.train()
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = net(x, target)["loss"]
        (loss * 2**16).backward()
        losses.append(loss.item())
        grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads) / 2**16)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert torch.isfinite(gradients[1]).all()
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


def test_fp16_on_a_cpu_is_float32_and_says_so(tmp_path, caplog):
    from segkern.data import open_dataset
    from segkern.testing import toy
    from segkern.train import fit

    assert recipe_for("sasformer_sparse_b4", "voc2012").mixed_precision == "fp16"
    plan = dict(iterations=1, batch=2, crop=(32, 32), mixed_precision="fp16")
    recipe = recipe_for("dsanet", "streets", **plan, class_weights=False)
    data = open_dataset("streets", size=(32, 48), length=2)
    fit(toy(num_classes=11), recipe, data, out=tmp_path / "run", device="cpu")
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["precision"] == "no" and "fp16 needs a GPU" in caplog.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["mixed_precision"] == "fp16"


def test_a_run_says_that_its_recipe_is_derived(tmp_path, capsys):
    "On a folder of one's own, from the command line: a line before the first step, and in the run's files."
    import torch
    from PIL import Image
    from segkern.cli import main

    drawn = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
            shape = (32, 32, 3) if kind == "images" else (32, 32)
            for i in range(2):
                picture = torch.randint(0, 2, shape, generator=drawn, dtype=torch.uint8)
                Image.fromarray(picture.numpy()).save(tmp_path / kind / split / f"{i}.png")
    data = ["--dataset", "folder", "--root", str(tmp_path), "-D", "classes=('ground', 'thing')"]
    small = "--set iterations=1 --set batch=2 --set crop=32x32 --set init=scratch --no-eval".split()
    out = tmp_path / "run"
    assert main(["train", "dsanet", *data, *small, "--device", "cpu", "--out", str(out)]) in (
        0,
        None,
    )
    said = capsys.readouterr().err
    assert (
        "recipe: derived from dsanet's recipe for camvid" in said and "class_weights=False" in said
    )
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["source"].startswith(DERIVED)
