"Golden outputs of the official networks and modules."

from copy import deepcopy

import numpy as np
import pytest
import torch

from shared import need
from segkern.core import load_table
from segkern.backbones.blocks import num_params
from segkern.losses import cross_entropy, focal_of_mean
from segkern.models import create_model, set_literal
from segkern.models.s2fpn_blocks import SSAM, SSAMv1
from segkern.ops import use_impl
from segkern.testing import assert_close, load_fixture, make_input, relative_l2
from segkern.testing.memory import exact_interpreter, launches
from segkern.weights import load_official, map_key

NETS = {
    "s2fpn_r18": "s2fpn_r18",
    "s2fpn_r34m": "s2fpn_r34m",
    "s2fpn_v1_r18": "s2fpn_v1_r18",
    "dsanet": "dsanet",
    "spfnet_r18": "spfnet_r18",
}
FEATURES = {
    "conv2_x": "encoder.body.layer1",
    "conv5_x": "encoder.body.layer4",
    "apf1": "apf1",
    "apf4": "apf4",
    "gfu1": "gfu1",
    "spatial": "detail",
    "bn_prelu_2": "post2",
    "bn_prelu_3": "post3",
    "bn_prelu_4": "post4",
    "spfm": "spfm",
    "dsc5": "dsc5",
    "dsc2": "dsc2",
    "egca2": "egca2",
    "fuse": "fuse",
}


def loaded(f, name):
    "The model of a fixture with its official weights."
    m = create_model(name, f.spec["variant"]["classes"]).eval()
    return m, load_official(m, f.state())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("literal", [False, True], ids=["ours", "literal"])
def test_network(name, literal):
    """Every head, every named feature, the five losses and the input gradient. The gradient in double: in single
    precision a rounding may decide a ReLU, and which one differs between processors."""
    f = need(name)
    m, report = loaded(f, NETS[name])
    set_literal(m, literal)
    assert num_params(m) + report.ignored_params == f.spec["params"]
    seen = {}
    for golden, path in FEATURES.items():
        if golden in f.golden:
            m.get_submodule(path).register_forward_hook(
                lambda mod, i, o, g=golden: seen.__setitem__(g, o[0] if isinstance(o, tuple) else o)
            )
    x = f.inputs()["x"]
    with torch.no_grad():
        out = m.outputs(x)
    for n, z in out.items():
        assert f.error(n, m.upsample(z, x.shape[-2:])) <= 2e-5, n
    assert set(seen) == set(FEATURES) & set(f.golden)
    for n, t in seen.items():
        assert f.error(n, t) <= 2e-5, n
    if "losses" not in f.golden:
        return
    k = m.num_classes
    y = torch.from_numpy(np.random.RandomState(7).randint(0, k + 1, (len(x), *x.shape[-2:])))
    y[y == k] = 255
    with torch.no_grad():
        losses = m(x, y)
    assert f.error("losses", torch.stack([losses[n] for n in out])) <= 2e-5
    exact = x.double().requires_grad_()
    (1000 * m.double()(exact, y)["loss"]).backward()
    assert f.error("grad_input", exact.grad) <= 2e-5


@pytest.mark.parametrize("name", ["s2fpn_r18", "s2fpn_v1_r18"])
def test_gradients_in_single_precision(name):
    """Gradients of the input and of every parameter against those in double. A fault shows at every picture, a ReLU
    that a rounding decides at few: each gradient must be close at one of three pictures."""
    m = create_model(name, 7).eval()
    errors = {}
    exact = deepcopy(m).double()
    for g in (p for net in (m, exact) for n, p in net.named_parameters() if n.endswith("gamma")):
        g.data.fill_(0.5)
    for seed in range(3):
        x = make_input([1, 3, 64, 96], seed)
        grads = []
        y = torch.from_numpy(np.random.RandomState(seed).randint(0, 7, (1, 64, 96)))
        for net in (exact, m):
            net.zero_grad()
            a = x.to(next(net.parameters()).dtype).requires_grad_()
            (1000 * net(a, y)["loss"]).backward()
            grads.append({"input": a.grad} | {n: p.grad.clone() for n, p in net.named_parameters()})
        for n, ref in grads[0].items():
            errors.setdefault(n, []).append(relative_l2(ref, grads[1][n]))
    assert len(errors) > 100 and max(map(min, errors.values())) <= 1e-4, max(
        (min(e), n) for n, e in errors.items()
    )


