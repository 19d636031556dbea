"Mix Transformers, SegFormer and both SASFormers: official keys of every size, parity, sizes, rewrites."

import numpy as np
import pytest
import torch

import segkern
from shared import need
from segkern.backbones.mit import MITS, MiT
from segkern.core import load_table
from segkern.backbones.blocks import num_params
from segkern.models import cost, create_model, list_models, load, save, set_literal
from segkern.models.segformer import LevelFusion
from segkern.ops import use_impl
from segkern.testing import assert_close, layouts, make_input, relative_l2, state_of
from segkern.weights import load_official, transfer

NVLABS = [f"segformer_b{i}" for i in range(6)]
MMSEG = [f"segformer_b{i}_mmseg" for i in range(6)]
SPARSE = [f"sasformer_sparse_b{i}" for i in range(6)]
SR = (8, 4, 2, 1)


def encoder_shapes(name, mmseg=False, prefix=""):
    "Keys and shapes of an official encoder, written down from the published tables."
    widths, depths = MITS[name]
    out = {}
    c_in = 3

    def norm(key, c):
        out[key + ".weight"], out[key + ".bias"] = (c,), (c,)

    def layer(key, *shape):
        out[key + ".weight"], out[key + ".bias"] = shape, (shape[0],)

    for s, (c, depth) in enumerate(zip(widths, depths)):
        embed, block, last = (
            (f"layers.{s}.0", f"layers.{s}.1", f"layers.{s}.2")
            if mmseg
            else (f"patch_embed{s + 1}", f"block{s + 1}", f"norm{s + 1}")
        )
        k = 7 if s == 0 else 3
        layer(f"{embed}.{'projection' if mmseg else 'proj'}", c, c_in, k, k)
        norm(f"{embed}.norm", c)
        for j in range(depth):
            b = f"{block}.{j}"
            norm(f"{b}.norm1", c)
            if mmseg:
                out[f"{b}.attn.attn.in_proj_weight"], out[f"{b}.attn.attn.in_proj_bias"] = (
                    (3 * c, c),
                    (3 * c,),
                )
                layer(f"{b}.attn.attn.out_proj", c, c)
            else:
                layer(f"{b}.attn.q", c, c)
                layer(f"{b}.attn.kv", 2 * c, c)
                layer(f"{b}.attn.proj", c, c)
            if SR[s] > 1:
                layer(f"{b}.attn.sr", c, c, SR[s], SR[s])
                norm(f"{b}.attn.norm", c)
            norm(f"{b}.norm2", c)
            one = (1, 1) if mmseg else ()
            names = (
                ("ffn.layers.0", "ffn.layers.1", "ffn.layers.4")
                if mmseg
                else ("mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2")
            )
            layer(f"{b}.{names[0]}", 4 * c, c, *one)
            layer(f"{b}.{names[1]}", 4 * c, 1, 3, 3)
            layer(f"{b}.{names[2]}", c, 4 * c, *one)
        norm(last, c)
        c_in = c
    return {prefix + k: v for k, v in out.items()}


def head_shapes(name, k, width, prefix):
    "Keys of the linear decoder."
    out = {}
    for i, c in enumerate(MITS[name][0], 1):
        out[f"linear_c{i}.proj.weight"], out[f"linear_c{i}.proj.bias"] = (width, c), (width,)
    out |= {
        "linear_fuse.conv.weight": (width, 4 * width, 1, 1),
        "linear_pred.weight": (k, width, 1, 1),
        "linear_pred.bias": (k,),
    }
    out |= {
        f"linear_fuse.bn.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")
    }
    return {prefix + n: s for n, s in out.items()}


