"""Heat maps, pictures of outputs and the commands around them: official pictures, every method,
errors, models left as they were."""

import importlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import segkern
from segkern import explain
from segkern.cli import explain as commands
from segkern.cli import masks
from segkern.cli import samples as shipped
from segkern.core import load_table
from segkern.core.labels import boundary_target, class_boundary_target, label_canny
from segkern.testing import fixture, make_input, relative_l2

cam_package = pytest.importorskip(
    "pytorch_grad_cam", reason="grad-cam is not installed: pip install 'segkern[explain]'"
)

from segkern.explain import guests  # noqa: E402
from segkern.explain import heat as H  # noqa: E402
from segkern.explain import pictures as P  # noqa: E402
from segkern.explain import targets as T  # noqa: E402

READY = [n for n, m in H.METHODS.items() if not m.refused and hasattr(cam_package, m.cls)]
PASSES = [n for n in READY if H.METHODS[n].passes]
CITY = load_table("cityscapes")


def picture(h=64, w=96, seed=0):
    "A uint8 picture of blocks [3, h, w]."
    a = np.random.RandomState(seed).randint(0, 256, (-(-h // 8), -(-w // 8), 3)).astype(np.uint8)
    return torch.from_numpy(a.repeat(8, 0).repeat(8, 1)[:h, :w]).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="module")
def models():
    "Networks by name, made once."
    made = {}

    def get(name, classes=11):
        if name not in made:
            made[name] = segkern.create_model(name, classes).eval()
        return made[name]

    return get


def commonest(model, image):
    return int(model(model.preprocess(image[None])).argmax(1).flatten().bincount().argmax())


class Small(nn.Module):
    "A small network with the interface of segkern's models, its parts registered in another order than they run."

    def __init__(self, k=3, multiple=1):
        super().__init__()
        self.name = "small"
        self.classes = None
        self.palette = None
        self.num_classes = k
        self.multiple = multiple
        self.align_corners = False
        self.preprocess = segkern.core.IMAGENET
        self.last = nn.Conv2d(6, 6, 3, 1, 1)
        self.classifier = nn.Conv2d(6, k, 1)
        self.twice = nn.Conv2d(6, 6, 1)
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.side = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Conv2d(3, 6, 1)
        self.pair = Pair()
        self.loose = nn.Conv2d(6, 6, 1)

    def outputs(self, x):
        return {"logits": self(x)}

    def forward(self, x):
        y = self.first(x).relu()
        self.loose(y)
        y = self.pair(self.twice(self.twice(y)))[0]
        y = (self.last(y) + self.side(y)).relu_()
        return self.classifier(y + self.pool(y))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture
def small():
    with segkern.core.seeded(1):
        return Small().eval()


def traces(m):
    "All that a guest could have changed."
    hooks = sum(
        len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks)
        for x in m.modules()
    )
    grads = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in m.parameters()]
    return (
        [x.training for x in m.modules()],
        grads,
        hooks,
        [(n, id(x)) for n, x in m.named_modules()],
        {k: v.clone() for k, v in m.state_dict().items()},
    )


def same(a, b):
    def equal(s, t):
        return (s is None) == (t is None) and (s is None or torch.equal(s, t))

    return (
        a[0] == b[0]
        and a[2:4] == b[2:4]
        and all(f == g and equal(s, t) for (f, s), (g, t) in zip(a[1], b[1]))
        and all(equal(v, b[4][k]) for k, v in a[4].items())
    )


# heat maps


def test_official_heat_map():
    "Map, overlay and mask of SANet's tool, with the fixture's weights."
    golden = fixture("sanet_tools")
    net = segkern.create_model("sanet_s").eval().deploy()
    segkern.load_official(net, golden.state())
    rgb = np.repeat(
        np.repeat(np.random.RandomState(7).randint(0, 256, (4, 8, 3)), 16, 0), 16, 1
    ).astype(np.uint8)
    case = golden.spec["cases"]["cam"]
    h = H.heat(net, rgb, case["category"], layer="classifier")
    assert (
        relative_l2(golden.golden["cam"], h.map[::2, ::2]) < 2e-5
        and h.fraction == case["mask_fraction"]
    )
    assert (h.mask[4::8, 4::8] == golden.golden["cam_mask"].astype(bool)).all()
    assert (
        np.abs(
            h.overlay[::4, ::4].transpose(2, 0, 1).astype(int) - golden.golden["cam_overlay_rgb"]
        ).max()
        <= 1
    )


