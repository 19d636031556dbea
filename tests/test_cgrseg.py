"""EfficientFormerV2 and CGRSeg: official keys, the equations once more, parity, other sizes, the
adaptive classifier's form."""

import copy

import numpy as np
import pytest
import torch

from shared import need
from oracles.cgrseg import (
    LOOKING,
    NETS,
    WIDTHS,
    Keys,
    decode,
    encode,
    encoder_keys,
    head_keys,
    net_keys,
)
from segkern.testing.official import assert_complete
from segkern.backbones.efficientformer import (
    EFFICIENTFORMERS,
    BiasedAttention,
    EfficientFormer,
    spread,
)
from segkern.core import seeded
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.models import list_models, load, save
from segkern.models.cgrseg import CGRSEGS, CGRSeg
from segkern.models.cgrseg_blocks import RectangularGate
from segkern.models.ssa import SSA
from segkern.testing import (
    assert_close,
    check_model,
    fill_tensor,
    filled_state,
    fixture,
    make_input,
    relative_l2,
    state_of,
)
from segkern.weights import load_official, transfer

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def official_state(shapes):
    "Filled; what scales a layer is small."
    state = filled_state(shapes)
    return {k: v * (0.1 if ".layer_scale_" in k else 1) for k, v in state.items()}


def tiny(name="cgrseg_t", classes=5, **kw):
    "A small network."
    with seeded(0):
        return CGRSeg(
            name, classes, "efficientformerv2_s0", **{**dict(width=16, depth=2, taps=7), **kw}
        )


def rewritten(m):
    "Every gate in the rewritten form, however small its map."
    for g in m.modules():
        if isinstance(g, RectangularGate):
            g.small = 0
    return m


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_official_encoders(size, prefix):
    "The segmentation form: every tensor has a place; what is ignored are leftovers of classification."
    with torch.device("meta"):
        e = EfficientFormer(f"efficientformerv2_{size}")
    shapes = encoder_keys(size)
    report = load_official(e, state_of(shapes.under(prefix)))
    assert_complete(e, report, shapes.under(prefix.removeprefix("module.")))
    assert (
        all(
            k.rsplit(".", 1)[1]
            in ("attention_biases", "attention_bias_idxs", "attention_bias_idxs_seg")
            for k, *_ in report.ignored
        )
        and not report.notes
    )
    buffers = ("running_mean", "running_var", "tracked", "idxs", "idxs_seg", "attention_biases")
    assert num_params(e) == sum(
        int(np.prod(s)) for k, s in shapes.items() if not k.endswith(buffers)
    )


@pytest.mark.parametrize("size", WIDTHS)
def test_imagenet_files(size):
    "Tables of distances start from zero and the report says so; what is known lands where it belongs."
    e = EfficientFormer(f"efficientformerv2_{size}")
    shapes = encoder_keys(size, imagenet=True)
    with torch.no_grad():
        _ = [m.attention_biases.fill_(7) for m in e.modules() if isinstance(m, BiasedAttention)]
    report = load_official(e, {"model": official_state(shapes)})
    count = 2 * LOOKING[size] + 1
    assert (
        len(report.notes) == 1
        and f"{count} tables" in report.notes[0]
        and "zero" in report.notes[0]
    )
    assert all(
        (m.attention_biases == 0).all() for m in e.modules() if isinstance(m, BiasedAttention)
    )
    assert {k for k, *_ in report.ignored} == {
        k
        for k in shapes
        if k.startswith(("norm.", "head.", "dist_head."))
        or k.endswith(("attention_biases", "idxs"))
    }
    assert torch.equal(
        e.stages[3].downsample.attn.q.proj.conv.weight,
        fill_tensor("network.5.attn.q.proj.0.weight", shapes["network.5.attn.q.proj.0.weight"]),
    )
    with torch.device("meta"):
        m = CGRSeg("cgrseg_b", 3, f"efficientformerv2_{size}")
    with pytest.raises(ValueError, match="goes into model.encoder"):
        load_official(m, state_of(shapes))


