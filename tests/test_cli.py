"The command line: every command as a user calls it, and what it says when something is wrong."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern import cli
from segkern.core import load_table
from segkern.testing import fixture, shared

COMMANDS = [
    "doctor",
    "models",
    "train",
    "pretrain",
    "eval",
    "predict",
    "convert",
    "reproduce",
    "lab",
    "bench models",
    "data check",
    "data make",
    "metrics explain",
    *(
        f"explain {c}"
        for c in "heat labels boundary class-boundary field effective paths calculators gallery samples".split()
    ),
]
ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent),
    "OMP_NUM_THREADS": "1",
}


def shell(*args, **kwargs):
    "The command in a process of its own."
    code = "import sys; from segkern.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=ENV,
        **kwargs,
    )


def picture(path, h=48, w=64, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (h, w, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of ours: the smallest network with random weights, 19 classes of Cityscapes."
    model = segkern.create_model("dsanet").eval()
    return segkern.save(
        model, tmp_path_factory.mktemp("weights") / "dsanet.safetensors", source="a test"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, call):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0 and f"Example: segkern {command}" in out and "Options:" in out


def test_help_is_light():
    code = (
        "import sys; from segkern.cli import main; main(['train', '-h']); "
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert run.returncode == 0 and time.perf_counter() - start < 5, run.stdout


def test_train_shows_its_plan(call, tmp_path):
    "Recipe and groups of the optimizer, without data, weights or a run folder."
    code, out, _ = call(
        "train",
        "sanet_s",
        "--dataset",
        "cityscapes",
        "--show",
        "--set",
        "batch=6",
        "--out",
        tmp_path / "run",
    )
    assert (
        code == 0
        and "base_size" in out
        and "parameters" in out
        and out.split("batch")[1].split()[0] == "6"
        and not (tmp_path / "run").exists()
    )
    code, out, _ = call(
        "train",
        "s2fpn_r18",
        "--dataset",
        "folder",
        "--show",
        "--set",
        "groups=(('encoder.*',0.1,1.0),('*',1.0,0.0))",
    )
    assert code == 0 and out.count("encoder.") >= 2 and "3.00e-05" in out


def test_a_checkpoint_with_more_outputs_than_classes(call, tmp_path):
    "150 outputs on 11 classes: refused with the way out, then measured."
    file = segkern.save(segkern.create_model("dsanet", num_classes=150), tmp_path / "m.safetensors")
    task = [
        "eval",
        file,
        "--dataset",
        "streets",
        "-D",
        "length=1",
        "-D",
        "size=64x96",
        "--split",
        "val",
    ]
    code, _, err = call(*task)
    assert code == 1 and "--restrict" in err
    code, out, _ = call(*task, "--restrict", "--json", "-")
    assert (
        code == 0
        and json.loads(out)["restricted_from"] == 150
        and len(json.loads(out)["iou"]) == 11
    )
    code, out, _ = call(
        *task, "--restrict", "--protocol", "ade32", "--size", "128x64", "--json", "-"
    )
    assert (
        code == 0
        and json.loads(out)["protocol"] == "ade32"
        and json.loads(out)["size"] == [128, 64]
    )


@pytest.mark.parametrize("module", ["segkern", "segkern.cli"])
def test_as_a_module(module):
    "`python -m segkern` is the command, with its exit code."

    def run(*args):
        command = [sys.executable, "-m", module, *args]
        return subprocess.run(command, capture_output=True, text=True, env=ENV)

    assert run("--version").stdout == f"segkern {segkern.__version__}\n"
    failed = run("models", "nothing*")
    assert failed.returncode == 1 and failed.stderr.startswith("error: no model matches")


def test_groups_and_commands_in_their_order(call):
    listed = call("--help")[1].split("Commands:")[1]
    commands = "doctor models train pretrain curves eval predict convert reproduce lab".split()
    groups = "recipe bench explain data metrics".split()
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == commands + groups


def test_version(call):
    assert call("--version")[:2] == (0, f"segkern {segkern.__version__}\n")


@pytest.mark.parametrize(
    "line, part",
    [
        ("models nothing*", "no model matches"),
        ("train s2fpn_r81", "s2fpn_r81"),
        ("train s2fpn_r18 --dataset camvid --set init=scratch", "root"),
        ("train s2fpn_r18 --dataset camvid --root /no/such/folder", "/no/such/folder"),
        ("train s2fpn_r18 --dataset mars", "mars"),
        ("train s2fpn_r18 --set iterations=many", "'iterations' wants a whole number"),
        ("train s2fpn_r18 --set speed=9", "no field ['speed']"),
        ("train s2fpn_r18 --set lr", "name=value"),
        ("train s2fpn_r18 -D order=sanet", "order"),
        ("eval s2fpn_r18 --dataset streets --split mars", "mars"),
        ("eval no/such/file.safetensors --dataset streets", "does not exist"),
        ("predict no_file.pth here.png", "here.png does not exist"),
        ("convert no_file.pth --model dsanet --dataset camvid --out x.safetensors", "no_file.pth"),
        ("convert no_file.pth --model dsanet --out x.safetensors", "--num-classes"),
        ("convert no_file.pth --model dsanet --dataset camvid --out x.pth", ".safetensors"),
        ("data check mars", "mars"),
        ("data make camvid x", "camvid"),
        ("data make streets x -D colour=red", "colour"),
        ("reproduce mars --papers-dir nowhere", "nowhere"),
        ("reproduce --scale huge", "huge"),
        ("bench models nothing*", "no model matches"),
    ],
)
def test_one_line_errors(line, part, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*line.split())
    lines = [text for text in err.splitlines() if not text.startswith(("warning: ", "  "))]
    assert code == 1 and part in err and len(lines) == 1 and lines[0].startswith("error: "), err
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.safetensors"))


def test_wrong_usage(call):
    for line in ("train", "mars", "predict --nonsense", "train s2fpn_r18 --seed one"):
        assert call(*line.split())[0] == 2


def test_debug_shows_the_traceback():
    for line, shown in (
        ("predict x.pth no.png", False),
        ("--debug predict x.pth no.png", True),
        ("predict x.pth no.png --debug", True),
    ):
        run = shell(*line.split())
        assert (
            run.returncode == 1
            and ("Traceback" in run.stderr) is shown
            and "no.png does not exist" in run.stderr
        )


def test_models(call):
    code, out, _ = call("models", "s2fpn_r*")
    assert code == 0 and out.split() == segkern.list_models("s2fpn_r*")
    code, out, _ = call("models", "s2fpn_r18", "--cost", "--json")
    assert code == 0 and abs(json.loads(out)[0]["GMACs, paper form"] / 35.8 - 1) < 0.01
    assert 0 < json.loads(out)[0]["GMACs, ours"] < json.loads(out)[0]["GMACs, paper form"]
    code, out, _ = call("models", "dsanet", "--cost", "--size", "96x128", "--num-classes", 11)
    assert code == 0 and "GMACs, paper form" in out


def test_doctor(call):
    code, out, _ = call("doctor")
    assert (
        code == 0
        and torch.__version__.split("+")[0] in out
        and "kernels" in out
        and "extras" in out
    )


def test_doctor_names_what_is_missing(call, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "papermill" else find(name, *a),
    )
    code, out, _ = call("doctor")
    assert code == 0 and "pip install 'segkern[papers]'" in out


SMALL = [
    "--set",
    "iterations=3",
    "--set",
    "batch=2",
    "--set",
    "crop=64x96",
    "-D",
    "length=6",
    "-D",
    "size=64x96",
    "--eval-limit",
    2,
    "--device",
    "cpu",
]


def test_train_eval_predict(call, tmp_path):
    run = tmp_path / "run"
    code, out, err = call("train", "dsanet", *SMALL, "--out", run)
    assert code == 0 and str(run) in out and "mIoU" in out, err
    code, _, err = call("train", "dsanet", *SMALL, "--out", run)
    assert code == 1 and "--resume" in err
    assert call("train", "dsanet", *SMALL, "--out", run, "--resume")[0] == 0
    code, out, err = call(
        "eval",
        run,
        "--dataset",
        "streets",
        "-D",
        "size=64x96",
        "--limit",
        3,
        "--json",
        tmp_path / "r.json",
        "--device",
        "cpu",
    )
    assert code == 0 and "bicyclist" in out and "3 pictures" in out, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert (
        found["model"] == "dsanet"
        and len(found["iou"]) == 11
        and found["protocol"] == "whole"
        and found["miou_over"] == "present"
    )
    code, out, _ = call(
        "eval",
        run,
        "--dataset",
        "streets",
        "-D",
        "size=64x96",
        "--limit",
        1,
        "--miou",
        "s2fpn",
        "--json",
        "-",
        "--device",
        "cpu",
    )
    assert code == 0 and json.loads(out)["miou_over"] == "s2fpn"
    code, out, err = call(
        "predict", run, picture(tmp_path / "a.png"), "--out", tmp_path / "out", "--device", "cpu"
    )
    assert code == 0 and set(np.unique(np.asarray(Image.open(tmp_path / "out" / "a.png")))) <= set(
        range(11)
    ), err


def test_predict_goes_on_past_broken_pictures(call, weights, tmp_path):
    for n in ("x/1.png", "y/1.png", "y/2.jpg", "y/2.png"):
        picture(tmp_path / "in" / n, 33, 47)
    (tmp_path / "in" / "broken.png").write_bytes(
        (tmp_path / "in" / "x" / "1.png").read_bytes()[:200]
    )
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    picture(tmp_path / "in" / "dot.png", 1, 1)
    code, out, err = call(
        "predict",
        weights,
        tmp_path / "in",
        "--out",
        tmp_path / "out",
        "--overlay",
        "--device",
        "cpu",
    )
    assert (
        code == 1
        and "Traceback" not in err
        and "broken.png" in err
        and "text.jpg" in err
        and "of 7 pictures" in out
    )
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert {"x_1.png", "y_1.png", "y_2_jpg.png", "y_2_png.png"} <= names and not {
        "broken.png",
        "text.png",
    } & names
    label = Image.open(tmp_path / "out" / "x_1.png")
    tinted = Image.open(tmp_path / "out" / "overlays" / "x_1.jpg")
    assert label.mode == "P" and label.size == tinted.size == (47, 33)
    assert label.getpalette()[:3] == load_table("cityscapes")["palette"][0]


def test_predict_equals_segment(call, weights, tmp_path):
    file = picture(tmp_path / "a.png", 64, 96)
    for extra in ([], ["--optimize"]):
        assert (
            call("predict", weights, file, "--out", tmp_path / "out", "--device", "cpu", *extra)[0]
            == 0
        )
        got = np.asarray(Image.open(tmp_path / "out" / "a.png"))
        assert (got == segkern.segment(segkern.load(weights), file).numpy()).mean() > (
            0.999 if extra else 0.9999
        )


def test_predict_never_overwrites_an_input(call, weights, tmp_path):
    file = picture(tmp_path / "a.png")
    before = file.read_bytes()
    code, _, err = call("predict", weights, file, "--out", tmp_path, "--device", "cpu")
    assert code == 1 and "overwritten" in err and file.read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert "no pictures" in call("predict", weights, tmp_path / "empty", "--out", tmp_path / "o")[2]


def test_predict_submission(call, weights, tmp_path):
    file = picture(tmp_path / "berlin_000000_000019_leftImg8bit.png", 48, 96)
    plain = tmp_path / "plain"
    sent = tmp_path / "sent"
    assert call("predict", weights, file, "--out", plain, "--device", "cpu")[0] == 0
    assert (
        call(
            "predict", weights, file, "--out", sent, "--submission", "cityscapes", "--device", "cpu"
        )[0]
        == 0
    )
    a, b = (
        np.asarray(Image.open(next(d.glob("berlin_000000_000019*.png")))) for d in (plain, sent)
    )
    assert (np.array(load_table("cityscapes")["label_ids"])[a] == b).all()
    assert (
        "mars"
        in call("predict", weights, file, "--out", sent, "--submission", "mars", "--device", "cpu")[
            2
        ]
    )


@pytest.mark.skipif(shared("data/camvid") is None, reason="needs CamVid")
def test_convert_then_predict_on_camvid(call, tmp_path):
    state = {f"module.{k}": v for k, v in fixture("dsanet").state().items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "official.pth")
    code, out, err = call(
        "convert",
        tmp_path / "official.pth",
        "--model",
        "dsanet",
        "--dataset",
        "camvid",
        "--out",
        tmp_path / "ours.safetensors",
    )
    assert code == 0 and "tensors loaded" in out and "wrote" in out, err
    files = sorted(
        p
        for p in shared("data/camvid").rglob("*")
        if p.suffix in (".jpg", ".png") and "annot" not in p.parent.name
    )[:2]
    code, out, err = call(
        "predict",
        tmp_path / "ours.safetensors",
        *files,
        "--out",
        tmp_path / "labels",
        "--overlay",
        "--device",
        "cpu",
    )
    assert code == 0 and "2 of 2" in out, err
    official = call(
        "predict",
        tmp_path / "official.pth",
        files[0],
        "--model",
        "dsanet",
        "--dataset",
        "camvid",
        "--out",
        tmp_path / "direct",
        "--device",
        "cpu",
    )
    assert official[0] == 0
    a, b = (
        np.asarray(Image.open(tmp_path / d / f"{files[0].stem}.png")) for d in ("labels", "direct")
    )
    assert (a == b).all() and a.max() < 11


def test_convert_refuses_the_wrong_network(call, tmp_path):
    torch.save(fixture("dsanet").state(), tmp_path / "official.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "official.pth").read_bytes()[:5000])
    out = tmp_path / "x.safetensors"
    for file, model in ((tmp_path / "official.pth", "s2fpn_r18"), (tmp_path / "cut.pth", "dsanet")):
        code, _, err = call("convert", file, "--model", model, "--dataset", "camvid", "--out", out)
        assert code == 1 and "error: " in err and "Traceback" not in err and not out.exists()


@pytest.mark.skipif(shared("data/camvid") is None, reason="needs CamVid")
def test_data_check(call, tmp_path):
    code, out, _ = call("data", "check", "camvid", shared("data/camvid"), "--limit", 3)
    assert "camvid" in out and "bicyclist" in out
    root = tmp_path / "camvid"
    shutil.copytree(shared("data/camvid"), root, copy_function=os.symlink)
    mask = sorted((root / "trainannot").glob("*.png"))[0]
    mask.unlink()
    code, out, err = call("data", "check", "camvid", root, "--split", "train", "--limit", 400)
    assert code == 1 and mask.name in out + err


def test_data_make(call, tmp_path):
    code, out, err = call(
        "data", "make", "streets", tmp_path / "town", "-D", "n=4", "-D", "size=48x64"
    )
    assert code == 0 and "12 files" in out, err
    assert Image.open(next((tmp_path / "town" / "train" / "images").glob("*.png"))).size == (64, 48)


def test_bench_models(call, tmp_path):
    code, out, err = call(
        "bench",
        "models",
        "dsanet",
        "--size",
        "64x96",
        "--repeats",
        2,
        "--out",
        tmp_path / "b.csv",
        "--device",
        "cpu",
    )
    assert code == 0 and "optimized" in out and "dsanet" in (tmp_path / "b.csv").read_text(), err


def test_lab_needs_jupyter(call, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "jupyterlab" else find(name, *a),
    )
    code, _, err = call("lab")
    assert code == 1 and "pip install" in err


def test_ctrl_c_is_quiet(tmp_path):
    code = "import sys; from segkern.cli import main; sys.exit(main())"
    args = [
        "train",
        "dsanet",
        "--set",
        "iterations=9000",
        "--set",
        "batch=2",
        "--set",
        "crop=64x96",
        "--no-eval",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    run = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        # a background job inherits a deaf ear
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while not (tmp_path / "run" / "config.json").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err


def test_options_of_the_network(call):
    "-M reaches the network and the recipe that belongs to it; what has an option of its own is refused there."
    code, out, _ = call(
        "train", "sasformer_sparse_b0", "--dataset", "voc2012", "-M", "levels=2", "--show"
    )
    assert code == 0 and "0.002" in out and "configuration 1" in out
    code, _, err = call("train", "segformer_b0", "--dataset", "streets", "-M", "seed=3", "--show")
    assert code == 1 and "--seed" in err and "internal" not in err


def test_validation_has_full_labels():
    "Sparse labels, from the recipe or from -D, are for training only."
    from segkern.cli.train import split_options
    from segkern.core import recipe_for

    train, val = split_options(
        recipe_for("segformer_b0", "streets"), ["annotation=scribble", "size=(64, 96)"]
    )
    assert train == ["annotation=scribble", "size=(64, 96)"] and val == ["size=(64, 96)"]
