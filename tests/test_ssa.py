"SSAClassifier: parity, equations as loops, names, files, corner cases."

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import need
from segkern.backbones.blocks import num_params, set_literal
from segkern.losses.distill import (
    at_grid,
    boundary_cells,
    relation_distillation,
    response_distillation,
)
from segkern.models import cost, create_model, list_models, load, save
from segkern.models.ssa import SSA, SSAClassifier, ssa_losses
from segkern.testing import assert_close, check_model, make_input, relative_l2
from segkern.weights import load_official

# millions of parameters, without teacher, true GMAC
SPEC = {"segformer_b0_ssa": (4.320, 4.057, 10.35), "segformer_b5_ssa": (82.575, 82.312, 76.82)}


def slow_teacher(net, feat, pos, y):
    "The teacher's centres with loops."
    w = net.seg.weight[:, :, 0, 0]
    b = net.basis.weight
    k = net.num_classes
    sem = torch.stack(
        [
            feat.permute(0, 2, 3, 1)[y == c].mean(0) if (y == c).any() else w[c].detach()
            for c in range(k)
        ]
    )
    spa = torch.stack(
        [
            torch.stack(
                [
                    pos[i].permute(1, 2, 0)[y[i] == c].mean(0)
                    if (y[i] == c).any()
                    else b[c].detach()
                    for c in range(k)
                ]
            )
            for i in range(len(y))
        ]
    )
    g = net.teacher.content(torch.cat([sem, w], -1))[None]
    h = net.teacher.place(torch.cat([spa, b.expand(len(y), -1, -1)], -1))
    z = net.teacher.out(g + h)
    f = (feat + pos).flatten(2)

    def unit(t, d):
        return t / (t.norm(dim=d, keepdim=True) + 1e-12)

    return 15 * (unit(z, 2) @ unit(f, 1)).unflatten(2, feat.shape[2:]), g, h


def slow_response(student, teacher, y):
    "The response loss class by class."
    q = teacher.softmax(1)
    e = boundary_cells(y)
    ok = y != 255
    t = (q + F.one_hot(torch.where(ok, y, 0), q.shape[1]).permute(0, 3, 1, 2)) / 2
    ce = -(t * student.log_softmax(1)).sum(1)
    h = -(q * (q + 1e-12).log()).sum(1) * ok
    parts = [
        (sum((ce * h)[(y == c) & m].sum() / (h[(y == c) & m].sum() + 1e-12) for m in (e, ~e))) / 2
        for c in y.unique()
        if c != 255
    ]
    return sum(parts) / len(parts)


@pytest.mark.parametrize(
    "k,c,size", [(2, 8, (5, 7)), (11, 16, (13, 17)), (150, 32, (14, 9))], ids=str
)
def test_against_loops(k, c, size):
    "Teacher, answers and losses, with gradients, in double precision; some classes are absent."
    torch.manual_seed(0)
    net = SSAClassifier(k, c, dropout=0).double()
    feat = make_input([2, c, *size], 1).double().requires_grad_()
    y = torch.from_numpy(np.random.RandomState(3).randint(0, k, (2, *size)))
    y[:, :2], y[y == 1] = 255, 0
    a = net.student_output(feat)
    for x, z in zip(
        net.teacher_output(feat, a.position, y), slow_teacher(net, feat, a.position, y)
    ):
        assert relative_l2(z, x) < 1e-10
    fast, slow = (
        f(a.logits, make_input(a.logits.shape, 5).double(), y)
        for f in (response_distillation, slow_response)
    )
    assert_close("response", slow, fast, 1e-5)  # the fast one computes in float32
    set_literal(net)
    assert relative_l2(net.student_output(feat).logits, a.logits) < 1e-10


def test_relation_is_one_sided():
    x = make_input([1, 4, 6], 1)
    assert relation_distillation(x, x) == 0 and relation_distillation(x * 0 + x[:, :1], x) > 0


@pytest.mark.parametrize("name", SPEC)
def test_costs(name):
    "Parameters with and without teacher, and every product counted."
    full, deployed, gmacs = SPEC[name]
    with torch.device("meta"):
        m = create_model(name, 150, seed=None)
    assert (
        abs(num_params(m) / 1e6 - full) < 6e-4
        and abs(num_params(m.deploy()) / 1e6 - deployed) < 6e-4
    )
    assert abs(cost(name, 150, (512, 512))["paper_gmacs"] / gmacs - 1) < 0.01


