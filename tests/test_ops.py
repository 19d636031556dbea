"Ops against double precision: shapes, layouts, types, gradients."

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segkern.ops.strip_attention as _  # noqa: F401  (the module is shadowed by its function)
from segkern import ops
from segkern.losses import cross_entropy, focal_loss, ohem_cross_entropy
from segkern.ops import bands
from segkern.testing import assert_close, layouts, make_input

SIZES = [
    ((5, 7), (20, 28)),
    ((5, 7), (37, 41)),
    ((8, 8), (3, 5)),
    ((1, 1), (4, 6)),
    ((3, 4), (1, 1)),
    ((6, 5), (6, 5)),
    ((2, 9), (31, 9)),
]


def labels(shape, k, void=0.1, seed=0):
    rng = np.random.RandomState(seed)
    y = rng.randint(0, k, shape)
    y[rng.rand(*shape) < void] = 255
    return torch.from_numpy(y)


@pytest.fixture(params=[1 << 21, 700], ids=["one band", "many bands"])
def band(request, monkeypatch):
    monkeypatch.setattr(bands, "BAND", request.param)


@pytest.mark.parametrize("align_corners", [False, True], ids=["half-pixel", "corners"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "weighted", "sum", "ohem", "none"])
def test_upsample_cross_entropy(kind, size, align_corners, band):
    "Values and gradients of every reduction."
    (h, w), full = size
    k = 7
    z = 3 * make_input([2, 7, h, w], 1)
    y = labels((2, *full), 7)
    y[0, 0, 0] = 3
    weight = torch.linspace(0.5, 2, k) if kind in ("weighted", "ohem") else None
    a = z.double().requires_grad_()
    b = z.clone().requires_grad_()
    up = F.interpolate(a, full, mode="bilinear", align_corners=align_corners)
    wide = None if weight is None else weight.double()
    if kind == "ohem":
        nll = F.cross_entropy(up, y, ignore_index=255, reduction="none")
        valid = y != 255
        p = torch.exp(-nll)[valid]
        t = max(p.sort().values[min(9, len(p) - 1)].item(), 0.3)
        keep = valid & (torch.exp(-nll) < t)
        per = F.cross_entropy(up, y, weight=wide, ignore_index=255, reduction="none")
        ref = per[keep].mean() if keep.any() else 0 * up.sum()
        got = ops.upsample_cross_entropy(
            b, y, weight=weight, align_corners=align_corners, ohem=(0.3, 9)
        )
    else:
        reduction = kind if kind in ("sum", "none") else "mean"
        ref = F.cross_entropy(up, y, weight=wide, ignore_index=255, reduction=reduction)
        got = ops.upsample_cross_entropy(
            b, y, weight=weight, align_corners=align_corners, reduction=reduction
        )
    g = make_input(ref.shape, 5).double() if kind == "none" else torch.tensor(1.7).double()
    (ref * g).sum().backward()
    (got * g.float()).sum().backward()
    assert_close("loss", ref + 1e-9, got + 1e-9, 5e-6)
    assert_close("dlogits", a.grad + 1e-9, b.grad + 1e-9, 2e-5)


@pytest.mark.parametrize(
    "dtype,ratio", [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)], ids=["fp16", "bf16"]
)
def test_upsample_cross_entropy_low_precision(dtype, ratio):
    z = make_input([2, 19, 6, 9], 2).to(dtype)
    y = labels((2, 24, 36), 19)
    a = z.double().requires_grad_()
    b = z.clone().requires_grad_()
    F.cross_entropy(F.interpolate(a, (24, 36), mode="bilinear"), y, ignore_index=255).backward()
    loss = ops.upsample_cross_entropy(b, y.to(torch.uint8))
    loss.backward()
    assert loss.dtype == torch.float32 and b.grad.dtype == dtype
    assert_close("dlogits", a.grad, b.grad, ratio)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_types_and_ids(dtype):
    z = make_input([1, 5, 3, 4])
    y = labels((1, 9, 8), 5)
    assert_close(
        "loss",
        F.cross_entropy(F.interpolate(z, (9, 8), mode="bilinear"), y, ignore_index=255),
        cross_entropy(z, y.to(dtype)),
        1e-6,
    )
    for bad in (5, 200, 254):
        wrong = y.clone()
        wrong[0, 3, 3] = bad
        for fn in (cross_entropy, ohem_cross_entropy, focal_loss, ops.upsample_confusion):
            with pytest.raises(ValueError, match=f"id {bad}"):
                fn(z, wrong)
    with pytest.raises(ValueError, match="integer"):
        cross_entropy(z, y.float())
    negative = y.clone().where(y != 255, -1)
    assert_close(
        "ignore -1",
        cross_entropy(z, y),
        ops.upsample_cross_entropy(z, negative, ignore_index=-1),
        1e-6,
    )


def test_void_only():
    "Nothing labelled: finite, zero gradient, for every loss."
    y = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    for fn in (cross_entropy, ohem_cross_entropy, focal_loss):
        z = make_input([2, 5, 2, 2]).requires_grad_()
        loss = fn(z, y)
        loss.backward()
        assert loss.item() == 0 and z.grad.abs().max() == 0, fn.__name__
    assert ops.upsample_cross_entropy(make_input([2, 5, 2, 2]), y).isnan()
    assert ops.upsample_confusion(make_input([2, 5, 2, 2]), y).sum() == 0


def test_nan_stays_nan():
    z = make_input([1, 5, 2, 2])
    z[0, 2, 1, 1] = float("nan")
    y = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert cross_entropy(z, y).isnan() and ohem_cross_entropy(z, y).isnan()
    z[0, 2, 1, 1] = float("inf")
    assert cross_entropy(z, y).isnan() and ohem_cross_entropy(z, y).isnan()
    assert cross_entropy(make_input([1, 5, 2, 2]), y, torch.full((5,), float("nan"))).isnan()


