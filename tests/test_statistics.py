"Mean, deviation and class weights of a data set: against numpy, and against S2-FPN's published values."

import json

import numpy as np
import pytest
from PIL import Image

from segkern.core import load_table
from segkern.data import measure, open_dataset
from segkern.testing import shared

# S2-FPN's file for CamVid trainval, red first
PUBLISHED_STD = (67.87634, 71.67616, 71.11642)
PUBLISHED_COUNTS = [
    12284387,
    19281259,
    721848,
    25130056,
    4366836,
    9017887,
    899583,
    1251792,
    4024593,
    518916,
    571977,
]


@pytest.fixture
def folder(tmp_path):
    "Five pictures of different sizes, one class that never occurs, void here and there."
    rng = np.random.default_rng(3)
    for i, (h, w) in enumerate(((5, 7), (8, 3), (1, 1), (6, 6), (2, 9))):
        for part, a in (
            ("images", rng.integers(0, 256, (h, w, 3), np.uint8)),
            ("masks", rng.choice(np.array([0, 1, 255], np.uint8), (h, w))),
        ):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(a).save(tmp_path / part / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "never"]))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_numpy_finds_the_same(folder, workers):
    found = measure("folder", folder, "all", workers=workers)
    ds = open_dataset("folder", folder, "all")
    pictures = [ds.image(i).numpy().reshape(3, -1).astype(float) for i in range(5)]
    labels = np.concatenate([ds.target(i).numpy().ravel() for i in range(5)])
    pixels = np.concatenate(pictures, axis=1)
    exact = dict(rtol=1e-14)
    np.testing.assert_allclose(found.mean_rgb, np.mean([p.mean(1) for p in pictures], 0), **exact)
    np.testing.assert_allclose(found.std_rgb, np.mean([p.std(1) for p in pictures], 0), **exact)
    np.testing.assert_allclose(found.pixel_mean_rgb, pixels.mean(1), **exact)
    np.testing.assert_allclose(found.pixel_std_rgb, pixels.std(1), **exact)
    assert found.pixels == pixels.shape[1] == sum(found.counts) + found.void
    assert found.counts == [int((labels == c).sum()) for c in range(3)] and found.counts[2] == 0
    share = np.array(found.counts) / sum(found.counts)
    np.testing.assert_allclose(found.class_weights, 1 / np.log(1.10 + share), rtol=1e-8)


def test_published_values_of_camvid():
    "The labels are those of the publication; the pictures went through JPEG since."
    root = shared("data/camvid")
    if root is None:
        pytest.skip("the shared CamVid is not beside the checkout")
    table = load_table("camvid")
    found = measure("camvid", root, "trainval")
    assert (found.pictures, found.counts, found.void) == (468, PUBLISHED_COUNTS, 2801266)
    # published in float32, whose digits end at 1.2e-7
    np.testing.assert_allclose(found.class_weights, table["class_weights"], rtol=3e-7)
    np.testing.assert_allclose(found.mean_rgb, table["mean_rgb"], rtol=7e-4)
    np.testing.assert_allclose(found.std_rgb, PUBLISHED_STD, rtol=1e-3)
    assert min(np.subtract(found.pixel_std_rgb, PUBLISHED_STD)) > 5
