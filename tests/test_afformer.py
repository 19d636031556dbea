"AFFormer: official keys with their aliases, the specification's equations as plain functions, sizes, forms, files."

import pytest
import torch

from oracles.afformer import BN, OUT, SHARED, Plain, official_keys, params, root
from segkern.testing.fill import state_of
from segkern.backbones.afformer import AFFORMERS, AFFormer
from segkern.core import seeded
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.models import SSA, list_models, load, save
from segkern.models.afformer import AFFormerSegmentor
from segkern.testing import assert_close, check_model, filled_state, make_input, relative_l2
from segkern.weights import load_official, map_key, transfer


def official_state(k=150):  # an alias holds what its stage holds
    return filled_state(official_keys(k), root)


def made(k=7, **kw):
    "A network in evaluation mode with official weights whose numbers stay in range."
    m = AFFormerSegmentor("afformer_b", k, **kw).eval()
    load_official(m, official_state(k))
    return m


def test_official_keys():
    """Every key has a place or is an alias or `align`; every tensor of ours is filled once, under
    every container and prefix; sizes."""
    shapes = official_keys()
    aliases = {n for n in shapes if root(n) != n}
    assert len(shapes) == 476 and len(aliases) == 140
    for container, prefix in (("state_dict", ""), ("state_dict_ema", "module.")):
        with torch.device("meta"):
            m = AFFormerSegmentor()
        report = load_official(
            m, {"meta": {}, container: {prefix + n: t for n, t in state_of(shapes).items()}}
        )
        places = [ours for _, ours in report.loaded]
        assert len(set(places)) == len(places) and set(places) == set(m.state_dict())
        reasons = {n: why for n, why, *_ in report.ignored}
        assert {n for n, why in reasons.items() if "another name" in why} == aliases and {
            n for n, why in reasons.items() if "does not call" in why
        } == {n for n in shapes if ".align." in n}
        assert (
            len(reasons) == 143
            and {n for n, _ in report.loaded} == set(shapes) - set(reasons)
            and report.notes == ["164 names of 24 shared tensors, each of which is stored once"]
        )
    align = 256 * 256 + 2 * 256
    assert (
        params(shapes) == num_params(m) + align
        and f"{params(shapes) / 1e6:.3f}" == "3.004"
        and f"{num_params(m.encoder) / 1e6:.3f}" == "2.844"
    )
    assert len({p.data_ptr() for p in made().parameters()}) == len(list(m.parameters()))


def test_aliases():
    """Any one name of a shared tensor is enough; where copies differ the last one counts and a
    note says so; other spellings of inner layers."""
    base = official_state(7)
    stage = "backbone.mhca_stages.2.mhca_blks.0."
    ref = made().state_dict()

    def loaded(state):
        m = AFFormerSegmentor(num_classes=7)
        return m, load_official(m, state)

    for keep in (
        lambda n: root(n) == n,
        lambda n: root(n) != n or not any(f"mhca_blks.0.{s}" in n for s in SHARED[:2]),
    ):
        m, report = loaded({n: t for n, t in base.items() if keep(n)})
        assert all(torch.equal(t, ref[n]) for n, t in m.state_dict().items()) and not any(
            "differ" in n for n in report.notes
        )
    last = torch.full_like(base[f"{stage}crpe.conv_list.1.weight"], 0.25)
    m, report = loaded(
        base | {f"{stage}MHCA_layers.5.factoratt_crpe.crpe.conv_list.1.weight": last}
    )
    assert torch.equal(m.encoder.stages[2].encoder.filters.high[1].weight, last) and any(
        "1 shared tensors differ" in n and "conv_list.1.weight" in n for n in report.notes
    )
    m, _ = loaded(
        {
            n.replace("mlp.dwconv.", "mlp.dwconv.dwconv.").replace("cpe.proj.", "cpe."): t
            for n, t in base.items()
        }
    )
    assert all(torch.equal(t, ref[n]) for n, t in m.state_dict().items())
    kept = {n: t.clone() for n, t in base.items()}
    loaded(dict(base))
    assert kept.keys() == base.keys() and all(torch.equal(t, base[n]) for n, t in kept.items())


def test_encoder_files():
    """Names without prefix and a classifier that is dropped; a segmentor's file fills an encoder;
    transfer leaves the decoder."""
    own = {
        n.removeprefix("backbone."): t
        for n, t in official_state().items()
        if n.startswith("backbone.")
    }
    extra = {
        "head.weight": torch.zeros(1000, 216),
        "head.bias": torch.zeros(1000),
        "cls_head.cls.weight": torch.zeros(1000, 216),
    }
    e = AFFormer()
    report = load_official(e, {"state_dict": own | extra})
    assert {n for n, why, *_ in report.ignored if "ImageNet" in why} == set(extra) and torch.equal(
        e.stem[0].conv.weight, own["stem.0.conv.weight"]
    )
    assert torch.equal(
        e.stages[3].encoder.filters.high[2].bias,
        own["mhca_stages.3.mhca_blks.0.crpe.conv_list.2.bias"],
    )
    report = load_official(e, official_state())
    assert {n for n, why, *_ in report.ignored if "decoder" in why} == {
        n for n in official_state() if n.startswith("decode_head.")
    }
    m = AFFormerSegmentor(num_classes=7)
    report = transfer(m, {"state_dict": own | extra})
    assert {n.split(".")[0] for n, *_ in report.fresh} == {"head", "classifier"} and torch.equal(
        m.encoder.stages[1].encoder.position.weight,
        own["mhca_stages.1.mhca_blks.0.cpe.proj.weight"],
    )