def test_gradient_keeps_its_precision():
    "Neither autocast nor a large loss scale rounds the gradient."
    z = make_input([2, 19, 16, 16])
    y = labels((2, 64, 64), 19)
    a = z.double().requires_grad_()
    b = z.clone().requires_grad_()
    c = z.half().requires_grad_()
    F.cross_entropy(F.interpolate(a, (64, 64), mode="bilinear"), y, ignore_index=255).backward()
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(b, y).backward()
    assert_close("autocast", a.grad, b.grad, 5e-6)
    (cross_entropy(c, y) * 65536).backward()
    assert_close("scaled", 65536 * a.grad, c.grad, 2e-3)


def test_loss_compiles_and_traces():
    z = make_input([1, 5, 4, 4]).requires_grad_()
    y = labels((1, 13, 11), 5)
    fn = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    ref = torch.autograd.grad(cross_entropy(z, y), z)[0]
    assert_close("compiled", ref, torch.autograd.grad(fn(z, y), z)[0], 1e-6)


@pytest.mark.parametrize("align_corners", [False, True], ids=["half-pixel", "corners"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_upsample_argmax(size, align_corners, band):
    (h, w), full = size
    for name, z in layouts(make_input([2, 19, h, w], 3)).items():
        up = F.interpolate(z.double(), full, mode="bilinear", align_corners=align_corners)
        top = up.topk(2, 1).values
        sure = (top[:, 0] - top[:, 1]) > 1e-5 * up.abs().amax()
        got = ops.upsample_argmax(z, full, align_corners)
        assert got.dtype == torch.uint8 and torch.equal(got.long()[sure], up.argmax(1)[sure]), name
    y = labels((2, *full), 19)
    m = ops.upsample_confusion(make_input([2, 19, h, w], 3), y, align_corners=align_corners)
    pred = ops.upsample_argmax(make_input([2, 19, h, w], 3), full, align_corners)
    ref = torch.zeros(19, 19, dtype=torch.int64)
    for t, p in zip(y[y != 255].tolist(), pred[y != 255].tolist()):
        ref[t, p] += 1
    assert torch.equal(m, ref)


@pytest.mark.parametrize("shape", [(2, 8, 7, 11), (1, 16, 1, 5), (3, 4, 13, 1)], ids=str)
@pytest.mark.parametrize("chunk", [1 << 22, 60], ids=["whole", "chunks"])
def test_strip_attention(shape, chunk, monkeypatch):
    "Against double precision with gradients by name; a permutation of the strips changes nothing."
    import sys

    monkeypatch.setattr(sys.modules["segkern.ops.strip_attention"], "MAX_SCORES", chunk)
    b, c, h, w = shape
    args = dict(q=make_input(shape, 1), k=make_input([b, c, w], 2), v=make_input([b, 2, w], 3))
    wide = {n: t.double().requires_grad_() for n, t in args.items()}
    a = torch.einsum("bcm,bchw->bmhw", wide["k"], wide["q"]).softmax(1)
    ref = torch.einsum("bvm,bmhw->bvhw", wide["v"], a)
    g = make_input(ref.shape, 4)
    ref.backward(g.double())
    for layout, q in layouts(args["q"]).items():
        got = {n: t.clone().requires_grad_() for n, t in args.items()} | {
            "q": q.detach().requires_grad_()
        }
        out = ops.strip_attention(**got)
        assert_close(layout, ref, out, 5e-6)
        out.backward(g)
        for n in args:
            assert_close(f"d{n}", wide[n].grad, got[n].grad, 2e-5)
    p = torch.randperm(w)
    assert_close(
        "permuted", out, ops.strip_attention(args["q"], args["k"][..., p], args["v"][..., p]), 1e-5
    )


@pytest.mark.parametrize("mode", ["mean", "max", "mean_max"])
@pytest.mark.parametrize("dim", ["h", "w", "hw"])
def test_strip_pool(mode, dim):
    for name, x in layouts(make_input([2, 3, 11, 7])).items():
        got = ops.strip_pool(x, mode, dim)
        got = got if isinstance(got, tuple) else (got,)
        ref = [
            f(x.double(), {"h": 2, "w": 3}[d])
            for d in dim
            for f in (
                (torch.mean,)
                if mode == "mean"
                else (torch.amax,)
                if mode == "max"
                else (torch.mean, torch.amax)
            )
        ]
        assert len(got) == len(ref)
        for r, t in zip(ref, got):
            assert_close(name, r, t, 2e-6)
    with pytest.raises(ValueError, match=r"\(2, 3, 0, 7\)"):
        ops.strip_pool(torch.zeros(2, 3, 0, 7))


def test_choice():
    assert ops.which("strip_attention", torch.zeros(1))[0] == "ref"
    with pytest.raises(ValueError, match="unknown implementation"), ops.use_impl("cuda"):
        pass
    with ops.use_impl("ref"):
        assert ops.which("upsample_argmax") == ("ref", "asked for")


def test_memory_of_the_loss():
    "Forward and backward of a large head hold no full-size logits."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            out = fn(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.n = max(self.n, t.numel())
            return out

    z = make_input([1, 19, 128, 256]).requires_grad_()
    y = torch.zeros(1, 512, 1024, dtype=torch.uint8)
    with Largest() as seen:
        cross_entropy(z, y).backward()
    assert seen.n < 19 * 512 * 1024 / 3, f"{seen.n:,} elements"
