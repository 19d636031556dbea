"Swin, HRNet, UPerNet, OCRNet: official keys of every size, parity, sizes, forms as written."

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import need
from oracles.ocrnet import Keys, hrnet_keys, ocr_keys
import segkern
from segkern.testing.official import assert_complete
from segkern.testing.fill import state_of
from segkern.backbones.swin import SWINS, Swin, WindowAttention, merge_order, seam_mask
from segkern.core import load_table, seeded
from segkern.backbones.blocks import num_params
from segkern.models import cost, create_model, list_models, load, save
from segkern.models.ocrnet import OCRNet
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

UPERNETS = [f"upernet_swin_{v}" for v in "tbl"]
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def swin_keys(name, form):
    "An official Swin: form `mmseg`, `microsoft` or `timm`."
    (c, depths, heads), keys, mm = SWINS[name], Keys(), form == "mmseg"
    keys.pair("patch_embed.projection" if mm else "patch_embed.proj", c, 3, 4, 4)
    keys.norm("patch_embed.norm", c)
    for i, (d, h) in enumerate(zip(depths, heads)):
        w = c << i
        for j in range(d):
            b = f"{'stages' if mm else 'layers'}.{i}.blocks.{j}"
            a = f"{b}.attn.w_msa" if mm else f"{b}.attn"
            keys[f"{a}.relative_position_bias_table"], keys[f"{a}.relative_position_index"] = (
                (169, h),
                (49, 49),
            )
            keys.norm(f"{b}.norm1", w)
            keys.norm(f"{b}.norm2", w)
            keys.pair(f"{a}.qkv", 3 * w, w)
            keys.pair(f"{a}.proj", w, w)
            keys.pair(f"{b}.ffn.layers.0.0" if mm else f"{b}.mlp.fc1", 4 * w, w)
            keys.pair(f"{b}.ffn.layers.1" if mm else f"{b}.mlp.fc2", w, 4 * w)
            if form == "microsoft" and j % 2 and i < 3:
                keys[f"{b}.attn_mask"] = (64 >> 2 * i, 49, 49)
        if i < 3:
            m = f"stages.{i}.downsample" if mm else f"layers.{i + (form == 'timm')}.downsample"
            keys.norm(f"{m}.norm", 4 * w)
            keys.pair(f"{m}.reduction", 2 * w, 4 * w, bias=False)
        if mm:
            keys.norm(f"norm{i}", w)
    if not mm:
        keys.norm("norm", 8 * c)
        keys.pair("head.fc" if form == "timm" else "head", 1000, 8 * c)
    return keys


def upernet_keys(name, k):
    "The official decoder and auxiliary head."
    c = SWINS[f"swin_{name[-1]}"][0]
    keys = Keys()
    for i in range(4):
        keys.unit(f"decode_head.psp_modules.{i}.1", 8 * c, 512)
    keys.unit("decode_head.bottleneck", 8 * c + 2048, 512, 3)
    for i in range(3):
        keys.unit(f"decode_head.lateral_convs.{i}", c << i, 512)
        keys.unit(f"decode_head.fpn_convs.{i}", 512, 512, 3)
    keys.unit("decode_head.fpn_bottleneck", 2048, 512, 3)
    keys.pair("decode_head.conv_seg", k, 512, 1, 1)
    keys.unit("auxiliary_head.convs.0", 4 * c, 256, 3)
    keys.pair("auxiliary_head.conv_seg", k, 256, 1, 1)
    return keys


def network(name, k, **kw):
    "A network in evaluation mode whose numbers stay in range: untrained ones overflow the softmaxes."
    with torch.device("meta"):
        m = create_model(name, k, seed=None, **kw)
    return filled(m.to_empty(device="cpu"))


