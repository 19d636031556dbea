"Raw trees of COCO-Stuff 10K, PASCAL-Context and VOC with SBD, in miniature, converted and read."

import logging

import numpy as np
import pytest
from PIL import Image

from segkern.core import load_table
from segkern.data import make, open_dataset

savemat = pytest.importorskip("scipy.io").savemat


def picture(path, w=30, h=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (w, h)).save(path)


def mat(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, fields)


def names_file(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def drawn(values, seed):
    "A mask of 20x30 in which every value occurs."
    rng = np.random.default_rng(seed)
    flat = np.concatenate([values, rng.choice(values, 600 - len(values))])
    return rng.permutation(flat).reshape(20, 30)


def coco(root):
    "Three pictures; masks with the 171 numbers in use and 0."
    unused = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
    numbers = np.array([0] + [i for i in range(1, 183) if i not in unused], np.uint16)
    raw = {}
    for name, given in (("COCO_a", "train"), ("COCO_b", "train"), ("COCO_c", "test")):
        picture(root / "images" / f"{name}.jpg")
        raw[name] = drawn(numbers, len(raw))
        mat(root / "annotations" / f"{name}.mat", S=raw[name], regionLabelsStuff=[1, 2])
    names_file(root / "imageLists" / "train.txt", ["COCO_a", "COCO_b"])
    names_file(root / "imageLists" / "test.txt", ["COCO_c"])
    return raw, numbers


def test_coco_stuff(tmp_path, caplog):
    raw, numbers = coco(tmp_path)
    with caplog.at_level(logging.WARNING, "segkern"):
        assert (make("coco_stuff10k", tmp_path), make("coco_stuff10k", tmp_path)) == (6, 0)
    assert "train has 2 pictures, 9000 as published" in caplog.text
    for split, names in (("train", ["COCO_a", "COCO_b"]), ("val", ["COCO_c"])):
        ds = open_dataset("coco_stuff10k", tmp_path, split)
        assert [p.stem for p, _ in ds.files] == names
        for i, name in enumerate(names):
            place = np.searchsorted(numbers, raw[name]) - 1
            assert (ds.target(i).numpy() == np.where(place < 0, 255, place)).all()
    kept = tmp_path / "annotations" / "train2014" / "COCO_a_labelTrainIds.png"
    before = kept.read_bytes()
    kept.with_name("COCO_b_labelTrainIds.png").unlink()
    assert make("coco_stuff10k", tmp_path) == 1 and kept.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_coco_stuff_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="coco_stuff10k: the list .*train.txt"):
        make("coco_stuff10k", tmp_path)
    coco(tmp_path)
    bad = tmp_path / "annotations" / "COCO_b.mat"
    mat(bad, S=np.full((20, 30), 12, np.uint16))
    with pytest.raises(ValueError, match="COCO_b.mat holds label 12 in 600 pixels.*171 of the"):
        make("coco_stuff10k", tmp_path)
    mat(bad, LabelMap=np.ones((20, 30)))
    with pytest.raises(ValueError, match="COCO_b.mat is not a mask of COCO-Stuff 10K .*'S'"):
        make("coco_stuff10k", tmp_path)
    bad.write_bytes(b"not a matrix")
    with pytest.raises(ValueError, match="COCO_b.mat is not a mask of COCO-Stuff"):
        make("coco_stuff10k", tmp_path)
    (tmp_path / "images" / "COCO_a.jpg").unlink()
    mat(bad, S=np.zeros((20, 30), np.uint16))
    with pytest.raises(FileNotFoundError, match="COCO_a.jpg is missing, but a list names it"):
        make("coco_stuff10k", tmp_path)
    bad.unlink()
    (tmp_path / "annotations" / "train2014" / "COCO_b_labelTrainIds.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 annotations are missing.*COCO_b.mat"):
        make("coco_stuff10k", tmp_path)


def context(root, folder):
    "Two pictures of VOC 2010 with all 459 classes."
    raw = {}
    for name, split in (("2008_000001", "train"), ("2009_000002", "val")):
        picture(root / "JPEGImages" / f"{name}.jpg")
        raw[name] = drawn(np.arange(1, 460).astype(np.uint16), len(raw))
        mat(folder / f"{name}.mat", LabelMap=raw[name])
        names_file(root / "ImageSets" / "Main" / f"{split}.txt", [name])
    return raw


