"""What a training keeps of its validations: losses, auxiliary heads, predictions, curves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.cli import main
from segkern.core import load_table, recipe_for
from segkern.data import open_dataset
from segkern.infer import segment
from segkern.models import create_model
from segkern.testing import toy
from segkern.train import fit, history
from segkern.train.start import prepare_model
from segkern.train.validation import keep_predictions, validation_losses
from segkern.weights.read import read


def streets(split, size=(64, 96)):
    return open_dataset("streets", size=size, length=4, split=split)


def trained(out, **kwargs):
    "Two steps of a toy with an auxiliary head."
    plan = dict(iterations=2, batch=2, crop=(64, 64), warmup=0, class_weights=False)
    recipe = recipe_for("dsanet", "streets", **plan)
    net = toy(num_classes=11)
    fit(net, recipe, streets("train"), streets("val"), out, eval_every=1, device="cpu", **kwargs)
    return net, recipe


def scalars(folder):
    "Tags of TensorBoard's files, with their values by step."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in {p.parent for p in folder.rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = {e.step: e.value for e in events.Scalars(tag)}
    return found


def test_everything_is_kept_and_changes_nothing(tmp_path):
    plain, _ = trained(tmp_path / "plain")
    net, recipe = trained(tmp_path / "run", tracker="tensorboard", predictions=-1)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
    assert all("loss" not in r["val"] for r in history(tmp_path / "plain") if "val" in r)
    vals = {r["step"]: r["val"] for r in history(tmp_path / "run") if "val" in r}
    tags = scalars(tmp_path / "run")
    assert {"train_loss", "valid_loss", "valid_mIoU", "valid_IoU/road"} <= set(tags)
    assert {"valid_mIoU_aux", "valid_IoU_aux/sky", "val/miou", "loss"} <= set(tags)
    for step, val in vals.items():
        assert tags["valid_loss"][step] == pytest.approx(val["loss"], rel=1e-6)
        assert tags["valid_mIoU"][step] == pytest.approx(val["miou"], rel=1e-6)
        folder = tmp_path / "run" / "predictions" / f"step_{step:08}"
        assert len(list((folder / "labels").iterdir())) == 4
    assert list(vals[2]["aux"]) == ["aux"] and len(vals[2]["aux"]["aux"]["iou"]) == 11
    assert not list((tmp_path / "run").rglob("*.tmp"))
    # the last predictions are those of the last weights, in the data's colours
    third = sorted((folder / "labels").iterdir())[2]
    ids = np.array(Image.open(third))
    own = segment(net, streets("val")[2][0]).numpy()
    palette = np.array(load_table("streets")["palette"], np.uint8)
    assert (ids == own).all()
    assert (np.array(Image.open(folder / "colours" / third.name)) == palette[own]).all()


@pytest.mark.parametrize(
    "name", ["s2fpn_r18", "pidnet_s", "sasformer_sparse_b0", "segformer_b0_mmseg_ssa"]
)
def test_the_loss_is_the_networks_own(name):
    "Of a picture that needs no padding: `model(x, target)` in evaluation mode."
    data = streets("val")
    recipe = recipe_for(name, "streets")
    net = create_model(name, num_classes=11)
    prepare_model(net, recipe, data)
    found = validation_losses(net.train(), data, recipe, limit=1)
    assert net.training
    image, labels = data[0]
    target = labels[None]
    if recipe.inside:
        target = torch.stack([labels, torch.ones_like(labels)])[None]
    if recipe.edges:
        from segkern.core.labels import boundary_target

        target = torch.stack([labels, boundary_target(labels, recipe.edge_frame)])[None]
    with torch.no_grad():
        losses = net.eval()(recipe.preprocess(image)[None], target)
    assert found["loss"] == pytest.approx(losses["loss"].item(), rel=1e-5)
    heads = {
        "s2fpn_r18": {"sup1", "sup2", "sup3", "sup4"},
        "pidnet_s": {"aux"},
        "segformer_b0_mmseg_ssa": {"coarse"},
    }
    assert set(found.get("aux", ())) == heads.get(name, set())


def test_a_frame_and_a_window(tmp_path):
    "Pictures are seen in the recipe's frame; predictions are those of the recipe's protocol."
    data = streets("val", (50, 70))
    frame = dict(fit_size=(140, 100), crop=(64, 64), protocol="ade32", batch=2, iterations=1)
    recipe = recipe_for("segformer_b0", "streets", **frame)
    net = create_model("segformer_b0", num_classes=11)
    prepare_model(net, recipe, data)
    assert validation_losses(net, data, recipe, limit=1)["loss"] > 0
    folder = keep_predictions(tmp_path, net, data, recipe, 7, count=1)
    (first,) = (folder / "labels").iterdir()
    ids = np.array(Image.open(first))
    assert (ids == segment(net, data[0][0]).numpy()).all()
    sliding = recipe.replace(fit_size=(), protocol="sliding", stride=(32, 32))
    again = keep_predictions(tmp_path, net, data, sliding, 7)
    assert again == folder and len(list((folder / "colours").iterdir())) == 4


def test_an_interrupted_writing_leaves_nothing(tmp_path):
    data = streets("val")

    class Broken:
        palette = data.palette

        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i == 2:
                raise OSError("unreadable")
            return data[i]

    recipe = recipe_for("dsanet", "streets")
    net = create_model("dsanet", num_classes=11)
    with pytest.raises(OSError, match="unreadable"):
        keep_predictions(tmp_path, net, Broken(), recipe, 1)
    assert list((tmp_path / "predictions").iterdir()) == []


def test_command_line(tmp_path, capsys):
    plan = "--set iterations=2 --set batch=2 --set crop=64x64 --set warmup=0 --eval-every 1".split()
    data = ["-D", "length=3", "-D", "size=64x64", "--device", "cpu"]
    out = tmp_path / "run"
    keep = ["--save-predictions", "2", "--val-loss", "--out", str(out)]
    assert main(["train", "dsanet", *plan, *data, *keep]) in (0, None), capsys.readouterr().err
    assert len(list((out / "predictions" / "step_00000001" / "labels").iterdir())) == 2
    assert json.loads((out / "results.json").read_text())["val"]["loss"] > 0
    png = tmp_path / "curves.png"
    assert main(["curves", str(out), "--out", str(png)]) in (0, None)
    assert Image.open(png).size[0] > 500
    assert main(["train", "dsanet", *data, "--save-predictions", "some"]) == 1
    assert "--save-predictions some" in capsys.readouterr().err
    assert read(out / "checkpoints" / "best.safetensors")
