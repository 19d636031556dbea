"SANet: golden outputs, losses, data rules, inference rules, checkpoints."

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import need
from segkern.core import load_table
from segkern.data.transform import TrainTransform
from segkern.data.geometry import scaled_size
from segkern.core.labels import boundary_target, class_boundary_target, label_canny
from segkern.infer import conv_chains, evaluating, exp_scores, optimize
from segkern.backbones.blocks import macs, num_params, set_literal
from segkern.losses import ohem_cross_entropy
from segkern.losses.boundary import balanced_bce, boundary_aware_losses, class_boundary_loss
from segkern.models import create_model
from segkern.models.context import APPPM, CONTEXTS
from segkern.models.sanet import SAD, key_rules, speed_form
from segkern.ops import upsample_cross_entropy, use_impl
from segkern.core import recipe_for
from segkern.testing import assert_close, make_input, state_of
from segkern.testing.memory import launches
from segkern.weights import load_official, map_key

CPU = not torch.cuda.is_available()


def official(f, variant="s", k=19, aux=True):
    "Shapes of an official state dict of any variant, from the S fixture and our own network."
    with torch.device("meta"):
        m = create_model(f"sanet_{variant}", k, seed=None)
    blocks = {n: len(getattr(m, n)) for n in ("layer1", "layer2", "layer3", "layer4", "layer5")}
    out = {}
    for key, shape, _ in f.spec["keys"]:
        if variant != "s" and key.startswith("fc."):
            continue
        if not aux and key.startswith("seghead_"):
            continue
        if re.match(r"(final_layer|seghead_extra)\.conv2\.", key):
            shape = [k, *shape[1:]]
        out[key] = shape
    for n, count in blocks.items():
        for key in [k for k in out if k.startswith(f"{n}.1.")]:
            for i in range(2, count):
                out[key.replace(f"{n}.1.", f"{n}.{i}.")] = out[key]
    for d, path in (("dp1", m.dp1), ("dp2", m.dp2)):
        for key in [k for k in out if k.startswith(f"{d}.conv.0.")]:
            for i in range(2, len(path.steps)):
                out[key.replace(".conv.0.", f".conv.{i}.")] = out[key]
    return state_of({k: s for k, s in out.items() if not k.endswith("num_batches_tracked")})


@pytest.fixture(scope="module")
def net():
    f = need("sanet_s")
    m = create_model("sanet_s").eval()
    load_official(m, f.state())
    return m


@pytest.mark.parametrize("literal", [False, True], ids=["ours", "literal"])
def test_network(net, literal):
    "Three heads and nine named features."
    f = need("sanet_s")
    seen = {}
    set_literal(net, literal)
    hooks = [
        getattr(net, n).register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o))
        for n in ("layer1", "layer3", "layer4", "layer5", "dp1", "dp2", "spp", "decoder")
    ]
    hooks.append(
        net.boundary_head.register_forward_pre_hook(lambda m, i: seen.__setitem__("dp", i[0]))
    )
    with torch.no_grad():
        out = net.outputs(f.inputs()["x"])
    for h in hooks:
        h.remove()
    set_literal(net, False)
    seen |= {"main": out["logits"], "aux": out["aux"], "boundary": out["boundary"]}
    assert set(seen) == set(f.golden)
    for n, t in seen.items():
        assert f.error(n, t) <= 2e-5, n


@pytest.mark.parametrize("case", "ab")
def test_apppm(net, case):
    f = need("sanet_apppm")
    seen = {}
    x = f.inputs()[f"x_{case}"].requires_grad_()
    m = net.spp
    hook = m.gate.register_forward_hook(lambda mod, i, o: seen.__setitem__("gate_logit", o))
    y = m(x)
    hook.remove()
    (y * f.inputs()[f"g_{case}"]).sum().backward()
    assert f.error(f"y_{case}", y) <= 2e-5 and f.error(f"dx_{case}", x.grad) <= 1e-4
    if case == "b":
        return
    assert f.error("gate_logit", seen["gate_logit"]) <= 2e-5
    _, b1, b2, b3, whole = m.branches(x)
    for n, t in (("scale11", b1), ("scale22", b2), ("scale33", b3), ("scale4", whole)):
        assert f.error(n, t) <= 2e-5, n
    m.zero_grad()