def test_context(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2010"
    raw = context(voc, tmp_path / "trainval")
    assert (make("pascal_context", tmp_path), make("pascal_context", tmp_path)) == (2, 0)
    official = load_table("pascal_context")["official_ids"]
    for (split, classes), (name, ids) in zip((("train", 59), ("val", 60)), raw.items()):
        ds = open_dataset("pascal_context", tmp_path, split, classes=classes)
        expected = np.full(460, 255 if classes == 59 else 0)
        expected[official] = np.arange(59) + (classes == 60)
        assert ds.files[0][0].stem == name and (ds.target(0).numpy() == expected[ids]).all()


def test_context_elsewhere_and_its_names(tmp_path):
    voc = tmp_path / "VOC2010"
    context(voc, tmp_path / "raw" / "masks")
    with pytest.raises(FileNotFoundError, match="name their folder with raw="):
        make("pascal_context", tmp_path)
    table = load_table("pascal_context")
    known = dict(zip(table["official_ids"], table["classes"]))
    lines = [f"{i}: {known.get(i, f'other {i}')}" for i in range(1, 460)]
    names_file(tmp_path / "raw" / "masks" / "labels.txt", lines[:-2] + ["458: wool", "459: wood"])
    with pytest.raises(ValueError, match="calls class 458 'wool', not 'wood'"):
        make("pascal_context", voc, raw=tmp_path / "raw" / "masks")
    names_file(tmp_path / "raw" / "masks" / "labels.txt", lines)
    assert make("pascal_context", voc, raw=tmp_path / "raw" / "masks") == 2
    with pytest.raises(FileNotFoundError, match="no JPEGImages/"):
        make("pascal_context", tmp_path / "raw")


def voc_and_sbd(root):
    "VOC's a and v, SBD's b, c and v; the two differ where both have a mask."
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    masks = {}
    for seed, name in enumerate("abcv"):
        picture(voc / "JPEGImages" / f"{name}.jpg")
        values = np.append(np.arange(21), 255) if name in "av" else np.arange(21)
        masks[name] = drawn(values.astype(np.uint8), seed)
        if name in "av":
            (voc / "SegmentationClass").mkdir(exist_ok=True)
            Image.fromarray(masks[name]).save(voc / "SegmentationClass" / f"{name}.png")
        if name in "bcv":
            other = masks[name] if name != "v" else np.zeros((20, 30), np.uint8)
            mat(sbd / "cls" / f"{name}.mat", GTcls=dict(Segmentation=other, Boundaries=0))
    for split, own, theirs in (("train", ["a"], ["b"]), ("val", ["v"], ["c", "v"])):
        names_file(voc / "ImageSets" / "Segmentation" / f"{split}.txt", own)
        names_file(sbd / f"{split}.txt", theirs)
    return masks


def test_voc_with_sbd(tmp_path):
    masks = voc_and_sbd(tmp_path)
    before = open_dataset("voc2012", tmp_path)
    assert (make("voc2012", tmp_path), make("voc2012", tmp_path)) == (4, 0)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    written = {p.stem: np.array(Image.open(p)) for p in (voc / "SegmentationClassAug").iterdir()}
    assert {n: a.tolist() for n, a in written.items()} == {n: a.tolist() for n, a in masks.items()}
    lists = voc / "ImageSets" / "Segmentation"
    assert (lists / "trainaug.txt").read_text().split() == ["a", "b", "c"]
    # read without SBD: the same samples
    after = open_dataset("voc2012", tmp_path, sbd=voc / "SegmentationClassAug")
    assert [p for p, _ in after.files] == [p for p, _ in before.files]
    assert all((after.target(i) == before.target(i)).all() for i in range(3))


def test_voc_without_sbd(tmp_path):
    voc_and_sbd(tmp_path)
    (tmp_path / "benchmark_RELEASE").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="name SBD's folder with raw="):
        make("voc2012", tmp_path)
    assert make("voc2012", tmp_path, raw=tmp_path / "elsewhere") == 4
