"""The rules of `infer.rosetta` against torchmetrics itself, and against the scripts' arithmetic written anew."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import JaccardIndex
from torchmetrics.functional.segmentation import mean_iou
from torchmetrics.segmentation import MeanIoU

from segkern.cli import main
from segkern.core import load_table
from segkern.infer.rosetta import CATEGORIES, METRICS, Tally, category_iou, compare, reduce_zero

K = 6


def pictures(seed, count=5, k=K, outside=False):
    "Predictions and targets; some void, the last class nowhere, the one before it never hit."
    g = torch.Generator().manual_seed(seed)
    sets = []
    for i in range(count):
        shape = (7 + i, 9)
        target = torch.randint(0, min(k - 1, 3 + i), shape, generator=g)
        guess = torch.randint(0, k - 2, shape, generator=g)
        right = torch.rand(shape, generator=g) < 0.6
        pred = torch.where(right & (target < k - 2), target, guess)
        target[torch.rand(shape, generator=g) < 0.1] = 255
        if outside:
            pred[torch.rand(shape, generator=g) < 0.05] = 255
        sets.append((pred, target))
    return sets


def tally(sets, k=K):
    found = Tally(k)
    for pred, target in sets:
        found.update(pred, target)
    return found


def miou(name, sets, k=K):
    return METRICS[name].score(tally(sets, k))["miou"]


def flat(sets):
    return (torch.cat([t.flatten() for t in part]) for part in zip(*sets))


def one_hot(ids, k=K):
    "[1, k, h, w]; void is a pixel of no class."
    return torch.stack([ids == c for c in range(k)])[None].long()


SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_torchmetrics_jaccard(seed):
    sets = pictures(seed)
    pred, target = flat(sets)
    metric = JaccardIndex("multiclass", num_classes=K, average="macro", ignore_index=255)
    for one, true in sets:
        metric.update(one, true)
    assert miou("torchmetrics", sets) == pytest.approx(float(metric.compute()), abs=1e-6)
    labelled = target != 255
    zero = JaccardIndex("multiclass", num_classes=K, average="macro", ignore_index=0)
    found = float(zero(pred[labelled], target[labelled]))
    assert miou("torchmetrics_zero", sets) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_torchmetrics_means_over_pictures(seed):
    sets = pictures(seed)
    pairs = MeanIoU(num_classes=K)
    foreground = MeanIoU(num_classes=K, include_background=False)
    classes = MeanIoU(num_classes=K, per_class=True)
    each = []
    for pred, target in sets:
        shown = one_hot(pred) * (target != 255), one_hot(target)
        for metric in (pairs, foreground, classes):
            metric.update(*shown)
        each.append(float(mean_iou(*shown, num_classes=K)))
    known = [float(v) for v in classes.compute() if v >= 0]
    wanted = dict(
        torchmetrics_pairs=float(pairs.compute()),
        torchmetrics_foreground=float(foreground.compute()),
        torchmetrics_classes=sum(known) / len(known),
        torchmetrics_pictures=sum(each) / len(each),
    )
    assert {n: miou(n, sets) for n in wanted} == pytest.approx(wanted, abs=1e-6)
    assert len({round(v, 6) for v in wanted.values()}) == 4


# the scripts' arithmetic, from what they say and do


def cityscapes(sets, k=K):
    """A matrix over all ids, void as id `k` (ignored) in the target and in the prediction; false positives
    only from rows that are not ignored."""
    matrix = np.zeros((k + 1, k + 1), np.int64)
    for pred, target in sets:
        for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()):
            matrix[min(t, k), min(p, k)] += 1
    scores = []
    for label in range(k):
        tp = matrix[label, label]
        fn = matrix[label].sum() - tp
        others = [i for i in range(k) if i != label]
        fp = matrix[others, label].sum()
        scores.append(math.nan if tp + fp + fn == 0 else tp / (tp + fp + fn))
    valid = [s for s in scores if not math.isnan(s)]
    return sum(valid) / len(valid), matrix


def voc(sets, k=K):
    "Joint histogram of pixels whose target is below 255; a plain mean, where 0/0 is NaN."
    counts = np.zeros((k, k))
    for pred, target in sets:
        result = pred.numpy().astype(float)
        if result.max() > k - 1:
            raise ValueError("out of range")
        truth = target.numpy().astype(float)
        at = truth < 255
        joint = (1 + truth + result * k)[at]
        histogram = np.histogram(joint, np.arange(0.5, k * k + 1))[0]
        counts += histogram.reshape(k, k, order="F")
    with np.errstate(invalid="ignore"):
        hit = np.diag(counts)
        return float(np.mean(hit / (counts.sum(1) + counts.sum(0) - hit)))


def histograms(sets, k=K, reduce=False):
    "Three histograms with `k` bins from 0 to k-1; what lies outside is in none of them."
    total = np.zeros((3, k))
    for pred, target in sets:
        pred = pred.numpy()
        target = target.numpy().astype(np.uint8)
        if reduce:
            target[target == 0] = 255
            target = target - 1
            target[target == 254] = 255
        keep = target != 255
        pred = pred[keep]
        target = target[keep]
        for i, part in enumerate((pred[pred == target], pred, target)):
            total[i] += np.histogram(part, bins=k, range=(0, k - 1))[0]
    hit, said, true = total
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.nanmean(hit / (said + true - hit))
        return float(iou), float(hit.sum() / true.sum()), float(np.nanmean(hit / true))


@pytest.mark.parametrize("outside", [False, True], ids=["classes", "outside"])
@pytest.mark.parametrize("seed", SEEDS)
def test_scripts(seed, outside):
    sets = pictures(seed, outside=outside)
    assert miou("cityscapes", sets) == pytest.approx(cityscapes(sets)[0], abs=1e-12)
    wanted = histograms(sets)
    for name in ("mmseg", "huggingface", "sasformer_icip", "ssa"):
        found = METRICS[name].score(tally(sets))
        assert [found[n] for n in ("miou", "pixel_acc", "mean_acc")] == pytest.approx(wanted)
    if outside:
        assert miou("voc", sets) is miou("torchmetrics", sets) is miou("sanet", sets) is None
        with pytest.raises(ValueError, match="out of range"):
            voc(sets)
        return
    assert miou("voc", sets) is None and math.isnan(voc(sets))  # a class is nowhere
    fewer = pictures(seed, k=K - 1)
    seen = [(p, t.where(t != K - 2, 255)) for p, t in fewer]
    k = K - 2
    assert miou("voc", seen, k) == pytest.approx(voc(seen, k), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed):
    sets = pictures(seed)
    pred, target = flat(sets)
    keep = target != 255
    matrix = np.zeros((K, K))
    np.add.at(matrix, (target[keep].numpy(), pred[keep].numpy()), 1)
    hit = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hit
    # SANet: absent classes count 0
    found = METRICS["sanet"].score(tally(sets))
    assert found["miou"] == pytest.approx((hit / np.maximum(1, union)).mean())
    assert found["mean_acc"] == pytest.approx((hit / np.maximum(1, matrix.sum(1))).mean())
    assert found["pixel_acc"] == pytest.approx(hit.sum() / matrix.sum())
    # S2-FPN: classes with a hit only
    assert miou("s2fpn", sets) == pytest.approx((hit / union.clip(1))[hit > 0].mean())
    # the sparse SASFormer: nanmean
    with np.errstate(invalid="ignore"):
        assert miou("sasformer_sparse", sets) == pytest.approx(np.nanmean(hit / union))


def test_the_example_of_sanets_specification():
    "Two classes, targets 0 0 1 void, predictions 0 1 1 0."
    sets = [(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 0, 1, 255]]))]
    found = METRICS["sanet"].score(tally(sets, 2))
    assert found == pytest.approx(dict(miou=0.5, pixel_acc=2 / 3, mean_acc=0.75))


def test_labels_that_start_at_one():
    sets = [(p, torch.where(t == 255, 0, t + 1)) for p, t in pictures(0)]
    down = [(p, reduce_zero(t)) for p, t in sets]
    assert miou("mmseg", down) == pytest.approx(histograms(sets, reduce=True)[0], abs=1e-12)
    twice = [(p, reduce_zero(t)) for p, t in down]
    assert miou("mmseg", twice) < 0.5 * miou("mmseg", down)


def test_categories():
    classes = load_table("cityscapes")["classes"]
    sets = pictures(1, k=19, outside=True)
    found = category_iou(tally(sets, 19), classes)
    matrix = cityscapes(sets, 19)[1]
    for category, names in CATEGORIES.items():
        ids = [classes.index(n) for n in names]
        others = [i for i in range(19) if i not in ids]
        tp = matrix[np.ix_(ids, ids)].sum()
        fn = matrix[ids].sum() - tp
        fp = matrix[np.ix_(others, ids)].sum()
        if tp + fp + fn == 0:
            assert found[category] is None
        else:
            assert found[category] == pytest.approx(tp / (tp + fp + fn))
    assert sum(map(len, CATEGORIES.values())) == 19


def test_the_command_on_folders(tmp_path, capsys):
    "Two folders, one prediction of no class, JSON and tables."
    sets = pictures(2, outside=True)
    for i, pair in enumerate(sets):
        for place, ids in zip(("said", "true"), pair):
            (tmp_path / place).mkdir(exist_ok=True)
            Image.fromarray(ids.numpy().astype(np.uint8)).save(tmp_path / place / f"{i}.png")
    folders = [str(tmp_path / "said"), "--targets", str(tmp_path / "true")]
    assert main(["metrics", "explain", *folders, "--num-classes", str(K), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rules"]["mmseg"]["miou"] == pytest.approx(histograms(sets)[0])
    assert report["rules"]["voc"]["miou"] is None and report["outside"] > 0
    assert report["nowhere"] == [str(K - 1)] and report["never_hit"] == [str(K - 2)]
    assert main(["metrics", "explain", *folders, "--num-classes", str(K)]) == 0
    assert str(compare(tally(sets))) in capsys.readouterr().out
    Image.new("L", (3, 3)).save(tmp_path / "said" / "0.png")
    assert main(["metrics", "explain", *folders, "--num-classes", str(K)]) == 1
    assert "0.png: pred has shape (3, 3)" in capsys.readouterr().err