@pytest.mark.parametrize("mmseg", [False, True], ids=["nvlabs", "mmseg"])
@pytest.mark.parametrize("name", MITS)
def test_official_encoders(name, mmseg):
    "Every key of both formats is loaded; the classifier and a decoder are listed; prefixes do not matter."
    shapes = encoder_shapes(name, mmseg)
    assert sum(np.prod(s) for s in shapes.values()) == load_table("costs")["mit"][name]["params"]
    for extra, prefix in (
        ({"head.weight": (1000, 8), "head.bias": (1000,)}, ""),
        ({"decode_head.conv_seg.bias": (19,)}, "backbone."),
    ):
        with torch.device("meta"):
            e = segkern.create_encoder(name, seed=None)
        report = load_official(e, state_of({prefix + k: s for k, s in shapes.items()} | extra))
        assert {k for k, _ in report.loaded} == {prefix + k for k in shapes} and {
            k for k, *_ in report.ignored
        } == set(extra)
        places = [ours for _, ours in report.loaded]
        assert len(set(places)) == len(places) == len(e.state_dict())
        assert (
            e.stages[0].proj_norm.eps
            == e.stages[2].blocks[0].attn.norm.eps
            == (1e-6 if mmseg else 1e-5)
            and e.stages[1].norm.eps == 1e-6
        )
        assert bool(report.notes) == mmseg


@pytest.mark.parametrize("name", NVLABS + MMSEG + SPARSE)
def test_official_segmentors(name):
    "Official files of every size, in the containers that training leaves."
    mit = f"mit_{name.split('_')[2 if 'sparse' in name else 1]}"
    k = 21 if name in SPARSE else 150
    with torch.device("meta"):
        m = create_model(name, k, seed=None)
    if name in MMSEG:
        shapes = encoder_shapes(mit, True, "backbone.") | {
            "decode_head.conv_seg.weight": (k, 256, 1, 1),
            "decode_head.conv_seg.bias": (k,),
            "decode_head.fusion_conv.conv.weight": (256, 1024, 1, 1),
        }
        shapes |= {
            f"decode_head.convs.{i}.conv.weight": (256, c, 1, 1) for i, c in enumerate(MITS[mit][0])
        }
        for unit in ("fusion_conv", *[f"convs.{i}" for i in range(4)]):
            shapes |= {
                f"decode_head.{unit}.bn.{n}": (256,)
                for n in ("weight", "bias", "running_mean", "running_var")
            }
    else:
        prefix = ("encoder.", "decoder.") if name in SPARSE else ("backbone.", "decode_head.")
        shapes = encoder_shapes(mit, False, prefix[0]) | head_shapes(mit, k, m.width, prefix[1])
        if name in NVLABS:
            shapes |= {
                "decode_head.conv_seg.weight": (k, 128, 1, 1),
                "decode_head.conv_seg.bias": (k,),
            }
    report = load_official(
        m,
        {"config_dict": {}, "state_dict": {f"module.{n}": t for n, t in state_of(shapes).items()}},
    )
    assert {n for n, _ in report.loaded} | {n for n, *_ in report.ignored} == set(shapes)
    assert all("conv_seg" in n for n, *_ in report.ignored)
    if name in NVLABS:
        assert (
            num_params(m) + report.ignored_params
            == load_table("costs")["segformer"][name]["params"]
        )


@pytest.mark.parametrize(
    "size,k",
    [
        ((512, 512), 150),
        *(
            pytest.param(size, k, marks=pytest.mark.slow)
            for size, k in (((640, 640), 150), ((1024, 2048), 19), ((1024, 2048), 150))
        ),
    ],
    ids=str,
)
def test_costs(size, k):
    "The paper form is within 1 % of the published operations; ours is less."
    key = f"gmacs_{size[0]}x{size[1]}" + (f"_{k}" if size[0] == 1024 else "")
    for name, row in load_table("costs")["segformer"].items():
        c = cost(name, k, size)
        assert (
            abs(c["paper_gmacs"] / row[key] - 1) < 0.01 and c["gmacs"] < 0.9 * c["paper_gmacs"]
        ), (name, c)
    if size[0] == 640:
        return
    for name in ("sasformer_icip_b0", "sasformer_icip_b2"):
        c = cost(name, k, size)
        assert abs(c["paper_gmacs"] / load_table("costs")["sasformer_icip"][name][key] - 1) < 0.01


