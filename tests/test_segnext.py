"""MSCAN and SegNeXt: official keys in both spellings, parity, the equations written out, starts of
the factorisation, sizes."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import need
from oracles.segnext import DEPTHS, HEADS, WIDTHS, encoder_keys, head_keys
from segkern.testing.official import assert_complete
from segkern.testing.fill import state_of
from segkern.backbones.mscan import MSCANS, MSCAN
from segkern.core import seeded
from segkern.infer import optimize
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.models import list_models, load, save
from segkern.models.segnext import SEGNEXTS, SegNeXt, unit_bases
from segkern.models.ssa import SSA
from segkern.testing import (
    assert_close,
    check_model,
    filled,
    filled_state,
    layouts,
    make_input,
    relative_l2,
)
from segkern.weights import load_official, transfer


def model(v="t", k=7, **kw):
    return SegNeXt(f"segnext_{v}", k, f"mscan_{v}", **kw)


def filled_model(k=7, **kw):
    "Weights of a sensible size, every one different from its initial value."
    m = filled(model("t", k, **kw))
    with torch.no_grad():
        for t in (t for n, t in m.state_dict().items() if ".scale" in n):
            t += 0.3
    return m


@pytest.mark.parametrize("doubled", [True, False], ids=["authors", "openmmlab"])
@pytest.mark.parametrize("v", WIDTHS)
def test_official_encoders(v, doubled):
    "Both spellings, with and without prefix and ImageNet classifier; the note tells them apart."
    keys = encoder_keys(v, doubled)
    assert len(set(keys)) == len(keys)
    for prefix, extra in (
        ("", {"head.weight": (1000, WIDTHS[v][3]), "head.bias": (1000,)}),
        ("backbone.", {"decode_head.conv_seg.bias": (150,)}),
        ("", {}),
    ):
        with torch.device("meta"):
            e = MSCAN(f"mscan_{v}")
        named = keys.under(prefix) | extra
        report = load_official(
            e, {"state_dict": {f"module.{k}": t for k, t in state_of(named).items()}}
        )
        assert_complete(e, report, named)
        assert {k for k, *_ in report.ignored} == set(extra)
        assert len(report.notes) == (not doubled) and (
            doubled or f": {sum(DEPTHS[v])} depthwise" in report.notes[0]
        )


@pytest.mark.parametrize("doubled", [True, False], ids=["authors", "openmmlab"])
@pytest.mark.parametrize("v", WIDTHS)
def test_official_segmentors(v, doubled):
    "Every key has a place; a table of patterns that some files hold has none."
    with torch.device("meta"):
        m = model(v, 150)
    shapes = encoder_keys(v, doubled).under("backbone.") | head_keys(v, 150).under("decode_head.")
    report = load_official(m, {"meta": {}, "state_dict": state_of(shapes), "optimizer": {}})
    assert_complete(m, report, shapes)
    assert not report.ignored and num_params(m) == sum(
        int(np.prod(s))
        for k, s in shapes.items()
        if not k.endswith(("running_mean", "running_var", "tracked"))
    )
    with torch.device("meta"):
        m = model(v, 150)
    report = load_official(
        m, state_of(shapes | {"decode_head.hamburger.ham.bases": (1, *HEADS[v])})
    )
    assert [k for k, *_ in report.ignored] == ["decode_head.hamburger.ham.bases"]


def test_every_tensor_in_its_place():
    "Renamed, the fixture's file gives the same network: a mistake between equal shapes would show."
    f = need("segnext_t")
    x = f.inputs()["x"]
    start = unit_bases(f.inputs()["bases_raw"].abs())
    state = {re.sub(r"mlp\.dwconv\.dwconv\.", "mlp.dwconv.", k): t for k, t in f.state().items()}
    m = model("t", 150).eval()
    assert "13 depthwise" in load_official(m, state).notes[0]
    with torch.no_grad():
        assert f.error("logits", m.classify(m.decode(m.encoder(x), start))) < 5e-6
    with torch.device("meta"):
        e = MSCAN()
    e = e.to_empty(device="cpu").eval()
    load_official(e, state)
    with torch.no_grad():
        assert f.error("stage4", e(x)[3]) < 5e-6


def test_refused_files():
    "A file of another size or network is named, unknown keys are refused."
    with torch.device("meta"):
        m = model("t", 150)
        e = MSCAN("mscan_s")
    big = state_of(encoder_keys("l").under("backbone.") | head_keys("l", 59).under("decode_head."))
    with pytest.raises(
        ValueError,
        match="looks like mscan_l with a Hamburger decoder of width 1024 and 59 classes; this "
        "model is segnext_t with 150",
    ):
        load_official(m, big)
    with pytest.raises(ValueError, match="looks like mscan_b, an encoder.s file.*model.encoder"):
        load_official(m, state_of(encoder_keys("b")))
    with pytest.raises(ValueError, match="looks like mscan_t; this encoder is mscan_s"):
        load_official(e, state_of(encoder_keys("t")))
    with pytest.raises(ValueError, match="no MSCAN"):
        load_official(m, state_of({"backbone.layer1.0.conv1.weight": (3, 3, 3, 3)}))
    with pytest.raises(ValueError, match="keys without a place.*conv9"):
        load_official(e, state_of(encoder_keys("s") | {"block1.0.conv9.weight": (3,)}))
    with pytest.raises(ValueError, match="unknown encoder"):
        MSCAN("mscan_x")
    with pytest.raises(ValueError, match="load_official"):
        MSCAN(pretrained=True)
    with pytest.raises(ValueError, match="multiple of 32"):
        model(width=40)


def test_imagenet_start():
    "An encoder's file starts the whole network through transfer."
    m = model()
    state = filled_state(encoder_keys("t", False))
    report = transfer(m, state)
    assert torch.equal(
        m.encoder.stages[3].blocks[1].near.weight, state["block4.1.mlp.dwconv.weight"]
    ) and all(not n.startswith("encoder.") for n, *_ in report.fresh)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_parity(layout):
    f = need("segnext_t")
    g = need("mscan_t")
    m = model("t", 150).eval()
    e = MSCAN().eval()
    load_official(m, f.state())
    load_official(e, g.state())
    x = layouts(f.inputs()["x"])[layout]
    start = unit_bases(f.inputs()["bases_raw"].abs())
    with torch.no_grad():
        for i, t in enumerate(e(layouts(g.inputs()["x"])[layout]), 1):
            assert g.error(f"stage{i}", t) < 5e-6
        assert f.error("logits", m.classify(m.decode(m.encoder(x), start))) < 5e-6
        assert (
            f.error("logits_seed0", m(x)) < 5e-6
            and f.error("hamburger", hamburger(m.head, m.encoder(x), start)) < 5e-6
        )


def hamburger(head, maps, start):  # the sum in front of the last convolution
    s = head.squeezed(maps[1:])
    m, z = head.factors(s, start)
    return F.relu(s + head.outlet((m @ z.transpose(1, 2)).unflatten(2, s.shape[2:])))


def bn(x, m, training):
    mean, var = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
        if training
        else (m.running_mean, m.running_var)
    )
    return (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None] * m.weight[
        :, None, None
    ] + m.bias[:, None, None]


def written_out(m, x, start, training):
    "The whole network from the equations, with explicit padding and sums; no dropped branches."

    def wide(x, c, py, px):
        return F.conv2d(F.pad(x, (px, px, py, py)), c.weight, c.bias, groups=c.groups)

    def point(x, c):
        return torch.einsum("oi,bihw->bohw", c.weight[:, :, 0, 0], x) + (
            0 if c.bias is None else c.bias[:, None, None]
        )

    def gelu(x):
        return x * (1 + torch.erf(x * 0.5**0.5)) / 2

    maps = []
    for i, stage in enumerate(m.encoder.stages):
        for layer in stage.down:
            if isinstance(layer, torch.nn.Conv2d):
                x = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias, stride=2)
            else:
                x = bn(x, layer, training) if isinstance(layer, torch.nn.BatchNorm2d) else gelu(x)
        for b in stage.blocks:
            n = bn(x, b.norm1, training)
            a = gelu(point(n, b.proj_in))
            t = wide(a, b.gate.square, 2, 2)
            t = t + sum(
                wide(wide(t, r, 0, k // 2), c, k // 2, 0)
                for k, r, c in zip((7, 11, 21), b.gate.rows, b.gate.columns)
            )
            x = x + b.scale1[:, None, None] * (point(point(t, b.gate.mix) * a, b.proj_out) + n)
            h = gelu(wide(point(bn(x, b.norm2, training), b.fc1), b.near, 1, 1))
            x = x + b.scale2[:, None, None] * point(h, b.fc2)
        mean = x.mean(1, keepdim=True)
        var = x.var(1, keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt() * stage.norm.weight[:, None, None] + stage.norm.bias[
            :, None, None
        ]
        maps.append(x)

    def up(t):
        return F.interpolate(t, maps[1].shape[2:], mode="bilinear", align_corners=False)

    def gn(x, norm):
        y = x.unflatten(1, (32, -1)).flatten(2)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y.view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]

    head = m.head
    steps = 6 if training else 7
    s = gn(
        point(torch.cat([maps[1], up(maps[2]), up(maps[3])], 1), head.squeeze.conv),
        head.squeeze.norm,
    ).relu()
    X = point(s, head.inlet).relu().flatten(2)
    M = start
    Z = torch.einsum("bdn,bdr->bnr", X, start).softmax(2)
    for step in range(steps + 1):
        Z = (
            Z
            * torch.einsum("bdn,bdr->bnr", X, M)
            / (torch.einsum("bnr,brs->bns", Z, torch.einsum("bdr,bds->brs", M, M)) + 1e-6)
        )
        if step < steps:
            M = (
                M
                * torch.einsum("bdn,bnr->bdr", X, Z)
                / (torch.einsum("bdr,brs->bds", M, torch.einsum("bnr,bns->brs", Z, Z)) + 1e-6)
            )
    h = (
        s
        + gn(
            point(torch.einsum("bdr,bnr->bdn", M, Z).view_as(s), head.outlet.conv), head.outlet.norm
        )
    ).relu()
    return point(gn(point(h, head.align.conv), head.align.norm).relu(), m.classifier)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("literal", [False, True], ids=["rewritten", "literal"])
def test_as_written(training, literal):
    "Logits and the gradient of every parameter by name, in double precision, at an odd size."
    m = set_literal(
        filled_model(drop_path=0.0, dropout=0.0, width=32, rank=5).double(), literal
    ).train(training)
    x = make_input([2, 3, 61, 45]).double()
    start = unit_bases(make_input([2, 32, 5], 1).abs().double())
    got = m.classify(m.decode(m.encoder(x), start))
    ref = written_out(m, x, start, training)
    assert relative_l2(ref, got) < 1e-10
    g = make_input(ref.shape, 2).double()
    names = [n for n, _ in m.named_parameters()]
    left, right = (torch.autograd.grad(out, list(m.parameters()), g) for out in (ref, got))
    total = max(a.norm() for a in left)
    for n, a, b in zip(names, left, right):
        assert (a - b).norm() < 1e-8 * a.norm() + 1e-10 * total, n


@pytest.mark.parametrize("size", [(100, 140), (33, 97), (5, 3), (1, 1)], ids=str)
def test_odd_sizes(size):
    "Logits at an eighth, rounded up; one by one as in a batch."
    m = filled_model(width=64)
    x = make_input([2, 3, *size])
    with torch.no_grad():
        ref = m(x)
        assert ref.shape[2:] == tuple(-(-s // 8) for s in size) and torch.isfinite(ref).all()
        if size > (1, 1):
            assert_close("alone", m(x[1:]), ref[1:], 1e-5)
        assert torch.equal(m(x), ref)


def test_starts():
    """Evaluation is reproducible, training is not unless seeded; seeds and generators act; nothing
    enters the state dict."""
    m = filled_model(width=32)
    x = make_input([2, 3, 64, 48])
    assert not any("bases" in n or "table" in n for n in m.state_dict()) and not any(
        "head.bases" in n for n, _ in m.named_buffers()
    )
    with torch.no_grad():
        ref = m(x)
        other = filled_model(width=32, bases_seed=1)
        assert torch.equal(copy.deepcopy(m)(x), ref) and relative_l2(ref, other(x)) > 1e-3
        maps = m.encoder(x)
        again = [m.decode(maps, generator=torch.Generator().manual_seed(5)) for _ in "ab"]
        assert torch.equal(*again) and not torch.equal(again[0], m.decode(maps))
        m.head.train()
        with seeded(0):
            a = m.decode(maps)
            b = m.decode(maps)
        with seeded(0):
            c = m.decode(maps)
        assert torch.equal(a, c) and not torch.equal(a, b)
        free = filled_model(width=32, bases_seed=None)
        with seeded(0):
            first = free(x)
            second = free(x)
        assert not torch.equal(first, second) and free.options["bases_seed"] is None
        with seeded(0):
            assert torch.equal(first, free(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    "The factorisation stays in float32: all parts of it are, and the features follow."
    m = filled_model(width=32)
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        ref = m(x)
        maps = m.encoder(x)
        with torch.autocast("cpu", dtype):
            s = m.head.squeezed(maps[1:])
            assert all(t.dtype == torch.float32 for t in m.head.factors(s))
            assert relative_l2(ref, m(x).float()) < 0.1
        for literal in (False, True):
            half = set_literal(copy.deepcopy(m), literal).to(dtype)
            assert relative_l2(ref, half(x.to(dtype)).float()) < 0.15


def test_contract():
    check_model(model(k=11, width=32), (37, 53))
    with pytest.raises(ValueError, match="more than 1 value"):
        model(width=32).train()(torch.zeros(1, 3, 4, 4))


def test_compile_and_export(monkeypatch):
    "No graph break up to the loss; export keeps the logits."
    monkeypatch.setitem(MSCANS, "mscan_t", (WIDTHS["t"], (1, 1, 1, 1), 0.1))
    m = filled_model(5, width=32)
    x = make_input([2, 3, 37, 52])
    y = torch.zeros(2, 37, 52, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="eager", fullgraph=True)(x, y)["loss"],
        1e-5,
    )
    assert_close("exported", m(x), torch.export.export(m, (x,)).module()(x), 1e-5)
    m.train()
    for mod in m.modules():
        if isinstance(mod, torch.nn.Dropout2d) or type(mod).__name__ == "DropPath":
            mod.eval()
    assert torch.isfinite(torch.compile(m, backend="eager", fullgraph=True)(x, y)["loss"])


def test_optimized():
    "All norms of the encoder are folded, prepacked or not, and folding twice changes nothing."
    m = filled_model(5, width=32)
    x = make_input([1, 3, 40, 56])
    with torch.no_grad():
        for kw in ({}, dict(channels_last=False, prepack=False), dict(dtype=torch.float64)):
            fast = optimize(m.double() if kw.get("dtype") else m, **kw)
            assert fast.facts["bn_folded"] == 2 * 13 + 5 and not any(
                isinstance(mod, torch.nn.BatchNorm2d) for mod in fast.net.modules()
            )
            kind = next(m.parameters()).dtype
            assert_close(
                str(kw), m(x.to(kind)), fast(x.to(kind)), 2e-5 if kind == torch.float32 else 1e-12
            )
            assert sum(b.fold() for b in fast.net.modules() if hasattr(b, "fold")) == 0


@pytest.mark.skipif(
    "segnext_t" not in list_models(), reason="SegNeXt has no published name in this build"
)
def test_files(tmp_path):
    "Options and weights survive a round trip; the patterns are drawn again, not stored."
    from segkern.models import create_model

    m = create_model("segnext_t", 5, width=32, rank=4, bases_seed=3, drop_path=0.2).eval()
    x = make_input([1, 3, 40, 56])
    back = load(save(m, tmp_path / "a.safetensors"))
    with torch.no_grad():
        assert torch.equal(back(x), m(x)) and back.options == m.options


def test_costs():
    "Paper form within 1 % of the published counts; the rewrites are cheaper."
    for v, params, gmacs in (("t", 4.263, 6.40), ("l", 48.927, 69.7)):
        with torch.device("meta"):
            m = model(v, 150).eval()
        assert (
            f"{num_params(m) / 1e6:.3f}" == f"{params:.3f}"
            and abs(macs(set_literal(m).outputs, (512, 512)) / 1e9 / gmacs - 1) < 0.01
        )
        assert macs(set_literal(m, False), (512, 512)) < 0.91e9 * gmacs


def test_tables():
    "Sizes, drop rates and heads of the specification."
    assert {n: (w, d) for n, (w, d, _) in MSCANS.items()} == {
        f"mscan_{v}": (WIDTHS[v], DEPTHS[v]) for v in WIDTHS
    }
    assert {n: v[1:] for n, v in SEGNEXTS.items()} == {f"segnext_{v}": HEADS[v] for v in HEADS}
    for v, rate in (("t", 0.1), ("s", 0.1), ("b", 0.1), ("l", 0.3)):
        with torch.device("meta"):
            e = MSCAN(f"mscan_{v}")
        blocks = [b for s in e.stages for b in s.blocks]
        assert [getattr(b.drop, "drop_prob", 0.0) for b in blocks] == pytest.approx(
            torch.linspace(0, rate, len(blocks)).tolist()
        )
    e = MSCAN()
    assert all(
        (b.scale1 == 0.01).all() and (b.scale2 == 0.01).all() for s in e.stages for b in s.blocks
    )


def test_with_ssa():
    "The adaptive classifier reads the map in front of dropout and classifier."
    m = SSA(model(k=5, width=32), "segnext_t_ssa")
    assert m.stride == 8
    check_model(m, (40, 56))
