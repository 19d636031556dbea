"SeaFormer: official keys of both sizes, parity, the specification's equations as plain functions, sizes, forms, files."

import functools

import pytest
import torch
from torch import nn

from shared import need
from oracles.seaformer import BN, TABLE, Plain, official_keys, params
from segkern.testing.fill import state_of
from segkern.backbones.seaformer import (
    SEAFORMERS,
    InvertedResidual,
    SeaFormer,
    SqueezeAxialAttention,
    key_rules,
)
from segkern.core import seeded
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.models import SSA, list_models, load, save
from segkern.models.seaformer import SeaFormerSegmentor
from segkern.testing import (
    assert_close,
    check_model,
    filled_state,
    layouts,
    make_input,
    relative_l2,
)
from segkern.weights import load_official, map_key, transfer, unwrap

SIZES = list(SEAFORMERS)
# kernel, expansion, channels, stride; dims, key widths, depths and ratios of the transformer stages; decoder widths


@functools.lru_cache(4)
def official_state(name, k=150):
    return filled_state(official_keys(name, k))


def made(name, k=7, **kw):
    "A network in evaluation mode with official weights whose numbers stay in range."
    m = SeaFormerSegmentor(name, k, name, **kw).eval()
    load_official(m, official_state(name, k))
    return m


@pytest.mark.parametrize("name", SIZES)
def test_official_keys(name):
    """Every key of the official files has a place, every tensor of ours is filled once, under
    every container and prefix."""
    shapes = official_keys(name)
    for container, prefix in (("state_dict", ""), ("state_dict_ema", "module.")):
        with torch.device("meta"):
            m = SeaFormerSegmentor(name, 150, name)
        report = load_official(
            m, {"meta": {}, container: {prefix + n: t for n, t in state_of(shapes).items()}}
        )
        places = [ours for _, ours in report.loaded]
        assert (
            len(set(places)) == len(places)
            and set(places) == set(m.state_dict())
            and {n for n, _ in report.loaded} == set(shapes)
            and not report.ignored
        )
    assert params(shapes) == num_params(m)
    assert (
        f"{num_params(m) / 1e6:.3f}" == dict(seaformer_b="8.606", seaformer_l="13.952")[name]
        and f"{num_params(m.encoder) / 1e6:.3f}"
        == dict(seaformer_b="8.486", seaformer_l="13.726")[name]
    )


@pytest.mark.parametrize("name", SIZES)
def test_imagenet_files(name):
    """Names without prefix and a classifier that is dropped; the averaged weights come first; a
    segmentor's file fills an encoder."""
    own = {
        n.removeprefix("backbone."): t
        for n, t in official_state(name).items()
        if n.startswith("backbone.")
    }
    extra = {"head.linear.weight": torch.zeros(1000, 4), "classifier.bias": torch.zeros(1000)}
    e = SeaFormer(name)
    report = load_official(
        e,
        {
            "state_dict": {n: torch.zeros_like(t) for n, t in own.items()},
            "state_dict_ema": own | extra,
            "epoch": 3,
        },
    )
    assert {n for n, *_ in report.ignored} == set(extra) and torch.equal(
        e.stem.conv.weight, own["smb1.stem_block.0.c.weight"]
    )
    assert torch.equal(
        e.stages[-1][1].attn.column_k,
        own[f"trans{len(e.stages)}.transformer_blocks.1.attn.pos_emb_columnk.pos_embed"],
    )
    report = load_official(e, official_state(name))
    assert all(n.startswith("decode_head.") for n, *_ in report.ignored)
    m = SeaFormerSegmentor(name, 7, name)
    report = transfer(m, {"state_dict_ema": own | extra})
    assert {n.split(".")[0] for n, *_ in report.fresh} == {"head", "classifier"}
    assert unwrap(
        {"model": {"a": torch.zeros(1)}, "state_dict_ema": {"b": torch.zeros(1)}}
    ).keys() == {"b"}