def test_refused_files():
    "A file of another size, another decoder or another network is named; a failed load leaves the eps alone."
    with torch.device("meta"):
        m = create_model("segformer_b0", 19, seed=None)
    other = state_of(
        encoder_shapes("mit_b2", False, "backbone.")
        | head_shapes("mit_b2", 19, 768, "decode_head.")
    )
    with pytest.raises(ValueError, match="looks like mit_b2 with NVlabs' decoder and 19 classes"):
        load_official(m, other)
    with pytest.raises(ValueError, match="OpenMMLab's decoder"):
        load_official(
            m,
            state_of(
                encoder_shapes("mit_b0", True, "backbone.")
                | {
                    "decode_head.fusion_conv.conv.weight": (256, 1024, 1, 1),
                    "decode_head.conv_seg.weight": (19, 256, 1, 1),
                }
            ),
        )
    assert m.embed_eps == 1e-5
    with pytest.raises(ValueError, match="no Mix Transformer"):
        load_official(m, {"fc.weight": torch.zeros(3, 3)})
    encoder = segkern.create_encoder("mit_b0")
    with pytest.raises(ValueError, match=r"in_proj_weight is \(95, 32\)"):
        load_official(
            encoder,
            state_of(
                encoder_shapes("mit_b0", True) | {"layers.0.1.0.attn.attn.in_proj_weight": (95, 32)}
            ),
        )


def test_start_weights_reach_every_network():
    "An ImageNet file of either format starts any of the networks; what it fills is said."
    for name in ("segformer_b0", "segformer_b0_mmseg", "sasformer_icip_b0", "sasformer_sparse_b0"):
        for mmseg in (False, True):
            m = create_model(name, 11)
            state = {k: torch.full(s, 0.25) for k, s in encoder_shapes("mit_b0", mmseg).items()}
            report = transfer(m, state)
            assert (m.encoder.stages[3].blocks[1].attn.kv.weight == 0.25).all() and len(
                report.fresh
            ) == len(
                [
                    n
                    for n, v in m.state_dict().items()
                    if not n.startswith("encoder.") and v.is_floating_point()
                ]
            )


def test_saved_options_come_back(tmp_path):
    "The eps that a file brought, and the decoder's choices, survive a round trip."
    m = create_model("segformer_b0", 11).eval()
    transfer(m, {k: torch.randn(s) * 0.1 for k, s in encoder_shapes("mit_b0", True).items()})
    back = load(save(m, tmp_path / "a.safetensors"))
    assert back.embed_eps == m.embed_eps == 1e-6
    x = make_input([1, 3, 40, 56])
    with torch.no_grad():
        assert torch.equal(back(x), m(x))
    m = create_model(
        "sasformer_icip_b0", 11, scm="sigmoid_mul", order="bottom_up", heads=(1, 1, 1, 1), width=64
    ).eval()
    back = load(save(m, tmp_path / "b.safetensors"))
    with torch.no_grad():
        assert torch.equal(back(x), m(x)) and back.chosen == m.chosen
    m = create_model("sasformer_sparse_b0", 21, levels=2, bgr=False, tree_weight=0.1).eval()
    back = load(save(m, tmp_path / "c.safetensors"))
    assert (
        back.options == m.options
        and back.preprocess == m.preprocess
        and back.tree_embed is not None
    )