def test_official_file_and_deployed_form():
    "A file with its teacher fills the model; the deploy form lists the teacher as unused; a baseline file is refused."
    f = need("ssa_head_segformer_b0")
    m = create_model("segformer_b0_ssa", 150).eval()
    report = load_official(m, {"state_dict": f.state()})
    assert num_params(m) + report.ignored_params == f.spec["params"]
    small = create_model("segformer_b0_mmseg_ssa", 150).deploy().eval()
    report = load_official(small, f.state())
    assert all("teacher" in why or "buffer" in why for _, why, *_ in report.ignored)
    x = f.inputs()["img"]
    with torch.no_grad():
        assert torch.equal(small(x), m(x))
    with pytest.raises(ValueError, match="tensors left empty"):
        load_official(m, need("segformer_b0_mmseg").state())


@pytest.mark.parametrize(
    "case", ["void", "one picture void", "absent", "two classes", "tiny", "minus"]
)
def test_corner_cases(case):
    "Ignored pictures, absent classes, K=2, maps smaller than the boundary's frame: finite, and right."
    k = 2 if case == "two classes" else 5
    size = (31, 33) if case == "tiny" else (64, 72)
    m = create_model("segformer_b0_ssa", k)
    x = make_input([2, 3, *size])
    y = torch.from_numpy(np.random.RandomState(1).randint(0, k, (2, *size)))
    if case == "void":
        y[:] = 255
    if case == "one picture void":
        y[0] = 255
    if case == "absent":
        y[y > 1] = 0
    losses = m(x, y)
    losses["loss"].backward()
    assert all(torch.isfinite(v) for v in losses.values()) and all(
        torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None
    )
    if case == "void":
        assert losses["loss"] == 0 and all(
            (p.grad == 0).all() for p in m.parameters() if p.grad is not None
        )