def test_refused_files():
    """Wrong size, wrong number of classes, an encoder's file, another network, an unknown key;
    downloads that do not exist."""
    with torch.device("meta"):
        m = SeaFormerSegmentor("seaformer_b", 150)
    with pytest.raises(
        ValueError,
        match="looks like seaformer_l with a light head and 171 classes; this model is seaformer_b with 150",
    ):
        load_official(m, state_of(official_keys("seaformer_l", 171)))
    with pytest.raises(ValueError, match=r"conv_seg.weight is \(19, 160, 1, 1\)"):
        load_official(m, state_of(official_keys("seaformer_b", 19)))
    with pytest.raises(ValueError, match="seaformer_b, an encoder.s file.*model.encoder"):
        load_official(
            m,
            state_of(
                {n: s for n, s in official_keys("seaformer_b").items() if n.startswith("backbone.")}
            ),
        )
    with pytest.raises(ValueError, match="holds no SeaFormer"):
        load_official(m, {"backbone.stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="trans1.extra.weight"):
        load_official(
            m,
            state_of(official_keys("seaformer_b"))
            | {"backbone.trans1.extra.weight": torch.zeros(1)},
        )
    with pytest.raises(ValueError, match="unknown encoder"):
        SeaFormer("seaformer_x")
    with pytest.raises(ValueError, match="load_official"):
        SeaFormer(pretrained=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_parity(layout):
    f = need("seaformer_b")
    m = SeaFormerSegmentor().eval()
    seen = {}
    load_official(m, f.state())
    x = layouts(next(iter(f.inputs().values())))[layout]
    m.encoder.stages[0][0].attn.register_forward_hook(
        lambda mod, i, o: seen.update(trans1_0_attn=o)
    )
    for change in (lambda: set_literal(m), lambda: set_literal(m, False), m.deploy):
        change()
        with torch.no_grad():
            maps = m.encoder(x)
            feat = m.feature(x)
            for n, t in {
                **seen,
                **{f"feat{i}": t for i, t in enumerate(maps)},
                "feat": feat,
                "logits": m(x),
            }.items():
                assert f.error(n, t) < 3e-6, n


def test_parity_of_the_attention():
    "Output, both squeezed attentions and all gradients of the golden module."
    f = need("sea_attention")
    a = SqueezeAxialAttention(64, 16, 4).eval()
    at = "trans1.transformer_blocks.0.attn."
    names = {
        n: map_key(at + n, key_rules("seaformer_b"))[0].removeprefix("stages.0.0.attn.")
        for n in f.state()
    }
    missing = a.load_state_dict({names[n]: t for n, t in f.state().items()}, strict=False)
    assert not missing.unexpected_keys and all(n.endswith("tracked") for n in missing.missing_keys)
    x = f.inputs()["x"].requires_grad_()
    g = f.inputs()["grad_out"]
    for literal in (True, False):
        out = set_literal(a, literal)(x)
        leaves = dict(a.named_parameters())
        row, column = a.attend(a.project(x))
        for n, t in {"out": out, "row_attn": row, "col_attn": column}.items():
            assert f.error(n, t.detach()) < 1e-5, n
        wanted = [n for n, *_ in f.spec["outputs"] if n.startswith("grad.")]
        grads = torch.autograd.grad(out, [x, *[leaves[names[n[5:]]] for n in wanted]], g)
        assert f.error("grad_x", grads[0]) < 1e-4 and len(wanted) == 8
        for n, t in zip(wanted, grads[1:]):
            step = {"grad.to_q.c.weight": (4, 4), "grad.to_v.c.weight": (8, 4)}.get(n)
            t = t if t.ndim == 1 else t.flatten(1)
            assert f.error(n, t[:: step[0], :: step[1]] if step else t) < 1e-4, n


@pytest.mark.parametrize(
    "name,size",
    [
        ("seaformer_b", (96, 160)),
        ("seaformer_b", (64, 9)),
        ("seaformer_b", (1, 1)),
        ("seaformer_l", (77, 131)),
    ],
    ids=str,
)
def test_as_specified(name, size):
    """The specification as plain functions in double precision: maps and logits of the form as
    written, ours and the deployed one."""
    m = made(name).double()
    x = make_input([2, 3, *size]).double()
    state = {n: t.double() for n, t in official_state(name, 7).items()}
    with torch.no_grad():
        maps = Plain(state, name).encoder(x)
        logits = Plain(state, name).logits(x)
        assert [list(t.shape) for t in maps] == [
            [2, c, *[-(-n // s) for n in size]]
            for c, s in zip(TABLE[name]["outs"], TABLE[name]["strides"])
        ]
        assert m.encoder.channels == list(TABLE[name]["outs"]) and m.encoder.strides == list(
            TABLE[name]["strides"]
        )
        for change in (lambda: set_literal(m), lambda: set_literal(m, False), m.deploy):
            change()
            for a, b in zip(maps, m.encoder(x)):
                assert_close("map", a, b, 1e-11)
            assert_close("logits", logits, m(x), 1e-11)


@pytest.mark.parametrize(
    "name,literal", [("seaformer_b", True), ("seaformer_b", False), ("seaformer_l", False)]
)
def test_training_as_specified(name, literal):
    "Batch statistics, and every gradient by name."
    m = set_literal(made(name, drop_path=0.0, dropout=0.0).double().train(), literal)
    rules = m.key_rules({})
    state = {
        n: t.double().requires_grad_(n.rsplit(".", 1)[-1] not in BN[2:])
        for n, t in official_state(name, 7).items()
    }
    x = make_input([2, 3, 70, 100]).double()
    ref = Plain(state, name, training=True).logits(x)
    got = m(x)
    assert_close("logits", ref, got, 1e-9)
    g = make_input(ref.shape, 5).double()
    leaves = {n: t for n, t in state.items() if t.requires_grad}
    ours = dict(m.named_parameters())
    truth = dict(zip(leaves, torch.autograd.grad(ref, list(leaves.values()), g)))
    grads = dict(zip(ours, torch.autograd.grad(got, list(ours.values()), g)))
    assert len(truth) == len(grads)
    for n, t in truth.items():
        assert (grads[map_key(n, rules)[0]] - t).norm() < 1e-7 * t.norm() + 1e-9 * g.norm(), n


def test_exact_rewrites():
    "Single precision, both modes, with gradients; literal is literal."
    with seeded(0):
        a = SqueezeAxialAttention(24, 4)
    with seeded(1):
        for n in a.modules():
            if isinstance(n, nn.BatchNorm2d):
                _ = (
                    nn.init.uniform_(n.weight, 0.5, 1.5),
                    n.running_var.uniform_(0.5, 2),
                    n.running_mean.normal_(),
                )
    calls = []
    a.q.register_forward_hook(lambda *_: calls.append(1))
    for training in (True, False):
        got = {}
        for literal in (True, False):
            x = make_input([2, 24, 9, 13]).requires_grad_()
            out = set_literal(a.train(training), literal)(x)
            got[literal] = [
                out.detach(),
                *torch.autograd.grad(out, [x, *a.parameters()], make_input(out.shape, 3)),
            ]
        assert_close("output", *[got[s][0] for s in (True, False)], 1e-6)
        biggest = max(t.norm() for t in got[True])
        for r, t in zip(got[True], got[False]):
            assert (r - t).norm() < 1e-5 * r.norm() + 1e-6 * biggest
    assert len(calls) == 4
    with torch.no_grad():
        ref = a(make_input([2, 24, 9, 13]))
        a.merge()
        a.merge()
        assert len(calls) == 5 and a.q is None and a.k is None and a.v is None
        assert_close("merged", ref, a(make_input([2, 24, 9, 13])), 1e-6)
        assert_close("merged, literal", ref, set_literal(a)(make_input([2, 24, 9, 13])), 1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_costs(name):
    with torch.device("meta"):
        m = SeaFormerSegmentor(name, 150, name).eval()
    official = dict(seaformer_b=1.758, seaformer_l=6.340)[name]
    assert (
        abs(macs(set_literal(m).outputs, (512, 512)) / 1e9 / official - 1) < 0.005
        and abs(macs(set_literal(m, False).deploy(), (512, 512)) / 1e9 / official - 1) < 0.005
    )


@pytest.mark.parametrize("size", [(100, 140), (33, 97), (5, 3)], ids=str)
def test_odd_sizes(size):
    "Logits at an eighth, rounded up; one by one as in a batch; the same bits again."
    for name in SIZES:
        m = made(name)
        x = make_input([2, 3, *size])
        with torch.no_grad():
            ref = m(x)
            assert ref.shape == (2, 7, *[-(-s // 8) for s in size]) and torch.equal(m(x), ref)
            assert_close("alone", m(x[1:]), ref[1:], 1e-5)
        assert m.predict(x).shape == (2, *size) and m.predict(x).dtype == torch.uint8


@pytest.mark.parametrize("name", SIZES)
def test_contract(name):
    check_model(SeaFormerSegmentor(name, 11, name), (77, 131))


def test_training_details():
    """Drop rates rise from 0 to 0.1 within each stage; position tables are normal, three norms per
    attention start at zero; one small picture cannot train."""
    for name in SIZES:
        with seeded(0):
            e = SeaFormer(name)
        for stage in e.stages:
            assert [getattr(b.drop, "drop_prob", 0.0) for b in stage] == pytest.approx(
                torch.linspace(0, 0.1, len(stage)).tolist()
            )
        a = e.stages[0][0].attn
        assert (
            all(u.bn.weight.abs().max() == 0 for u in (a.row_out, a.column_out, a.out))
            and 0.9 < a.row_q.std() < 1.1
            and a.q.bn.weight.min() == 1
        )
        with seeded(0):
            assert all(
                torch.equal(p, q) for p, q in zip(e.parameters(), SeaFormer(name).parameters())
            )
        with pytest.raises(ValueError, match="at least 2 pictures"):
            e.train()(make_input([1, 3, 64, 128]))
        assert len(e(make_input([1, 3, 65, 128]))) == len(e.channels)
    assert (
        isinstance(InvertedResidual(3, 3, 3, 1, 1).expand, type(None))
        and InvertedResidual(3, 3, 3, 2, 1).residual
    )


def test_compile_and_export():
    "No graph break up to the loss; export holds plain PyTorch and keeps the logits, at odd sizes too."
    m = made("seaformer_b", 5)
    x = make_input([2, 3, 77, 101])
    # deeper ones take longer and show the same
    m.encoder.stages = nn.ModuleList([stage[:1] for stage in m.encoder.stages])
    y = torch.zeros(2, 77, 101, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="eager", fullgraph=True)(x, y)["loss"],
        1e-5,
    )
    with torch.no_grad():
        for v in (x, m.deploy() and make_input([1, 3, 64, 96], 1)):
            program = torch.export.export(m, (v,))
            assert "segkern" not in str(program.graph)
            assert_close("exported", m(v), program.module()(v), 1e-5)


def test_optimized():
    "The fast form has the same logits, and the merged projection is packed."
    from segkern.infer import PackedConv, optimize

    m = made("seaformer_b", 5)
    x = make_input([1, 3, 90, 130])
    fast = optimize(m)
    with torch.no_grad():
        assert_close("optimized", m(x), fast(x), 2e-5)
    if fast.facts["prepacked"]:
        assert all(isinstance(b.attn.qkv, PackedConv) for s in fast.net.encoder.stages for b in s)
    assert m.encoder.stages[0][0].attn.qkv is None


@pytest.mark.skipif("seaformer_b" not in list_models(), reason="not among the models by name")
@pytest.mark.parametrize("name", SIZES)
def test_files(name, tmp_path):
    "Options, weights and the deploy form survive a round trip."
    from segkern.models import create_model

    m = create_model(name, 5, drop_path=0.05, mean_over="valid", dropout=0.2).eval()
    x = make_input([1, 3, 90, 70])
    back = load(save(m, tmp_path / "a.safetensors"))
    with torch.no_grad():
        ref = m(x)
        assert (
            torch.equal(back(x), ref)
            and back.options == m.options
            and m.options["drop_path"] == 0.05
        )
        assert_close("deployed", ref, load(save(m.deploy(), tmp_path / "b.safetensors"))(x), 1e-5)
    with pytest.raises(RuntimeError, match="deploy form"):
        m(x, torch.zeros(1, 90, 70, dtype=torch.uint8))


@pytest.mark.parametrize("name", SIZES)
def test_the_adaptive_classifier(name):
    "It sees what the last ReLU gives, at an eighth, and takes the classifier's place."
    m = made(name)
    seen = []
    x = make_input([1, 3, 90, 70])
    with torch.no_grad():
        feat = m.feature(x)
        assert feat.shape == (1, TABLE[name]["head"][-1], 12, 9) and feat.min() == 0
        assert_close("classifier", m.classifier(feat), m(x), 1e-6)
        both = SSA(m).eval()
        both.classifier.register_forward_pre_hook(lambda mod, args: seen.append(args[0]))
        out = both(x)
    assert out.shape == (1, 7, 12, 9) and (not seen or torch.equal(seen[0], feat))


def test_low_precision():
    "bfloat16 without surprises."
    m = made("seaformer_b")
    x = make_input([1, 3, 128, 96])
    with torch.no_grad():
        ref = m(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = m(x)
    assert low.dtype == torch.bfloat16 and relative_l2(ref, low.float()) < 0.05
