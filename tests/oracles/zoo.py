"Which networks have a golden output from a re-implementation, and how each was made."

from dataclasses import dataclass, field
from typing import Callable

from oracles import afformer, cgrseg, ocrnet, sanet, seaformer, segnext, vit_adapter
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


SSA = dict(logits=2, coarse=3, feat=4)
MAPS = dict(map1=8, map2=4, map3=4, map4=2)
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
        {**SSA, **MAPS},
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
