"GTA V: SANet's lists at their full length, the dataset's own split, and folders with half of them."

import logging

import numpy as np
import pytest
from PIL import Image

from segkern.core import load_table
from segkern.data import check, open_dataset
from segkern.data.base import MissingSplit, unpaired
from segkern.data.gtav import is_left_out

FRAMES = [f for f in range(1, 24967) if not is_left_out(f)]
# any split of the published sizes
TEST = FRAMES[::4][:6155]
TRAINVAL = sorted(set(FRAMES) - set(TEST))
VAL = TRAINVAL[::2][:6347]
TRAIN = sorted(set(TRAINVAL) - set(VAL))


def write_list(root, part, frames):
    "A list as the official repository has it."
    lines = (f"images/{f:05d}.png\tlabels/{f:05d}.png\n" for f in frames)
    (root / f"{part}.lst").write_text("".join(lines))


@pytest.fixture
def lists(tmp_path):
    "The official lists, of which the train list is cut short; the pictures are elsewhere."
    for part, frames in (("trainval", TRAINVAL), ("val", VAL), ("test", TEST)):
        write_list(tmp_path, part, frames)
    write_list(tmp_path, "train", TRAIN[:116])
    return tmp_path


def numbers(dataset):
    "The frames of a dataset."
    return [int(image.stem) for image, _ in dataset.files]


def test_official_lists(lists):
    with unpaired():
        opened = {s: open_dataset("gtav", lists, s) for s in ("train", "val", "trainval", "test")}
    expected = dict(train=TRAIN, val=VAL, trainval=TRAINVAL, test=TEST)
    assert {s: numbers(d) for s, d in opened.items()} == expected
    assert {s: len(d) for s, d in opened.items()} == load_table("gtav")["published"]
    assert len(TRAINVAL) + len(TEST) == 24904
    assert [len(d.notes) for d in opened.values()] == [1, 0, 0, 0]
    assert "holds 116 lines" in opened["train"].notes[0] and "12,402" in opened["train"].notes[0]


def test_whole_train_list_is_taken_as_it_is(lists):
    write_list(lists, "train", TRAIN[::-1])
    with unpaired():
        train = open_dataset("gtav", lists, "train")
    assert numbers(train) == TRAIN[::-1] and not train.notes


def miniature(root, frames):
    "Pictures and masks of two pixels."
    for part in ("images", "labels"):
        (root / part).mkdir()
    for f in frames:
        Image.fromarray(np.zeros((1, 2, 3), np.uint8)).save(root / "images" / f"{f:05d}.png")
        Image.fromarray(np.full((1, 2), 7, np.uint8)).save(root / "labels" / f"{f:05d}.png")


def test_lists_of_another_length_are_named(tmp_path, caplog):
    miniature(tmp_path, [1, 2, 3])
    write_list(tmp_path, "trainval", [1, 2])
    write_list(tmp_path, "val", [2])
    with caplog.at_level(logging.INFO, "segkern"):
        assert numbers(open_dataset("gtav", tmp_path, "train")) == [1]
    assert "train.lst is not there" in caplog.text
    assert "train has 1 pictures by the lists, 12,402 as published" in caplog.text
    with pytest.raises(MissingSplit, match="not test.lst"):
        open_dataset("gtav", tmp_path, "test")
    report = check("gtav", tmp_path)
    assert report.ok and "val: val has 1 pictures by the lists, 6,347 as published" in report.notes
    (tmp_path / "val.lst").unlink()
    with pytest.raises(MissingSplit, match="trainval.lst and val.lst"):
        open_dataset("gtav", tmp_path, "train")
    assert numbers(open_dataset("gtav", tmp_path, "train", by="stretches")) == [1, 2, 3]


def test_own_split_of_the_dataset(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    miniature(tmp_path, [1, 2, 3, 15188])
    parts = dict(trainIds=[[1], [15188]], valIds=[[3]], testIds=[[2]])
    savemat(tmp_path / "split.mat", parts)
    assert numbers(open_dataset("gtav", tmp_path, "trainval")) == [1, 3]
    whole = open_dataset("gtav", tmp_path, "train", by="mat", all_frames=True)
    assert numbers(whole) == [1, 15188]
    assert whole.notes == ["train has 2 pictures by split.mat, 12,403 as published"]
    savemat(tmp_path / "split.mat", dict(trainIds=[[1]]))
    with pytest.raises(ValueError, match="is not GTA V.s split.mat .*testIds"):
        open_dataset("gtav", tmp_path, "test")
    with pytest.raises(ValueError, match="by must be one of"):
        open_dataset("gtav", tmp_path, by="chance")