def test_sad(net):
    f = need("sanet_sad")
    t = {n: v.requires_grad_(n != "g") for n, v in f.inputs().items()}
    m = net.decoder
    for literal in (False, True):
        m.literal = literal
        for v in t.values():
            v.grad = None
        out = m(t["d1"], t["d2"], t["x"], t["y"])
        (out * t["g"]).sum().backward()
        assert f.error("out", out) <= 2e-5
        for n in ("d1", "d2", "x", "y"):
            assert f.error("d" + n, t[n].grad) <= 1e-4, n
    m.literal = False
    d = t["d1"] + t["d2"]
    assert f.error("logit_h", m.across(d)) <= 2e-5 and f.error("logit_w", m.down(d)) <= 2e-5
    m.zero_grad()


def cityscapes_weights():
    return torch.tensor(load_table("cityscapes")["class_weights_hrnet"])


@pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", ["ohem_thres", "ohem_thres_cw", "ohem_minkept", "ohem_minkept_cw", "ohem_all_but_max"]
)
def test_ohem(case, impl):
    "Values and gradients; also on the Triton kernels, which must have run."
    f = need("sanet_losses")
    c = f.spec["cases"][case]
    logits = (3 * make_input([2, 19, 12, 16], 40)).requires_grad_()
    y = torch.from_numpy(f.golden["labels"]).long()
    with use_impl(impl), launches() as ran:
        loss = ohem_cross_entropy(
            logits,
            y,
            c["thres"],
            c["min_kept"],
            cityscapes_weights() if c["class_weights"] else None,
            align_corners=True,
        )
        loss.backward()
    if impl == "triton":
        assert ran
    assert abs(loss.item() / c["loss"] - 1) <= 1e-4
    if f"{case}_grad" in f.golden:
        assert f.error(f"{case}_grad", logits.grad) <= 1e-4


def test_plain_criteria():
    "The unreduced map, the criterion without mining, the boundary term."
    f = need("sanet_losses")
    w = cityscapes_weights()
    logits = (3 * make_input([2, 19, 12, 16], 40)).requires_grad_()
    y = torch.from_numpy(f.golden["labels"]).long()
    ce = upsample_cross_entropy(logits, y, 255, w, True, reduction="none")
    assert f.error("ce_map_cw", ce) <= 1e-4
    mean = upsample_cross_entropy(logits, y, 255, w, True, reduction="sum") / y.numel()
    assert abs(mean.item() / f.spec["cases"]["ce_map_cw"]["mean_over_all_pixels"] - 1) <= 1e-4
    mean.backward()
    assert f.error("ce_map_cw_meangrad", logits.grad) <= 1e-4
    logits.grad = None
    out = {"aux": 0.5 * logits, "logits": logits, "boundary": torch.full((2, 1, 12, 16), -9.0)}
    both = boundary_aware_losses(out, y, torch.zeros_like(y), w, ohem=None)
    assert abs(both["loss"].item() / f.spec["cases"]["ce_plain_2"]["loss"] - 1) <= 1e-4
    both["loss"].backward()
    assert f.error("ce_plain_2_grad", logits.grad) <= 1e-4
    b = make_input([2, 1, 24, 32], 42).requires_grad_()
    loss = 20 * balanced_bce(b, torch.from_numpy(f.golden["bd_gt"]))
    assert abs(loss.item() / f.spec["cases"]["bd"]["loss"] - 1) <= 1e-4
    (100 * loss).backward()
    assert f.error("bd_grad", b.grad) <= 1e-4


@pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["fm", "fmk"])
def test_objective(case, impl):
    "The whole training objective: terms, the official map, gradients of all three heads."
    f = need("sanet_losses")
    c = f.spec["cases"][case]
    out = {
        "aux": 2 * make_input([2, 19, 4, 6], 50),
        "logits": 3 * make_input([2, 19, 8, 12], 51),
        "boundary": 2 * make_input([2, 1, 8, 12], 52),
    }
    out = {n: t.requires_grad_() for n, t in out.items()}
    y = (
        torch.from_numpy(f.golden["fm_labels_small"])
        .long()
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    y[:, :8] = 255
    edges = torch.from_numpy((np.random.RandomState(54).rand(2, 64, 96) < 0.1).astype(np.float32))
    m = create_model("sanet_s", ohem=(0.9, c["ohemkeep"]))
    with use_impl(impl), launches() as ran:
        losses = m.objective(out, torch.stack([y, edges.long()], 1))
        losses["loss"].backward()
    if impl == "triton":
        assert ran

    def close(a, b):
        return abs(float(a.detach()) / b - 1) <= 1e-4

    assert (
        close(losses["loss"], c["total"])
        and close(20 * losses["boundary"], c["loss_b"])
        and close(losses["logits_boundary"], c["loss_sb"])
    )
    assert close(0.4 * losses["aux"] + losses["logits"], c["loss_s_mean"])
    w = cityscapes_weights()
    ce = 0.4 * upsample_cross_entropy(out["aux"], y, 255, w, True, reduction="none")
    whole = ce + losses["logits"] + 20 * losses["boundary"] + losses["logits_boundary"]
    assert f.error(f"{case}_loss_map", whole[None]) <= 1e-4
    for n, g in (("aux", "daux"), ("logits", "dmain"), ("boundary", "dbd")):
        assert f.error(f"{case}_{g}", out[n].grad) <= 1e-4, n


def test_empty_boundary_and_void():
    "Where the reference fails: no sure boundary pixel, one confident pixel, void only."
    out = {
        "aux": make_input([2, 5, 4, 6]),
        "logits": make_input([2, 5, 8, 12], 1),
        "boundary": torch.full((2, 1, 8, 12), -9.0),
    }
    out = {n: t.requires_grad_() for n, t in out.items()}
    y = torch.zeros(2, 64, 96, dtype=torch.long)
    losses = boundary_aware_losses(out, y, boundary_target(y))
    losses["loss"].backward()
    assert (
        losses["logits_boundary"] == 0
        and losses["boundary"] == 0
        and all(torch.isfinite(t.grad).all() for t in out.values())
    )
    one = torch.full_like(y, 255)
    one[0, 0, 0] = 0
    sharp = {
        **out,
        "logits": torch.where(torch.arange(5).view(1, 5, 1, 1) == 0, 30.0, 0.0)
        .expand(2, 5, 8, 12)
        .clone()
        .requires_grad_(),
    }
    losses = boundary_aware_losses(sharp, one, boundary_target(one))
    assert losses["logits"] == 0 and losses["loss"].isfinite()


def test_label_maps_and_edges():
    "Train ids, Canny, both edge targets and the class boundary, bit for bit."
    from segkern.data.base import lookup  # noqa: F401
    from segkern.data.cityscapes import id_table

    f = need("sanet_tools")
    raw = f.golden["label_ids"].astype(np.int64)
    table = id_table()
    ids = torch.from_numpy(np.vectorize(lambda v: table.get(int(v), 255))(raw))
    golden = {
        n: torch.from_numpy(f.golden[n]).long()
        for n in ("train_ids", "canny", "edge_cityscapes", "edge_camvid", "multi_class_boundary")
    }
    assert torch.equal(ids, golden["train_ids"])
    assert torch.equal(label_canny(ids).long() * 255, golden["canny"])
    assert torch.equal(boundary_target(ids, frame=6).long(), golden["edge_cityscapes"])
    assert torch.equal(boundary_target(ids).long(), golden["edge_camvid"])
    assert torch.equal(class_boundary_target(ids, 19).long(), golden["multi_class_boundary"])


@pytest.mark.parametrize("seed", range(20))
def test_canny_equals_opencv(seed):
    cv2 = pytest.importorskip("cv2")
    r = np.random.RandomState(seed)
    cell = r.randint(1, 9)
    ids = np.kron(
        r.randint(0, r.randint(2, 20), (r.randint(1, 12), r.randint(1, 12))), np.ones((cell, cell))
    ).astype(np.uint8)
    ids[r.rand(*ids.shape) < 0.1] = 255
    edge = cv2.Canny(ids, 0.1, 0.2)
    ours = label_canny(torch.from_numpy(ids))
    assert np.array_equal(ours.numpy() * 255, edge)
    grown = (cv2.dilate(edge, np.ones((4, 4), np.uint8), iterations=1) > 50).astype(np.uint8)
    assert np.array_equal(boundary_target(torch.from_numpy(ids)).numpy(), grown)


def test_preprocess_and_submission():
    f = need("sanet_tools")
    m = create_model("sanet_s")
    bgr = torch.from_numpy(f.golden["image_u8"].astype(np.uint8)).permute(2, 0, 1)
    assert f.error("image_city", m.preprocess(bgr.flip(0))) <= 1e-6
    from segkern.data.cityscapes import to_label_ids

    assert to_label_ids(torch.arange(19)).tolist() == f.spec["cases"]["submission_ids"]


@pytest.mark.parametrize(
    "golden, scales, flip",
    [
        ("ms_single", (1.0,), False),
        ("ms_4scales", (0.5, 0.75, 1.0, 1.25), False),
        ("ms_4scales_flip", (0.5, 0.75, 1.0, 1.25), True),
    ],
)
def test_multiscale(net, golden, scales, flip):
    "The official summation of exponentials."
    f = need("sanet_tools")
    with evaluating(net):
        scores = exp_scores(net, f.inputs()["ms_x"], scales, flip, base_size=128, window=(64, 128))
    assert f.error(golden, scores) <= 2e-5


@pytest.mark.parametrize(
    "base, size, scale",
    [(96, (48, 64), 0.7), (100, (67, 51), 1.3), (64, (33, 64), 2.1), (50, (50, 31), 0.5)],
)
def test_base_size_equals_opencv(base, size, scale):
    "Scaling relative to a base size: at most one grey level from OpenCV, labels and edges equal."
    cv2 = pytest.importorskip("cv2")
    r = np.random.RandomState(0)
    image = r.randint(0, 256, (*size, 3)).astype(np.uint8)
    mask = np.kron(r.randint(0, 5, (12, 12)), np.ones((6, 6))).astype(np.uint8)[
        : size[0], : size[1]
    ]
    long = int(base * scale + 0.5)
    new = (
        (long, int(size[1] * long / size[0] + 0.5))
        if size[0] > size[1]
        else (int(size[0] * long / size[1] + 0.5), long)
    )
    t = TrainTransform(
        recipe_for("sanet_s", "camvid").preprocess, new, (scale,), 0.0, "black", base, True
    )
    x, y = t(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask))
    assert scaled_size(size, scale, base)[0] == new
    ref = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    assert (
        np.abs(t.preprocess.undo(x).permute(1, 2, 0).numpy().astype(int) - ref.astype(int)).mean()
        <= 1
    )

    def nearest(a):
        return cv2.resize(a, new[::-1], interpolation=cv2.INTER_NEAREST)

    assert np.array_equal(y[0].numpy(), nearest(mask)) and np.array_equal(
        y[1].numpy(), nearest(boundary_target(torch.from_numpy(mask)).numpy())
    )


