"""Labels and probabilities of one pass, by every protocol and in every type; what `predict` writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern.cli import main
from segkern.core import load_table
from segkern.data.cityscapes import to_label_ids
from segkern.infer import (
    PROTOCOLS,
    FirstClasses,
    Settings,
    evaluating,
    labels_of,
    optimize,
    segment,
)
from segkern.infer.maps import picture_maps
from segkern.infer.probabilities import Scores, maps_of, probability_groups
from segkern.testing import toy

TYPES = (torch.float32, torch.float16, torch.uint8)
TOLD = Settings(window=48, stride=32, size=(64, 48), scales=(0.5, 1.0, 1.25), flip=True)


def photo(h=75, w=101, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g)


def settings_of(protocol):
    return Settings(size=(40, 56)) if protocol == "whole" else TOLD


@pytest.mark.parametrize("k", [4, 23])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_are_the_best_class(protocol, k):
    m = toy(num_classes=k)
    own = settings_of(protocol)
    image = photo()
    with evaluating(m):
        if protocol == "whole":
            labels = segment(m, image, own.size)[None]
        else:
            labels = labels_of(m, image[None], protocol, own)
        for dtype in TYPES:
            maps = picture_maps(m, image, protocol, own, all_classes=dtype, best=3, doubt=True)
            p = maps.probabilities
            assert torch.equal(maps.labels, labels) and torch.equal(p.argmax(1), labels.long())
            assert p.dtype == dtype and p.shape == (1, k, 75, 101)
            total = p.double().sum(1) / (255 if dtype == torch.uint8 else 1)
            rounding = {torch.float32: 1e-5, torch.float16: k * 2**-11, torch.uint8: k / 255}
            assert (total - 1).abs().max() <= rounding[dtype]
            values, ids = maps.best
            assert torch.equal(ids[:, 0], labels) and (values[:, 0] >= values[:, 2]).all()
            assert (ids[:, 0] != ids[:, 1]).all() and (ids[:, 1] != ids[:, 2]).all()
    exact = segment(m, image, protocol=protocol, settings=own, probabilities=True)
    assert torch.equal(exact[0], labels[0]) and torch.equal(exact[1].argmax(0), labels[0].long())
    entropy, margin = maps.doubt
    naive = -torch.special.xlogy(exact[1], exact[1]).sum(0) / np.log(k)
    two = exact[1].topk(2, 0).values
    assert (entropy[0] - naive).abs().max() < 1e-5
    assert (margin[0] - (two[0] - two[1])).abs().max() < 1e-5


def test_probabilities_are_those_of_the_formulas():
    "Softmax of the mean of windows; the mean of softmaxes; exponentials over their sum; a mean of summed logits."
    from segkern.infer import exp_scores, multiscale_probs, sliding_logits

    m = toy()
    image = photo()
    x = m.preprocess(image[None])
    with evaluating(m):
        whole = m.upsample(m(x), (75, 101)).softmax(1)
        sliding = sliding_logits(m, x, 48, 32).softmax(1)
        several = multiscale_probs(m, x, TOLD.scales, True, window=48, stride=32)
        summed = exp_scores(m, x, TOLD.scales, True, 0, 48)
        wanted = dict(whole=whole, sliding=sliding, multiscale=several)
        wanted.update(exp_sum=summed / summed.sum(1, keepdim=True))
        for protocol, p in wanted.items():
            own = Settings() if protocol == "whole" else replace(TOLD, size=None)
            got = picture_maps(m, image, protocol, own, all_classes=torch.float32).probabilities
            assert (got - p).abs().max() < 1e-5, protocol
        one = Settings(size=(64, 64), scales=(1.0,), flip=False)
        alone = picture_maps(m, image, "square512_ms", one, all_classes=torch.float32)
        both = picture_maps(
            m,
            image,
            "square512_ms",
            Settings(size=(64, 64), scales=(1.0, 1.0), flip=False),
            all_classes=torch.float32,
        )
        # twice the same scale is the same mean, not twice the sharpness
        assert (alone.probabilities - both.probabilities).abs().max() < 1e-6


@pytest.mark.parametrize("wrap", ["optimized", "first classes"])
def test_wrapped_networks(wrap):
    net = segkern.create_model("dsanet", 11).eval()
    m = optimize(net) if wrap == "optimized" else FirstClasses(net, 5)
    image = photo(64, 96)
    labels, p = segment(m, image, probabilities=True)
    assert torch.equal(labels, segment(m, image)) and torch.equal(p.argmax(0), labels.long())
    assert len(p) == m.num_classes and (p.sum(0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("budget", [1, 5 * 20 * 20, 2**24])
def test_groups_do_not_matter(budget):
    z = torch.randn(1, 19, 6, 5)
    z[:, 7:14] = z[:, :7].clone()  # equal classes: the first one wins
    scores = Scores(z, ((20, 20), (13, 17)), budget=budget)
    whole = torch.nn.functional.interpolate(z, (20, 20), mode="bilinear")
    whole = torch.nn.functional.interpolate(whole, (13, 17), mode="bilinear")
    labels = scores.labels()
    assert torch.equal(labels, whole.argmax(1).to(torch.uint8))
    parts = [p for _, p in probability_groups(scores)]
    assert torch.allclose(torch.cat(parts, 1), whole.softmax(1), atol=1e-6)
    assert max(p.numel() for p in parts) <= max(budget, 13 * 17)
    for count in (1, 4, 30):
        values, ids = maps_of(scores, labels, best=count).best
        assert ids.shape[1] == min(count, 19) and torch.equal(ids[:, 0], labels)
        order = whole.softmax(1).sort(dim=1, descending=True, stable=True)
        assert torch.allclose(values, order.values[:, : min(count, 19)], atol=1e-6)


def test_memory_of_the_best_classes():
    "150 classes at 256x512 are 79 MB of probabilities; the best three are kept with a twentieth of it at any time."
    peak = 0
    scores = Scores(torch.randn(1, 150, 32, 64), ((256, 512),), budget=2**20)
    for _, part in probability_groups(scores):
        peak = max(peak, part.nbytes)
    values, ids = maps_of(scores, scores.labels(), best=3, dtype=torch.float16).best
    assert peak <= 150 * 256 * 512 * 4 / 18 and values.nbytes + ids.nbytes == 3 * 256 * 512 * 3


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    "A folder with two pictures named as Cityscapes names them, and weights of SANet."
    folder = tmp_path_factory.mktemp("city")
    for i in range(2):
        name = f"berlin_00000{i}_000019_leftImg8bit.png"
        Image.fromarray(photo(64, 128, i).permute(1, 2, 0).numpy()).save(folder / name)
    m = segkern.create_model("sanet_s", dataset="cityscapes").eval()
    segkern.save(m, folder / "net.safetensors")
    return folder


def call(city, out, *args):
    pictures = sorted(map(str, city.glob("*.png")))
    words = ["predict", city / "net.safetensors", *pictures, "--out", out, "--device", "cpu"]
    return main([str(a) for a in (*words, *args)])


@pytest.mark.parametrize("naming", ["cityscapes", "s2fpn"])
def test_submission_in_several_scales(city, tmp_path, naming):
    "SANet's sum of exponentials, label ids, and the names that the server looks for."
    scales = ["--protocol", "exp_sum", "--scales", "0.5,0.75,1.0,1.25", "--no-flip"]
    window = ["--base-size", 128, "--window", "64x128"]
    assert call(city, tmp_path, *scales, *window, "--submission", naming) == 0
    end = "_leftImg8bit" if naming == "cityscapes" else ""
    files = sorted(tmp_path.glob("*.png"))
    assert [f.name for f in files] == [f"berlin_00000{i}_000019{end}.png" for i in range(2)]
    m = segkern.load(city / "net.safetensors")
    own = Settings(window=(64, 128), scales=(0.5, 0.75, 1.0, 1.25), flip=False, base_size=128)
    ids = load_table("cityscapes")["label_ids"]
    for f, picture in zip(files, sorted(city.glob("*.png"))):
        labels = segment(m, picture, protocol="exp_sum", settings=own)
        written = np.asarray(Image.open(f))
        assert (written == to_label_ids(labels)).all() and set(np.unique(written)) <= set(ids)
        assert written.shape == (64, 128)


def test_files_of_maps(city, tmp_path):
    "PNGs by class, half precision and the best classes say the labels that are written."
    kept = ["--topk", 2, "--uncertainty", "--protocol", "multiscale", "--scales", "0.5,1"]
    assert call(city, tmp_path / "a", "--probabilities", "png", *kept) == 0
    assert call(city, tmp_path / "b", "--probabilities", "float16", *kept[3:]) == 0
    name = "berlin_000000_000019_leftImg8bit"
    labels = np.asarray(Image.open(tmp_path / "a" / f"{name}.png"))
    pngs = sorted((tmp_path / "a" / "probabilities" / name).iterdir())
    assert len(pngs) == 19 and pngs[6].name == "006-traffic-light.png"
    assert (np.stack([np.asarray(Image.open(p)) for p in pngs]).argmax(0) == labels).all()
    half = np.load(tmp_path / "b" / "probabilities" / f"{name}.npz")
    assert half["classes"].tolist() == load_table("cityscapes")["classes"]
    assert (half["probabilities"].argmax(0) == labels).all()
    best = np.load(tmp_path / "a" / "topk" / f"{name}.npz")
    assert (best["ids"][0] == labels).all() and best["values"].shape == (2, 64, 128)
    doubt = np.load(tmp_path / "a" / "uncertainty" / f"{name}.npz")
    grey = np.asarray(Image.open(tmp_path / "a" / "uncertainty" / f"{name}-entropy.png"))
    assert np.abs(grey / 255 - doubt["entropy"]).max() < 3e-3


def test_options_that_would_have_no_effect(city, tmp_path, capsys):
    for args, words in (
        (["--scales", "0.5,1"], "--scales has no effect on protocol 'whole'"),
        (["--protocol", "sliding", "--flip"], "--flip has no effect on protocol 'sliding'"),
        (["--protocol", "ade64"], "unknown protocol 'ade64'"),
        (["--probabilities", "float64"], "--probabilities knows uint8, float16, png"),
        (["--topk", "-1"], "--topk must be positive"),
        (["--submission", "kitti"], "--submission knows cityscapes and s2fpn"),
    ):
        assert call(city, tmp_path, *args) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