@pytest.mark.parametrize(
    "name,outputs",
    [("mit_b0", ("c1", "c2", "c3", "c4")), ("mit_b0_mmseg", ("c1", "c2", "c3", "c4"))],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_encoder_parity(name, outputs, layout):
    "Features to 2e-6: the eps is right, whatever the memory layout of the picture."
    f = need(name)
    e = segkern.create_encoder("mit_b0").eval()
    load_official(e, f.state())
    with torch.no_grad():
        maps = e(layouts(f.inputs()["x"])[layout])
    for n, t in zip(outputs, maps):
        assert f.error(n, t) < 2e-6, n


@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b0_mmseg"])
@pytest.mark.parametrize("literal", [False, True], ids=["ours", "literal"])
def test_segmentor_parity(name, literal):
    f = need(name)
    m = create_model(name, 150).eval()
    load_official(m, f.state())
    set_literal(m, literal)
    with torch.no_grad():
        maps = m.encoder(f.inputs()["x"])
        fused = m.decode(maps)
        found = {"c4": maps[3], "fused": fused, "logits": m.classifier(fused)}
    for n, t in found.items():
        assert f.error(n, t) <= 2e-5, n


@pytest.mark.parametrize("size", [(100, 140), (33, 97), (64, 31)], ids=str)
def test_odd_sizes(size):
    "Grids by the convolutions' rule; rewrites and one-by-one evaluation agree."
    for name in ("segformer_b0", "segformer_b0_mmseg", "sasformer_icip_b0", "sasformer_sparse_b0"):
        m = create_model(name, 7).eval()
        x = make_input([2, 3, *size])
        with torch.no_grad():
            ref = m(x)
            assert ref.shape[2:] == tuple(-(-s // 4) for s in size)
            assert_close("literal", set_literal(m)(x), ref, 1e-5)
            assert_close("alone", set_literal(m, False)(x[1:]), ref[1:], 1e-5)
        assert m.predict(x).shape == (2, *size)


def test_too_small():
    for name in ("segformer_b0", "sasformer_icip_b0", "sasformer_sparse_b0"):
        with pytest.raises(ValueError, match="at least 29"):
            create_model(name, 5).eval()(torch.zeros(1, 3, 28, 64))


def test_fusion_in_training():
    "The order before the resize has the same gradients and the same batch statistics as the form as written."
    torch.manual_seed(0)
    for kw in (dict(inlet=5), dict(coarse_first=False), dict()):
        fusion = LevelFusion([3, 4, 6], 8, **kw).double().train()
        maps = [make_input([2, c, 11 >> i, 7 >> i], i).double() for i, c in enumerate((3, 4, 6))]
        found = []
        for literal in (True, False):
            fusion.bn.reset_running_stats()
            fusion.zero_grad()
            leaves = [t.clone().requires_grad_() for t in maps]
            set_literal(fusion, literal)(leaves).square().sum().backward()
            found.append(
                [t.grad for t in leaves]
                + [
                    p.grad.clone()
                    for n, p in fusion.named_parameters()
                    if "inlets" not in n or "weight" in n
                ]
                + [fusion.bn.running_mean.clone(), fusion.bn.running_var.clone()]
            )
        for a, b in zip(*found):
            assert relative_l2(a, b) < 1e-10


def test_attention_maps_are_lazy():
    "Queries and keys are views of what the network computes; a map is a softmax of its own."
    m = create_model("sasformer_sparse_b0", 5).eval()
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        stages = m.attention_maps(x)
    assert [s.size for s in stages] == [(16, 24), (8, 12), (4, 6), (4, 6)] and [
        s.key_size for s in stages
    ] == [(2, 3), (2, 3), (2, 3), (4, 6)]
    for s in stages:
        assert len(s) == 2 and all(t.untyped_storage().nbytes() <= 4 * 3 * t.numel() for t in s.qs)
        maps = [s[i] for i in range(2)]
        assert_close("rows", torch.ones(()), maps[0].sum(-1).mean(), 1e-5)
        assert_close("average", torch.stack(maps).mean((0, 2)), s.average(), 1e-5)
    assert segkern.create_encoder("mit_b1", seed=None).strides == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["segformer_b0", "sasformer_icip_b0", "sasformer_sparse_b0"])
def test_compile_and_export(name):
    "No graph break in inference and in the training step; export keeps the logits."
    m = create_model(name, 5).eval()
    x = make_input([1, 3, 32, 48])
    with torch.no_grad():
        assert_close("compiled", m(x), torch.compile(m, backend="eager", fullgraph=True)(x), 1e-5)
    assert_close("exported", m(x), torch.export.export(m, (x,)).module()(x), 1e-5)
    if name == "sasformer_sparse_b0":
        return
    y = torch.zeros(1, 32, 48, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="aot_eager", fullgraph=True)(x, y)["loss"],
        1e-5,
    )


def test_optimized():
    "The fast form has the same logits."
    from segkern.infer import optimize

    for name in ("segformer_b0", "segformer_b0_mmseg", "sasformer_icip_b0", "sasformer_sparse_b0"):
        m = create_model(name, 7).eval()
        x = make_input([1, 3, 64, 96])
        for mod in m.modules():
            if isinstance(mod, torch.nn.BatchNorm2d):
                mod.running_var.uniform_(0.5, 2)
                mod.running_mean.uniform_(-0.5, 0.5)
        with torch.no_grad():
            assert_close(name, m(x), optimize(m)(x), 2e-5)


def test_drop_path_rates():
    "Linear from 0 to 0.1 over all blocks, the same on both branches."
    e = MiT("mit_b2")
    rates = [getattr(b.drop, "drop_prob", 0.0) for s in e.stages for b in s.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 16).tolist()) and rates[0] == 0