@pytest.mark.parametrize("name", ["s2fpn_r18", "s2fpn_v1_r18"])
def test_deploy_keeps_logits(name):
    f = need(name)
    m, _ = loaded(f, name)
    x = f.inputs()["x"]
    with torch.no_grad():
        assert f.error("logits", m.upsample(m.deploy()(x), x.shape[-2:])) <= 2e-5


GRADS = {
    "grad_gamma": "gamma",
    "grad_conv_sh_weight": "project.weight",
    "grad_fuse_conv_weight": "fuse.conv.weight",
}
V2 = {
    "grad_bn_sh1_weight": "bn_key.weight",
    "grad_bn_sh1_bias": "bn_key.bias",
    "grad_bn_sh2_weight": "bn_query.weight",
    "grad_bn_sh2_bias": "bn_query.bias",
    "grad_augmment_conv_weight": "gates.weight",
    "grad_augmment_conv_bias": "gates.bias",
    "grad_conv_v_weight": "value.weight",
    "grad_conv_v_bias": "value.bias",
    "grad_fuse_out_conv_weight": "fuse_out.conv.weight",
}
V1 = {
    "grad_bn_sh1_weight": "bn_max.weight",
    "grad_bn_sh1_bias": "bn_max.bias",
    "grad_bn_sh2_weight": "bn_mean.weight",
    "grad_bn_sh2_bias": "bn_mean.bias",
}


def ssam(f, version):
    "The attention alone, filled through the network's own key table."
    module = SSAM(16) if version == 2 else SSAMv1(16)
    rules = create_model("s2fpn_r18" if version == 2 else "s2fpn_v1_r18").key_rules({})
    prefix, inner = (
        ("apf1.sa.tr.0.attn.", "apf1.strip.attn.") if version == 2 else ("apf1.sa.", "apf1.strip.")
    )
    state = {}
    for k, v in f.state().items():
        name, why = map_key(prefix + k, rules)
        assert name or why, k
        if name:
            state[name.removeprefix(inner)] = v
    missing = module.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(
        k.endswith("num_batches_tracked") for k in missing.missing_keys
    )
    return module.eval()


@pytest.mark.parametrize("literal", [False, True], ids=["ours", "literal"])
@pytest.mark.parametrize("version", [2, 1])
def test_ssam(version, literal, monkeypatch):
    "Intermediates, both gammas, every parameter's gradient, and batch statistics in training."
    import segkern.models.s2fpn_blocks as module

    f = need("ssam" if version == 2 else "ssam_v1")
    m = ssam(f, version)
    m.literal = literal
    x = f.inputs()["x"].requires_grad_()
    if version == 2:
        q, k, v = m.qkv(x)
        a, context, gate = m.gate_literal(q, k, v)
        parts = dict(query=q, key_strip=k, value_strip=v, att=a, context=context, gate=gate)
        if not literal:
            parts["gate"] = m.gate(q, k, v)
    else:
        top, mean, gate, fused = m.strips(x)
        parts = dict(
            max_strip=top, avg_strip=mean, gate=gate, fusion=gate[:, :1] * mean + gate[:, 1:] * top
        )
    for n, t in parts.items():
        assert f.error(n, t) <= 2e-5, n
    cotangent = make_input(x.shape, 111 if version == 2 else 112)

    def run():
        x.grad = None
        m.zero_grad()
        out = m(x)
        (out * cotangent).sum().backward()
        return out

    assert f.error("out", run()) <= 2e-5 and f.error("grad_x", x.grad) <= 1e-4
    m.gamma.data.fill_(0.5)
    assert f.error("out_g05", run()) <= 2e-5 and f.error("grad_x_g05", x.grad) <= 1e-4
    grads = {n: p.grad for n, p in m.named_parameters()}
    names = GRADS | (V2 if version == 2 else V1)
    assert set(names.values()) == set(grads)
    for golden, n in names.items():
        assert f.error(golden, grads[n]) <= 1e-4, golden
    monkeypatch.setattr(module, "DROPOUT", 0.0)
    m.train()
    assert f.error("train_out", run()) <= 1e-3 and f.error("train_grad_x", x.grad) <= 1e-3


