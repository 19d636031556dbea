"""Training pipelines of OpenMMLab and of the sparse SASFormer: each step against OpenCV, whole
samples in the papers' order, chances."""

import math

import numpy as np
import pytest
import torch

from segkern.core import IMAGENET, RECIPES, STREETS
from segkern.data import colour, open_dataset, transform
from segkern.data.transform import Augment, balanced, transform_for
from segkern.data.colour import (
    uniform_integer,
    hsv_to_rgb,
    linear,
    photometric,
    rgb_to_hsv,
    saturate,
    shifted,
    turn_hue,
    uniform,
)
from segkern.data.geometry import cubic_window, fitted_size
from segkern.data.transform import TrainTransform
from segkern.models.s2fpn import S2FPN_CAMVID
from segkern.models.sanet import SANET_CAMVID
from segkern.models.sasformer_icip import SASFORMER_ICIP_ADE20K
from segkern.models.sasformer_sparse import SASFORMER_SPARSE_VOC
from segkern.models.segformer import SEGFORMER_STREETS


def street(i=2, size=(90, 120)):
    return open_dataset("streets", size=size)[i]


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def tensor(a):
    return torch.from_numpy(np.ascontiguousarray(a)).permute(2, 0, 1)


def array(t):
    return t.permute(1, 2, 0).numpy()


def gap(a, b):
    return np.abs(a.astype(int) - b.astype(int))


# ---- colour


def test_hsv_is_opencvs(cv2):
    "Bytes equal for every hue, saturation and value; the way back within one level."
    levels = np.array([*range(0, 256, 9), 1, 2, 3, 254], np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(
        len(levels), -1, 3
    )
    ref = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    assert (array(rgb_to_hsv(tensor(image))) == ref).all()
    hues = (
        np.stack(np.meshgrid(np.arange(180), levels[:32], levels[:32], indexing="ij"), -1)
        .astype(np.uint8)
        .reshape(180, -1, 3)
    )
    back = gap(array(hsv_to_rgb(tensor(hues))), cv2.cvtColor(hues, cv2.COLOR_HSV2RGB))
    assert back.max() <= 1 and back.mean() < 1e-2


# OpenMMLab's, in NumPy
def convert(image, alpha=1.0, beta=0.0):
    return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def official_saturation(cv2, bgr, factor):
    hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
    hsv[..., 1] = convert(hsv[..., 1], factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def official_hue(cv2, bgr, by):
    hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + by) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


@pytest.mark.parametrize(
    "image", [noise(37, 64), array(street(size=(90, 128))[0])], ids=["noise", "street"]
)
def test_colour_steps_against_opencv(cv2, image):
    """To a twentieth of a level. OpenCV cuts in its vector path and rounds what is left at the end
    of a row: the widths here leave nothing."""
    x = tensor(image)
    bgr = image[..., ::-1]
    for offset in (-32, -7.3, 31.9):
        assert (array(linear(x, offset=offset)) == convert(image, beta=offset)).all()
    for factor in (0.5, 0.93, 1.5):
        assert (array(linear(x, factor)) == convert(image, factor)).all()
        assert (
            gap(array(saturate(x, factor)), official_saturation(cv2, bgr, factor)[..., ::-1]).mean()
            < 0.05
        )
    for by in (-18, -1, 0, 17):
        assert gap(array(turn_hue(x, by)), official_hue(cv2, bgr, by)[..., ::-1]).mean() < 0.05
    for by in (-10, 0, 10):
        assert (array(shifted(x, by)) == np.clip(image.astype(int) + by, 0, 255)).all()


def official_photometric(cv2, rgb, g):
    "OpenMMLab's order on BGR, with our draws."
    bgr = rgb[..., ::-1]

    def coin():
        return uniform_integer(2, g)

    if coin():
        bgr = convert(bgr, beta=uniform(-32, 32, g))
    early = coin()
    if early and coin():
        bgr = convert(bgr, uniform(0.5, 1.5, g))
    if coin():
        bgr = official_saturation(cv2, bgr, uniform(0.5, 1.5, g))
    if coin():
        bgr = official_hue(cv2, bgr, uniform_integer(36, g) - 18)
    if not early and coin():
        bgr = convert(bgr, uniform(0.5, 1.5, g))
    return bgr[..., ::-1]


def test_photometric_against_opencv(cv2):
    image = street(size=(90, 128))[0]
    for seed in range(24):
        g, same = (torch.Generator().manual_seed(seed) for _ in range(2))
        assert (
            gap(array(photometric(image, g)), official_photometric(cv2, array(image), same)).mean()
            < 0.1
        )
        assert torch.equal(g.get_state(), same.get_state())


def test_photometric_draws(monkeypatch):
    "Every step with probability one half, contrast before and after alike, values over their whole ranges."
    calls = {}

    def note(name):
        return lambda image, *a, **kw: (calls[name].append(a[0] if a else kw["offset"]), image)[1]

    for name in ("linear", "saturate", "turn_hue"):
        calls[name] = []
        monkeypatch.setattr(colour, name, note(name))
    g = torch.Generator().manual_seed(0)
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for _ in range(4000):
        photometric(image, g)
    offsets, factors = [
        [v for v in calls["linear"] if (abs(v) > 1.5) == far] for far in (True, False)
    ]
    near = 1.5 / 32 * 2000  # offsets that look like factors
    for values, n in (
        (offsets, 2000 - near),
        (factors, 2000 + near),
        (calls["saturate"], 2000),
        (calls["turn_hue"], 2000),
    ):
        assert abs(len(values) - n) < 130
    assert (
        min(offsets) < -31.5
        and max(offsets) > 31.5
        and set(calls["turn_hue"]) == set(range(-18, 18))
    )
    assert (
        min(calls["saturate"]) < 0.51
        and max(calls["saturate"]) > 1.49
        and abs(np.mean(calls["saturate"]) - 1) < 0.03
    )


# ---- size


@pytest.mark.parametrize("h, w", [(1, 1), (7, 5), (101, 67), (90, 120)])
@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.31, 2.0])
def test_cubic_agrees_with_opencv(cv2, h, w, factor):
    image = noise(h, w, h * w)
    new = max(1, int(h * factor / 1.03)), max(1, int(w * factor * 1.03))
    ref = cv2.resize(image, new[::-1], interpolation=cv2.INTER_CUBIC)
    got = array(cubic_window(tensor(image), (new[0] / h, new[1] / w), 0, 0, *new))
    assert got.shape == ref.shape and gap(got, ref).max() <= 2 and gap(got, ref).mean() < 0.5


