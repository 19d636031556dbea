"The model contract over every published name."

import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

import segkern
from segkern.core import load_table
from segkern.backbones.blocks import num_params
from segkern.models import cost, create_model, list_models, load, macs, save, set_literal
from segkern.testing import (
    assert_close,
    check_model,
    load_fixture,
    make_input,
    relative_l2,
    state_of,
)
from segkern.weights import load_official

FIXTURES = Path(__file__).parent / "fixtures"
SMALLEST = [
    "s2fpn_r18",
    "s2fpn_v1_r18",
    "spfnet_r18",
    "dsanet",
    "sanet_s",
    "pidnet_s",
    "segformer_b0",
    "segformer_b0_mmseg",
    "sasformer_icip_b0",
    "sasformer_sparse_b0",
]
TOTAL = {
    "s2fpn_v1_r18": 30_515_570,
    "s2fpn_v1_r34": 40_623_730,
    "s2fpn_v1_r34m": 40_623_730,
    "s2fpn_r18": 21_827_433,
    "s2fpn_r34": 31_935_593,
    # parameters of the official networks, 19 classes
    "s2fpn_r34m": 31_935_593,
    "s2fpn_r50": 46_695_593,
}
ROUGHLY = {
    "s2fpn_v1_r50": 42.85e6,
    "s2fpn_v1_r101": 61.84e6,
    "s2fpn_v1_r152": 77.48e6,
    "s2fpn_r101": 65.69e6,
    "s2fpn_r152": 81.33e6,
}


def official_state(name, k=19):
    "An official state dict of any S2-FPN: the decoder's keys are all networks' alike, the encoder's are torchvision's."
    version = 1 if "_v1_" in name else 2
    spec = load_fixture(FIXTURES / ("s2fpn_v1_r18" if version == 1 else "s2fpn_r18")).spec
    with torch.device("meta"):
        m = create_model(name, k, seed=None)
    shapes = {
        key: [k if d == 19 and "conv.weight" not in key else d for d in s]
        for key, s, _ in spec["keys"]
        if not re.match(r"conv[2-5]_x", key)
    }
    for key in shapes:
        if re.search(r"(classifier\.2|\.fc)\.conv\.weight$", key):
            shapes[key][0] = k
    for key, v in m.state_dict().items():
        if hit := re.match(r"encoder\.body\.layer(\d)\.", key):
            shapes[f"conv{int(hit[1]) + 1}_x.{key[hit.end() :]}"] = list(v.shape)
        if version == 2 and (hit := re.match(r"down\.layer", key)):
            shapes["down" + key[hit.end() :]] = list(v.shape)
    return state_of({k: s for k, s in shapes.items() if not k.endswith("num_batches_tracked")})