@pytest.mark.parametrize(
    "variant, total, keys", [("s", 8_947_289, 389), ("m", 12_454_897, 519), ("l", 18_511_089, 765)]
)
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module."])
def test_checkpoints(variant, total, keys, prefix):
    """Every key has a place or a reason in each variant, whatever wrapper it comes in; parameters
    add up to the official count."""
    f = need("sanet_s")
    state = official(f, variant)
    assert len(state) + sum(k.endswith("running_var") for k in state) == keys
    wrapped = {prefix + k: v for k, v in state.items()}
    if prefix:
        wrapped["sem_loss.criterion.weight"] = torch.zeros(19, device="meta")
    with torch.device("meta"):
        m = create_model(f"sanet_{variant}", seed=None)
    report = load_official(m, {"state_dict": wrapped, "epoch": 3})
    ignored = sum(n for k, _, n, param in report.ignored if param and not k.startswith("sem_loss"))
    assert num_params(m) + ignored == total


def test_checkpoints_that_do_not_fit():
    f = need("sanet_s")
    state = official(f)

    def message(model, s):
        with torch.device("meta"):
            m = create_model(model, seed=None)
        with pytest.raises(ValueError) as e:
            load_official(m, s)
        return str(e.value)

    assert "sanet_s with 19 classes" in message("sanet_m", state)
    text = message("sanet_s", {**state, "model_x.weight": torch.zeros(2, device="meta")})
    assert "keys without a place (1): model_x.weight" in text
    assert "11 classes" in message(
        "sanet_s", official(f, k=11)
    ) and "expected (19, 64, 1, 1)" in message("sanet_s", official(f, k=11))
    assert "deploy()" in message("sanet_s", official(f, aux=False))
    assert "no SANet" in message("sanet_s", {"conv.weight": torch.zeros(1)})
    with torch.device("meta"):
        m = create_model("sanet_s", seed=None).deploy()
    assert not [
        k for k, why, *_ in load_official(m, official(f, aux=False)).ignored if "auxiliary" in why
    ]
    assert any("auxiliary" in why for _, why, *_ in load_official(m, state).ignored)


