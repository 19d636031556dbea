"""Golden outputs from re-implementations (`tests/oracles`): the networks keep them, the re-implementations give them
again and agree with the authors' outputs where there are any."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oracles import cgrseg, plain, s2fpn, sanet, seaformer, segformer, segnext, swin, vit_adapter
from oracles.zoo import ORACLES, ORIGIN
from shared import need
from segkern.models import create_model, list_models
from segkern.testing import golden_origin, relative_l2, shared
from segkern.testing.fixtures import load_fixture
from segkern.weights import load_official

FIXTURES = Path(__file__).parent / "fixtures"
WRITTEN = [
    pytest.param(n, marks=pytest.mark.slow) if oracle.large else n for n, oracle in ORACLES.items()
]


def network(golden):
    "The network of a fixture, with its official weights."
    name, options = golden.spec["model"], golden.spec["options"]
    k = 19 if name.startswith(("sanet", "s2fpn")) else 150
    with torch.device("meta"):
        m = create_model(name, k, seed=None, **options)
    m = m.to_empty(device="cpu").eval()
    load_official(m, golden.state())
    return m


def answers(m, x, names):
    "Our outputs under the names of the golden ones: heads, the classifier's map, maps of the encoder, named parts."
    host = getattr(m, "host", m)
    parts = {}
    for n in names:
        if hasattr(m, n) and n not in ("feature", "outputs"):
            m.get_submodule(n).register_forward_hook(lambda mod, i, o, n=n: parts.update({n: o}))
    with torch.no_grad():
        found = {**m.outputs(x), **parts}
        if "feat" in names:
            found["feat"] = m.feature(x)
        if any(n.startswith("map") for n in names):
            found |= {f"map{i}": t for i, t in enumerate(host.encoder(x), 1)}
    return {n: found[n] for n in names}


@pytest.mark.parametrize("name", WRITTEN)
def test_networks_keep_them(name):
    "In single precision, every kept output."
    golden = need(name)
    assert golden.spec["origin"] == ORIGIN
    found = answers(network(golden), golden.inputs()["x"], list(golden.golden))
    errors = {n: golden.error(n, t) for n, t in found.items()}
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_reimplementations_answer_again(name):
    "The stored numbers are theirs, and in double precision the network gives the same everywhere."
    golden = need(name)
    oracle = ORACLES[name]
    spec = oracle.spec()
    assert {n: golden.spec[n] for n in spec} == spec
    with torch.no_grad():
        again = oracle.outputs()
    for n in golden.golden:
        assert golden.error(n, again[n]) < 1e-6, n
    m = network(golden).double()
    for n, t in answers(m, golden.inputs()["x"].double(), list(golden.golden)).items():
        assert relative_l2(again[n], t) <= 1e-8, n


def of_s2fpn(depth, pool):
    def answer(state, inputs):
        found = s2fpn.answer(state, depth, pool, inputs["x"])
        heads = [n for n in found if n == "logits" or n.startswith("sup")]
        size = inputs["x"].shape[2:]
        return found | {n: plain.up(found[n], size, align_corners=True) for n in heads}

    return answer


def of_segnext(state, inputs):
    start = F.normalize(inputs["bases_raw"].abs(), dim=1).double()
    return segnext.answer(state, "t", inputs["x"], start)


def picture(answer):
    "Of the only input."
    return lambda state, inputs: answer(state, next(iter(inputs.values())))


AUTHORS = {  # fixture -> the re-implementation of its family
    "s2fpn_v1_r18": of_s2fpn(18, True),
    "s2fpn_r34m": of_s2fpn(34, False),
    "sanet_s": picture(lambda s, x: sanet.answer(s, "sanet_s", x)),
    "segformer_b0": picture(lambda s, x: segformer.answer(s, 0, "nvlabs", x)),
    "segformer_b0_mmseg": picture(lambda s, x: segformer.answer(s, 0, "mmseg", x)),
    "ssa_head_segformer_b0": picture(lambda s, x: segformer.answer(s, 0, "mmseg", x)),
    "ssa_upernet_swin_t": picture(lambda s, x: swin.answer(s, "t", x)),
    "segnext_t": of_segnext,
    "seaformer_b": picture(lambda s, x: seaformer.answer(s, "seaformer_b", x)),
    "cgrseg_b": picture(lambda s, x: cgrseg.answer(s, "cgrseg_b", x)),
}
# theirs -> ours, where names differ
RENAMED = dict(main="logits", fused="feat", stage4="map4")
RENAMED |= {f"c{i}": f"map{i}" for i in (1, 2, 3, 4)}
OF_THE_CLASSIFIER = dict(head_logits="logits", center_pos="spatial", pred_proto="semantic")
SLOW = ("ssa_upernet_swin_t",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in AUTHORS]
)
def test_reimplementations_agree_with_the_authors(name):
    "Every family whose authors' code has answered: all outputs that both have."
    f = need(name)
    names = RENAMED | OF_THE_CLASSIFIER if name.startswith("ssa_") else RENAMED
    with torch.no_grad():
        found = AUTHORS[name](f.state(), f.inputs())
    compared = {}
    for n, shape, _ in f.spec["outputs"]:
        ours = found.get(names.get(n, n))
        if ours is not None and list(ours.shape) == shape:
            compared[n] = f.error(n, ours)
    assert {"logits", "main", "head_logits"} & set(compared) and max(compared.values()) < 3e-6


def test_deformable_attention_agrees_with_its_authors():
    "Of ViT-Adapter, whose network has no official output: three levels, four heads."
    f = need("msdeform_attn")
    state = {f"attn.{k}": t for k, t in f.state().items()}
    net = vit_adapter.Plain(state, width=64, depth=0, heads=4)
    query, tokens = (f.inputs()[n].double() for n in ("query", "feat"))
    sizes = [(8, 12), (4, 6), (2, 3)]
    assert f.error("out", net.deform(query, [(4, 6)], tokens, sizes, "attn")) < 1e-6


def test_keys_are_the_authors():
    "Of the checkpoints whose lists are known; sizes of the others as the specification counts them."
    known = {
        "sanet_s": sanet.official_keys("sanet_s"),
        "s2fpn_r34m": s2fpn.official_keys("s2fpn", 34),
        "segformer_b0": segformer.official_keys(0, "nvlabs"),
        "ssa_head_segformer_b0": segformer.official_keys(0, "mmseg", ssa=True),
        "ssa_upernet_swin_t": swin.official_keys("t"),
        "seaformer_b": seaformer.official_keys("seaformer_b"),
        "cgrseg_b": cgrseg.net_keys("cgrseg_b", 150),
    }
    for name, keys in known.items():
        theirs = {k: tuple(s) for k, s, _ in need(name).spec["keys"]}
        heads = ("seghead.", "apf")  # of as many classes as the data set has
        assert set(theirs) == set(keys), name
        assert all(theirs[k] == keys[k] or k.startswith(heads) for k in keys), name
    sizes = {"sanet_m": (519, 12_454_897), "sanet_l": (765, 18_511_089)}
    for name, (count, params) in sizes.items():
        keys = sanet.official_keys(name)
        assert (len(keys), keys.params()) == (count, params)


def test_copies_are_the_authors_outputs():
    "Names and shapes as each specification says; equal to the shared folder where that is beside the checkout."
    folders = sorted((FIXTURES / "official").iterdir())
    assert len(folders) >= 38
    for folder in folders:
        f = load_fixture(folder)
        assert "origin" not in f.spec and len(f.inputs()) == len(f.spec["input"])
        for n, shape, stride in f.spec.get("outputs", ()):
            points = torch.empty(shape, device="meta")
            points = points[..., ::stride, ::stride] if points.ndim >= 3 else points
            assert f.golden[n].shape == points.shape, (f.name, n)
        beside = shared(f"parity/{f.name}")
        if beside:
            assert json.loads((beside / "spec.json").read_text()) == f.spec
            assert (beside / "golden.npz").read_bytes() == (folder / "golden.npz").read_bytes()


def test_size_of_the_fixtures():
    assert sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file()) < 6_000_000


def test_who_answered_for_which_network():
    "README's column is true: the networks that have a golden output of their own, and whose it is."
    found = {}
    for name in list_models():
        found.setdefault(golden_origin(name), []).append(name)
    theirs = "cgrseg_b dsanet s2fpn_r18 s2fpn_r34m s2fpn_v1_r18 sanet_s sasformer_sparse_b4 seaformer_b segformer_b0 "
    theirs += "segformer_b0_mmseg segformer_b0_mmseg_ssa segnext_t spfnet_r18 upernet_swin_t upernet_swin_t_ssa"
    again = "afformer_b afformer_b_ssa cgrseg_b_ssa ocrnet_hr48 ocrnet_hr48_ssa s2fpn_r34 s2fpn_v1_r34 s2fpn_v1_r34m "
    again += "sanet_l sanet_m seaformer_b_ssa seaformer_l seaformer_l_ssa segformer_b5 segformer_b5_mmseg "
    again += "segformer_b5_mmseg_ssa segnext_t_ssa upernet_swin_l upernet_swin_l_ssa vit_adapter_l vit_adapter_l_ssa"
    assert sorted(found["official"]) == theirs.split()
    assert sorted(found["re-implementation"]) == again.split()
