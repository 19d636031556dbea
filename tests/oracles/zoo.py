"Which networks have a golden output from a re-implementation, and how each was made."

from dataclasses import dataclass, field
from typing import Callable

from oracles import (
    afformer,
    cgrseg,
    ocrnet,
    s2fpn,
    sanet,
    seaformer,
    segformer,
    segnext,
    swin,
    vit_adapter,
)
from segkern.testing import Fixture, state_of

ORIGIN = "double-precision re-implementation"


@dataclass
class Oracle:
    "A network of the specifications: official keys, an answer in double precision, what is kept of it."

    keys: dict  # official key -> shape
    answer: Callable  # (state, picture) -> outputs by name
    size: tuple  # of the picture
    strides: dict  # output -> stride of what is kept
    model: str = ""  # where the fixture has another name
    options: dict = field(default_factory=dict)  # of `create_model`
    extra: dict = field(default_factory=dict)  # further fields of the specification
    large: bool = False  # minutes, or gigabytes

    def spec(self):
        "Keys and inputs, as they stand in a fixture."
        keys = [[k, list(v.shape), str(v.dtype)] for k, v in state_of(self.keys).items()]
        return dict(keys=keys, input=[["x", [1, 3, *self.size], 0]], **self.extra)

    def outputs(self):
        "The answer to the picture, with weights made from the names of the keys."
        source = Fixture("", self.spec(), {})
        return self.answer(source.state(), source.inputs()["x"])


SSA = dict(logits=3, coarse=4, feat=6)
MAPS = dict(map1=8, map2=8, map3=4, map4=3)
# gammas of the size of trained ones: at their fill the deep blocks amplify every rounding
SMALL_SCALES = {"fill_scale": {".layer_scale_": 0.1}}
# unnormalised branches grow to hundreds, where a softmax is a choice and a rounding makes another one
SMALL_REGIONS = {
    "fill_scale": {
        "decode_head.0.conv_seg.": 0.01,
        "decode_head.1.bottleneck.bn.weight": 0.02,
        "decode_head.1.bottleneck.bn.bias": 0.02,
    }
}


def of_s2fpn(kind, pool):
    strides = dict(logits=1, sup1=1, sup2=1, sup3=1, sup4=2, gfu1=4)
    keys = s2fpn.official_keys(kind, 34)
    # products of maps overflow with the standard fill: slopes stay at their first value, as official fixtures do it
    slopes = [k for k in keys if k.endswith(".act.weight")]
    return Oracle(
        keys,
        lambda state, x: s2fpn.answer(state, 34, pool, x),
        (72, 104),
        strides if pool else {n: 2 * stride for n, stride in strides.items()},
        extra={"keep": slopes, "keep_value": 0.25} if slopes else {},
    )


def of_segformer_b5(form, ssa):
    return Oracle(
        segformer.official_keys(5, form, ssa=ssa),
        lambda state, x: segformer.answer(state, 5, form, x),
        (64, 96),
        {**(SSA if ssa else dict(logits=3, feat=6)), **MAPS},
        large=True,
    )


def of_sanet(name):
    strides = dict(logits=1, aux=1, boundary=1, layer4=4, layer5=2, dp1=8, dp2=8, spp=1, decoder=4)
    return Oracle(
        sanet.official_keys(name),
        lambda state, x: sanet.answer(state, name, x),
        (128, 192),
        strides,
    )


def of_seaformer(name):
    return Oracle(
        seaformer.ssa_official_keys(name),
        lambda state, x: seaformer.answer(state, name, x),
        (128, 192),
        SSA,
    )


def of_segnext(v, **kw):
    return Oracle(
        segnext.official_keys(v),
        lambda state, x: segnext.answer(state, v, x),
        (96, 160),
        {**SSA, "map4": 2},
        **kw,
    )


def of_cgrseg(name):
    return Oracle(
        cgrseg.net_keys(name, 150, ssa=True),
        lambda state, x: cgrseg.answer(state, name, x),
        (128, 192),
        {**SSA, "map4": 2},
        extra=SMALL_SCALES,
    )


def of_vit_adapter(head, size, picture, **kw):
    options = {} if size is vit_adapter.LARGE else dict(width=head, encoder_options=size)
    return Oracle(
        vit_adapter.ssa_official_keys(150, head, **size),
        lambda state, x: vit_adapter.answer(state, size, x),
        picture,
        {**SSA, "aux": 1, **MAPS},
        model="vit_adapter_l_ssa",
        options=options,
        **kw,
    )


NARROW = dict(width=256, depth=8, heads=8, inner=32)
ORACLES = {
    "s2fpn_v1_r34": of_s2fpn("s2fpn_v1", True),
    "s2fpn_v1_r34m": of_s2fpn("s2fpn_v1", False),
    "s2fpn_r34": of_s2fpn("s2fpn", True),
    "segformer_b5": of_segformer_b5("nvlabs", False),
    "segformer_b5_mmseg_ssa": of_segformer_b5("mmseg", True),
    "upernet_swin_l_ssa": Oracle(
        swin.official_keys("l"),
        lambda state, x: swin.answer(state, "l", x),
        (96, 128),
        {**SSA, "aux": 1, **MAPS},
        large=True,
    ),
    "sanet_m": of_sanet("sanet_m"),
    "sanet_l": of_sanet("sanet_l"),
    "seaformer_b_ssa": of_seaformer("seaformer_b"),
    "seaformer_l_ssa": of_seaformer("seaformer_l"),
    "segnext_t_ssa": of_segnext("t"),
    "cgrseg_b_ssa": of_cgrseg("cgrseg_b"),
    "afformer_b_ssa": Oracle(
        afformer.ssa_official_keys(),
        afformer.answer,
        (128, 192),
        {**SSA, **MAPS, "map4": 8},
        extra={"aliases": afformer.aliases()},
    ),
    "ocrnet_hr48_ssa": Oracle(
        ocrnet.official_keys(),
        ocrnet.answer,
        (64, 96),
        {**SSA, "aux": 3, **MAPS},
        extra=SMALL_REGIONS,
    ),
    "vit_adapter_narrow": of_vit_adapter(128, NARROW, (96, 128)),
    "vit_adapter_l_ssa": of_vit_adapter(512, vit_adapter.LARGE, (64, 96), large=True),
}