@pytest.mark.parametrize(
    "size, inside",
    [((12, 12), 0), ((12, 30), 0), ((30, 12), 0), ((15, 15), 1), ((14, 31), 1), ((11, 30), None)],
    ids=str,
)
def test_frame_of_the_boundary(size, inside):
    """A frame of six cells has no edges, so a side of twelve leaves none; smaller maps, which the
    reference cannot take, keep theirs."""
    ids = (torch.arange(size[0])[:, None] // 3 + torch.arange(size[1]) // 3)[None] % 5
    cells, (h, w) = boundary_cells(ids)[0], size
    if min(size) < 12:
        assert cells.any()
    else:
        # dilated by one
        assert (
            not cells[:5].any()
            and not cells[h - 5 :].any()
            and not cells[:, :5].any()
            and not cells[:, w - 5 :].any()
        )
        assert cells.any() == bool(inside)


def test_a_module_in_bfloat16_trains():
    m = create_model("segformer_b0_ssa", 7).bfloat16()
    x = make_input([2, 3, 64, 64]).bfloat16()
    losses = m(x, torch.randint(0, 7, (2, 64, 64)))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and all(
        p.grad.dtype == torch.bfloat16 for p in m.parameters() if p.grad is not None
    )
    with pytest.raises(ValueError, match=r"target must be ids \[2, h, w\], got \(2, 1, 64, 64\)"):
        m(x, torch.zeros(2, 1, 64, 64, dtype=torch.long))


def test_the_alias_has_the_same_recipe():
    from segkern.core import recipe_for

    for dataset in ("ade20k", "cityscapes", "camvid", "streets", "pascal_context"):
        assert recipe_for("segformer_b2_ssa", dataset) == recipe_for(
            "segformer_b2_mmseg_ssa", dataset
        )
    for host in ("upernet_swin_t", "ocrnet_hr48", "segnext_t", "seaformer_b", "cgrseg_b"):
        assert recipe_for(f"{host}_ssa", "camvid").crop == (360, 360)


def test_names():
    "Published hosts have their _ssa; every other host on request; SegFormer's short name is an alias."
    assert {f"segformer_b{i}_mmseg_ssa" for i in range(6)} <= set(
        list_models("*_ssa")
    ) and "s2fpn_r18_ssa" not in list_models()
    others = list_models("*_ssa", all=True)
    assert (
        "s2fpn_r18_ssa" in others
        and "sanet_s_ssa" in others
        and create_model("segformer_b0_ssa", 3).name == "segformer_b0_mmseg_ssa"
    )
    with pytest.raises(ValueError, match="segformer_b5_mmseg_ssa"):
        create_model("segformer_b9_mmseg_ssa")
    with pytest.raises(ValueError, match="1x1 convolution"):
        SSA(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["segformer_b0_ssa", "s2fpn_v1_r18_ssa"])
def test_contract(name, tmp_path):
    "The contract, a round trip in both forms, and no change of logits by deploy."
    m = create_model(name, 7)
    x = make_input([1, 3, 61, 45])
    check_model(m, (61, 45))
    ref = m.eval()(x)
    for form in (m, m.deploy()):
        assert torch.equal(load(save(form, tmp_path / "m.safetensors"))(x), ref)


def test_compile_and_export():
    m = create_model("segformer_b0_ssa", 5).eval()
    x = make_input([1, 3, 32, 48])
    with torch.no_grad():
        assert_close("compiled", m(x), torch.compile(m, backend="eager", fullgraph=True)(x), 1e-5)
    assert_close("exported", m(x), torch.export.export(m.deploy(), (x,)).module()(x), 1e-4)


def test_deploy_has_no_loss():
    m = create_model("segformer_b0_ssa", 5).deploy()
    with pytest.raises(RuntimeError, match="deploy form"):
        m(make_input([1, 3, 32, 32]), torch.zeros(1, 32, 32, dtype=torch.long))
    net = SSAClassifier(3, 4).deploy()
    feat = make_input([1, 4, 5, 5])
    with pytest.raises(RuntimeError, match="deploy form"):
        ssa_losses(net, net.student_output(feat), feat, torch.zeros(1, 9, 9, dtype=torch.long))


def test_nearest_rule():
    "Labels on the grid are pixel floor(i H/h)."
    y = torch.arange(63).view(1, 7, 9)
    assert torch.equal(at_grid(y, (3, 4))[0], y[0][[0, 2, 4]][:, [0, 2, 4, 6]])


def test_upernet_parity():
    "Swin, decoder, both heads, prototypes and every loss of the official UPerNet with the classifier."
    f = need("ssa_upernet_swin_t")
    m = create_model("upernet_swin_t_ssa", 150).eval()
    report = load_official(m, f.state())
    assert num_params(m) + report.ignored_params == f.spec["params"]
    x = f.inputs()["img"]
    y = torch.from_numpy(f.golden["label"])[:, 0].long()
    with torch.no_grad():
        maps = m.host.encoder(x)
        feat, aux = m.features(x)
        a = m.classifier.student_output(feat)
        losses = m(x, y)
    found = {
        **{f"c{i}": t for i, t in enumerate(maps, 1)},
        "feat": feat,
        "coarse": a.coarse,
        "center_pos": a.spatial,
        "pred_proto": a.semantic,
        "head_logits": a.logits,
        "aux": aux["aux"],
        "logits": m.upsample(a.logits, x.shape[2:]),
    }
    for n, t in found.items():
        assert f.error(n, t) <= 2e-5, n
    terms = {
        "train.aux.loss_ce": losses["aux"],
        "train.decode.loss_ce": losses["loss"] - losses["aux"],
        **{f"train.decode.{n}": v for n, v in losses.items() if n not in ("loss", "aux")},
    }
    for n, t in terms.items():
        assert f.error(n, t) <= 1e-4, n
    assert set(found) | set(terms) == set(f.golden) - {"label"}


@pytest.mark.parametrize(
    "name,full,deployed,gmacs",
    [
        ("upernet_swin_t_ssa", 62.123, 61.073, 240.87),
        ("upernet_swin_b_ssa", 123.461, 122.411, 302.99),
        ("upernet_swin_l_ssa", 235.941, 234.891, 411.61),
        ("ocrnet_hr48_ssa", 72.714, 71.664, 171.13),
    ],
)
def test_costs_of_hosts(name, full, deployed, gmacs):
    "Parameters with and without teacher (the count leaves auxiliary heads in), and every product counted."
    with torch.device("meta"):
        m = create_model(name, 150, seed=None)
    assert abs(num_params(m) / 1e6 - full) < 6e-4
    m.classifier.deploy()
    assert abs(num_params(m) / 1e6 - deployed) < 1.1e-3  # both published figures are rounded
    c = cost(name, 150, (512, 512))
    assert abs(c["paper_gmacs"] / gmacs - 1) < 0.01, c