@pytest.mark.parametrize("ssa", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_official_networks(name, ssa):
    "All three sizes, with their own classifier and with the adaptive one."
    with torch.device("meta"):
        m = SSA(CGRSeg(name, 150)) if ssa else CGRSeg(name, 150)
    shapes = net_keys(name, 150, ssa)
    assert_complete(m, load_official(m, state_of(shapes)), shapes)
    if ssa:
        assert not any("guide" in k for k in m.state_dict())
        with pytest.raises(ValueError, match="left empty"):
            load_official(m, state_of(net_keys(name, 150)))
        with torch.device("meta"):
            part = SSA(CGRSeg(name, 150))
        report = transfer(part, state_of(net_keys(name, 150)))
        assert {n.split(".")[0] for n, *_ in report.fresh} == {"classifier"} and all(
            "second half" in why for k, why, *_ in report.ignored if ".lgc." in k
        )
    elif name == "cgrseg_b" and (golden := fixture("cgrseg_b")):
        assert [[k, list(s)] for k, s in sorted(shapes.items())] == sorted(
            [k, s] for k, s, _ in golden.spec["keys"]
        )


def test_wrong_files():
    "Another size, another number of classes, an unknown key, a tensor missing: named."
    with torch.device("meta"):
        m = CGRSeg("cgrseg_b", 150)
    for state, words in (
        (
            net_keys("cgrseg_l", 150),
            "efficientformerv2_l with a CGRSeg decoder of 5 context blocks and 150 classes",
        ),
        (net_keys("cgrseg_b", 19), "19 classes"),
        (net_keys("cgrseg_b", 150) | {"decode_head.new.weight": (3, 3)}, "decode_head.new.weight"),
        ({k: s for k, s in net_keys("cgrseg_b", 150).items() if "lgc" not in k}, "left empty"),
        ({"stage.weight": (3, 3)}, "no EfficientFormerV2"),
    ):
        with pytest.raises(ValueError, match=words):
            load_official(m, state_of(state))


@pytest.mark.parametrize("height,width", [(64, 96), (160, 32), (96, 224)])
def test_the_equations_again(height, width):
    "Written down once more in official names, in double precision, at sizes whose matrices are resized."
    shapes = Keys(
        {
            **encoder_keys("s0").under("backbone."),
            **head_keys("s0", 16, 2, 7, 5).under("decode_head."),
        }
    )
    state = {
        k: v.double() if v.is_floating_point() else v for k, v in official_state(shapes).items()
    }
    m = rewritten(tiny()).double().eval()
    x = make_input([2, 3, height, width]).double()
    load_official(m, state)
    own, theirs = (
        {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}
        for p in ("decode_head.", "backbone.")
    )
    with torch.no_grad():
        maps = encode(theirs, x, "s0")
        logits, f = decode(own, maps[1:], 2)
        for i, (a, b) in enumerate(zip(maps, m.encoder(x))):
            assert_close(f"map {i}", a, b, 1e-12)
        assert_close("logits", logits, m(x), 1e-12)
        assert_close("literal", logits, set_literal(m)(x), 1e-12)
        assert_close("bare", f, m.bare().feature(x), 1e-12)


def test_parity():
    "Both golden pictures; what may go wrong unseen is seen."
    golden = need("cgrseg_b")
    m = CGRSeg().eval()
    ins = golden.inputs()
    load_official(m, golden.state())
    assert num_params(m) == golden.spec["params"] and all(
        (v * 10 - fill_tensor(k, v.shape)).abs().max() < 1e-5
        for k, v in golden.state().items()
        if k.endswith("layer_scale_2")
    )
    with torch.no_grad():
        for form in (m, rewritten(m), set_literal(copy.deepcopy(m))):
            assert golden.error("logits", form(ins["x"])) < 1e-5
        assert golden.error("x512_logits", m(ins["x512"])) < 1e-5
        for a in m.modules():
            if isinstance(a, BiasedAttention):
                a.resize = "table"
        assert (
            golden.error("x512_logits", m(ins["x512"])) < 1e-5 < golden.error("logits", m(ins["x"]))
        )


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_parity_of_the_gate(train, literal):
    golden = need("cgr_rca")
    names = {"dwconv_hw": "local", "excite.0": "wide", "excite.1": "bn", "excite.3": "tall"}
    prefix = "train_" if train else ""
    g = rewritten(RectangularGate(64, 11)).train(train)
    ins = golden.inputs()
    g.literal = literal
    g.load_state_dict(
        {
            f"{names[k.rsplit('.', 1)[0]]}.{k.rsplit('.', 1)[1]}": v
            for k, v in golden.state().items()
        },
        strict=False,
    )
    x = ins["x"].requires_grad_()
    out = g(x)
    out.backward(ins["grad_out"])
    assert (
        golden.error(prefix + "out", out.detach()) < 1e-5
        and golden.error(prefix + "grad_x", x.grad) < 1e-4
    )
    seen = 0
    for theirs, ours in names.items():
        for n, p in getattr(g, ours).named_parameters():
            if (key := f"{prefix}grad.{theirs}.{n}") in golden.golden:
                assert golden.error(key, p.grad.flatten(1) if p.ndim > 1 else p.grad) < 1e-4
                seen += 1
    assert seen == 7 + (not train)
    if train:
        assert (
            golden.error("train_running_mean", g.bn.running_mean) < 1e-5
            and golden.error("train_running_var", g.bn.running_var) < 1e-5
        )


def test_gradients_of_both_forms():
    "The whole network in training: all gradients by name, and the running statistics."
    a = tiny().double()
    b = None
    with torch.no_grad(), seeded(3):
        for n, p in a.named_parameters():
            if n.endswith(("gamma", "guide.outer.weight", "attention_biases")):
                p.normal_(0, 0.3)
    b = set_literal(copy.deepcopy(a))
    a.dropout.p = b.dropout.p = 0.0
    x = make_input([2, 3, 64, 96]).double() + 1
    y = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(0))
    losses = [m(x, y)["loss"] for m in (rewritten(a), b)]
    assert abs(losses[0] - losses[1]) < 1e-12
    for loss in losses:
        loss.backward()
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-8 * (q.grad.norm() + 1e-6), n
    for (n, p), q in zip(a.named_buffers(), b.buffers()):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12), n