@pytest.mark.parametrize("name", list_models())
def test_builds_on_meta(name):
    "Every name builds without memory, and its logits have the promised size on an odd picture."
    with torch.device("meta"):
        m = create_model(name, 7, seed=None).eval()
    size = (64 if m.multiple > 1 else 37, 96 if m.multiple > 1 else 53)
    with torch.no_grad():
        out = m.outputs(torch.empty(1, 3, *size, device="meta"))
    assert out["logits"].shape == (1, 7, *(-(-s // m.stride) for s in size))
    assert all(v.shape[1] == (1 if n == "boundary" else 7) for n, v in out.items())


@pytest.mark.parametrize("name", [n for n in list_models("s2fpn*")])
def test_official_keys(name):
    "Every official key has a place or a reason, and the parameters add up to the official count."
    with torch.device("meta"):
        m = create_model(name, 19, seed=None)
    report = load_official(
        m, {"model": {f"module.{k}": v for k, v in official_state(name).items()}}
    )
    total = num_params(m) + report.ignored_params
    if name in TOTAL:
        assert total == TOTAL[name]
    else:
        assert abs(total / ROUGHLY[name] - 1) < 2e-4, total
    assert len({ours for _, ours in report.loaded}) == len(report.loaded)


@pytest.mark.parametrize(
    "size",
    [
        "512x1024",
        pytest.param("1024x2048", marks=pytest.mark.slow),
        pytest.param("360x480", marks=pytest.mark.slow),
    ],
)
def test_costs(size):
    "The paper form is within 1 % of the official network's operations, at every size."
    h, w = map(int, size.split("x"))
    for name, row in load_table("costs")["s2fpn"].items():
        c = cost(name, 19, (h, w))
        assert abs(c["paper_gmacs"] / row[f"gmacs_{size}"] - 1) < 0.01, (name, c, row)
        assert row["live"] in (None, c["params"]) and c["gmacs"] < c["paper_gmacs"]


@pytest.mark.parametrize("name", SMALLEST)
def test_contract(name):
    "Odd sizes, losses, void pixels, gradients, predict."
    m = create_model(name, 11)
    check_model(m, (72, 104) if m.multiple > 1 else (67, 101))


@pytest.mark.parametrize("name", SMALLEST)
def test_layouts_and_repeats(name):
    """Evaluation is repeatable, and a channels-last, sliced or lone picture gives the same logits: in double to 1e-10.
    In single precision each form adds up in its own order, and a deep network without training enlarges that (3e-7 to
    1.4e-5, PIDNet's differ tenfold between processors): as close to double as every fixture's outputs, twice over."""
    m = create_model(name, 5).eval()
    x = make_input([2, 3, 40, 56], 3)
    double = deepcopy(m).double()
    big = make_input([2, 3, 42, 58])
    big[:, :, 1:-1, 1:-1] = x
    last = x.contiguous(memory_format=torch.channels_last)
    forms = {"channels last": last, "sliced": big[:, :, 1:-1, 1:-1], "alone": x[:1]}
    with torch.no_grad():
        ref = m(x)
        exact = double(x.double())
        assert torch.equal(ref, m(x))
        assert_close("plain", exact, ref, 4e-5)
        for form, other in forms.items():
            truth = exact[: len(other)]
            assert_close(f"{form} in double", truth, double(other.double()), 1e-10)
            assert_close(form, truth, m(other), 4e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(ref, m(x)) < 0.15


@pytest.mark.parametrize(
    "name", [n for n in SMALLEST if n.startswith("s") and "former" not in n and n != "sanet_s"]
)
@pytest.mark.parametrize("size", [(1, 1), (101, 67), (33, 65)], ids=str)
def test_any_size(name, size):
    "Networks without a multiple take any picture."
    m = create_model(name, 5).eval()
    x = make_input([1, 3, *size])
    labels = m.predict(x)
    assert labels.shape == (1, *size) and labels.max() < 5


@pytest.mark.parametrize("name", SMALLEST)
def test_round_trip(name, tmp_path):
    "A saved model comes back from its file alone, also in its deploy form."
    m = create_model(name, 11, seed=3).eval()
    x = make_input([1, 3, 32, 48])
    with torch.no_grad():
        ref = m(x)
        for form in (m, m.deploy()):
            back = load(save(form, tmp_path / "m.safetensors"))
            assert (
                torch.equal(back(x), ref)
                and back.name == name
                and back.classes == m.classes
                and back.preprocess == m.preprocess
            )


def test_seeds():
    "The seed decides the weights, and the caller's generator is left alone."
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    a = create_model("dsanet", 5, seed=1)
    b = create_model("dsanet", 5, seed=2)
    assert torch.equal(torch.rand(1), before)
    assert not torch.equal(a.classifier.weight, b.classifier.weight)


def test_batch_statistics_and_dropout_follow_training_only():
    "`m(x, target)` computes every head in evaluation mode too."
    m = create_model("s2fpn_v1_r18", 5).eval()
    x = make_input([2, 3, 32, 32])
    y = torch.zeros(2, 32, 32, dtype=torch.uint8)
    a = m(x, y)
    b = m(x, y)
    assert torch.equal(a["loss"], b["loss"]) and set(a) == {
        "loss",
        "logits",
        "sup1",
        "sup2",
        "sup3",
        "sup4",
    }
    assert abs(a["loss"] - sum(v for n, v in a.items() if n != "loss")) < 1e-5


@pytest.mark.parametrize("size", [(40, 56), (41, 77)], ids=str)
def test_literal_form(size):
    "Exact rewrites against the forms as written, in double precision, with gradients."
    for name in ("s2fpn_r18", "spfnet_r18"):
        m = create_model(name, 5).double().eval()
        x = make_input([1, 3, *size]).double()
        for g in (p for n, p in m.named_parameters() if n.endswith("gamma")):
            g.data.fill_(0.5)
        y = torch.from_numpy(np.random.RandomState(0).randint(0, 5, (1, *size)))
        grads = []
        for literal in (False, True):
            m.zero_grad()
            loss = set_literal(m, literal)(x, y)["loss"]
            loss.backward()
            grads.append(
                {n: p.grad.clone() for n, p in m.named_parameters()} | {"loss": loss.detach()}
            )
        for n in grads[0]:
            assert (grads[0][n] - grads[1][n]).norm() <= 1e-8 * (1 + grads[1][n].norm()), (name, n)


def test_compile():
    "Inference and the training step trace without a graph break."
    m = create_model("s2fpn_v1_r18", 5).eval()
    x = make_input([1, 3, 32, 48])
    with torch.no_grad():
        assert_close("compiled", m(x), torch.compile(m, backend="eager", fullgraph=True)(x), 1e-5)
    current = create_model("s2fpn_r18", 5).eval()
    y = torch.zeros(1, 32, 48, dtype=torch.uint8)
    ref = current(x, y)["loss"]
    got = torch.compile(current, backend="aot_eager", fullgraph=True)(x, y)["loss"]
    assert_close("compiled loss", ref, got, 1e-5)


def test_export():
    "torch.export keeps the logits."
    m = create_model("s2fpn_r18", 5).eval()
    x = make_input([1, 3, 32, 48])
    program = torch.export.export(m, (x,))
    assert_close("exported", m(x), program.module()(x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_onnx(name, tmp_path):
    "The exported ONNX graph gives the same logits in onnxruntime."
    onnxruntime = pytest.importorskip("onnxruntime")
    m = create_model(name, 5).eval()
    x = make_input([1, 3, 32, 48])
    torch.onnx.export(m, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert_close("onnx", m(x), torch.from_numpy(got), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in list_models() if n not in SMALLEST])
def test_contract_of_the_others(name):
    m = create_model(name, 11)
    check_model(m, (64, 96) if m.multiple > 1 else (37, 53))


def test_macs_of_one_convolution():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, device="meta")
    assert macs(conv, (10, 20)) == 3 * 8 * 9 * 200


def test_encoders():
    "Every encoder keeps its promise about channels and strides."
    for name in segkern.list_encoders():
        with torch.device("meta"):
            e = segkern.create_encoder(name, seed=None).eval()
        h, w = (64, 96) if getattr(e, "multiple", 1) > 1 else (70, 90)
        maps = e(torch.empty(1, 3, h, w, device="meta"))
        assert [tuple(t.shape[1:]) for t in maps] == [
            (c, -(-h // s), -(-w // s)) for c, s in zip(e.channels, e.strides)
        ]


def test_wrong_options():
    with pytest.raises(ValueError, match="s2fpn_r18"):
        create_model("s2fpn_r8")
    with pytest.raises(ValueError, match="does not take"):
        create_model("dsanet", 5, widht=3)
    with pytest.raises(ValueError, match="scratch"):
        create_model("dsanet", 5, pretrained=True)
    with pytest.raises(ValueError, match="11 classes"):
        create_model("dsanet", 5, dataset="camvid")
    with pytest.raises(ValueError, match="multiples of 8"):
        create_model("dsanet", 5).eval()(make_input([1, 3, 12, 16]))