def test_names():
    assert (
        list_models("sasformer_icip*") == ["sasformer_icip_b0", "sasformer_icip_b2"]
        and len([n for n in list_models("segformer*") if not n.endswith("_ssa")]) == 12
        and len(list_models("sasformer_sparse*")) == 6
    )


@pytest.mark.parametrize("k", [5, 21])
def test_sparse_targets(k):
    """Batches without label, without gap, or of padding alone train on: finite, and zero gradient
    where nothing is labelled."""
    m = create_model("sasformer_sparse_b0", k, bgr=False)
    x = make_input([2, 3, 45, 61])
    full = torch.randint(0, k, (2, 45, 61))
    for target, zero in (
        (torch.full_like(full, 255), True),
        (torch.full_like(full, -1), True),
        (torch.full_like(full, -2), True),
        (full, False),
    ):
        m.zero_grad()
        losses = m(x, target)
        losses["loss"].backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in grads) and torch.isfinite(losses["loss"])
        assert zero == all((g == 0).all() for g in grads)
    with pytest.raises(ValueError):
        m(x, torch.full_like(full, k))


def test_labels_that_the_grid_misses():
    """A click between the cells of the quarter grid is no label for the cross-entropy: the step
    has no effect, as the official one."""
    m = create_model("sasformer_sparse_b0", 5)
    x = make_input([2, 3, 64, 96])
    y = torch.full((2, 64, 96), 255)
    y[:, 1, 1] = 3
    losses = m(x, y)
    losses["loss"].backward()
    assert (
        losses["loss"] == 0
        and losses["affinity"] > 0
        and all((p.grad == 0).all() for p in m.parameters() if p.grad is not None)
    )
    with pytest.raises(RuntimeError, match="call model"):
        m.objective({}, y)


def test_options_tell_the_truth():
    "A published name has one head; the input rule of an option is that of the network; empty batches pass."
    with pytest.raises(ValueError, match="fixes"):
        create_model("segformer_b0", 5, head="mmseg")
    m = create_model("sasformer_sparse_b0", 5)
    m.preprocess = m.preprocess.__class__("rgb")
    assert m.options["bgr"] is False
    for name in ("segformer_b0", "sasformer_icip_b0", "sasformer_sparse_b0"):
        assert create_model(name, 5).eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 5, 16, 16)
    shapes = {
        k.replace("encoder.", "backbone.").replace("decoder.", "decode_head."): s
        for k, s in (
            encoder_shapes("mit_b0", False, "encoder.") | head_shapes("mit_b0", 5, 256, "decoder.")
        ).items()
    }
    assert len(
        load_official(
            create_model("sasformer_sparse_b0", 5), {k: torch.zeros(s) for k, s in shapes.items()}
        ).loaded
    ) == len(shapes)


def test_config_table():
    "The five configurations share one network; only the loss differs."
    from segkern.models.sasformer_sparse import CONFIGS

    x = make_input([1, 3, 64, 64])
    y = torch.full((1, 64, 64), 255)
    y[:, ::4, 8:24] = 1
    losses = {}
    for i, kw in CONFIGS.items():
        m = create_model("sasformer_sparse_b0", 5, **kw).eval()
        losses[i] = m(x, y)
    assert len({v["ce"].item() for v in losses.values()}) == 1 and "affinity" not in losses[-1]
    parts = [losses[i]["affinity"].item() for i in range(4)]
    assert 0 < parts[0] < parts[1] < parts[2] < parts[3]


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_sparse_step_on_the_kernels(impl):
    "The training step through every op's kernels equals the references'."
    from segkern.ops.dispatch import interpreting

    if impl == "triton" and not interpreting():
        pytest.skip("needs the interpreter")
    m = create_model("sasformer_sparse_b0", 5, bgr=False).eval()
    x = make_input([1, 3, 32, 48])
    y = torch.full((1, 32, 48), 255)
    y[:, ::4, 8:24] = 1
    with use_impl("ref"):
        m(x, y)["loss"].backward()
    ref = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    with use_impl(impl):
        m(x, y)["loss"].backward()
    for n, p in m.named_parameters():
        assert relative_l2(ref[n], p.grad) < 1e-4 or ref[n].norm() < 1e-7, n