def test_losses():
    "Weighted cross-entropy and the official focal loss, with gradients."
    f = need("s2fpn_misc")
    z = f.inputs()["logits"].requires_grad_()
    y = torch.from_numpy(np.random.RandomState(7).randint(0, 12, (2, 9, 13)))
    y[y == 11] = 255
    w = torch.tensor(load_table("camvid")["class_weights"])
    for name, fn in dict(
        ce_camvid=lambda: cross_entropy(z, y, w),
        focal=lambda: focal_of_mean(z, y),
        focal_camvid=lambda: focal_of_mean(z, y, weight=w),
    ).items():
        z.grad = None
        loss = fn()
        (1000 * loss).backward()
        assert f.error(name, loss[None]) <= 1e-4, name
        assert f.error(f"{name}_grad", z.grad) <= 1e-4, name
    z19 = f.inputs()["logits19"]
    y19 = torch.from_numpy(np.random.RandomState(7).randint(0, 20, (2, 9, 13)))
    y19[y19 == 19] = 255
    assert (
        f.error(
            "ce_cityscapes",
            cross_entropy(z19, y19, torch.tensor(load_table("cityscapes")["class_weights"]))[None],
        )
        <= 1e-4
    )
    for name in ("camvid", "cityscapes"):
        assert (
            f.error(f"class_weights_{name}", torch.tensor(load_table(name)["class_weights"]))
            <= 1e-6
        )


def own_fixtures():
    "Folders of the project's own fixtures."
    from pathlib import Path

    return sorted((Path(__file__).parent / "fixtures").glob("*/spec.json"))


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("folder", [p.parent for p in own_fixtures()], ids=lambda p: p.name)
def test_own_fixture(folder, impl):
    "Outputs that were written when parity held: they keep it where the shared folder is absent, with kernels as well."
    if impl == "triton" and not exact_interpreter():
        pytest.skip("kernels need TRITON_INTERPRET=1 here")
    f = load_fixture(folder)
    m = create_model(f.name, f.spec["num_classes"]).eval()
    load_official(m, f.state())
    with torch.no_grad(), use_impl(impl), launches() as seen:
        for n, z in m.outputs(f.inputs()["x"]).items():
            assert f.error(n, z) <= 2e-5, n
    assert bool(seen) == (impl == "triton" and "s2fpn" in f.name)


def test_every_op_on_triton():
    "Loss, gradient and labels of S2-FPN with all kernels, in the interpreter, are those of the references."
    if not exact_interpreter():
        pytest.skip("kernels need TRITON_INTERPRET=1 here")
    m = create_model("s2fpn_r18", num_classes=5).eval()
    x = torch.randn(1, 3, 40, 64)
    out = {}
    y = torch.randint(0, 5, (1, 40, 64))
    for p in m.parameters():
        # gamma starts at 0, where the attention has no effect
        if (p == p.flatten()[0]).all():
            p.data.add_(0.1)
    for impl in ("ref", "triton"):
        a = x.clone().requires_grad_()
        with use_impl(impl), launches() as seen:
            loss = m(a, y)["loss"]
            loss.backward()
            out[impl] = loss, a.grad, m.predict(x)
    assert {
        "_strip_pool_bwd_kernel",
        "_strip_attention_dq_kernel",
        "_strip_attention_dkv_kernel",
        "_upsample_ce_bwd_kernel",
        "_upsample_argmax_kernel",
    } <= set(seen)
    assert_close("loss", out["ref"][0], out["triton"][0], 2e-6)
    assert_close("dx", out["ref"][1], out["triton"][1], 2e-5)
    assert torch.equal(out["ref"][2], out["triton"][2])
