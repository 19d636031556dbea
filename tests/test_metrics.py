"""The confusion matrix against the official S2-FPN metric, torchmetrics and a plain loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segkern.infer.metrics import MIOU, Confusion, iou_table
from segkern.testing import assert_close, fixture


def random_labels(seed, k, shape=(3, 17, 13), void=0.1):
    "Predictions and targets of which some are void."
    g = torch.Generator().manual_seed(seed)
    pred, target = (torch.randint(0, k, shape, generator=g) for _ in range(2))
    target[torch.rand(shape, generator=g) < void] = 255
    return torch.where(torch.rand(shape, generator=g) < 0.6, target.clamp(max=k - 1), pred), target


def test_official_s2fpn_numbers():
    golden = fixture("s2fpn_misc").golden
    rng = np.random.RandomState(5)
    gt = rng.randint(0, 12, 2000)
    pred = np.where(rng.rand(2000) < 0.5, gt, rng.randint(0, 11, 2000))
    c = Confusion(11).update(np.where(pred >= 10, 3, pred), np.where(gt == 11, 255, gt))
    r = c.result("s2fpn")
    assert c.matrix.tolist() == golden["confusion"].astype(int).tolist()
    assert_close("miou_reported", golden["miou_reported"], [r["miou"]], 1e-6)
    assert_close("iou_listed", golden["iou_listed"], [v for v in r["iou"] if v], 1e-6)
    assert_close("mean_class_acc", golden["mean_class_acc"], [r["mean_acc"]], 1e-6)
    assert (
        c.result()["miou"] == pytest.approx(r["miou"] * 10 / 11)
        and c.result("all")["miou"] == c.result()["miou"]
    )


@pytest.mark.parametrize("k", [1, 2, 11, 19])
def test_agrees_with_torchmetrics(k):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    pred, target = random_labels(k, k + 3)
    pred = pred.clamp(max=k - 1)
    target = torch.where(target == 255, target, target.clamp(max=k - 1))
    r = Confusion(k + 1).update(pred, target).result()  # one class more than there is
    each = multiclass_jaccard_index(pred, target, k + 1, average="none", ignore_index=255)
    assert r["iou"][-1] is None
    assert_close("iou", each[:k], r["iou"][:k], 1e-6)
    assert r["miou"] == pytest.approx(each[:k].mean().item(), rel=1e-6)
    assert r["pixel_acc"] == pytest.approx(
        multiclass_accuracy(pred, target, k + 1, average="micro", ignore_index=255).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
def test_any_integer_type(dtype):
    pred, target = random_labels(0, 5)
    assert (
        Confusion(5)
        .update(pred.to(dtype), target.to(dtype))
        .matrix.equal(Confusion(5).update(pred, target).matrix)
    )


def test_counts_are_a_plain_loop():
    pred, target = random_labels(1, 4, (2, 5, 7))
    want = torch.zeros(4, 4, dtype=torch.int64)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()):
        if t != 255:
            want[t, p] += 1
    c = Confusion(4).update(pred, target)
    assert (
        c.matrix.equal(want)
        and c.matrix.dtype == torch.int64
        and c.result()["n_pixels"] == int(want.sum())
    )


def test_parts_add_up():
    pred, target = random_labels(2, 6)
    parts = [Confusion(6).update(p, t) for p, t in zip(pred, target)]
    assert (parts[0] + parts[1] + parts[2]).matrix.equal(Confusion(6).update(pred, target).matrix)
    with pytest.raises(ValueError, match="5 classes"):
        parts[0] + Confusion(5)


def test_rules_differ_where_they_should():
    target = torch.tensor([0, 0, 1, 1, 2, 2, 255])
    pred = torch.tensor([0, 0, 1, 0, 0, 0, 3])
    c = Confusion(5).update(pred, target)  # class 2 never hit, classes 3 and 4 absent
    iou = [2 / 5, 1 / 2, 0.0]
    assert c.result()["iou"] == [*iou, None, None]
    assert [c.result(m)["miou"] for m in MIOU] == pytest.approx([0.9 / 3, 0.9 / 5, 0.9 / 2])
    assert c.result()["mean_acc"] == pytest.approx((1 + 0.5 + 0) / 3)
    with pytest.raises(ValueError, match="unknown mIoU rule 'mean'"):
        c.result("mean")


def test_nothing_but_void():
    r = Confusion(3).update(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), 255)).result()
    assert r == dict(miou=None, iou=[None] * 3, pixel_acc=None, mean_acc=None, n_pixels=0)
    assert "–" in str(iou_table(r))


@pytest.mark.parametrize(
    "pred, target, words",
    [
        ([0, 3], [0, 0], "pred holds the id 3"),
        ([0, -1], [0, 0], "pred holds the id -1"),
        ([0, 0], [0, 11], "target holds the id 11"),
        ([0, 0], [0, -2], "target holds the id -2"),
        ([0.0, 1.0], [0, 1], "integer class ids"),
        ([0, 0, 0], [0, 0], "shape"),
    ],
)
def test_bad_labels_are_named(pred, target, words):
    c = Confusion(3)
    with pytest.raises(ValueError, match=words):
        c.update(torch.tensor(pred), torch.tensor(target))
    assert c.matrix.sum() == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        Confusion(0)
    with pytest.raises(ValueError, match="one of the 11 classes"):
        Confusion(11, ignore_index=3)
    with pytest.raises(ValueError, match="2 class names for 3"):
        iou_table(Confusion(3).result(), ["a", "b"])


@pytest.mark.parametrize("align_corners", [False, True])
def test_counts_from_small_logits(align_corners):
    "As from labels, with the classes of the channels in another order, over several batches, parts and integer types."
    order = torch.tensor([3, 0, 4, 1, 2])
    g = torch.Generator().manual_seed(0)
    whole = Confusion(5)
    parts = [Confusion(5), Confusion(5)]
    for n, dtype in enumerate((torch.uint8, torch.int16, torch.int64)):
        z = torch.randn(2, 5, 3, 4, generator=g)
        y = torch.randint(0, 5, (2, 13, 17), generator=g)
        y[:, :3] = 255
        labels = F.interpolate(
            z.double(), (13, 17), mode="bilinear", align_corners=align_corners
        ).argmax(1)
        whole.update(order[labels], y)
        parts[n % 2].update_logits(z, y.to(dtype), align_corners, order)
    assert (parts[0] + parts[1]).matrix.equal(whole.matrix) and (
        parts[0] + parts[1]
    ).result() == whole.result()


def test_illegal_ids_in_small_logits_are_raised_with_the_result():
    z = torch.zeros(1, 3, 2, 2)
    y = torch.full((1, 4, 4), 255)
    y[0, 0, 0], y[0, 0, 1], y[0, 1] = -1, 9, 2
    c = Confusion(3).update_logits(z, y)
    assert c.matrix.sum() == 4
    with pytest.raises(ValueError, match=r"ids from -1 to 9 \(2 pixels\); expected 0 to 2 or 255"):
        c.result()
    with pytest.raises(ValueError, match="-1 to 9"):
        (Confusion(3).update_logits(z, y.clamp(min=0)) + c).result()
    with pytest.raises(ValueError, match="3 classes, not 4"):
        Confusion(4).update_logits(z, y)
    with pytest.raises(ValueError, match="integer"):
        Confusion(3).update_logits(z, y.float())
    assert Confusion(3).update_logits(z[:0], y[:0]).result()["miou"] is None