@pytest.mark.parametrize("form", ["mmseg", "microsoft", "timm"])
@pytest.mark.parametrize("name", SWINS)
def test_official_swin(name, form):
    "Three key formats; the ImageNet ones have no norms of the maps, and a classifier."
    with torch.device("meta"):
        e = segkern.create_encoder(name, seed=None)
    shapes = swin_keys(name, form)
    if form == "mmseg":
        assert shapes.params() == num_params(e)
    for prefix in ("", "backbone."):
        named = shapes.under(prefix)
        report = load_official(e, {"model": state_of(named)})
        own = (
            ()
            if form == "mmseg"
            else [f"{prefix}norm{i}.{n}" for i in range(4) for n in ("weight", "bias")]
        )
        assert_complete(e, report, named, own)
        assert bool(report.notes) == (form != "mmseg")
        why = {k.removeprefix(prefix): reason for k, reason, *_ in report.ignored}
        assert {k for k in why if not k.endswith(("index", "attn_mask"))} == (
            set() if form == "mmseg" else {k for k in shapes if k.startswith(("norm.", "head"))}
        )
        assert sum(k.endswith("index") for k in why) == sum(SWINS[name][1])


def test_official_hrnet():
    "1830 keys, with and without ImageNet's classifier."
    shapes = hrnet_keys()
    assert len(shapes) == 1830
    for prefix, extra in (
        (
            "",
            {
                "incre_modules.0.0.conv1.weight": (32, 48, 1, 1),
                "final_layer.0.bias": (2048,),
                "classifier.bias": (1000,),
                "downsamp_modules.0.0.bias": (256,),
            },
        ),
        ("backbone.", {"decode_head.0.conv_seg.bias": (19,)}),
    ):
        with torch.device("meta"):
            e = segkern.create_encoder("hrnet_w48", seed=None)
        named = shapes.under(prefix)
        assert shapes.params() == num_params(e)
        report = load_official(e, {"state_dict": state_of(named | extra)})
        assert_complete(e, report, named, extra)
        assert {k for k, *_ in report.ignored} == set(extra)


@pytest.mark.parametrize("name", [*UPERNETS, "ocrnet_hr48"])
def test_official_segmentors(name):
    "Parameters are the published ones to the last printed digit, every key has a place."
    k = 150
    ocr = name.startswith("ocr")
    backbone = hrnet_keys() if ocr else swin_keys(f"swin_{name[-1]}", "mmseg")
    heads = ocr_keys(k) if ocr else upernet_keys(name, k)
    with torch.device("meta"):
        m = create_model(name, k, seed=None)
    shapes = backbone.under("backbone.") | heads
    report = load_official(
        m, {"meta": {}, "state_dict": {f"module.{n}": t for n, t in state_of(shapes).items()}}
    )
    assert_complete(m, report, shapes)
    assert report.ignored_params == 0 and backbone.params() + heads.params() == num_params(m)
    assert (
        f"{num_params(m) / 1e6:.3f}"
        == f"{load_table('costs')['ssa_hosts'][name]['params_millions']:.3f}"
    )


@pytest.mark.parametrize("name", [*UPERNETS, "ocrnet_hr48"])
def test_costs(name):
    "Within 1 % of the official operations; without the auxiliary head, within 2 per mille."
    c = cost(name, 150, (512, 512))
    o = load_table("costs")["ssa_hosts"][name]
    assert (
        abs(c["paper_gmacs"] / o["gmacs_512x512"] - 1) < 0.01
        and abs(c["gmacs"] / o["gmacs_512x512"] - 1) < 2e-3
    )


def test_refused_files():
    "A file of another size or network is named."
    with torch.device("meta"):
        m = create_model("upernet_swin_t", 150, seed=None)
        o = create_model("ocrnet_hr48", 150, seed=None)
    other = state_of(
        swin_keys("swin_b", "mmseg").under("backbone.") | upernet_keys("upernet_swin_b", 171)
    )
    with pytest.raises(
        ValueError,
        match="looks like swin_b with a UPerNet decoder and 171 classes; this model is upernet_swin_t with 150",
    ):
        load_official(m, other)
    with pytest.raises(ValueError, match="looks like swin_t, an encoder.s file.*model.encoder"):
        load_official(m, state_of(swin_keys("swin_t", "mmseg")))
    with pytest.raises(ValueError, match="no HRNet"):
        load_official(o, other)
    with pytest.raises(
        ValueError, match="looks like hrnet_w48 with OCRNet's two heads and 19 classes"
    ):
        load_official(o, state_of(hrnet_keys().under("backbone.") | ocr_keys(19)))
    with pytest.raises(ValueError, match="unknown encoder"):
        Swin("swin_x")