def test_fitted_size_is_imrescale():
    for size in ((512, 683), (683, 512), (100, 2000), (1024, 2048), (3, 5)):
        for r in (0.5, 0.777, 1.3, 2.0):
            long = int(2048 * r)
            short = int(512 * r)
            scale = min(long / max(size), short / min(size))
            assert fitted_size(size, (2048, 512), r) == tuple(int(x * scale + 0.5) for x in size)
    assert fitted_size((1, 4000), (2048, 512), 0.5) == (1, 1024)


# ---- crops


def test_crops_are_drawn_again():
    "A left half of one class: crops inside it are refused, unless ten redraws do not help."
    target = torch.zeros(40, 400, dtype=torch.uint8)
    target[:, 200:] = torch.arange(200, dtype=torch.uint8) % 5
    image = torch.zeros(3, 40, 400, dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    one = [
        balanced(Augment(IMAGENET, (40, 40), flip=0, cat_max_ratio=r)(image, target, g)[1], 0.75)
        for r in (0.0, 0.75)
        for _ in range(300)
    ]
    assert 0.4 < np.mean(one[:300]) < 0.65 and np.mean(one[300:]) > 0.99
    assert (
        Augment(IMAGENET, (40, 40), cat_max_ratio=0.75)(image, torch.full_like(target, 3), g)[1]
        .eq(3)
        .all()
    )
    assert (
        Augment(IMAGENET, (40, 40), cat_max_ratio=0.75)(image, torch.full_like(target, 255), g)[1]
        .eq(255)
        .all()
    )


def test_eleven_crops_at_most(monkeypatch):
    tries = []
    monkeypatch.setattr(transform, "balanced", lambda labels, limit: tries.append(limit))
    image, target = street()
    Augment(IMAGENET, (20, 20), cat_max_ratio=0.6)(image, target)
    assert tries == [0.6] * 10


# ---- whole samples


def official_mmseg(cv2, image, target, recipe, g):
    "Resize, crop, flip, distort, normalise, pad, as the library does it on whole BGR pictures."
    rgb, ids, (ch, cw) = array(image), target.numpy(), recipe.crop
    new = fitted_size(rgb.shape[:2], recipe.fit_size, uniform(*recipe.scale_range, g))
    rgb = cv2.resize(rgb, new[::-1], interpolation=cv2.INTER_LINEAR)
    ids = cv2.resize(ids, new[::-1], interpolation=cv2.INTER_NEAREST)
    for k in range(11):
        top = uniform_integer(max(new[0] - ch, 0) + 1, g)
        left = uniform_integer(max(new[1] - cw, 0) + 1, g)
        part = ids[top : top + ch, left : left + cw]
        labels, count = np.unique(part, return_counts=True)
        count = count[labels != 255]
        if k < 10 and len(count) > 1 and count.max() / count.sum() < recipe.cat_max_ratio:
            break
    rgb = rgb[top : top + ch, left : left + cw]
    ids = part
    if uniform(0, 1, g) < recipe.flip:
        rgb = rgb[:, ::-1]
        ids = ids[:, ::-1]
    rgb = official_photometric(cv2, rgb, g)
    x = (rgb - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    pads = ch - x.shape[0], cw - x.shape[1]
    return np.pad(x, ((0, pads[0]), (0, pads[1]), (0, 0))), np.pad(
        ids, ((0, pads[0]), (0, pads[1])), constant_values=255
    )


@pytest.mark.parametrize("seed", range(8))
def test_openmmlabs_pipeline(cv2, seed):
    image, target = street(seed)
    recipe = SASFORMER_ICIP_ADE20K.replace(crop=(64, 64), fit_size=(256, 64))
    g, same = (torch.Generator().manual_seed(seed) for _ in range(2))
    x, y = transform_for(recipe)(image, target, g)
    rx, ry = official_mmseg(cv2, image, target, recipe, same)
    assert (
        (y.numpy() == ry).all()
        and np.abs(array(x) - rx).mean() < 1 / 57
        and torch.equal(g.get_state(), same.get_state())
    )
    assert y.dtype == torch.uint8 and x.dtype == torch.float32 and x.is_contiguous()


def official_sparse(cv2, image, target, recipe, g):
    "Flip, stretch, crop, pad, shift, normalise BGR, as the official code does it."
    bgr, ids, (ch, cw) = array(image)[..., ::-1], target.numpy(), recipe.crop
    if uniform(0, 1, g) < recipe.flip:
        bgr = bgr[:, ::-1]
        ids = ids[:, ::-1]
    scale = uniform(*recipe.scale_range, g)
    a = uniform(*recipe.aspect, g)
    new = int(bgr.shape[1] * (math.sqrt(a) * scale)), int(bgr.shape[0] * (math.sqrt(1 / a) * scale))
    bgr = cv2.resize(np.ascontiguousarray(bgr), new, interpolation=cv2.INTER_CUBIC)
    ids = cv2.resize(np.ascontiguousarray(ids), new, interpolation=cv2.INTER_NEAREST)
    top = uniform_integer(max(new[1] - ch, 0) + 1, g)
    left = uniform_integer(max(new[0] - cw, 0) + 1, g)
    bgr = bgr[top : top + ch, left : left + cw]
    ids = ids[top : top + ch, left : left + cw].astype(int)
    ids[ids == 255] = -1
    by = uniform_integer(21, g) - 10
    top = uniform_integer(ch - bgr.shape[0] + 1, g)
    left = uniform_integer(cw - bgr.shape[1] + 1, g)
    spare = (top, ch - top - bgr.shape[0]), (left, cw - left - bgr.shape[1])
    bgr = np.pad(bgr, (*spare, (0, 0)))
    ids = np.pad(ids, spare, constant_values=-2)
    bgr = np.clip(bgr.astype(int) + by, 0, 255) / 255
    return (bgr - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]), ids


@pytest.mark.parametrize("seed", range(10))
def test_the_sparse_pipeline(cv2, seed):
    image, target = open_dataset("streets", size=(90, 120), annotation="scribble")[seed]
    recipe = SASFORMER_SPARSE_VOC.replace(crop=(96, 96))
    g, same = (torch.Generator().manual_seed(seed) for _ in range(2))
    x, y = transform_for(recipe)(image, target, g)
    rx, ry = official_sparse(cv2, image, target, recipe, same)
    ours = np.where(
        y[1].numpy() == 0, -2, np.where(y[0].numpy() == 255, -1, y[0].numpy().astype(int))
    )
    assert (
        (ours == ry).all()
        and np.abs(array(x) - rx).mean() < 1 / 57
        and torch.equal(g.get_state(), same.get_state())
    )
    assert (
        y.shape == (2, 96, 96) and y.dtype == torch.uint8 and set(y[1].unique().tolist()) <= {0, 1}
    )


def test_padding_lies_anywhere_and_scales_fill_their_range():
    image = torch.full((3, 30, 30), 200, dtype=torch.uint8)
    target = torch.zeros(30, 30, dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    t = transform_for(SASFORMER_SPARSE_VOC.replace(crop=(70, 70)))
    tops = []
    sizes = []
    for _ in range(400):
        y = t(image, target, g)[1]
        rows, columns = (np.flatnonzero(y[1].any(d).numpy()) for d in (1, 0))
        tops.append(rows[0] / max(1, 70 - len(rows)))
        sizes.append((len(rows), len(columns)))
    h, w = np.array(sizes).T
    assert abs(np.mean(tops) - 0.5) < 0.05 and min(tops) == 0 and max(tops) == 1
    assert (
        abs(h.mean() - 37) < 2
        and h.min() <= 16
        and h.max() >= 58
        and 0.94 < np.median(w / h) < 1.06
        and (w / h).max() > 1.05
        and (w / h).min() < 0.95
    )


def test_black_padding_moves_with_the_shift_or_not():
    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    target = torch.zeros(8, 8, dtype=torch.uint8)
    for kind, pad, outside in (
        ("shift", "black", 11),
        ("shift_picture", "black", 1),
        ("shift", "mean", 1),
    ):
        t = Augment(IMAGENET, (16, 16), colour=kind, pad=pad, place="random", inside=True)
        g = torch.Generator().manual_seed(3)
        values = {
            (int(t.preprocess.undo(x)[0][y[1] == 1][0]), round(float(x[0][y[1] == 0][0]), 4))
            for x, y in (t(image, target, g) for _ in range(300))
        }
        assert {v for v, _ in values} == set(range(118, 139)) and len(
            {o for _, o in values}
        ) == outside


@pytest.mark.parametrize("size", [(1, 1), (101, 67), (1, 50), (300, 20)], ids=str)
@pytest.mark.parametrize("name", ["icip", "sparse", "streets"])
def test_any_size(size, name):
    recipe = dict(
        icip=SASFORMER_ICIP_ADE20K, sparse=SASFORMER_SPARSE_VOC, streets=SEGFORMER_STREETS
    )[name].replace(crop=(60, 50))
    t = transform_for(recipe)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    for seed in range(4):
        x, y = t(image, target, torch.Generator().manual_seed(seed))
        assert (
            x.shape == (3, 60, 50)
            and x.isfinite().all()
            and y.shape[-2:] == (60, 50)
            and (y == 0).any()
        )


def test_chance_comes_from_the_generator_alone():
    state, (image, target) = torch.random.get_rng_state(), street()
    for recipe in (SASFORMER_ICIP_ADE20K, SASFORMER_SPARSE_VOC):
        t = transform_for(
            recipe.replace(crop=(64, 64), **({"fit_size": (256, 64)} if recipe.fit_size else {}))
        )
        a, b, c = (t(image, target, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("recipe", [S2FPN_CAMVID, SANET_CAMVID], ids=["s2fpn", "sanet"])
def test_plain_fields_are_the_plain_transform(recipe):
    r, (image, target) = recipe.replace(crop=(64, 80)), street()
    one = transform_for(r)
    two = Augment(r.preprocess, r.crop, r.scales, r.flip, r.pad, r.base_size, r.edges, r.edge_frame)
    assert type(one) is TrainTransform
    for seed in range(6):
        (x, y), (u, v) = (t(image, target, torch.Generator().manual_seed(seed)) for t in (one, two))
        assert torch.equal(x, u) and torch.equal(y, v)


def test_every_recipe_has_its_transform():
    recipes = {**RECIPES, ("*", "streets"): STREETS}  # the one of any other network
    kinds = {(m, d): type(TrainTransform.from_recipe(r)).__name__ for (m, d), r in recipes.items()}
    # the others follow OpenMMLab's pipeline
    assert {m.split("_")[0] for (m, _), k in kinds.items() if k != "Augment"} == {
        "s2fpn",
        "spfnet",
        "dsanet",
        "sanet",
        "pidnet",
        "*",
    }
    text = repr(transform_for(SASFORMER_SPARSE_VOC))
    assert "interpolation=cubic" in text and "place=random" in text and "fit_size" not in text
    for bad in (
        dict(colour="jitter"),
        dict(interpolation="area"),
        dict(place="centre"),
        dict(inside=True, edges=True),
    ):
        with pytest.raises(ValueError):
            Augment(IMAGENET, (4, 4), **bad)