@pytest.mark.parametrize("name", ["sanet_s", "sanet_m", "sanet_l"])
def test_counts(name):
    "Parameters exactly, operations within 1 %, with and without the auxiliary heads, and the norms that fold."
    row = load_table("costs")["sanet"][name]
    with torch.device("meta"):
        m = create_model(name, seed=None).eval()
    assert num_params(m) == row["live"]
    assert abs(macs(m.outputs, (1024, 2048)) / 1e9 / row["gmacs_1024x2048"] - 1) < 0.01
    m.deploy()
    assert num_params(m) == row["deployed"]
    for size in ((1024, 2048), (720, 960)):
        assert abs(macs(m, size) / 1e9 / row[f"deployed_gmacs_{size[0]}x{size[1]}"] - 1) < 0.01
    folded = [c for c in conv_chains(create_model(name).eval().deploy()) if c[1] is not None]
    assert len(folded) == {"sanet_s": 41, "sanet_m": 63, "sanet_l": 104}[name]


def test_deploy_forms(net):
    "The folded form is the same network; the paper's speed form is not."
    f = need("sanet_s")
    x = f.inputs()["x"][..., :128, :256].contiguous()
    with torch.no_grad():
        ref = net(x)
        fast = optimize(net)
        bare = speed_form(net)
        assert_close("folded", ref, fast(x), 1e-5)
        assert (bare(x) - ref).norm() > 0.1 * ref.norm()
    # the speed model as published counts 8,785,476 parameters, 8,797,508 - 8,264,820 of them never called
    assert num_params(bare) == 8_785_476 - (8_797_508 - 8_264_820)
    assert (
        sum(isinstance(m, torch.nn.BatchNorm2d) for m in bare.modules())
        == sum(isinstance(m, torch.nn.BatchNorm2d) for m in bare.spp.modules())
        == 10
    )


@pytest.mark.parametrize("context", list(CONTEXTS))
def test_contexts(context):
    m = create_model("sanet_s", 5, context=context).eval()
    x = make_input([2, 3, 64, 104])
    with torch.no_grad():
        assert m(x).shape == (2, 5, 8, 13)
    assert m(x, torch.zeros(2, 64, 104, dtype=torch.long))["loss"].isfinite()


def test_classwise(tmp_path):
    "A boundary head with one channel per class trains, and comes back from its file."
    from segkern.models import load, save

    m = create_model("sanet_s", 5, classwise=True, context="dappm", ohem=None)
    losses = m(make_input([2, 3, 64, 96]), torch.randint(0, 5, (2, 64, 96)))
    losses["loss"].backward()
    assert m.boundary_head.classifier.weight.grad.abs().sum() > 0 and losses["boundary"] > 0
    from segkern.explain import boundary_picture

    assert boundary_picture(m.eval(), np.zeros((64, 96, 3), np.uint8)).shape == (64, 96, 3)
    back = load(save(m, tmp_path / "m.safetensors"))
    assert (
        back.options == m.options
        and m.eval().outputs(make_input([1, 3, 64, 96]))["boundary"].shape[1] == 6
    )