def test_merging_order():
    """One matrix in the order 00, 10, 01, 11 of whole blocks, on the four neighbours in that
    order, is the converted one on unfolded neighbours."""
    x = make_input([2, 5, 6, 8])
    w = make_input([7, 20], 1)
    blocks = (
        torch.cat([x[:, :, r::2, s::2] for r, s in ((0, 0), (1, 0), (0, 1), (1, 1))], 1)
        .flatten(2)
        .transpose(1, 2)
    )
    assert_close(
        "merging",
        blocks @ w.t(),
        F.unfold(x, 2, stride=2).transpose(1, 2) @ merge_order(w).t(),
        1e-6,
    )


def test_imagenet_start():
    """An ImageNet file starts the whole network through transfer: norms of the maps are new, heads
    stay; a second load gives the same."""
    m = create_model("upernet_swin_t", 5, width=64)
    state = filled_state(swin_keys("swin_t", "timm"))
    head = m.head.fuse.conv.weight.clone()
    report = transfer(m, state)
    assert torch.equal(
        m.encoder.stages[1].merge.reduction.weight,
        merge_order(state["layers.2.downsample.reduction.weight"]),
    )
    assert (
        (m.encoder.stages[2].norm.weight == 1).all()
        and torch.equal(head, m.head.fuse.conv.weight)
        and all(not n.startswith("encoder.") for n, *_ in report.fresh)
    )
    again = segkern.create_encoder("swin_t")
    load_official(again, state)
    for a, b in zip(again.state_dict().values(), m.encoder.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_parity(layout):
    "Backbone, feature, classifier and auxiliary head of the official UPerNet."
    f = need("ssa_upernet_swin_t")
    m = create_model("upernet_swin_t", 150).eval()
    own = re.compile(r"decode_head\.(?:get_feat_pos|(?:gt_)?center_|ssa_loss)")
    load_official(m, {k: t for k, t in f.state().items() if not own.match(k)})
    x = layouts(f.inputs()["img"])[layout]
    with torch.no_grad():
        for i, t in enumerate(m.encoder(x), 1):
            assert f.error(f"c{i}", t) < 2e-6
        feat, others = m.features(x)
        for n, t in {"feat": feat, "coarse": m.classify(feat), **others}.items():
            assert f.error(n, t) < 5e-6, n
        label = torch.from_numpy(f.golden["label"])[:, 0]
        assert (
            abs(
                m.aux_losses(others, label)["aux"].item() / f.golden["train.aux.loss_ce"].item() - 1
            )
            < 1e-5
        )


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 14), (10, 8), (15, 6)], ids=str)
@pytest.mark.parametrize("shift", [0, 3])
def test_windows(size, shift):
    """Attention over all places of the padded grid at once, with everything outside of the own
    window masked, and its gradients."""
    with seeded(0):
        attn = WindowAttention(6, 2).double()
    with torch.no_grad():
        attn.bias_table.copy_(make_input([169, 2]))
    (h, w), x = size, make_input([2, *size, 6], 1).double().requires_grad_()
    rows, cols = (torch.arange(-(-n // 7) * 7) for n in (h, w))
    place = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)
    moved = torch.stack([(place[:, i] - shift) % len(n) for i, n in enumerate((rows, cols))], 1)
    same = ((moved[:, None] // 7) == (moved[None] // 7)).all(-1)
    strip = torch.stack(
        [
            torch.bucketize(
                moved[:, i].contiguous(), torch.tensor([len(n) - 7, len(n) - 3]), right=True
            )
            for i, n in enumerate((rows, cols))
        ],
        1,
    )
    apart = (strip[:, None] != strip[None]).any(-1) if shift else torch.zeros_like(same)
    delta = moved[:, None] % 7 - moved[None] % 7 + 6
    padded = F.pad(x, (0, 0, 0, len(cols) - w, 0, len(rows) - h)).flatten(1, 2)
    q, k, v = attn.qkv(padded).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    scores = (
        (q * 3**-0.5) @ k.transpose(-1, -2)
        + attn.bias_table[(delta[..., 0].clamp(0, 12) * 13 + delta[..., 1].clamp(0, 12))].permute(
            2, 0, 1
        )
        - 100.0 * apart
    )
    ref = attn.proj(
        (scores.masked_fill(~same, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    ).unflatten(1, (len(rows), len(cols)))[:, :h, :w]
    got = attn(x, shift, seam_mask(h, w, x) if shift else None)
    assert relative_l2(ref, got) < 1e-12
    g = make_input(got.shape, 2).double()
    for a, b in zip(
        torch.autograd.grad(ref, [x, *attn.parameters()], g, retain_graph=True),
        torch.autograd.grad(got, [x, *attn.parameters()], g),
    ):
        assert relative_l2(a, b) < 1e-10


def upsampled(x, to):
    return F.interpolate(x, to.shape[2:], mode="bilinear", align_corners=False)


def literal_ocr(m, maps):
    "OCRNet's decoder as its authors write it: loops over pictures, probability maps in full."
    stacked = torch.cat([maps[0]] + [upsampled(t, maps[0]) for t in maps[1:]], 1)

    def unit(u, x):
        return F.relu(u.bn(F.conv2d(x, u.conv.weight, padding=u.conv.padding)))

    regions = m.regions.classifier(unit(m.regions.fusion, stacked))
    f = unit(m.bottleneck, stacked)
    feats = []
    b, c, h, w = f.shape
    for i in range(b):
        p = torch.softmax(regions[i].view(regions.shape[1], -1), 1)
        context = torch.stack([(f[i].view(c, -1) * row).sum(1) for row in p], 1)[None, :, :, None]
        key = context
        value = unit(m.context.value, context)
        query = f[i : i + 1]
        for u in m.context.key:
            key = unit(u, key)
        for u in m.context.query:
            query = unit(u, query)
        attention = torch.softmax(
            query.view(query.shape[1], -1).t() @ key[0, :, :, 0] * query.shape[1] ** -0.5, 1
        )
        attended = (attention @ value[0, :, :, 0].t()).t().view(1, -1, h, w)
        feats.append(
            unit(m.context.merge, torch.cat([unit(m.context.out, attended), f[i : i + 1]], 1))
        )
    return m.classifier(torch.cat(feats)), regions


@pytest.mark.parametrize("size", [(64, 96), (45, 67), (33, 31)], ids=str)
def test_ocr_as_written(size):
    "Both guesses equal the literal form, odd sizes included."
    m = network("ocrnet_hr48", 7, width=64)
    x = make_input([2, 3, *size])
    with torch.no_grad():
        m.regions.classifier.weight.mul_(0.01)
        m.bottleneck.bn.weight.mul_(0.02)
        out = m.outputs(x)
        assert out["aux"].flatten(2).softmax(2).amax() < 0.5
        logits, regions = literal_ocr(m, m.encoder(x))
    assert_close("logits", logits, out["logits"], 1e-5)
    assert_close("regions", regions, out["aux"], 1e-5)


def test_hrnet_is_timm():
    "The four branches are timm's bits once its upsampling interpolates."
    import timm

    e = network("ocrnet_hr48", 3, width=8).encoder
    net = timm.create_model("hrnet_w48").eval()
    net.load_state_dict({k: v for k, v in e.body.state_dict().items()}, strict=False)
    for mod in net.modules():
        if isinstance(mod, torch.nn.Upsample):
            mod.mode = "bilinear"
            mod.align_corners = False
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        ref = net.stages(net.act2(net.bn2(net.conv2(net.act1(net.bn1(net.conv1(x)))))))
        for a, b in zip(ref, e(x)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(100, 140), (33, 97), (64, 31), (5, 3)], ids=str)
def test_odd_sizes(size):
    "Logits at a quarter, rounded up; one by one as in a batch."
    for name in ("upernet_swin_t", "ocrnet_hr48"):
        m = network(name, 7, width=32)
        x = make_input([2, 3, *size])
        with torch.no_grad():
            ref = m(x)
            assert ref.shape[2:] == tuple(-(-s // 4) for s in size)
            assert_close("alone", m(x[1:]), ref[1:], 1e-5)
        assert m.predict(x).shape == (2, *size)


@pytest.mark.parametrize("name", ["upernet_swin_t", "ocrnet_hr48"])
def test_contract(name):
    check_model(create_model(name, 11, width=64), (37, 53))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*UPERNETS, "ocrnet_hr48"])
def test_contract_full(name):
    check_model(create_model(name, 19), (45, 67))


@pytest.mark.parametrize(
    "name", ["upernet_swin_t", pytest.param("ocrnet_hr48", marks=pytest.mark.slow)]
)
def test_compile_and_export(name):
    "No graph break up to the loss; export keeps the logits."
    m = network(name, 5, width=32)
    x = make_input([2, 3, 36, 52])
    y = torch.zeros(2, 36, 52, dtype=torch.uint8)
    assert_close(
        "compiled loss",
        m(x, y)["loss"],
        torch.compile(m, backend="eager", fullgraph=True, dynamic=False)(x, y)["loss"],
        1e-5,
    )
    assert_close("exported", m(x), torch.export.export(m, (x,)).module()(x), 1e-5)


@pytest.mark.parametrize("name", ["upernet_swin_t", "ocrnet_hr48"])
def test_files(name, tmp_path):
    "Options, weights and the deploy form survive a round trip."
    m = create_model(name, 5, width=32, aux_weight=0.3, mean_over="valid").eval()
    x = make_input([1, 3, 40, 56])
    back = load(save(m, tmp_path / "a.safetensors"))
    with torch.no_grad():
        ref = m(x)
        assert torch.equal(back(x), ref) and back.options == m.options
        assert torch.equal(load(save(m.deploy(), tmp_path / "b.safetensors"))(x), ref)
    with pytest.raises(RuntimeError, match="deploy form"):
        m(x, torch.zeros(1, 40, 56, dtype=torch.uint8))


@pytest.mark.parametrize(
    "name", ["upernet_swin_t", pytest.param("ocrnet_hr48", marks=pytest.mark.slow)]
)
def test_optimized(name):
    "The fast form has the same logits."
    from segkern.infer import optimize

    m = network(name, 5, width=32)
    x = make_input([1, 3, 40, 56])
    with torch.no_grad():
        assert_close(name, m(x), optimize(m)(x), 2e-5)


def test_losses():
    "All pixels divide, 0.4 for the second head, and the second guess trains the first."
    for name in ("upernet_swin_t", "ocrnet_hr48"):
        m = network(name, 5, width=32)
        x = make_input([2, 3, 36, 52])
        y = torch.from_numpy(np.random.RandomState(0).randint(0, 5, (2, 36, 52)))
        y[:, :9] = 255
        out = m.outputs(x)
        losses = m(x, y)
        ce = {
            n: F.cross_entropy(
                F.interpolate(z, (36, 52), mode="bilinear", align_corners=False),
                y,
                ignore_index=255,
                reduction="sum",
            )
            / y.numel()
            for n, z in out.items()
        }
        assert_close("total", ce["logits"] + 0.4 * ce["aux"], losses["loss"], 1e-5)
        assert_close("auxiliary", 0.4 * ce["aux"], losses["aux"], 1e-5)
        if name == "ocrnet_hr48":
            ref = torch.autograd.grad(ce["logits"], m.regions.classifier.weight, retain_graph=True)[
                0
            ]
            assert ref.norm() > 0
            assert_close(
                "first guess",
                ref
                + 0.4
                * torch.autograd.grad(ce["aux"], m.regions.classifier.weight, retain_graph=True)[0],
                torch.autograd.grad(losses["loss"], m.regions.classifier.weight)[0],
                1e-4,
            )


def test_region_statistics():
    "One pass with a momentum of 0.19 leaves the statistics that two passes of the official training leave."
    m = create_model("ocrnet_hr48", 5, width=32)
    bn = m.regions.fusion.bn
    x = make_input([2, 3, 36, 52])
    seen = []
    hook = bn.register_forward_hook(lambda mod, i, o: seen.append(i[0].detach()))
    m(x)
    hook.remove()
    twice = torch.nn.BatchNorm2d(720).train()
    for _ in range(2):
        twice(seen[0])
    assert len(seen) == 1
    assert_close("mean", twice.running_mean, bn.running_mean, 1e-5)
    assert_close("variance", twice.running_var, bn.running_var, 1e-5)


def test_swin_details():
    "Drop rates 0 to 0.3, windows that move in every odd block, bf16 without surprises."
    e = Swin("swin_t")
    blocks = [b for s in e.stages for b in s.blocks]
    assert [getattr(b.drop, "drop_prob", 0.0) for b in blocks] == pytest.approx(
        torch.linspace(0, 0.3, 12).tolist()
    )
    assert [b.shift for b in blocks] == [0, 3] * 6 and not any(
        "index" in n or "mask" in n for n in e.state_dict()
    )
    x = make_input([1, 3, 60, 44])
    with torch.no_grad():
        ref = e.eval()(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = e(x)
    for a, b in zip(ref, low):
        assert relative_l2(a, b.float()) < 0.05


def test_one_picture_cannot_train():
    with pytest.raises(ValueError, match="at least 2 pictures"):
        create_model("upernet_swin_t", 5, width=32)(make_input([1, 3, 36, 52]))
    with pytest.raises(ValueError, match="2 pictures per device or 2 classes"):
        OCRNet("ocrnet_hr48", 1, width=32)(make_input([1, 3, 36, 52]))


def test_names():
    assert [
        n for n in list_models("upernet*") if not n.endswith("_ssa")
    ] == UPERNETS and "ocrnet_hr48" in list_models()
    assert segkern.list_encoders("swin*") == [
        "swin_t",
        "swin_b",
        "swin_l",
    ] and segkern.list_encoders("hrnet_w48") == ["hrnet_w48"]


@pytest.mark.parametrize("suffix", ["", "_ssa"])
def test_recipes(suffix):
    "AdamW without decay on the encoder's norms and position tables alone; SGD with one rate for OCRNet."
    from segkern.core import recipe_for
    from segkern.train import lr_at, parameter_groups

    with torch.device("meta"):
        swin, hr = (
            create_model(f"{n}{suffix}", 150, seed=None) for n in ("upernet_swin_t", "ocrnet_hr48")
        )
    for dataset, steps, crop in (
        ("ade20k", 160_000, 512),
        ("coco_stuff10k", 80_000, 512),
        ("pascal_context", 80_000, 480),
    ):
        r = recipe_for(swin.name, dataset)
        groups = {k: [n for n, *_ in v] for k, v in parameter_groups(swin, r).items()}
        assert set(groups) == {(1.0, 0.0), (1.0, 0.01)} and (r.iterations, r.crop, r.batch) == (
            steps,
            (crop, crop),
            16,
        )
        kept = {n for n, _ in swin.named_parameters() if "norm" in n or "bias_table" in n}
        assert set(groups[(1.0, 0.0)]) == kept and len(kept) == 2 * (1 + 2 * 12 + 3 + 4) + 12
        for i in (0, 700, 1499, 1500, steps - 1):
            official = 6e-5 * (1 - i / steps) * (1 - (1 - i / 1500) * (1 - 1e-6) if i < 1500 else 1)
            assert lr_at(r, i) == pytest.approx(official, rel=1e-9)
        r = recipe_for(hr.name, dataset)
        assert (
            list(parameter_groups(hr, r)) == [(1.0, 5e-4)]
            and r.optimizer == "sgd"
            and r.momentum == 0.9
            and (r.iterations, r.crop, r.batch) == (steps, (crop, crop), 16)
        )
        for i in (0, 1000, steps - 1):
            assert lr_at(r, i) == pytest.approx(
                (0.01 - 1e-4) * (1 - i / steps) ** 0.9 + 1e-4, rel=1e-9
            )