@pytest.mark.parametrize("name", ["sanet_s", "s2fpn_r18", "dsanet"])
def test_closed_form(name, models):
    "At the classifier Grad-CAM is ReLU of the logit, at its input the same without the bias, in every network here."
    m = models(name)
    image = picture()
    c = commonest(m, image)
    with torch.no_grad():
        z = m(m.preprocess(image[None]))[0, c]

    def unit(t):
        return (t - t.min()) / (1e-7 + (t - t.min()).max())

    def expected(t):
        return unit(
            nn.functional.interpolate(
                unit((t * ((z * 0 + 1).mean())).clamp_min(0))[None, None],
                image.shape[1:],
                mode="bilinear",
            )[0, 0]
        )

    assert relative_l2(expected(z), H.heat(m, image, c, "classifier").map) < 1e-4
    bias = 0 if m.classifier.bias is None else m.classifier.bias[c].item()
    assert relative_l2(expected(z - bias), H.heat(m, image, c, "classifier:in").map) < 1e-4


@pytest.mark.parametrize(
    "method", [m if m not in PASSES else pytest.param(m, marks=pytest.mark.slow) for m in READY]
)
@pytest.mark.parametrize("name", ["sanet_s", "s2fpn_r18", "dsanet"])
def test_every_method(name, method, models):
    "Runs, gives a map of the picture's size, leaves the model as it was."
    m = models(name)
    image = picture()
    before = traces(m)
    h = H.heat(m, image, commonest(m, image), method=method)
    assert (
        h.map.shape == (64, 96)
        and h.map.dtype == np.float32
        and np.isfinite(h.map).all()
        and 0 <= h.map.min() <= h.map.max() <= 1
        and h.map.max() > 0.5
    )
    assert (
        h.overlay.shape == (64, 96, 3) and h.overlay.dtype == np.uint8 and same(before, traces(m))
    )


@pytest.mark.parametrize("method", READY)
def test_small_network(method, small):
    "Every method, on a model in the middle of training, with its flags, gradients and hooks untouched."
    small.train().side.eval()
    small.first.weight.requires_grad_(False)
    small(torch.zeros(2, 3, 16, 16)).sum().backward()
    small.last.register_forward_hook(lambda *a: None)
    before = traces(small)
    if method == "fullgrad":
        with pytest.raises(ValueError, match="twice more than once"):
            H.heat(small, picture(24, 40), 1, method=method)
    else:
        assert H.heat(small, picture(24, 40), 1, "last", method, target="everywhere").map.max() > 0
    assert same(before, traces(small))


def test_table_knows_the_package():
    "Every map-making class of the installed package has a line."
    makers = {
        n
        for n, c in vars(cam_package).items()
        if isinstance(c, type)
        and n.endswith(("CAM", "Grad", "FEM", "SESS", "PlusPlus", "ElementWise"))
        and n != "BaseCAM"
    }
    assert makers <= {m.cls for m in H.METHODS.values()}, makers
    table = explain.methods()
    assert len(table) == len(H.METHODS) and sum("ready" in r for r in table.rows) == len(READY)


def test_absent_and_refused(monkeypatch, small):
    for name in ("sess", "guided_backprop", "DFF"):
        with pytest.raises(ValueError, match="cannot be used here"):
            H.heat(small, picture(), 0, method=name)
    monkeypatch.delattr(cam_package, "HiResCAM")
    with pytest.raises(ValueError, match="this version of grad-cam has no HiResCAM"):
        H.heat(small, picture(), 0, method="hirescam")
    assert "not in grad-cam" in str(explain.methods())
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r"pip install 'segkern\[explain\]'"):
        H.heat(small, picture(), 0)


