"""Protocols that bring pictures to a size of their own, against OpenCV and naive loops; restricted
classes; what recipes and `segment` make of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segkern.models  # noqa: F401  papers register their recipes
from segkern import infer, train
from segkern.core import IMAGENET, Preprocess, seeded
from segkern.infer import (
    PROTOCOLS,
    FirstClasses,
    argmax_resized,
    evaluate,
    evaluating,
    fit_into_frame,
    optimize,
    picture_rule,
    segment,
    sliding_logits,
    square_labels,
    window_starts,
)
from segkern.core import RECIPES, STREETS, recipe_for
from segkern.train import evaluation_of


class Net(nn.Module):
    "Logits at a quarter of the size, smooth enough that small differences of the input do not turn labels."

    def __init__(self, k=5, preprocess=IMAGENET):
        super().__init__()
        self.name = "net"
        self.num_classes = k
        self.classes = [f"c{i}" for i in range(k)]
        self.preprocess = preprocess
        self.align_corners = False
        self.seen = []
        self.conv = nn.Conv2d(3, 8, 7, 4, 3)
        self.classifier = nn.Conv2d(8, k, 1)

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        return self.classifier(torch.tanh(self.conv(x)))

    def upsample(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def predict(self, x, size=None):
        return self.upsample(self(x), size or x.shape[-2:]).argmax(1).to(torch.uint8)


NAMES = "whole sliding multiscale exp_sum ade ade32 ade32_sliding square512 square512_ms".split()


def net(**kw):
    with seeded(3):
        return Net(**kw).eval()


class Images:
    "Pictures with given targets."

    def __init__(self, classes, items):
        self.classes = list(classes)
        self.items = items
        self.name = "images"

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def picture(h, w, seed=0):
    "Blurred noise: like a photograph, unlike noise, it survives a resize."
    x = torch.rand(1, 3, h // 8 + 2, w // 8 + 2, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(x, (h, w), mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)


def array(t):
    return t.permute(1, 2, 0).numpy()


def normal(rgb):
    return IMAGENET(torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1))[None]


def agreement(a, b):
    return float((torch.as_tensor(a) == torch.as_tensor(b)).float().mean())


def test_names_are_the_recipes():
    assert list(PROTOCOLS) == NAMES and {r.protocol for r in RECIPES.values()} <= set(PROTOCOLS)
    for name in NAMES:
        assert PROTOCOLS[name].name == name and STREETS.replace(protocol=name).protocol == name
    with pytest.raises(ValueError, match="unknown protocol 'ade64'; known: whole, sliding"):
        evaluate(
            net(), Images("abcde", [(picture(9, 9), torch.zeros(9, 9, dtype=torch.uint8))]), "ade64"
        )


# ---- steps


@pytest.mark.parametrize("k, budget", [(1, 10), (7, 1), (7, 3 * 400), (7, 2**24)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_labels_come_group_by_group(monkeypatch, k, budget, mode):
    """No resize makes more numbers than the budget, unless one class alone does; the labels are
    those of all classes at once."""
    sizes = [(20, 20), (13, 17)]
    made = []
    resize = F.interpolate
    logits = torch.randn(1, k, 6, 5)
    logits[:, 3:6] = logits[:, :3].clone() if k > 3 else 0.0  # equal classes: the first one wins
    whole = logits
    for s in sizes:
        whole = resize(whole, s, mode=mode, align_corners=False)
    monkeypatch.setattr(
        nn.functional, "interpolate", lambda *a, **kw: (made.append(resize(*a, **kw)), made[-1])[1]
    )
    got = argmax_resized(logits, sizes, mode, budget=budget)
    assert torch.equal(got, whole.argmax(1).to(torch.uint8)) and max(
        m.numel() for m in made
    ) <= max(budget, 400)


@pytest.mark.parametrize("size", [(75, 101), (101, 75), (20, 200), (1, 1), (64, 64)], ids=str)
def test_fitted_against_opencv(cv2, size):
    image = picture(*size)
    for multiple in (1, 32):
        long = 256
        short = 64
        f = min(long / max(size), short / min(size))
        h, w = (int(n * f + 0.5) for n in size)
        ref = cv2.resize(array(image), (w, h), interpolation=cv2.INTER_LINEAR)
        up = [-(-n // multiple) * multiple for n in (h, w)]
        ref = cv2.resize(ref, up[::-1], interpolation=cv2.INTER_LINEAR)
        got = array(fit_into_frame(image, (long, short), multiple))
        assert got.shape == ref.shape and np.abs(got.astype(int) - ref).mean() < 0.6


# ---- whole protocols


def test_ade32_against_opencv(cv2):
    m = net()
    image = picture(75, 101)
    with torch.no_grad():
        first = cv2.resize(array(image), (86, 64), interpolation=cv2.INTER_LINEAR)
        x = normal(cv2.resize(first, (96, 64), interpolation=cv2.INTER_LINEAR))
        full = F.interpolate(
            F.interpolate(m(x), (64, 96), mode="bilinear"), (75, 101), mode="bilinear"
        ).argmax(1)
        plain = F.interpolate(
            F.interpolate(m(normal(first)), (64, 86), mode="bilinear"), (75, 101), mode="bilinear"
        ).argmax(1)
    m.seen.clear()
    assert (
        agreement(segment(m, image, (256, 64), "ade32"), full[0]) > 0.99
        and agreement(segment(m, image, (256, 64), "ade"), plain[0]) > 0.99
    )
    assert m.seen == [(64, 96), (64, 86)] and agreement(plain, full) < 0.999


def test_square_against_opencv(cv2):
    "Input and logits by OpenCV's cubic, in BGR with the statistics of RGB, as the official script does it."
    m = net(preprocess=Preprocess("bgr"))
    image = picture(75, 101)
    bgr = cv2.resize(array(image)[..., ::-1].copy(), (64, 64), interpolation=cv2.INTER_CUBIC)
    x = (bgr / 255 - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    with torch.no_grad():
        logits = m(torch.from_numpy(x).permute(2, 0, 1)[None].float())[0]
    full = cv2.resize(logits.permute(1, 2, 0).numpy(), (101, 75), interpolation=cv2.INTER_CUBIC)
    got = segment(m, image, (64, 64), "square512")
    assert agreement(got, full.argmax(-1)) > 0.99


def test_square_ms_against_a_naive_loop(cv2):
    m = net()
    image = picture(75, 101)
    total = 0
    x = normal(cv2.resize(array(image), (64, 64), interpolation=cv2.INTER_CUBIC))

    def up(t, n):
        return F.interpolate(t, (n, n), mode="bilinear", align_corners=True)

    with torch.no_grad():
        for s in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
            y = up(x, int(64 * s))
            total = total + up(m(y), 64) + up(m(y.flip(-1)), 64).flip(-1)
    full = cv2.resize(total[0].permute(1, 2, 0).numpy(), (101, 75), interpolation=cv2.INTER_CUBIC)
    m.seen.clear()
    with evaluating(m):
        got = square_labels(m, image, (64, 64), PROTOCOLS["square512_ms"].scales)
    assert agreement(got[0], full.argmax(-1)) > 0.99 and m.seen == [
        (n, n) for n in (32, 48, 64, 80, 96, 112, 128) for _ in (0, 1)
    ]


def test_cityscapes_windows():
    assert window_starts(2048, 1024, 768) == [0, 768, 1024] and window_starts(1024, 1024, 768) == [
        0
    ]
    m = net()
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        total = torch.zeros(1, 5, 32, 64)
        count = torch.zeros(64)
        for left in (0, 24, 32):
            total[..., left : left + 32] += m.upsample(m(x[..., left : left + 32]), (32, 32))
            count[left : left + 32] += 1
        # logits, not probabilities
        assert torch.allclose(sliding_logits(m, x, 32, 24), total / count, atol=1e-6)


# ---- evaluate


def test_evaluate_says_what_it_did():
    m = net()
    images = [picture(40, 50), picture(50, 40, 1), picture(50, 40, 2)]
    for protocol, kw, shown in (
        ("ade32", dict(size=(128, 32)), dict(size=[128, 32])),
        ("ade", dict(size=(128, 32)), dict(size=[128, 32])),
        ("square512", dict(size=(64, 64)), dict(size=[64, 64])),
        (
            "square512_ms",
            dict(size=(32, 32), scales=(1.0,)),
            dict(size=[32, 32], scales=[1.0], flip=True),
        ),
    ):
        more = {k: v for k, v in kw.items() if k != "scales"}
        items = [
            (
                i,
                segment(m, i, more["size"], protocol)
                if "scales" not in kw
                else square_labels(m.eval(), i, (32, 32), (1.0,))[0].detach(),
            )
            for i in images
        ]
        m.train()
        r = evaluate(m, Images(m.classes, items), protocol, batch=2, **kw)
        assert (
            r["miou"] == 1
            and r["protocol"] == protocol
            and {k: r[k] for k in shown} == shown
            and m.training
        ), protocol
        assert not set(r) & {"window", "stride", "restricted_from"}
    assert evaluate(m, Images(m.classes, items[:1]), "ade32")["size"] == [2048, 512]
    assert m.seen[-1] == (512, 640)
    whole = evaluate(m, Images(m.classes, items))
    assert not set(whole) & {"window", "stride", "size", "scales", "flip"}


def test_more_outputs_than_classes():
    "Only on request, and then the first outputs: those after them never win."
    m = net()
    with torch.no_grad():
        m.classifier.bias[3:] += 100
    image = picture(40, 50)
    names = ["road", "sky", "car"]
    with torch.no_grad():
        truth = m.upsample(m(IMAGENET(image[None]))[:, :3], (40, 50)).argmax(1)[0].to(torch.uint8)
    data = Images(names, [(image, truth)])
    for protocol, kw in (
        ("whole", {}),
        ("sliding", dict(window=64)),
        ("ade32", {}),
        ("square512", {}),
    ):
        with pytest.raises(
            ValueError,
            match=r"5 classes.*the dataset.*3.*restrict=True \(--restrict\) measures its first 3 outputs",
        ):
            evaluate(m, data, protocol, **kw)
        r = evaluate(m, data, protocol, restrict=True, **kw)
        assert (
            r["restricted_from"] == 5
            and r["classes"] == names
            and r["miou"] > (0.99 if protocol in ("whole", "sliding") else 0.2)
        )
    m.classes = None
    with pytest.raises(ValueError, match="the model has 5 classes, the dataset 3; restrict"):
        evaluate(m, data)
    assert evaluate(optimize(m), data, restrict=True)["miou"] > 0.99
    with pytest.raises(ValueError, match="5 classes, the dataset 6$"):
        evaluate(m, Images("abcdef", data.items), restrict=True)
    same = Images("vwxyz", [(image, torch.full((40, 50), 4, dtype=torch.uint8))])
    assert "restricted_from" not in evaluate(m, same, restrict=True)
    with pytest.raises(ValueError, match="5 outputs, 6 are asked for"):
        FirstClasses(m, 6)
    assert not FirstClasses(m, 2).net.training and FirstClasses(m, 2).preprocess == IMAGENET


# ---- recipes and pictures


@pytest.mark.parametrize(
    "model, dataset, expected",
    [
        ("segformer_b0", "ade20k", dict(protocol="ade32", size=(2048, 512))),
        ("segformer_b0_mmseg", "ade20k", dict(protocol="ade", size=(2048, 512))),
        (
            "sasformer_icip_b0",
            "cityscapes",
            dict(protocol="sliding", window=(1024, 1024), stride=(768, 768)),
        ),
        (
            "vit_adapter_l_ssa",
            "pascal_context",
            dict(protocol="ade32_sliding", size=(4096, 520), window=(480, 480), stride=(320, 320)),
        ),
        (
            "vit_adapter_l",
            "ade20k",
            dict(protocol="ade32_sliding", size=(2048, 512), window=(512, 512), stride=(341, 341)),
        ),
        ("ocrnet_hr48", "pascal_context", dict(protocol="ade", size=(520, 520))),
        ("sasformer_sparse_b4", "voc2012", dict(protocol="square512", size=(512, 512))),
        ("s2fpn_r18", "camvid", dict(protocol="whole", miou="nonzero")),
    ],
)
def test_validation_follows_the_recipe(monkeypatch, model, dataset, expected):
    seen = {}
    monkeypatch.setattr(train.state, "evaluate", lambda model, data, **kw: seen.update(kw))
    evaluation_of(recipe_for(model, dataset))(None, None)
    assert seen == {"miou": "present", **expected}


def test_windows_over_a_fitted_picture():
    "Fit into the frame, sides up to multiples of 32, windows, the picture's own size."
    m = net()
    image = picture(40, 56)
    data = [(image, torch.zeros(40, 56, dtype=torch.uint8))]
    seen = fit_into_frame(image, (128, 64), 32)
    logits = sliding_logits(m, m.preprocess(seen[None]), (48, 48), (32, 32))
    want = F.interpolate(logits, (40, 56), mode="bilinear").argmax(1)
    got = infer.fitted_labels(m, image, (128, 64), 32, (48, 48), (32, 32))
    assert (
        seen.shape[1:] == (64, 96)
        and (got == want).float().mean() > 0.999
        and set(m.seen) == {(48, 48)}
    )
    report = evaluate(
        m,
        Images([f"c{i}" for i in range(5)], data),
        protocol="ade32_sliding",
        size=(128, 64),
        window=(48, 48),
        stride=(32, 32),
    )
    assert report["pixel_acc"] == pytest.approx((want == 0).float().mean().item(), abs=1e-3) and (
        report["window"],
        report["size"],
    ) == ((48, 48), [128, 64])
    with pytest.raises(ValueError, match="'ade32_sliding' wants a window"):
        evaluate(m, Images([f"c{i}" for i in range(5)], data), protocol="ade32_sliding")


def test_segment_follows_the_recipe_of_the_dataset():
    m = net()
    image = picture(40, 50)
    whole = segment(m, image)
    for name, dataset, size in (
        ("segformer_b0", "ade20k", (512, 640)),
        ("sasformer_sparse_b4", "voc2012", (512, 512)),
    ):
        m.name = name
        m.dataset = dataset
        m.seen.clear()
        labels = segment(m, torch.stack([image, image]))
        assert (
            labels.shape == (2, 40, 50)
            and m.seen == [size] * 2
            and torch.equal(labels[0], segment(m, image))
            and picture_rule(m)["protocol"] == recipe_for(name, dataset).protocol
        )
        assert (
            torch.equal(segment(m, image, protocol="whole"), whole)
            and segment(m, image, size=(32, 32)).shape == (40, 50)
            and m.seen[-1] == (32, 32)
        )
    for name, dataset in (
        ("segformer_b0", "cityscapes"),
        ("s2fpn_r18", "camvid"),
        ("net", None),
        ("segformer_b0", "streets"),
    ):
        m.name = name
        m.dataset = dataset
        assert picture_rule(m)["protocol"] == "whole" and torch.equal(segment(m, image), whole)
    with pytest.raises(ValueError, match="wants a window"):
        segment(m, image, protocol="sliding")


def test_a_trained_network_remembers_how_it_saw_pictures(tmp_path):
    """On one's own data there is no published rule: the run's own goes into its files, and
    `segment` shows a picture as validation did."""
    from segkern.data import open_dataset
    from segkern.train import fit, run_weights

    data = open_dataset("streets", size=(60, 80), length=4)
    recipe = recipe_for(
        "dsanet",
        "streets",
        batch=2,
        iterations=1,
        crop=(64, 64),
        fit_size=(128, 64),
        scales=(1.0,),
        protocol="ade32",
        class_weights=False,
    )
    model = segkern.create_model("dsanet", 11)
    result = fit(
        model,
        recipe,
        data,
        open_dataset("streets", split="val", size=(60, 80), length=1),
        tmp_path / "run",
        device="cpu",
    )
    again = segkern.load(
        segkern.save(segkern.load(run_weights(tmp_path / "run")), tmp_path / "again.safetensors")
    )
    image = picture(60, 80)
    assert (
        result["protocol"] == "ade32"
        and again.rule == model.rule == dict(protocol="ade32", size=[128, 64])
        and picture_rule(optimize(again)) == again.rule
    )
    assert (
        torch.equal(segment(again, image), segment(again, image, (128, 64), "ade32"))
        and agreement(segment(again, image), segment(again, image, protocol="whole")) < 1
    )
    assert (
        segkern.load(
            segkern.save(segkern.create_model("dsanet", 11), tmp_path / "new.safetensors")
        ).rule
        is None
    )


def test_options_of_a_recipe_are_for_training_only():
    from segkern.cli.train import split_options

    r = recipe_for("sasformer_sparse_b0", "streets")
    assert split_options(r, ["size=64x96"]) == (
        ["annotation=scribble", "size=64x96"],
        ["size=64x96"],
    )
    assert split_options(r, ["annotation=point"]) == (["annotation=point"], [])
    assert split_options(recipe_for("sanet_s", "camvid"), ["order=sanet"]) == (
        ["order=sanet"],
        ["order=sanet"],
    )


def test_a_run_on_scribbles(tmp_path):
    "The smoke recipe end to end: targets with two planes reach the model, validation has full labels."
    from segkern.data import open_dataset
    from segkern.train import fit

    class Sparse(Net):
        planes = set()

        def forward(self, x, target=None):
            if target is None:
                return super().forward(x)
            self.planes.add((target.shape[1:], target.dtype))
            labels = F.interpolate(target[:, :1].float(), x.shape[2] // 4, mode="nearest")[
                :, 0
            ].long()
            return dict(
                loss=F.cross_entropy(
                    F.interpolate(super().forward(x), labels.shape[1:]),
                    labels,
                    ignore_index=255,
                    reduction="sum",
                )
                / 100
            )

    with seeded(0):
        model = Sparse(11)
    recipe = recipe_for(
        "sasformer_sparse_b0", "streets", batch=2, iterations=3, crop=(64, 64), warmup=0
    )
    train_set = open_dataset("streets", size=(60, 80), length=6, **dict(recipe.data_options))
    result = fit(
        model,
        recipe,
        train_set,
        open_dataset("streets", split="val", size=(60, 80), length=2),
        tmp_path / "run",
        device="cpu",
    )
    assert (
        result["steps"] == 3
        and result["miou"] is not None
        and Sparse.planes == {((2, 64, 64), torch.uint8)}
        and train_set.annotation == "scribble"
    )