def test_contract_export_and_compile():
    "Sizes; graphs; the same bits twice; deep copies; the optimised form."
    from segkern.infer import optimize

    m = tiny()
    check_model(m, (64, 96))
    x = make_input([2, 3, 96, 64])
    twin = copy.deepcopy(m)
    with torch.no_grad():
        y = m(x)
    with torch.no_grad():
        assert (
            torch.equal(m(x), y) and torch.equal(twin(x), y) and torch.equal(copy.deepcopy(m)(x), y)
        )
    assert_close("exported", y, torch.export.export(m, (x,)).module()(x), 1e-5)
    with torch.no_grad():
        assert_close("compiled", y, torch.compile(m, backend="eager", fullgraph=True)(x), 1e-5)
    g = rewritten(RectangularGate(4, 3))
    z = make_input([2, 4, 9, 8]).requires_grad_()
    for form in (g, g.eval()):
        new = torch.compile(form, backend="eager", fullgraph=True)(z)
        old = form(z)
        assert_close("compiled gate", old, new, 1e-6)
        assert_close(
            "its gradient", *(torch.autograd.grad(o.square().sum(), z)[0] for o in (old, new)), 1e-5
        )
    assert_close("optimised", y, optimize(copy.deepcopy(m))(x), 1e-4)
    for size in ((64, 90), (31, 32), (33, 64)):
        for call in (m, m.encoder):
            with pytest.raises(ValueError, match=f"multiples of 32, got {size[0]}x{size[1]}"):
                call(make_input([1, 3, *size]))
    with torch.no_grad():
        assert m(make_input([1, 3, 32, 32])).shape == (1, 5, 4, 4)
    m.train()
    with pytest.raises(ValueError, match="needs larger pictures or at least 2"):
        m(make_input([1, 3, 64, 64]))
    with pytest.raises(ValueError, match="got 1 picture of 1 pixel"):
        rewritten(RectangularGate(3, 3))(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="odd number"):
        RectangularGate(3, 4)
    with pytest.raises(ValueError, match="efficientformerv2_l"):
        EfficientFormer("efficientformerv2_m")
    with pytest.raises(ValueError, match="resize must be"):
        EfficientFormer(resize="image")