@pytest.mark.parametrize(
    "layer, message",
    [
        ("lst", "Did you mean 'last'"),
        ("", "no layer"),
        ("unused", "is not run"),
        ("twice", "runs 2 times"),
        ("pair", "gives a tuple"),
        ("pool", "is no map"),
        ("loose", "do not depend on loose"),
    ],
)
def test_layers_refused(layer, message, small):
    before = traces(small)
    with pytest.raises(ValueError, match=message):
        H.heat(small, picture(), 0, layer, target="everywhere")
    assert same(before, traces(small))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(cls=3), r"classes 0\.\.2, got 3"),
        (dict(cls="road"), "no names: use an id"),
        (dict(target="here"), "must be 'predicted'"),
        (dict(target=-np.ones((4, 4))), "not negative"),
        (dict(method="gradkam"), "Did you mean"),
        (dict(method="fullgrad", layer="last"), "all layers"),
    ],
)
def test_arguments_refused(kwargs, message, small):
    with pytest.raises(ValueError, match=message):
        H.heat(small, picture(), **{"cls": 0, **kwargs})


def test_other_pictures_refused(small, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    for bad in (picture()[None].repeat(2, 1, 1, 1), picture().float(), tmp_path / "a.png"):
        with pytest.raises(ValueError):
            H.heat(small, bad, 0)
    with pytest.raises(FileNotFoundError):
        H.heat(small, tmp_path / "b.png", 0)
    with pytest.raises(ValueError, match="want float32"):
        H.heat(small.half(), picture(), 0)


def test_class_by_name(models):
    m = models("sanet_s")
    assert (
        H.class_id(m, "Car") == m.classes.index("car") == H.class_id(m, str(m.classes.index("car")))
    )
    with pytest.raises(ValueError, match="Did you mean 'pedestrian'"):
        H.class_id(m, "pedestrain")


def test_memory_is_reckoned(small, monkeypatch):
    monkeypatch.setattr(guests, "LIMIT", 1e-4)
    for method in ("eigencam", "kpcacam", "scorecam"):
        with pytest.raises(ValueError, match="takes about .* GiB .*smaller size"):
            H.heat(small, picture(128, 128), 0, "last", method, "everywhere")


def test_nowhere_is_zero_and_says_so(small, caplog):
    with torch.no_grad():
        small.classifier.bias.copy_(torch.tensor([9e3, 0, 0]))
    with caplog.at_level(logging.WARNING, "segkern"):
        h = H.heat(small, picture(), 2, "last")
    assert (
        not h.map.any()
        and h.fraction == 0
        and not h.mask.any()
        and "no pixel for 'class 2'" in caplog.text
    )
    assert (
        H.heat(small, picture(), 2, "last", target="everywhere").map.max() > 0.9
        and H.heat(small, picture(), 2, "last", "eigencam").map.max() > 0.9
    )


def test_class_free_methods(small):
    maps = {
        n: [H.heat(small, picture(), c, "last", n, "everywhere").map for c in (0, 1)]
        for n in ("eigencam", "fem", "kpcacam", "randomcam", "gradcam")
    }
    assert all(np.array_equal(*v) == (n != "gradcam") for n, v in maps.items())
    assert not np.array_equal(
        maps["randomcam"][0],
        H.heat(small, picture(), 0, "last", "randomcam", "everywhere", seed=1).map,
    )


def test_own_mask(small):
    "A mask over half of the picture gives the map of that half's score."
    mask = np.zeros((64, 96))
    mask[:, :48] = 1
    a, b = (
        H.heat(small, picture(), 1, "first", "hirescam", target=t).map
        for t in (mask, torch.from_numpy(mask).bool())
    )
    other = H.heat(small, picture(), 1, "first", "hirescam", target=1 - mask).map
    assert np.array_equal(a, b) and not np.allclose(a, other)


def test_sizes(models, small, tmp_path):
    "Pictures of any size and kind, and a size of the network's own; several layers are averaged."
    odd = picture(50, 75)
    assert H.heat(models("sanet_s"), odd, 0, target="everywhere").map.shape == (50, 75)
    assert H.heat(small, odd, 0, "last", size=(32, 48), target="everywhere").map.shape == (50, 75)
    Image.fromarray(odd.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    by_path = H.heat(small, tmp_path / "a.png", 0, "last", target="everywhere")
    assert np.array_equal(by_path.map, H.heat(small, odd, 0, "last", target="everywhere").map)
    two = H.heat(small, odd, 0, ["last", "first"], target="everywhere")
    assert two.layer == "first + last" and not np.array_equal(two.map, by_path.map)
    with Image.open(by_path.save(tmp_path / "h.png")) as f:
        assert np.array_equal(np.array(f), by_path.overlay)


@pytest.mark.parametrize("method", PASSES)
def test_batches_do_not_matter(method, small):
    a, b = (
        H.heat(small, picture(32, 48), 0, "last", method, "everywhere", batch_size=n).map
        for n in (1, 5)
    )
    assert np.allclose(a, b, atol=1e-5)


def test_quiet_off_terminal(small, capfd):
    for method in PASSES:
        H.heat(small, picture(32, 48), 0, "last", method, "everywhere")
    out, err = capfd.readouterr()
    assert not out and not err


def test_inference_mode_around(small):
    with torch.inference_mode():
        h = H.heat(small, picture(), 0, "last", target="everywhere")
    assert np.array_equal(h.map, H.heat(small, picture(), 0, "last", target="everywhere").map)


def test_heat_figure(small):
    fig = H.heat_figure(
        small,
        picture(),
        0,
        layers=["first", "last"],
        methods=["gradcam", "layercam"],
        target="everywhere",
    )
    assert [a.get_title(loc="left") or a.get_title() for a in fig.axes[:2]] == [
        "GradCAM",
        "LayerCAM",
    ] and len(fig.axes) == 5


def test_linear_probe():
    data = segkern.open_dataset("streets", split="train", size=(64, 96))
    images, targets = (torch.stack(t) for t in zip(*[data[i] for i in range(4)]))
    m = segkern.create_model("dsanet", 11)

    def right():
        return float((m.eval().predict(m.preprocess(images)) == targets).float().mean())

    before = right()
    weights = {
        k: v.clone()
        for k, v in m.state_dict().items()
        if "running" not in k and not k.startswith("classifier")
    }
    H.linear_probe(m, images, targets)
    assert (
        right() > max(0.3, before)
        and not m.training
        and all(torch.equal(v, m.state_dict()[k]) for k, v in weights.items() if "tracked" not in k)
    )


# pictures


def test_official_pictures():
    "Labels, boundary, boundary by class, edges and train ids of the official tools."
    golden = fixture("sanet_tools")
    g = golden.golden
    z = {n: make_input(s, seed) for n, s, seed in golden.spec["input"]}
    assert (P.colour_labels(z["seg_logits"], (48, 64), CITY["palette"]) == g["seg_rgb"]).all()
    assert np.abs(P.normalised(z["bd_logits"], (48, 64)) - g["boundary_norm01"]).max() <= 1e-6
    ids = torch.from_numpy(g["train_ids"].astype(np.uint8))
    assert (class_boundary_target(ids, 19).numpy() == g["multi_class_boundary"]).all()
    assert (label_canny(ids).numpy() * 255 == g["canny"]).all()
    assert (boundary_target(ids, frame=6).numpy() == g["edge_cityscapes"]).all() and (
        boundary_target(ids).numpy() == g["edge_camvid"]
    ).all()


def test_official_train_ids(tmp_path):
    g = fixture("sanet_tools").golden
    Image.fromarray(g["label_ids"].astype(np.uint8)).save(tmp_path / "ids.png")
    assert (masks.read_mask(tmp_path / "ids.png", "label", CITY).numpy() == g["train_ids"]).all()
    call("class-boundary", tmp_path / "ids.png", "--ids", "label", "--out", tmp_path / "edges.png")
    colours = np.concatenate([np.array(CITY["palette"]), [[0, 0, 0]]])
    assert (
        np.array(Image.open(tmp_path / "edges.png"))
        == colours[g["multi_class_boundary"].astype(int)]
    ).all()
    cases = fixture("sanet_tools").spec["cases"]["boundary_rgb_at_0_0.5_1"]
    assert P.viridis([0, 0.5, 1]).tolist() == cases


@pytest.mark.parametrize("name", ["sanet_s", "s2fpn_r18", "dsanet"])
def test_pictures(name, models):
    "Labels equal `predict`, boundaries come from the head or from the labels, every auxiliary head can be drawn."
    m = models(name).train()
    image = picture()
    labels = m.eval().predict(m.preprocess(image[None]))[0]
    m.train()
    before = traces(m)
    seg = P.segmentation_picture(m, image)
    edge = P.boundary_picture(m, image)
    assert (seg == P.segmentation_picture(m, image, "main")).all()
    sure = (seg == segkern.viz.colour(labels, m.palette)).all(-1).mean()
    assert sure > 0.999 and edge.shape == seg.shape == (64, 96, 3)
    if name != "sanet_s":
        assert (edge == P.viridis(boundary_target(labels).float())).all(-1).mean() > 0.999
    heads = [
        n
        for n, t in m.eval().outputs(m.preprocess(image[None])).items()
        if n != "logits" and t.shape[1] == 11
    ]
    m.train()
    assert heads and all(P.segmentation_picture(m, image, h).shape == (64, 96, 3) for h in heads)
    assert (P.segmentation_picture(m, image, overlay=True) != seg).any() and same(before, traces(m))
    m.eval()


def test_heads_refused(models):
    with pytest.raises(ValueError, match="it has logits, aux"):
        P.segmentation_picture(models("sanet_s"), picture(), "sup1")
    deployed = segkern.create_model("sanet_s", 11).eval().deploy()
    with pytest.raises(ValueError, match="dropped by deploy"):
        P.segmentation_picture(deployed, picture(), "aux")
    assert len(np.unique(P.boundary_picture(deployed, picture()).reshape(-1, 3), axis=0)) <= 2


def test_pure_functions():
    for bad in (torch.zeros(2, 3, 4, 4), torch.zeros(4)):
        with pytest.raises(ValueError):
            P.colour_labels(bad, (8, 8))
    with pytest.raises(ValueError, match="one channel"):
        P.normalised(torch.zeros(1, 2, 4, 4), (8, 8))
    with pytest.raises(ValueError, match="ids"):
        P.class_boundary_picture(torch.zeros(1, 4, 4, dtype=torch.uint8))
    street = torch.tensor([[0, 0, 0, 0, 13, 13, 13, 13]]).expand(6, 8)
    out = P.class_boundary_picture(street, 19, CITY["palette"])[0].tolist()
    assert out == [CITY["palette"][0]] * 2 + [CITY["palette"][13]] * 5 + [[0, 0, 0]]
    mask = np.zeros((20, 30), bool)
    mask[5:12, 6:20] = True
    seen = P.field_picture(np.full((20, 30, 3), 10, np.uint8), mask)
    assert (
        seen[5, 6].tolist() == [213, 94, 0] == seen[11, 19].tolist()
        and seen[8, 10].tolist() == [10] * 3
        and seen[0, 0].tolist() == [95] * 3
    )


def test_gallery(models, tmp_path):
    m = models("sanet_s")
    files = P.gallery(
        m,
        [picture(), picture(50, 75, 1)],
        tmp_path,
        classes=["road"],
        target="everywhere",
        max_kb=30,
    )
    names = [f.name for f, _ in files]
    assert names[:9] == [
        f"00-{n}.png"
        for n in (
            "picture",
            "overlay",
            "labels",
            "labels-aux",
            "boundary",
            "class-boundary",
            "heat-road",
            "field",
        )
    ] + ["01-picture.png"]
    assert all(f.stat().st_size <= 30 * 1024 and c for f, c in files) and {
        Image.open(f).size for f, _ in files
    } == {(96, 64), (75, 50)}
    with pytest.raises(ValueError, match="no class"):
        P.gallery(m, picture(), tmp_path, classes=["mars"])


# the package


def test_lazy_names():
    for name, (module, inner) in explain._LAZY.items():
        made = getattr(importlib.import_module(f"segkern.explain.{module}"), inner)
        assert getattr(explain, name) is made, name
    assert explain.heat_map is H.heat and set(explain._LAZY) <= set(dir(explain))
    with pytest.raises(AttributeError):
        explain.nothing


def test_imports_are_light():
    code = (
        "import sys, segkern.cli.explain, segkern.cli.samples; a = {'torch', 'numpy', 'matplotlib'} & "
        "set(sys.modules); import segkern.explain, segkern.explain.heat; "
        "print(a or {'matplotlib', 'pytorch_grad_cam', 'cv2'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


# commands


def call(*args):
    "Output of a command that must succeed."
    result = CliRunner().invoke(commands.app, [str(a) for a in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def fails(*args):
    "The message of a command that must fail without a bug."
    result = CliRunner().invoke(commands.app, [str(a) for a in args])
    assert result.exit_code and isinstance(result.exception, (ValueError, OSError, ImportError)), (
        result.output,
        result.exception,
    )
    return str(result.exception)


COMMANDS = [
    "heat",
    "labels",
    "boundary",
    "class-boundary",
    "field",
    "effective",
    "paths",
    "calculators",
    "gallery",
    "samples",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: segkern explain {command}" in call(command, "--help")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A file of ours and a picture."
    folder = tmp_path_factory.mktemp("explain")
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(folder / "a.png")
    return segkern.save(
        segkern.create_model("sanet_s", 11).eval(), folder / "net.safetensors"
    ), folder / "a.png"


def test_picture_commands(files, tmp_path):
    net, image = files

    def size(f):
        return Image.open(f).size

    text = call(
        "heat",
        net,
        image,
        "--class",
        "road",
        "--layer",
        "decoder",
        "--method",
        "layercam",
        "--everywhere",
        "--out",
        tmp_path / "h.png",
    )
    assert "layercam at decoder" in text and size(tmp_path / "h.png") == (96, 64)
    call(
        "heat",
        net,
        image,
        "--class",
        "road",
        "--class",
        "1",
        "--layer",
        "decoder",
        "--layer",
        "layer3",
        "--everywhere",
        "--out",
        tmp_path / "h.jpg",
    )
    assert size(tmp_path / "h-road.jpg") == size(tmp_path / "h-building.jpg") == (96, 64)
    call("labels", net, image, "--head", "aux", "--overlay", "--out", tmp_path / "l.png")
    call("boundary", net, image, "--size", "32x48", "--out", tmp_path / "b.png")
    assert size(tmp_path / "l.png") == size(tmp_path / "b.png") == (96, 64)
    assert (
        "00-heat-road.png"
        in call("gallery", net, image, "--class", "road", "--out", tmp_path / "g")
        and len(list((tmp_path / "g").iterdir())) == 8
    )


def test_field_commands(files, tmp_path):
    net, image = files
    text = call(
        "field", "sanet_s", "--at", "layer3", "--size", "128x256", "--out", tmp_path / "f.png"
    )
    assert "159" in text and (tmp_path / "f.png").stat().st_size > 1000
    text = call("effective", net, image, "--at", "layer2", "--out", tmp_path / "e.png")
    assert "1 pictures of 64x96" in text and (tmp_path / "e.png").exists()
    assert (
        "15 x 15 cells, up to 9 paths"
        in call("paths", "--layers", "3,2 3,2 3,1", "--out", tmp_path / "p")
        and len(list((tmp_path / "p").iterdir())) == 3
    )
    assert (
        "cells"
        in call("paths", "--model", net, "--at", "stem", "--out", tmp_path / "m.png", "--cell", "4")
        and (tmp_path / "m.png").exists()
    )
    rows = call("calculators", "--layers", "3,2 3,1,2").splitlines()
    assert rows[-1].split()[:5] == ["3", "1", "2", "11", "2"]


def test_mistakes(files, tmp_path):
    net, image = files
    assert "Did you mean 'road'" in fails("heat", net, image, "--class", "raod")
    assert "Did you mean 'decoder'" in fails(
        "heat", net, image, "--class", "0", "--layer", "decodr"
    )
    assert "there is no method" in fails("heat", net, image, "--class", "0", "--method", "magic")
    assert "does not exist" in fails("labels", net, tmp_path / "none.png")
    assert "does not exist" in fails("labels", tmp_path / "none.safetensors", image)
    assert ".png or .jpg" in fails("boundary", net, image, "--out", tmp_path / "a.gif")
    assert "either --layers or --model" in fails("paths") and "either --layers or --model" in fails(
        "paths", "--layers", "3,1", "--model", net
    )
    assert "kernel,stride" in fails(
        "calculators", "--layers", "3,2 x"
    ) and "must be positive" in fails("calculators", "--layers", "3,0")
    assert "HEIGHTxWIDTH" in fails("field", "sanet_s", "--size", "512")
    assert "no class table" in fails("class-boundary", image, "--dataset", "mars")
    assert "--ids colour" in fails("class-boundary", image)
    Image.fromarray(np.full((8, 8), 30, np.uint8)).save(tmp_path / "m.png")
    assert "holds the ids [30]" in fails("class-boundary", tmp_path / "m.png")


def test_masks_of_camvid(tmp_path):
    "The void id of SegNet's masks, and masks in colours; unknown colours are void."
    ids = np.array([[0, 3, 11, 11], [0, 3, 3, 10]], np.uint8)
    table = load_table("camvid")
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(np.array([*table["palette"], [1, 2, 3]], np.uint8)[ids]).save(
        tmp_path / "colours.png"
    )
    expected = np.where(ids == 11, 255, ids)
    for kind, name in (("train", "ids"), ("colour", "colours")):
        assert (masks.read_mask(tmp_path / f"{name}.png", kind, table).numpy() == expected).all()
    call("class-boundary", tmp_path / "ids.png", "--dataset", "camvid", "--out", tmp_path / "e.png")


# samples

PATTERNS = [
    "--image",
    "image/*.png",
    "--labels",
    "label/*.png",
    "--main",
    "main/*.png",
    "--aux",
    "aux/*.png",
]


@pytest.fixture
def samples(tmp_path):
    "Three generated samples: the main prediction errs on an eighth of the pixels, the auxiliary one is coarse."
    colours = np.array(CITY["palette"], np.uint8)
    rng = np.random.default_rng(0)
    truth = []
    for part in ("image", "label", "main", "aux"):
        (tmp_path / part).mkdir()
    for i in range(3):
        ids = rng.integers(0, 5, (4, 8)).repeat(16, 0).repeat(16, 1)
        wrong = ids.copy()
        wrong[:, :16] = (ids[:, :16] + 1) % 5
        truth.append((ids, wrong))
        image = rng.integers(0, 256, (8, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        for part, name, a in (
            ("image", "leftImg8bit", image),
            ("label", "gtFine_color", colours[ids]),
            ("main", "leftImg8bit", colours[wrong]),
            ("aux", "leftImg8bit", colours[ids[::32, ::32].repeat(32, 0).repeat(32, 1)]),
        ):
            Image.fromarray(a).save(tmp_path / part / f"town_{i:06d}_{name}.png")
    return tmp_path, truth


def test_samples_scored(samples):
    folder, truth = samples
    found = shipped.score_samples(
        folder, None, "image/*.png", "label/*.png", {"main": "main/*.png", "aux": "aux/*.png"}
    )
    t, p = (np.stack(x) for x in zip(*truth))
    ious = [((t == c) & (p == c)).sum() / ((t == c) | (p == c)).sum() for c in range(5)]
    assert (
        found["main"]["pixel_acc"] == pytest.approx(87.5)
        and found["main"]["miou"] == pytest.approx(100 * np.mean(ious))
        and found["main"]["classes"] == 5
    )
    assert found["main"]["agreement"] is None and found["aux"]["pixel_acc"] < 70
    text = call("samples", folder, *PATTERNS)
    assert "79.7" in text and "56.8" in text and "87.5" in text


def test_samples_against_a_network(samples, tmp_path):
    "Predictions that a network itself made agree with it to the last pixel."
    folder, _ = samples
    net = segkern.create_model("sanet_s").eval()
    for head in ("main", "aux"):
        for f in (folder / "image").iterdir():
            Image.fromarray(P.segmentation_picture(net, f, head)).save(folder / head / f.name)
    text = call(
        "samples",
        folder,
        *PATTERNS,
        "--weights",
        segkern.save(net, tmp_path / "net.safetensors"),
        "--device",
        "cpu",
    )
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["100", "100"]


def test_samples_refused(samples):
    folder, _ = samples
    file = folder / "main" / "town_000001_leftImg8bit.png"
    Image.fromarray(np.full((64, 128, 3), 7, np.uint8)).save(file)
    assert "100 % of the pixels have colours" in fails("samples", folder, *PATTERNS) and str(
        file
    ) in fails("samples", folder, *PATTERNS)
    Image.new("RGB", (64, 64)).save(file)
    assert f"{file} is [64, 64]" in fails("samples", folder, *PATTERNS)
    file.write_bytes(b"")
    assert f"{file} cannot be read" in fails("samples", folder, *PATTERNS)
    file.unlink()
    assert "missing main of 'town_000001'" in fails("samples", folder, *PATTERNS)
    assert "no file in" in fails("samples", folder, "--image", "nothing/*.png")
    assert "is not a folder" in fails("samples", folder / "none")
    Image.new("RGB", (128, 64)).save(folder / "main" / "town_000000_main.png")
    assert "both belong to 'town_000000'" in fails("samples", folder, *PATTERNS)


def test_expected_scores_are_those_of_the_specification():
    assert json.loads(json.dumps(shipped.EXPECTED)) == {
        "main": [79.7, 96.8],
        "aux": [56.8, 93.8],
    }


# every network of the zoo

SMALLEST = [
    "s2fpn_r18 spfnet_r18 dsanet sanet_s pidnet_s segformer_b0 sasformer_icip_b0",
    "sasformer_sparse_b0 segnext_t seaformer_b cgrseg_t afformer_b sanet_s_ssa cgrseg_t_ssa",
]
ZOO = segkern.models.list_models(all=True)
QUICK = " ".join(SMALLEST).split()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_every_network_is_drawn(name, tmp_path):
    "A heat map where nobody chose a layer, and the gallery; of the slow ones the receptive field, too."
    m = segkern.create_model(name, 11).eval()
    files = P.gallery(
        m, picture(), tmp_path, heats=1, target="everywhere", fields=name not in QUICK
    )
    heats = [caption for f, caption in files if "heat" in f.name]
    assert len(heats) == 1 and all(f.is_file() for f, _ in files)
    one = H.heat(m, picture(), commonest(m, picture()))
    assert one.map.shape == (64, 96) and 0 <= one.map.min()
    # a map is brought to 0..1, unless nothing of it speaks for the class: random weights may say so
    nothing = name not in QUICK and not one.map.any()
    assert 0.99 < one.map.max() <= 1 or nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "upernet_swin_t", "ocrnet_hr48"])
def test_every_layer_is_drawn_or_refused(name):
    "A layer gives a heat map, or one line says why it cannot; some of those that give a map are drawn."
    m = segkern.create_model(name, 11).eval()
    with H.held_still(m):
        x, _ = H.network_input(m, picture(), None)
        layers = [n for n, _ in m.named_modules() if n]
        layers += [f"{n}:in" for n in layers]
        maps = []
        _, seen, _ = T.probe(m, x, layers)
        for n in layers:
            why = T._trouble(seen.get(n, []), x.shape[2:])
            assert "\n" not in why
            maps += [] if why else [n]
    assert maps
    for n in maps[:: max(1, len(maps) // 8)]:
        assert H.heat(m, picture(), 0, n, target="everywhere").map.shape == (64, 96)
