"""`segkern eval` measures as training measured and as papers do: every recipe, exactly; several frames as
OpenMMLab's pipeline; the last checkpoints; the pictures behind a number."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import eval_table
import segkern
from eval_table import command, measure
from segkern.core import IMAGENET, RECIPES, recipe_for, seeded
from segkern.data import open_dataset
from segkern.data.geometry import resize_window
from segkern.infer import evaluate, labels_of, Settings
from segkern.infer.metrics import Confusion
from segkern.infer.plan import plan_for, plan_of
from segkern.train import fit

# ---- every recipe


def test_plans_of_all_recipes(tmp_path):
    "Training, a run folder, a file of weights, and the recipe's fields read anew: one plan."
    found = eval_table.plans(tmp_path)
    assert set(found) == set(RECIPES) and len(found) >= 200
    assert [pair for pair, (equal, _) in found.items() if not equal] == []


@pytest.mark.parametrize("protocol, miou", sorted(eval_table.SMALL), ids=str)
def test_numbers_of_training(protocol, miou, tmp_path):
    "The same floats, not nearly the same."
    wrote, found = eval_table.number(tmp_path, protocol, miou)
    assert wrote == found and all(wrote)


def test_every_kind_of_measurement_is_run():
    assert {eval_table.kind(r) for r in RECIPES.values()} == set(eval_table.SMALL)


# ---- where a plan comes from


class Net(nn.Module):
    "Logits at a quarter of the size, smooth enough that small differences of the input do not turn labels."

    multiple = 1
    align_corners = False
    preprocess = IMAGENET

    def __init__(self, name="net", dataset=None, k=5):
        super().__init__()
        self.name = name
        self.dataset = dataset
        self.num_classes = k
        self.classes = [f"c{i}" for i in range(k)]
        with seeded(3):
            self.conv = nn.Conv2d(3, 8, 7, 4, 3)
            self.classifier = nn.Conv2d(8, k, 1)

    def forward(self, x):
        return self.classifier(torch.tanh(self.conv(x)))

    def upsample(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def predict(self, x, size=None):
        return self.upsample(self(x), size or x.shape[-2:]).argmax(1).to(torch.uint8)


@pytest.mark.parametrize(
    "model, dataset, protocol, settings",
    [
        ("segformer_b0", "cityscapes", "sliding", dict(window=(1024, 1024), stride=(768, 768))),
        (
            "vit_adapter_l",
            "ade20k",
            "ade32_sliding",
            dict(window=(512, 512), stride=(341, 341), size=(2048, 512)),
        ),
        ("segformer_b0_mmseg_ssa", "pascal_context", "ade", dict(size=(520, 520))),
    ],
)
def test_windows_and_frames_of_recipes(model, dataset, protocol, settings):
    plan = plan_of(Net(model, dataset))
    assert plan.protocol == protocol and plan.settings == settings


def test_another_protocol_keeps_the_frame_of_the_recipe():
    plan = plan_of(Net("segformer_b0_mmseg_ssa", "pascal_context"))
    for name in ("ade32", "multiscale"):
        assert plan.told(protocol=name).settings["size"] == (520, 520)
    assert plan.told(protocol="ade32", size=(64, 32)).settings == dict(size=(64, 32))
    several = plan_of(Net("vit_adapter_l", "ade20k")).told(protocol="multiscale")
    assert several.settings == dict(
        window=(512, 512), stride=(341, 341), multiple=32, size=(2048, 512)
    )


def test_a_network_without_a_recipe_says_that_it_guesses(tmp_path):
    model = segkern.create_model("dsanet", 11)
    model.dataset = "mars"
    plan = plan_of(model)
    assert (plan.protocol, plan.miou, plan.split) == ("whole", "present", "val")
    assert plan.source == "a guess, for there is no recipe of dsanet on mars"
    model.dataset = "folder"
    assert plan_of(model).source.startswith("derived for folder, where dsanet has no recipe")


def camvid(root):
    "A tree of CamVid with small pictures."
    numbers = np.random.RandomState(0)
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(2):
            picture = numbers.randint(0, 255, (48, 64, 3), np.uint8)
            mask = numbers.randint(0, 12, (6, 8), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(picture).save(root / split / f"{split}{i}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{split}{i}.png")
    return root


def test_data_split_and_order_follow_the_run(tmp_path, monkeypatch):
    "CamVid's test pictures in SANet's order of classes, the mean over all classes: nothing said again."
    root = camvid(tmp_path / "camvid")
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    small = "crop=48x64 batch=2 iterations=2 init=scratch base_size=64".split()
    changed = [part for text in small for part in ("--set", text)]
    data = ["--dataset", "camvid", "--root", "camvid", "-D", "order=sanet", "--device", "cpu"]
    command("train", "sanet_s", *data, *changed, "--out", run)
    wrote = json.loads((run / "results.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = measure(run, tmp_path / "a.json")
    assert found["miou"] == found["written_miou"] == wrote["best_miou"]
    assert (found["split"], found["miou_over"], found["n_images"]) == ("test", "all", 2)
    assert found["classes"][0] == "bicyclist" and str(run / "config.json") in found["source"]
    file = tmp_path / "moved.safetensors"
    shutil.copy(run / "checkpoints" / "best.safetensors", file)
    moved = measure(file, tmp_path / "b.json", "--root", root)
    assert moved["miou"] == pytest.approx(wrote["best_miou"], abs=1e-12)
    assert (moved["split"], moved["miou_over"]) == ("test", "all")
    assert moved["source"] == "the recipe of sanet_s on camvid"
    other = measure(run, tmp_path / "c.json", "--split", "train", "--miou", "present")
    assert (other["split"], other["miou_over"]) == ("train", "present")
    assert other["source"].endswith("miou as said")


def test_arguments_of_python_follow_too(tmp_path):
    "`fit(eval_args=…)`: another protocol and fewer pictures."
    recipe = recipe_for(
        "dsanet", "streets", batch=2, iterations=2, crop=(48, 64), fit_size=(80, 60), warmup=0
    )
    pictures = dict(size=(48, 64), length=4)
    result = fit(
        segkern.create_model("dsanet", 11),
        recipe,
        open_dataset("streets", **pictures),
        open_dataset("streets", split="val", **pictures),
        tmp_path / "run",
        device="cpu",
        eval_args=dict(protocol="multiscale", scales=(0.5, 1.0), limit=3, batch=2),
    )
    found = measure(tmp_path / "run", tmp_path / "a.json", "--best")
    assert found["miou"] == result["best_miou"] and found["n_images"] == 3
    assert (found["protocol"], found["scales"], found["size"]) == (
        "multiscale",
        [0.5, 1.0],
        [80, 60],
    )
    assert measure(tmp_path / "run", tmp_path / "a.json", "--limit", 0)["n_images"] == 4


# ---- several scales


def test_exp_sum_is_what_the_configuration_files_say():
    m = Net()
    images = torch.stack([picture(40, 56)])
    with torch.inference_mode():
        plain = labels_of(m, images, "exp_sum")
        said = labels_of(m, images, "exp_sum", Settings(scales=(0.5, 0.75, 1.0, 1.25), flip=False))
        mirrored = labels_of(m, images, "exp_sum", Settings(flip=True))
    assert torch.equal(plain, said) and not torch.equal(plain, mirrored)


def picture(h, w, seed=0):
    "Blurred noise: like a photograph, it survives a resize."
    x = torch.rand(1, 3, h // 8 + 2, w // 8 + 2, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(x, (h, w), mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)


def slide(m, x, crop, stride):
    "mmsegmentation's `slide_inference`, written out."
    height, width = x.shape[-2:]
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    total = torch.zeros(1, m.num_classes, height, width)
    count = torch.zeros(1, 1, height, width)
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride + crop, height)
            right = min(column * stride + crop, width)
            top = max(bottom - crop, 0)
            left = max(right - crop, 0)
            part = x[..., top:bottom, left:right]
            total[..., top:bottom, left:right] += m.upsample(m(part), part.shape[-2:])
            count[..., top:bottom, left:right] += 1
    return total / count


def aug_test(m, image, frame, multiple, ratios, window, resize):
    "OpenMMLab's test with scales and mirror images, step by step: probabilities [1, K, h, w]."
    h, w = image.shape[1:]
    total = 0
    for ratio in ratios:
        long, short = int(frame[0] * ratio), int(frame[1] * ratio)
        factor = min(max(long, short) / max(h, w), min(long, short) / min(h, w))
        seen = resize(image, (int(h * factor + 0.5), int(w * factor + 0.5)))
        seen = resize(seen, [-(-n // multiple) * multiple for n in seen.shape[1:]])
        for mirrored in (False, True):
            shown = seen.flip(-1) if mirrored else seen
            x = IMAGENET(shown[None])
            logits = slide(m, x, *window) if window else m.upsample(m(x), x.shape[-2:])
            probs = F.interpolate(logits, (h, w), mode="bilinear", align_corners=False).softmax(1)
            total = total + (probs.flip(-1) if mirrored else probs)
    return total / (2 * len(ratios))


CASES = [
    ("segformer_b0_mmseg", "ade20k", (128, 32), None),
    ("segformer_b0", "ade20k", (128, 32), None),
    ("vit_adapter_l", "ade20k", (128, 48), (32, 21)),
    ("segformer_b0", "cityscapes", (80, 40), (40, 30)),
]


@pytest.mark.parametrize("model, dataset, frame, window", CASES)
def test_multiscale_scales_the_frame(cv2, model, dataset, frame, window):
    """The plan of a recipe for `multiscale`, its sizes made small, against the pipeline: the same probabilities
    with our resize, the same labels with OpenCV's."""

    def opencv(image, size):
        array = image.permute(1, 2, 0).numpy()
        array = cv2.resize(array, tuple(size)[::-1], interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(array).permute(2, 0, 1)

    def exact(image, size):
        factors = tuple(new / old for new, old in zip(size, image.shape[1:]))
        return resize_window(image, factors, 0, 0, *size)

    small = dict(fit_size=frame)
    if window:
        small |= dict(crop=(window[0],) * 2, stride=(window[1],) * 2)
    plan = plan_for(recipe_for(model, dataset).replace(**small)).told(protocol="multiscale")
    multiple = 32 if "ade32" in recipe_for(model, dataset).protocol else 1
    m = Net()
    image = picture(40, 64, 5)
    settings = Settings(**plan.settings)
    with torch.inference_mode():
        got = labels_of(m, image[None], "multiscale", settings)
        ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        want = aug_test(m, image, frame, multiple, ratios, window, exact).argmax(1)
        near = aug_test(m, image, frame, multiple, ratios, window, opencv).argmax(1)
    assert (got == want).float().mean() == 1 and (got == near).float().mean() > 0.99
    assert settings.multiple == multiple and (settings.window is None) == (window is None)


# ---- checkpoints and pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of four steps that keeps three checkpoints."
    out = tmp_path_factory.mktemp("runs") / "first"
    small = "crop=48x64 batch=2 iterations=4 init=scratch".split()
    changed = [part for text in small for part in ("--set", text)]
    data = ["--dataset", "streets", "-D", "size=48x64", "-D", "length=5", "--device", "cpu"]
    every = ["--eval-every", 1, "--save-every", 1, "--keep", 3]
    command("train", "dsanet", *data, *changed, *every, "--out", out)
    return out


def test_the_last_checkpoints(run, tmp_path, caplog):
    found = measure(run, tmp_path / "a.json", "--last", 9)
    scores = {s["step"]: s["miou"] for s in found["checkpoints"]}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wrote = {r["step"]: r["val"]["miou"] for r in rows if "val" in r}
    assert scores == {step: wrote[step] for step in (2, 3, 4)} and len(wrote) == 4
    assert found["miou"] == max(scores.values()) and "keeps 3 checkpoints, not 9" in caplog.text


@pytest.mark.parametrize(
    "args, part",
    [
        (["--best", "--last", 1], "choose one"),
        (["--save", "pages", "--last", 2], "choose the weights"),
        (["--miou", "mean"], "unknown mIoU rule 'mean'"),
        (["--protocol", "hole"], "unknown protocol 'hole'"),
        (["--limit", -1], "nothing to evaluate"),
    ],
)
def test_refused_in_one_line(run, args, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert segkern.cli.main(["-q", "eval", str(run), "--device", "cpu", *map(str, args)]) == 1
    assert part in capsys.readouterr().err


def test_a_setting_that_is_not_read_is_told(run, tmp_path, caplog):
    measure(run, tmp_path / "a.json", "--window", "32x32")
    assert "protocol 'whole' does not read window" in caplog.text


@pytest.mark.parametrize("protocol, batch", [("whole", 2), ("sliding", 1)])
def test_saved_pictures_give_the_number(run, protocol, batch, tmp_path):
    "What lies in the folder is what was counted."
    pages = tmp_path / "pages"
    more = ["--protocol", protocol, "--batch", batch]
    plain = measure(run, tmp_path / "a.json", *more)
    saved = measure(run, tmp_path / "b.json", *more, "--save", pages, "--worst", 2)
    assert plain["miou"] == saved["miou"]
    data = open_dataset("streets", split="val", size=(48, 64), length=5)
    confusion = Confusion(11)
    table = list(csv.DictReader(open(pages / "scores.csv")))
    for i, row in enumerate(table):
        name = row["file"].removesuffix(".png")
        labels = np.array(Image.open(pages / "labels" / f"{name}.png"))
        own = Confusion(11).update(labels, data[i][1])
        confusion = confusion + own
        assert float(row["miou"]) == pytest.approx(own.result()["miou"], abs=1e-6)
        colours = np.array(Image.open(pages / "colours" / f"{name}.png"))
        assert np.array_equal(colours, np.array(data.palette, np.uint8)[labels])
        panel = np.array(Image.open(pages / "panels" / f"{name}.png"))
        assert panel.shape == (48, 3 * 64, 3) and np.array_equal(panel[:, :64], colours)
    assert confusion.result()["miou"] == saved["miou"] and len(table) == 5
    lowest = sorted((float(r["miou"]), r["file"]) for r in table)[:2]
    worst = [f"{i + 1:02}_{file}" for i, (_, file) in enumerate(lowest)]
    assert sorted(p.name for p in (pages / "worst").iterdir()) == worst
    assert [w["file"] for w in saved["worst"]] == [file for _, file in lowest]


def test_random_networks_are_measured_alike():
    "A network that draws numbers in evaluation gives the same score every time."

    class Dice(Net):
        def forward(self, x):
            return super().forward(x) + torch.randn(1, self.num_classes, 1, 1)

    data = open_dataset("streets", split="val", size=(48, 64), length=3)
    m = Dice(k=11)
    m.classes = data.classes
    torch.manual_seed(5)
    first = evaluate(m, data)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert evaluate(m, data)["iou"] == first["iou"]
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