def test_batch_norm_options():
    "Cumulative momentum; another kind of norm takes the written form."
    for momentum in (None, 0.3):
        new, old = (rewritten(RectangularGate(4, 3)) for _ in range(2))
        old.load_state_dict(new.state_dict())
        old.literal = True
        new.bn.momentum = momentum
        old.bn.momentum = momentum
        for seed in range(3):
            _ = new(make_input([2, 4, 5, 6], seed)), old(make_input([2, 4, 5, 6], seed))
        assert_close("mean", old.bn.running_mean, new.bn.running_mean, 1e-6)
        assert_close("variance", old.bn.running_var, new.bn.running_var, 1e-6)
        assert new.bn.num_batches_tracked == 3
    g = rewritten(RectangularGate(4, 3)).eval()
    x = make_input([2, 4, 5, 6])
    out = g(x)
    g.bn = torch.nn.SyncBatchNorm(4).eval()
    assert_close("another norm", out, g(x), 1e-6)


def test_tables_follow_the_weights():
    """The store of matrices: filled without gradients only; emptied by training, loading, casting,
    writing; bounded; gradients flow in evaluation."""
    e = EfficientFormer("efficientformerv2_s0").eval()
    a = e.stages[3].downsample.attn
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        e(x)
        assert list(a.kept) and a.bias(4, 6) is a.bias(4, 6)
        e(make_input([1, 3, 96, 96]))
        assert len(a.kept) == 2
        a.attention_biases.add_(1)  # an optimiser or an average of weights
        assert_close("after writing", a.make_bias(4, 6), a.bias(4, 6), 1e-6)
        for change in (
            lambda: e.train().eval(),
            lambda: e.load_state_dict(e.state_dict()),
            lambda: e.load_state_dict(e.state_dict(), assign=True),
            lambda: e.double().float(),
        ):
            a.bias(4, 6)
            assert a.kept
            change()
            assert not a.kept
        a.resize = "table"
        b = a.bias(4, 6)
        a.resize = "matrix"
        assert not torch.equal(b, a.bias(4, 6)) or float(a.attention_biases.std()) == 0
        import segkern.backbones.efficientformer as module

        limit = module.KEPT
        module.KEPT = b.numel()
        try:
            a.forget()
            for size in ((4, 6), (6, 4), (8, 8)):
                a.bias(*size)
            assert len(a.kept) == 1 and (8, 8) not in {k[:2] for k in a.kept}
        finally:
            module.KEPT = limit
    a.forget()
    a.bias(4, 6).square().sum().backward()
    assert not a.kept and a.attention_biases.grad.abs().sum() > 0
    with torch.inference_mode():
        first = e(x)[-1]
    with torch.no_grad():
        assert torch.equal(first, e(x)[-1])
    e(x)[-1].sum().backward()  # what was kept in inference mode does not get into a graph
    assert not any(m.kept for m in copy.deepcopy(e).modules() if isinstance(m, BiasedAttention))


