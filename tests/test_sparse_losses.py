"""Losses of sparse labels: targets, partial cross-entropy, consistency through attention maps;
against the published code and an own plain form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import need
from segkern.losses.affinity import (
    affinity_losses,
    consistency,
    partial_cross_entropy,
    sparse_target,
)
from segkern.ops import AttentionMaps
from segkern.ops.dispatch import interpreting
from segkern.testing import assert_close, make_input, relative_l2
from segkern.testing.memory import exact_interpreter

exact_interpreter()
IMPLS = [
    "ref",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not interpreting(), reason="kernels run in the interpreter here; set TRITON_INTERPRET=1"
        ),
    ),
]


def from_scores(scores, size, key_size):
    "Maps with given scores, through the real op: unit keys."
    return AttentionMaps(
        scores,
        [torch.eye(s.shape[3], dtype=s.dtype).expand(*s.shape[:2], -1, -1) for s in scores],
        size,
        key_size,
        scale=1.0,
    )


def plain(z, scores, size, key_size, unlabelled, double=True):
    "One level with stored maps, written out."

    def full(s):
        return torch.softmax(F.interpolate(z, s, mode="bilinear"), 1).flatten(2)

    maps = sum(s.softmax(3).mean(1) for s in scores) / len(scores)
    g = (maps @ full(key_size).transpose(1, 2)).transpose(1, 2)
    p = full(size)
    if double:
        g = g.softmax(1)
        p = p.softmax(1)
    mask = F.interpolate(unlabelled[:, None].to(z), size, mode="nearest").flatten(1)
    return (mask * (g - p).abs().sum(1)).sum() / max(mask.sum(), 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_published_code(impl):
    "Random tensors of the fixture: four losses and all gradients."
    fx = need("sasformer_sparse_affinity")
    given = fx.inputs()
    sizes = fx.spec["seg_sizes"]
    z = (3 * given["seg"]).requires_grad_()
    scores = [
        [(2 * given[f"attn_logit_{s + 1}_{i}"]).requires_grad_() for i in range(d)]
        for s, d in enumerate(fx.spec["depths"])
    ]
    maps = [
        from_scores(a, sizes[min(s, 2)], sizes[3 if s < 3 else 2]) for s, a in enumerate(scores)
    ]
    labels, unlabelled = sparse_target(torch.from_numpy(fx.golden["target"]).short())
    for levels in range(1, 5) if impl == "ref" else (4,):
        parts = affinity_losses(z, maps, unlabelled, levels, impl=impl)
        assert (
            len(parts) == levels
            and abs(1.2 * sum(parts).item() - fx.golden["loss_idx0123"][levels - 1]) < 1e-5
        )
    assert affinity_losses(z, maps, unlabelled, 0) == []
    grads = torch.autograd.grad(1.2 * sum(parts), [z, *[a[0] for a in scores]])
    for n, g in zip(["seg", *[f"attn_logit_{s}_0" for s in range(1, 5)]], grads):
        assert fx.error(f"grad_{n}", fx.spec["grad_scale"] * g) < 1e-4, n
    ce = partial_cross_entropy(z, labels)
    assert (
        relative_l2(fx.golden["ce"][0], ce) < 1e-6
        and fx.error("grad_ce_seg", fx.spec["grad_scale"] * torch.autograd.grad(ce, z)[0]) < 1e-5
    )
    for s, stage in enumerate(maps if impl == "ref" else []):
        assert fx.error(f"A{s + 1}", stage.average()) < 2e-5
        small = torch.softmax(F.interpolate(z, stage.key_size, mode="bilinear"), 1)
        assert (
            fx.error(f"prop{s + 1}", stage.propagate(small, impl).flatten(2).transpose(1, 2)) < 2e-5
        )


@pytest.mark.parametrize("double", [True, False], ids=["two softmaxes", "one"])
@pytest.mark.parametrize(
    "size,cells,full",
    [
        ((5, 7), (2, 3), (19, 27)),
        ((1, 1), (1, 1), (3, 5)),
        ((9, 4), (9, 4), (9, 4)),
        ((13, 11), (3, 1), (50, 45)),
    ],
    ids=str,
)
def test_odd_grids(size, cells, full, double):
    "Values and gradients in double precision, on grids that divide nothing."
    z = make_input([2, 3, *size], 1).double().requires_grad_()
    scores = [
        make_input([2, 2, size[0] * size[1], cells[0] * cells[1]], i).double().requires_grad_()
        for i in (2, 3)
    ]
    unlabelled = torch.from_numpy(np.random.RandomState(4).rand(2, *full) < 0.7)
    (got,) = affinity_losses(z, [from_scores(scores, size, cells)], unlabelled, 1, double)
    ref = plain(z, scores, size, cells, unlabelled, double)
    assert got.dtype == torch.float64 and abs(got - ref) < 1e-12
    for a, b in zip(torch.autograd.grad(ref, [z, *scores]), torch.autograd.grad(got, [z, *scores])):
        assert (a - b).abs().max() < 1e-12


def test_gradient_of_every_input():
    "Finite differences, both distances, away from ties."
    z = make_input([1, 3, 3, 4], 1).double().requires_grad_()
    q = make_input([1, 2, 12, 3], 2).double().requires_grad_()
    k = make_input([1, 2, 2, 3], 3).double().requires_grad_()
    unlabelled = torch.ones(1, 6, 8, dtype=torch.bool)
    for kw in (dict(), dict(double_softmax=False), dict(double_softmax=False, distance="kl")):
        assert torch.autograd.gradcheck(
            lambda z, q, k, kw=kw: affinity_losses(
                z, [AttentionMaps([q], [k], (3, 4), (1, 2))], unlabelled, 1, **kw
            )[0],
            (z, q, k),
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_without_one_kind(impl):
    "Fully labelled, not labelled, padding only: finite, and zero where nothing counts."
    few = torch.full((2, 20, 28), 255, dtype=torch.uint8)
    few[:, ::8, ::8] = 2
    targets = {
        "few": few.short(),
        "labelled": torch.ones(2, 20, 28),
        "none": torch.full((2, 20, 28), -1),
        "padding": torch.full((2, 20, 28), -2),
    }
    want = {
        "few": (True, True),
        "labelled": (True, False),
        "none": (False, True),
        "padding": (False, False),
    }
    for name, t in targets.items():
        labels, unlabelled = sparse_target(t.short())
        z = make_input([2, 4, 5, 7]).requires_grad_()
        s = make_input([2, 3, 35, 6], 1).requires_grad_()
        terms = [
            partial_cross_entropy(z, labels),
            affinity_losses(z, [from_scores([s], (5, 7), (2, 3))], unlabelled, 1, impl=impl)[0],
        ]
        assert tuple(bool(x > 0) for x in terms) == want[name], name
        gz, gs = torch.autograd.grad(sum(terms), [z, s])
        assert torch.isfinite(gz).all() and torch.isfinite(gs).all()
        assert bool(gs.abs().sum() > 0) == want[name][1] and bool(gz.abs().sum() > 0) == any(
            want[name]
        )


def test_infinity_outside_the_mask_stays_outside():
    "A broken value where no loss is taken does not spoil the batch."
    z = make_input([2, 4, 5, 7]).requires_grad_()
    s = make_input([2, 1, 35, 6], 1)
    broken = s.clone()
    broken[1] = float("nan")
    unlabelled = torch.ones(2, 5, 7, dtype=torch.bool)
    unlabelled[1] = False
    a, b = (
        affinity_losses(z, [from_scores([t], (5, 7), (2, 3))], unlabelled, 1)[0]
        for t in (s, broken)
    )
    assert a == b


def test_autocast_and_narrow_inputs():
    "float32 accumulation: under autocast and with narrow logits only queries and keys are rounded."
    z = make_input([2, 21, 8, 12])
    q = make_input([2, 2, 96, 16], 1)
    k = make_input([2, 2, 6, 16], 2)
    q = q.bfloat16()
    k = k.bfloat16()
    unlabelled = torch.ones(2, 32, 48, dtype=torch.bool)
    (exact,) = affinity_losses(
        z, [AttentionMaps([q.float()], [k.float()], (8, 12), (2, 3))], unlabelled, 1
    )
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = affinity_losses(
            z.requires_grad_(), [AttentionMaps([q], [k], (8, 12), (2, 3))], unlabelled, 1
        )
    assert got.dtype == torch.float32
    assert_close("autocast", exact, got, 1e-6)
    (narrow,) = affinity_losses(
        z.detach().bfloat16(), [AttentionMaps([q], [k], (8, 12), (2, 3))], unlabelled, 1
    )
    assert narrow.dtype == torch.float32 and abs(narrow - exact) < 1e-2 * exact
    assert torch.autograd.grad(got, z)[0].dtype == torch.float32


def test_targets():
    "Two forms, several types; an id that no class has is an error of the cross-entropy."
    ids = torch.tensor([[[0, 20, 255, 255], [3, 255, 255, 7]]])
    inside = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]]])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        labels, unlabelled = sparse_target(torch.stack((ids, inside), 1).to(dtype))
        assert labels.tolist() == [
            [[0, 20, 255, 255], [3, 255, 255, 255]]
        ] and unlabelled.tolist() == [[[False, False, True, False], [False, True, False, False]]]
    official = ids.where(ids != 255, -1).where(inside > 0, -2)
    for dtype in (torch.int8, torch.int16, torch.int64):
        a, b = sparse_target(official.to(dtype))
        assert torch.equal(a.long(), labels) and torch.equal(b, unlabelled)
    with pytest.raises(ValueError, match="integer"):
        sparse_target(ids.float())
    with pytest.raises(ValueError, match=r"\[b, 2, H, W\]"):
        sparse_target(ids[0])
    with pytest.raises(ValueError, match="id 20"):
        partial_cross_entropy(make_input([1, 19, 2, 4]), labels)
    with pytest.raises(ValueError, match="1 stages"):
        affinity_losses(make_input([1, 3, 2, 4]), [None], unlabelled, 2)
    with pytest.raises(ValueError, match="known: l1, kl"):
        consistency(make_input([1, 3, 2, 4]), None, distance="cos")


def test_labels_are_thinned_nearest():
    "Every fourth pixel from the first, as the published code resizes."
    z = make_input([1, 3, 3, 4])
    labels = torch.full((1, 12, 16), 255)
    labels[0, 1::4], labels[0, :, 2::4] = 1, 1
    assert partial_cross_entropy(z, labels) == 0
    labels[0, 4, 8] = 2
    assert_close(
        "one pixel",
        F.cross_entropy(z[:, :, 1, 2], torch.tensor([2])),
        partial_cross_entropy(z, labels),
        1e-6,
    )