def test_bad_input():
    m = create_model("sanet_s", 5)
    with pytest.raises(ValueError, match="multiples of 8, got 100x100"):
        m(make_input([1, 3, 100, 100]))
    with pytest.raises(ValueError, match="at least 2 pictures"):
        m(make_input([1, 3, 128, 192]))
    with pytest.raises(ValueError, match="Google Drive"):
        create_model("sanet_s", pretrained=True)
    with pytest.raises(ValueError, match="unknown context 'aspp'"):
        create_model("sanet_s", context="aspp")
    with pytest.raises(ValueError, match="one channel"):
        balanced_bce(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="expected 0..4 or 255"):
        class_boundary_target(torch.full((4, 4), 7), 5)
    with pytest.raises(ValueError, match="balance"):
        class_boundary_loss(
            torch.zeros(1, 6, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long), "focal"
        )


def test_keys_have_one_place():
    "No two official keys fall onto one of our names."
    f = need("sanet_s")
    names = [map_key(k, key_rules())[0] for k, _, d in f.spec["keys"] if "float" in d]
    kept = [n for n in names if n]
    assert len(kept) == len(set(kept)) and all(
        map_key(k, key_rules()) != (None, "") for k, _, d in f.spec["keys"] if "float" in d
    )


def test_modules_alone():
    "Blocks with other widths, odd maps, double precision gradients."
    torch.manual_seed(0)
    m = APPPM(6, 4, 4).double().eval()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, x, atol=1e-5)
    s = SAD(4, 3).double()
    args = [
        torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
        for size in ((3, 5), (3, 5), (3, 5), (2, 2))
    ]
    assert torch.autograd.gradcheck(s, args, atol=1e-5)
    plain = F.conv2d(args[2] * s.gate(args[0] + args[1]) + args[2], s.out.weight)
    assert plain.shape == (1, 3, 3, 5)


@pytest.mark.parametrize("variant", "sml")
def test_encoder(variant):
    "The trunk alone, with the network's own weights."
    import segkern

    f = need("sanet_s")
    with torch.device("meta"):
        e = segkern.create_encoder(f"sanet_{variant}", seed=None)
    assert any(
        "encoder does not have" in why
        for _, why, *_ in load_official(e, official(f, variant)).ignored
    )
    if variant != "s":
        return
    e = segkern.create_encoder("sanet_s").eval()
    m = create_model("sanet_s").eval()
    for net in (e, m):
        load_official(net, f.state())
    x = f.inputs()["x"][..., :64, :128]
    with torch.no_grad():
        assert_close("1/8", F.relu(m.decode(x)[2]), e(x)[1], 1e-6)


def test_convert_and_predict(tmp_path):
    "An official training file becomes one of ours, and labels a picture."
    import segkern
    from PIL import Image
    from segkern.cli.app import main

    f = need("sanet_s")
    state = {f"model.{k}": v for k, v in f.state().items()} | {
        "sem_loss.criterion.weight": torch.ones(19)
    }
    torch.save({"epoch": 1, "best_mIoU": 0.5, "state_dict": state}, tmp_path / "best.pth.tar")
    assert (
        main(
            [
                "convert",
                str(tmp_path / "best.pth.tar"),
                "--model",
                "sanet_s",
                "--dataset",
                "cityscapes",
                "--out",
                str(tmp_path / "sanet.safetensors"),
            ]
        )
        == 0
    )
    image, _ = segkern.open_dataset("streets", split="val", size=(104, 160))[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "street.png")
    assert (
        main(
            [
                "predict",
                str(tmp_path / "sanet.safetensors"),
                str(tmp_path / "street.png"),
                "--out",
                str(tmp_path / "labels"),
            ]
        )
        == 0
    )
    m = create_model("sanet_s").eval()
    load_official(m, f.state())
    labels = np.array(Image.open(next((tmp_path / "labels").glob("*.png"))))
    assert (
        np.array_equal(labels, m.predict(m.preprocess(image)[None])[0].numpy())
        and len(np.unique(labels)) > 1
    )
    assert (
        main(
            [
                "convert",
                str(tmp_path / "best.pth.tar"),
                "--model",
                "sanet_m",
                "--dataset",
                "cityscapes",
                "--out",
                str(tmp_path / "m.safetensors"),
            ]
        )
        == 1
    )