def test_tables_at_other_sizes():
    "The published grids come out untouched; the table's resize keeps what a distance means."
    with seeded(0):
        e = EfficientFormer("efficientformerv2_s0", resize="table")
    looks = [m for m in e.modules() if isinstance(m, BiasedAttention)]
    assert len(looks) == 5 and {m.resize for m in looks} == {"table"}
    a = looks[0]
    i = torch.arange(a.side).float()
    with torch.no_grad():
        a.attention_biases.copy_(torch.stack([i[:, None] + 100 * i] * 8).flatten(1))
    for how in ("table", "matrix"):
        a.resize = how
        assert torch.equal(
            a.make_bias(a.side, a.side),
            spread(a.attention_biases.unflatten(1, (a.side, a.side)), a.step),
        )
    a.resize = "table"
    far = (
        a.make_bias(9, 21)
        .detach()[3]
        .view(9 // a.step + 9 % a.step if a.step == 2 else 9, -1, 9, 21)
    )
    for p, q, r, s in ((0, 0, 8, 20), (2, 3, 2, 3), (1, 2, 7, 5)):
        want = (
            abs(a.step * p - r) * (a.side - 1) / 8 + 100 * abs(a.step * q - s) * (a.side - 1) / 20
        )
        assert abs(far[p, q, r, s] - want) < 0.1 * max(1, want), (p, q, r, s)
    with torch.no_grad():
        assert e.eval()(make_input([1, 3, 64, 96]))[3].shape == (1, 176, 2, 3)


@pytest.mark.parametrize("name", ["efficientformerv2_s1", "efficientformerv2_l"])
def test_timm(name):
    "timm's networks for 512×512: the same bits; drop path as published."
    timm = pytest.importorskip("timm")
    with seeded(0):
        theirs = timm.create_model(name, img_size=512, num_classes=0, drop_path_rate=0.1).eval()
        e = EfficientFormer(name, 0.1).eval()
    with torch.no_grad(), seeded(1):
        _ = [
            p.normal_(0, 0.5)
            for n, p in theirs.named_parameters()
            if n.endswith(("attention_biases", "gamma"))
        ]
    assert not load_official(e, theirs.state_dict()).notes
    with torch.no_grad():
        assert all(
            relative_l2(a, b) < 1e-6
            for a, b in zip(
                theirs.forward_intermediates(make_input([1, 3, 512, 512]), intermediates_only=True),
                e(make_input([1, 3, 512, 512])),
            )
        )
    rates = [
        b.drop_path2.drop_prob if hasattr(b.drop_path2, "drop_prob") else 0.0
        for s in e.stages
        for b in s.blocks
    ]
    assert np.allclose(rates, np.linspace(0, 0.1, sum(EFFICIENTFORMERS[name][1])))


def test_adaptive_classifier():
    """The host loses its second half, trains with every term, gives the coarse answer of f; the
    name of the hook is public."""
    host = tiny()
    x = make_input([2, 3, 64, 96])
    with torch.no_grad():
        f = host.eval().head.fuse(host.head(host.encoder(x)[1:]))
    with seeded(1):
        m = SSA(host)
    assert (
        m.host.guide is None
        and m.classifier.channels == 16
        and (m.stride, m.multiple, m.name) == (8, 32, "cgrseg_t_ssa")
    )
    m.eval()
    with torch.no_grad():
        assert torch.equal(m.feature(x), f)
        assert_close("coarse", m.classifier.seg(f), m.outputs(x)["coarse"], 1e-6)
    check_model(m, (64, 96))
    with pytest.raises(ValueError, match="multiples of 32"):
        m(make_input([1, 3, 64, 70]))
    assert_close("exported", m(x), torch.export.export(m.deploy(), (x,)).module()(x), 1e-4)


@pytest.mark.parametrize("name", NETS)
def test_costs(name):
    "Parameters and multiply-accumulates of the sheet; the rewrite needs fewer of them."
    published = {
        "cgrseg_b": (19.115, 12.151, 8.59, 19.549, 19.286),
        "cgrseg_l": (35.678, 25.578, 16.12, 36.112, 35.849),
    }
    with torch.device("meta"):
        m = CGRSeg(name).eval()
        s = SSA(CGRSeg(name))
    paper = macs(set_literal(m), (512, 512)) / 1e9
    ours = macs(set_literal(rewritten(m), False), (512, 512)) / 1e9
    assert 0.98 * paper < ours < paper and CGRSEGS[name] == (
        f"efficientformerv2_{NETS[name][0]}",
        *NETS[name][1:],
    )
    found = (
        *(round(num_params(n) / 1e6, 3) for n in (m, m.encoder)),
        paper,
        round(num_params(s) / 1e6, 3),
        round(num_params(s.deploy()) / 1e6, 3),
    )
    if name in published:
        assert (
            found[:2] + found[3:] == published[name][:2] + published[name][3:]
            and abs(paper / published[name][2] - 1) < 0.01
        )


def test_round_trip(tmp_path):
    "Written and rebuilt from the file alone."
    if "cgrseg_t" not in list_models():
        pytest.skip("not registered")
    from segkern.models import create_model

    for name in ("cgrseg_t", "cgrseg_t_ssa"):
        m = create_model(
            name, 5, width=16, depth=1, taps=5, drop_path=0.2, resize="table", dataset="folder"
        ).eval()
        back = load(save(m, tmp_path / f"{name}.safetensors"))
        x = make_input([1, 3, 64, 96])
        with torch.no_grad():
            assert torch.equal(m(x), back(x))
        assert (
            back.options == m.options
            and back.options["resize"] == "table"
            and back.options["drop_path"] == 0.2
        )
