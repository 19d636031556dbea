"""ViT-Adapter and UPerNet on it: official keys, parity of deformable attention, the
specification's equations as plain functions, sizes, forms, files."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from shared import need
from oracles.vit_adapter import (
    BN,
    LARGE,
    SMALL,
    Plain,
    encoder_keys,
    official_keys,
    params,
    plain_keys,
)
from segkern.testing.fill import state_of
from segkern.backbones.vit_adapter import VITS, ViTAdapter
from segkern.backbones.vit_blocks import DeformableAttention, centres, read_between
from segkern.core import IMAGENET, Preprocess, seeded
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.models import SSA, list_models, load, save
from segkern.models.upernet import UPerNet
from segkern.testing import (
    assert_close,
    check_model,
    filled_state,
    make_input,
    relative_l2,
)
from segkern.weights import load_official, map_key, transfer

OFFICIAL = dict(
    sampling_offsets="offsets", attention_weights="weights", value_proj="value", output_proj="out"
)


def small(k=7, head=16, **kw):
    "The network in evaluation mode, made small, with official weights that stay in range."
    m = UPerNet("vit_adapter_l", k, "vit_adapter_l", width=head, encoder_options=SMALL, **kw).eval()
    load_official(m, filled_state(official_keys(k, head, **SMALL)))
    return m


def test_official_keys():
    """Every key of the authors' file has a place, every tensor of ours is filled once, under every
    container and prefix; sizes by part."""
    shapes = official_keys(**LARGE)
    for container, prefix in (("state_dict", ""), ("model", "module.")):
        with torch.device("meta"):
            m = UPerNet("vit_adapter_l", 150, "vit_adapter_l")
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
    sizes = [
        num_params(m),
        num_params(m.encoder),
        num_params(m.head) + num_params(m.classifier),
        num_params(m.auxiliary),
    ]
    assert [f"{n / 1e6:.2f}" for n in sizes] == ["363.80", "326.97", "34.43", "2.40"]
    rules = m.key_rules({})
    for theirs, ours in (
        ("backbone.norm3.bias", "encoder.norms.2.bias"),
        ("backbone.blocks.17.mlp.fc2.weight", "encoder.blocks.17.fc2.weight"),
        ("backbone.blocks.3.norm2.bias", "encoder.blocks.3.norm2.bias"),
        (
            "backbone.interactions.3.extra_extractors.1.ffn.dwconv.dwconv.bias",
            "encoder.interactions.3.extractors.2.mlp.near.bias",
        ),
        ("backbone.spm.stem.7.running_var", "encoder.prior.stem.2.bn.running_var"),
        ("backbone.interactions.2.injector.gamma", "encoder.interactions.2.injector.gamma"),
        ("decode_head.fpn_bottleneck.bn.weight", "head.fuse.bn.weight"),
    ):
        assert map_key(theirs, rules)[0] == ours


def test_costs():
    "Within 1 % of the official operations; sampling counts nothing in either form."
    with torch.device("meta"):
        m = UPerNet("vit_adapter_l", 150, "vit_adapter_l").eval()
    total = macs(set_literal(m), (512, 512)) / 1e9
    encoder = macs(m.encoder, (512, 512)) / 1e9
    assert (
        abs(total / 667.2 - 1) < 2e-3
        and abs(encoder / 445.7 - 1) < 2e-3
        and abs((total - encoder) / 221.5 - 1) < 2e-3
    )
    assert macs(set_literal(m.encoder, False), (512, 512)) / 1e9 == encoder


def test_encoder_files():
    "A segmentor's file fills an encoder; timm's fills its transformer through transfer, and says what is new."
    with torch.device("meta"):
        e = ViTAdapter()
    report = load_official(e, state_of(official_keys(**LARGE)))
    assert all(
        n.startswith(("decode_head.", "auxiliary_head.")) for n, *_ in report.ignored
    ) and len(report.loaded) == len(encoder_keys(**LARGE))
    keys = plain_keys(**LARGE)
    extra = {
        "cls_token": (1, 1, 1024),
        "norm.weight": (1024,),
        "norm.bias": (1024,),
        "head.weight": (1000, 1024),
        "head.bias": (1000,),
    }
    assert len(keys) == 291
    m = UPerNet("vit_adapter_l", 7, "vit_adapter_l", width=4, encoder_options=SMALL).deploy()
    own = {
        n: tuple(SMALL["width"] if i == 1024 else i for i in s)
        for n, s in (plain_keys(**SMALL) | extra).items()
    }
    state = {n: make_input(s, i) for i, (n, s) in enumerate(own.items())}
    up = m.encoder.up.weight.detach().clone()
    for net, given, prefix in ((e, state_of(keys | extra), ""), (m, state, "encoder.")):
        report = transfer(net, given)
        assert {n for n, *_ in report.ignored} == set(extra) and {
            n for n, _ in report.loaded
        } == set(given) - set(extra)
        fresh = {n.removeprefix(prefix) for n, *_ in report.fresh if n.startswith(prefix)}
        assert {n.split(".")[0] for n in fresh} == {
            "level_embed",
            "prior",
            "interactions",
            "up",
            "norms",
            "blocks",
        } and all("gamma" in n for n in fresh if n.startswith("blocks."))
    assert (
        torch.equal(m.encoder.blocks[5].qkv.weight, state["blocks.5.attn.qkv.weight"])
        and torch.equal(m.encoder.pos_embed, state["pos_embed"])
        and torch.equal(m.encoder.up.weight, up)
    )
    with pytest.raises(
        ValueError,
        match="a plain Vision Transformer of width 1024 and 24 blocks, whose weights "
        "segkern.transfer takes; this encoder is vit_adapter_l",
    ):
        load_official(e, state_of(keys | extra))


def test_refused_files():
    "Files of other networks are named, in both directions."
    with torch.device("meta"):
        m = UPerNet("vit_adapter_l", 150, "vit_adapter_l")
        swin = UPerNet()
    full = state_of(official_keys(**LARGE))
    with pytest.raises(
        ValueError,
        match="looks like vit_adapter_l with a UPerNet decoder and 150 classes; this model is upernet_swin_t with 150",
    ):
        load_official(swin, full)
    with pytest.raises(
        ValueError,
        match="looks like vit_adapter_l with a UPerNet decoder and 171 classes; this model is vit_adapter_l with 150",
    ):
        load_official(m, state_of(official_keys(171, **LARGE)))
    with pytest.raises(
        ValueError, match="looks like a ViT-Adapter of width 32 and 8 blocks with a UPerNet decoder"
    ):
        load_official(m, state_of(official_keys(**SMALL)))
    with pytest.raises(ValueError, match="vit_adapter_l, an encoder.s file.*model.encoder"):
        load_official(m, {n: t for n, t in full.items() if n.startswith("backbone.")})
    with pytest.raises(ValueError, match="a plain Vision Transformer of width 1024 and 24 blocks"):
        load_official(m, state_of(plain_keys(**LARGE)))
    with pytest.raises(ValueError, match="no Swin Transformer and no ViT-Adapter"):
        load_official(m, {"stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="looks like swin_t"):
        load_official(
            m,
            {
                "backbone.patch_embed.norm.weight": torch.zeros(96),
                **{
                    f"backbone.stages.{s}.blocks.{j}.norm1.weight": torch.zeros(1)
                    for s, d in enumerate((2, 2, 6, 2))
                    for j in range(d)
                },
            },
        )
    with pytest.raises(ValueError, match="interactions.2.extra.weight"):
        load_official(m, full | {"backbone.interactions.2.extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra_extractors"):
        load_official(
            m, full | {"backbone.interactions.3.extra_extractors.2.ffn.fc1.weight": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match="unknown encoder 'vit_x'"):
        ViTAdapter("vit_x")
    with pytest.raises(ValueError, match="unknown encoder 'vit_x'; known: swin_t.*vit_adapter_l"):
        UPerNet(encoder="vit_x")
    with pytest.raises(ValueError, match="4 equal groups.*6 blocks"):
        ViTAdapter(width=32, depth=6, heads=4)
    with pytest.raises(ValueError, match="3 heads"):
        DeformableAttention(32, 1, 3)


@pytest.mark.parametrize("literal", [True, False])
def test_parity_of_the_attention(literal):
    "Output and all gradients of the golden module."
    f = need("msdeform_attn")
    a = set_literal(DeformableAttention(64, 3, 4), literal)
    names = {n: OFFICIAL[n.split(".")[0]] + "." + n.split(".")[1] for n in f.state()}
    a.load_state_dict({names[n]: t for n, t in f.state().items()})
    query = f.inputs()["query"].requires_grad_()
    tokens = f.inputs()["feat"].requires_grad_()
    leaves = dict(a.named_parameters())
    refs = torch.tensor([((j + 0.5) / 6, (i + 0.5) / 4) for i in range(4) for j in range(6)])
    assert torch.equal(refs, centres([(4, 6)], query))
    out = a(query, refs, tokens, [(8, 12), (4, 6), (2, 3)])
    assert f.error("out", out.detach()) < 1e-6
    wanted = [n for n, *_ in f.spec["outputs"] if n.startswith("grad.")]
    grads = torch.autograd.grad(
        out, [query, tokens, *[leaves[names[n[5:]]] for n in wanted]], f.inputs()["grad_out"]
    )
    assert (
        f.error("grad_query", grads[0]) < 1e-5
        and f.error("grad_feat", grads[1]) < 1e-5
        and len(wanted) == 6
    )
    for n, t in zip(wanted, grads[2:]):
        step = {"grad.sampling_offsets.weight": (3, 3), "grad.value_proj.weight": (2, 4)}.get(n)
        assert relative_l2(f.golden[n], t[:: step[0], :: step[1]] if step else t) < 1e-5, n


@pytest.mark.parametrize("sizes", [[(1, 1)], [(2, 5), (1, 3)], [(7, 4), (3, 3), (1, 2)]], ids=str)
def test_attention_as_specified(sizes):
    """Both forms against rows of tent weights, double precision, points far outside too; gradients
    by name and their check by differences."""
    with seeded(0):
        a = DeformableAttention(12, len(sizes), 3).double()
    with seeded(1):
        for p in a.parameters():
            torch.nn.init.normal_(p)
    state = {
        f"attn.{n}.{k}": t
        for n, ours in OFFICIAL.items()
        for k, t in getattr(a, ours).state_dict(keep_vars=True).items()
    }
    queries = [(3, 2), (1, 4)]
    plain = Plain(state, 12, 4, 3)
    q = make_input([2, 10, 12]).double().requires_grad_()
    tokens = make_input([2, sum(h * w for h, w in sizes), 12], 1).double().requires_grad_()
    ref = plain.deform(q, queries, tokens, sizes, "attn")
    g = make_input([2, 10, 12], 2).double()
    leaves = {"query": q, "tokens": tokens, **dict(a.named_parameters())}
    truth = torch.autograd.grad(ref, list(leaves.values()), g)
    for literal in (True, False):
        out = set_literal(a, literal)(q, centres(queries, q), tokens, sizes)
        assert_close("output", ref, out, 1e-12)
        for n, t, u in zip(leaves, truth, torch.autograd.grad(out, list(leaves.values()), g)):
            assert (t - u).norm() < 1e-9 * t.norm() + 1e-11 * g.norm(), n


def test_reading():
    """The written-out reading on and between cells, at the border and beyond, both directions; the
    places' gradient where a place is a cell's centre."""
    v = make_input([2, 3, 4, 5]).double().requires_grad_()
    at = make_input([2, 7, 3, 2], 1).double() * 0.7 + 0.5
    at[0, 0, 0], at[0, 0, 1], at[0, 0, 2] = (
        torch.tensor(t, dtype=torch.float64) for t in ([0.1, 0.125], [0.3, 0.125], [1.1, 0.5])
    )
    at.requires_grad_()
    got = read_between(v, at)
    ref = F.grid_sample(v, 2 * at - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
    assert_close("values", ref, got, 1e-12)
    assert_close("a centre", v[0, :, 0, 0], got[0, :, 0, 0], 1e-12)
    g = make_input(got.shape, 2).double()
    away = torch.ones_like(at[..., :1])
    away[0, 0] = 0  # at a cell's centre the slope has two sides
    for n, a, b in zip(
        ("map", "places"),
        torch.autograd.grad(ref, [v, at], g),
        torch.autograd.grad(got, [v, at], g),
    ):
        assert_close(n, a * away if n == "places" else a, b * away if n == "places" else b, 1e-12)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (160, 32)], ids=str)
def test_as_specified(size):
    "The specification as plain functions in double precision: all maps, both forms, and every gradient by name."
    with seeded(0):
        e = ViTAdapter(**SMALL, drop_path=0.0).eval()
    state = filled_state(encoder_keys(**SMALL))
    load_official(e, state)
    e, state, rules = (
        e.double(),
        {
            n: t.double().requires_grad_(n.rsplit(".", 1)[-1] not in BN[2:])
            for n, t in state.items()
        },
        e.key_rules({}),
    )
    x = make_input([2, 3, *size]).double()
    gs = None
    ref = Plain(state, **SMALL).encoder(x)
    assert (
        [list(t.shape) for t in ref]
        == [[2, 32, size[0] // s, size[1] // s] for s in (4, 8, 16, 32)]
        and e.channels == [32] * 4
        and e.strides == [4, 8, 16, 32]
    )
    gs = [make_input(t.shape, i).double() for i, t in enumerate(ref)]
    leaves = {n: t for n, t in state.items() if t.requires_grad}
    ours = dict(e.named_parameters())
    truth = dict(zip(leaves, torch.autograd.grad(ref, list(leaves.values()), gs)))
    for literal in (True, False):
        got = set_literal(e, literal)(x)
        for a, b in zip(ref, got):
            assert_close("map", a, b, 1e-11)
        grads = dict(zip(ours, torch.autograd.grad(got, list(ours.values()), gs)))
        assert len(grads) == len(truth)
        for n, t in truth.items():
            assert (grads[map_key(n, rules)[0]] - t).norm() < 1e-8 * t.norm() + 1e-10, n


def test_forms():
    "Single precision: grid_sample against the written-out reading, whole network, and the same bits again."
    m = small()
    x = make_input([2, 3, 64, 96])
    with torch.no_grad():
        ref = set_literal(m)(x)
        got = set_literal(m, False)(x)
        assert_close("logits", ref, got, 1e-6)
        assert torch.equal(got, m(x))
        assert_close("alone", got[1:], m(x[1:]), 1e-5)
    seen = []
    import segkern.backbones.vit_blocks as module

    keep = module.read_between
    module.read_between = lambda *a: seen.append(1) or keep(*a)
    try:
        with torch.no_grad():
            set_literal(m)(x[:1]), set_literal(m, False)(x[:1])
    finally:
        module.read_between = keep
    assert len(seen) == 4 * 3 + 6


@pytest.mark.parametrize("size", [(64, 97), (33, 64), (16, 32), (0, 32)], ids=str)
def test_refused_sizes(size):
    m = small()
    e = ViTAdapter(**SMALL)
    with pytest.raises(
        ValueError, match=f"multiples of 32, got {size[0]}x{size[1]}: pad or resize"
    ):
        m(torch.zeros(1, 3, *size))
    with pytest.raises(
        ValueError, match=f"multiples of 32, got {size[0]}x{size[1]}: pad or resize"
    ):
        e(torch.zeros(1, 3, *size))
    assert m.multiple == 32 and UPerNet("upernet_swin_t", 3, width=8).multiple == 1


def test_contract():
    check_model(
        UPerNet("vit_adapter_l", 11, "vit_adapter_l", width=16, encoder_options=SMALL), (64, 96)
    )


def test_preprocess():
    "127.5 and 127.5 on ADE20K, ImageNet's elsewhere; Swin's stays; a given one is kept."
    halves = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)

    def made(k, encoder="vit_adapter_l", **kw):
        return UPerNet("x", k, encoder, **kw)

    with torch.device("meta"):
        nets = [
            made(150),
            made(171),
            made(59),
            made(150, "swin_t"),
            made(150, dataset="ade20k"),
            made(150, preprocess=IMAGENET),
            made(171, preprocess=halves),
        ]
    assert [m.preprocess == halves for m in nets] == [
        True,
        False,
        False,
        False,
        True,
        False,
        True,
    ] and all(m.preprocess in (halves, IMAGENET) for m in nets)
    assert_close("range", (image.float() - 127.5) / 127.5, nets[0].preprocess(image), 1e-6)
    with torch.device("meta"):
        assert SSA(made(150)).preprocess == halves and SSA(made(150)).multiple == 32


def test_training_details():
    "Drop rates, scales, the points' first directions, positions of the table."
    with seeded(0):
        e = ViTAdapter(**SMALL)
    assert [getattr(b.drop, "drop_prob", 0.0) for b in e.blocks] == pytest.approx(
        torch.linspace(0, 0.4, 8).tolist()
    )
    assert [len(i.extractors) for i in e.interactions] == [1, 1, 1, 3] and all(
        x.drop.drop_prob == 0.4 for i in e.interactions for x in i.extractors
    )
    assert all(i.injector.gamma.abs().max() == 0 for i in e.interactions) and all(
        (b.gamma1 == 1).all() and (b.gamma2 == 1).all() for b in e.blocks
    )
    bias, weight = (getattr(e.interactions[1].injector.attn.offsets, n) for n in ("bias", "weight"))
    assert weight.abs().max() == 0
    for head, way in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
        for level in range(3):
            assert torch.allclose(
                bias.view(4, 3, 4, 2)[head, level],
                torch.tensor([[k * way[0], k * way[1]] for k in (1.0, 2.0, 3.0, 4.0)]),
                atol=1e-5,
            )
    assert e.interactions[0].extractors[0].attn.weights.weight.abs().max() == 0 and all(
        m.eps == 1e-6 for m in e.modules() if isinstance(m, torch.nn.LayerNorm)
    )
    table = e.pos_embed[:, 1:]
    assert torch.equal(e.positions(24, 24), table) and e.positions(3, 5).shape == (1, 15, 32)
    m = UPerNet("vit_adapter_l", 3, "vit_adapter_l", width=8, encoder_options=SMALL)
    assert (
        m.drop_path == 0.4
        and UPerNet("upernet_swin_t", 3, width=8).drop_path == 0.3
        and list(VITS) == ["vit_adapter_l"]
    )
    with seeded(0):
        assert all(
            torch.equal(p, q) for p, q in zip(e.parameters(), ViTAdapter(**SMALL).parameters())
        )


def test_compile():
    "No graph break up to the loss."
    with seeded(0):
        m = UPerNet(
            "vit_adapter_l",
            5,
            "vit_adapter_l",
            width=8,
            encoder_options=dict(width=16, depth=4, heads=2, inner=4),
        ).eval()
    x = make_input([2, 3, 64, 96])
    y = torch.zeros(2, 64, 96, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="eager", fullgraph=True)(x, y)["loss"],
        1e-5,
    )


@pytest.mark.parametrize(
    "moving", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "moving"]
)
def test_export(moving):
    "Export keeps the maps, for other sizes of whole multiples too."
    with seeded(0):
        e = ViTAdapter(width=16, depth=4, heads=2, inner=4).eval()
        x = make_input([2, 3, 64, 96])
    dynamic = {
        0: torch.export.Dim("b", min=1, max=8),
        2: 32 * torch.export.Dim("h", min=2, max=64),
        3: 32 * torch.export.Dim("w", min=2, max=64),
    }
    program = torch.export.export(e, (x,), **(dict(dynamic_shapes=(dynamic,)) if moving else {}))
    for v in (x, make_input([1, 3, 128, 64], 1))[: 1 + moving]:
        for a, b in zip(e(v), program.module()(v)):
            assert_close("exported", a, b, 1e-5)


@pytest.mark.skipif("vit_adapter_l" not in list_models(), reason="not among the models by name")
def test_files(tmp_path):
    "Options, weights and the deploy form survive a round trip."
    from segkern.models import create_model

    m = create_model(
        "vit_adapter_l",
        150,
        width=16,
        encoder_options=SMALL,
        drop_path=0.1,
        mean_over="valid",
        dropout=0.2,
    ).eval()
    x = make_input([1, 3, 64, 32])
    back = load(save(m, tmp_path / "a.safetensors"))
    with torch.no_grad():
        ref = m(x)
        assert (
            torch.equal(back(x), ref)
            and back.options == m.options
            and m.options["drop_path"] == 0.1
            and m.options["encoder_options"] == SMALL
            and back.preprocess == m.preprocess
        )
        assert_close("deployed", ref, load(save(m.deploy(), tmp_path / "b.safetensors"))(x), 1e-6)
    with pytest.raises(RuntimeError, match="deploy form"):
        m(x, torch.zeros(1, 64, 32, dtype=torch.uint8))
    assert "encoder_options" not in UPerNet("upernet_swin_t", 3, width=8).options


def test_the_adaptive_classifier():
    """It sees what the last convolution gives, at a quarter, takes the classifier's place and
    keeps the auxiliary head's loss."""
    m = small()
    x = make_input([2, 3, 64, 96])
    y = torch.randint(0, 7, (2, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        feat = m.feature(x)
        assert feat.shape == (2, 16, 16, 24) and feat.min() == 0
        assert_close("classifier", m.classifier(feat), m(x), 1e-6)
    aux = m(x, y)["aux"]
    both = SSA(m).eval()
    assert both(x).shape == (2, 7, 16, 24)
    assert_close("auxiliary", aux, both(x, y)["aux"], 1e-6)
    with pytest.raises(ValueError, match="multiples of 32"):
        both(x[..., :90])


def test_low_precision():
    "bfloat16: places stay exact, maps close."
    m = small()
    x = make_input([1, 3, 128, 96])
    with torch.no_grad():
        ref = m.encoder(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = m.encoder(x)
    for a, b in zip(ref, low):
        assert relative_l2(a, b.float()) < 0.08
    a = ViTAdapter(**SMALL).interactions[0].extractors[0].attn
    q = make_input([1, 60 * 44, 32])
    tokens = make_input([1, 120 * 88, 32], 1)
    with torch.no_grad():
        ref = a(q, centres([(60, 44)], q), tokens, [(120, 88)])
        low = a.bfloat16()(q.bfloat16(), centres([(60, 44)], q), tokens.bfloat16(), [(120, 88)])
    assert low.dtype == torch.bfloat16 and relative_l2(ref, low.float()) < 0.02


# VmHWM begins anew with the program; `ru_maxrss` would count the process that started it
FULL_SIZE = r"""
import pathlib, re, torch
from segkern.core import seeded
from segkern.models.upernet import UPerNet
from segkern.testing import make_input
with seeded(0): m = UPerNet("vit_adapter_l", 150, "vit_adapter_l")
x, y = make_input([2, 3, 96, 64]), torch.randint(0, 150, (2, 96, 64), dtype=torch.uint8)
with torch.no_grad(): maps = m.eval().encoder(x[:1])
assert [tuple(t.shape) for t in maps] == [(1, 1024, 96//s, 64//s) for s in (4, 8, 16, 32)]
losses = m.train()(x, y)
losses["loss"].backward()
assert set(losses) == {"loss", "logits", "aux"}
assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())
print(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_full_size():
    """The published network in a process of its own: built, forward and backward at 96x64, under 4
    GB, every gradient finite."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 4 * 2**20  # KB