def test_refused_files():
    "Wrong number of classes, an encoder's file, another network, an unknown key; downloads that do not exist."
    with torch.device("meta"):
        m = AFFormerSegmentor()
    with pytest.raises(ValueError, match=r"conv_seg.weight is \(19, 256, 1, 1\)"):
        load_official(m, state_of(official_keys(19)))
    with pytest.raises(
        ValueError,
        match="looks like afformer_b with its classifier and 19 classes; this model is afformer_b with 150",
    ):
        load_official(m, state_of(official_keys(19)))
    with pytest.raises(ValueError, match="afformer_b, an encoder.s file.*model.encoder"):
        load_official(
            m, state_of({n: s for n, s in official_keys().items() if n.startswith("backbone.")})
        )
    with pytest.raises(ValueError, match="holds no AFFormer"):
        load_official(m, {"backbone.stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="MHCA_layers.0.extra.weight"):
        load_official(
            m,
            state_of(official_keys())
            | {"backbone.mhca_stages.1.mhca_blks.0.MHCA_layers.0.extra.weight": torch.zeros(1)},
        )
    with pytest.raises(ValueError, match="mlp.again.weight .its place"):
        load_official(
            m,
            state_of(official_keys())
            | {
                "backbone.mhca_stages.1.mhca_blks.0.MHCA_layers.0.mlp.again.weight": torch.zeros(
                    192, 1, 3, 3, device="meta"
                )
            },
        )
    with pytest.raises(ValueError, match="unknown encoder"):
        AFFormer("afformer_x")
    with pytest.raises(ValueError, match="load_official"):
        AFFormer(pretrained=True)
    with pytest.raises(ValueError, match="multiple of 32.*got 100"):
        AFFormerSegmentor(width=100)


@pytest.mark.parametrize("size", [(96, 160), (77, 131), (64, 9), (1, 1)], ids=str)
def test_as_specified(size):
    "The specification as plain functions in double precision: maps, feature and logits."
    m = made().double()
    x = make_input([2, 3, *size]).double()
    plain = Plain({n: t.double() for n, t in official_state(7).items()})
    with torch.no_grad():
        maps = plain.encoder(x)
        assert [list(t.shape) for t in maps] == [
            [2, c, *[-(-n // s) for n in size]] for c, s in zip(OUT, (4, 8, 8, 8))
        ]
        assert (
            m.encoder.channels == list(OUT)
            and m.encoder.strides == [4, 8, 8, 8]
            and len(AFFORMERS) == 1
        )
        for a, b in zip(maps, m.encoder(x)):
            assert_close("map", a, b, 1e-11)
        assert_close("feature", plain.feature(x), m.feature(x), 1e-11)
        assert_close("logits", plain.logits(x), m(x), 1e-11)


def test_training_as_specified():
    "Batch statistics, and every gradient by name; a shared tensor gets the sum over its layers."
    m = made(dropout=0.0).double().train()
    state = {
        n: t.double().requires_grad_(n.rsplit(".", 1)[-1] not in BN[2:] and ".align." not in n)
        for n, t in official_state(7).items()
    }
    rules = m.key_rules({})
    x = make_input([2, 3, 100, 140]).double()
    ref = Plain(state, training=True).logits(x)
    got = m(x)
    assert_close("logits", ref, got, 1e-9)
    g = make_input(ref.shape, 5).double()
    ours = dict(m.named_parameters())
    leaves = {n: t for n, t in state.items() if t.requires_grad}
    truth = {}
    # the stage's own copies are read by no layer
    for n, t in zip(leaves, torch.autograd.grad(ref, list(leaves.values()), g, allow_unused=True)):
        if t is not None:
            truth[root(n)] = truth.get(root(n), 0) + t
    grads = dict(zip(ours, torch.autograd.grad(got, list(ours.values()), g)))
    assert len(truth) == len(grads)
    for n, t in truth.items():
        assert (grads[map_key(n, rules)[0]] - t).norm() < 1e-7 * t.norm() + 1e-9 * g.norm(), n


def test_costs():
    with torch.device("meta"):
        m = AFFormerSegmentor().eval()
    assert abs(macs(set_literal(m).outputs, (512, 512)) / 1e9 / (4.27 + 0.07) - 1) < 0.003 and macs(
        set_literal(m, False).deploy(), (512, 512)
    ) == macs(m.outputs, (512, 512))


@pytest.mark.parametrize("size", [(100, 140), (33, 97), (64, 31), (5, 3)], ids=str)
def test_odd_sizes(size):
    "Logits at an eighth, rounded up; one by one as in a batch; the same bits again."
    m = made()
    x = make_input([2, 3, *size])
    with torch.no_grad():
        ref = m(x)
        assert ref.shape == (2, 7, *[-(-s // 8) for s in size]) and torch.equal(m(x), ref)
        assert_close("alone", m(x[1:]), ref[1:], 1e-5)
        for n, v in {
            "channels last": x.contiguous(memory_format=torch.channels_last),
            "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        }.items():
            assert_close(n, ref, m(v), 1e-5)
    assert m.predict(x).shape == (2, *size) and m.predict(x).dtype == torch.uint8


def test_contract():
    check_model(AFFormerSegmentor("afformer_b", 11), (77, 131))


def test_training_details():
    "Seeds, norms, no dropped paths, one set of convolutions per stage."
    with seeded(0):
        e = AFFormer()
    with seeded(0):
        assert all(torch.equal(p, q) for p, q in zip(e.parameters(), AFFormer().parameters()))
    assert not any("Drop" in type(m).__name__ for m in e.modules()) and all(
        m.eps == 1e-6 for m in e.modules() if isinstance(m, torch.nn.LayerNorm)
    )
    assert [None if s.encoder is None else len(s.encoder.layers) for s in e.stages] == [
        None,
        2,
        6,
        2,
    ] and sum("filters" in n for n in e.state_dict()) == 18
    m = AFFormerSegmentor(num_classes=7)
    x = make_input([1, 3, 64, 64])
    m(x, torch.zeros(1, 64, 64, dtype=torch.uint8))["loss"].backward()
    assert m.encoder.stages[2].encoder.filters.high[0].weight.grad.abs().max() > 0


def test_compile_and_export():
    "No graph break up to the loss; export keeps the logits."
    m = made(5)
    x = make_input([2, 3, 77, 101])
    y = torch.zeros(2, 77, 101, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="eager", fullgraph=True)(x, y)["loss"],
        1e-5,
    )
    assert_close("exported", m(x), torch.export.export(m, (x,)).module()(x), 1e-5)


@pytest.mark.slow
def test_export_of_any_size():
    m = made(5)
    x = make_input([2, 3, 77, 101])
    dynamic = {
        0: torch.export.Dim("b", min=1, max=8),
        2: torch.export.Dim("h", min=65, max=1024),
        3: torch.export.Dim("w", min=65, max=1024),
    }
    program = torch.export.export(m, (x,), dynamic_shapes=(dynamic,))
    for v in (x, make_input([1, 3, 130, 94], 1)):
        assert_close("exported", m(v), program.module()(v), 1e-5)


def test_optimized():
    "The fast form has the same logits."
    from segkern.infer import optimize

    m = made(5)
    x = make_input([1, 3, 90, 130])
    with torch.no_grad():
        assert_close("optimized", m(x), optimize(m)(x), 2e-5)


@pytest.mark.skipif("afformer_b" not in list_models(), reason="not among the models by name")
def test_files(tmp_path):
    "Options, weights and the deploy form survive a round trip."
    from segkern.models import create_model

    m = create_model("afformer_b", 5, width=64, mean_over="valid", dropout=0.2).eval()
    x = make_input([1, 3, 90, 70])
    back = load(save(m, tmp_path / "a.safetensors"))
    with torch.no_grad():
        ref = m(x)
        assert torch.equal(back(x), ref) and back.options == m.options and m.options["width"] == 64
        assert_close("deployed", ref, load(save(m.deploy(), tmp_path / "b.safetensors"))(x), 1e-6)
    with pytest.raises(RuntimeError, match="deploy form"):
        m(x, torch.zeros(1, 90, 70, dtype=torch.uint8))


def test_the_adaptive_classifier():
    """It sees what the last ReLU gives, at an eighth, and takes the classifier's place; the
    official file of both still drops its aliases."""
    m = made()
    x = make_input([1, 3, 90, 70])
    with torch.no_grad():
        feat = m.feature(x)
        assert feat.shape == (1, 256, 12, 9) and feat.min() == 0
        assert_close("classifier", m.classifier(feat), m(x), 1e-6)
        both = SSA(m).eval()
        assert both(x).shape == (1, 7, 12, 9)
    fresh = SSA(AFFormerSegmentor(num_classes=7))
    report = transfer(fresh, official_state(7))
    assert sum("another name" in why for _, why, *_ in report.ignored) == 140 and torch.equal(
        fresh.host.encoder.stem[1].conv.weight, both.host.encoder.stem[1].conv.weight
    )
    with torch.device("meta"):
        sizes = [
            num_params(SSA(AFFormerSegmentor())),
            num_params(SSA(AFFormerSegmentor()).deploy()),
        ]
    assert [f"{(n + 256 * 256 + 512) / 1e6:.3f}" for n in sizes] == ["3.570", "3.308"]


def test_low_precision():
    "bfloat16 without surprises."
    m = made()
    x = make_input([1, 3, 128, 96])
    with torch.no_grad():
        ref = m(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = m(x)
    assert low.dtype == torch.bfloat16 and relative_l2(ref, low.float()) < 0.05
