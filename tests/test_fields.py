"Receptive fields: the tracer against gradients, the path counts and calculators against the golden outputs."

import copy
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared import need
import segkern
from segkern.explain import field as X
from segkern.explain import gradients as P
from segkern.explain.draw import field_figure, fields_figure
from segkern.explain.field import receptive_field, receptive_fields
from segkern.explain.gradients import effective_field, field_shares, footprint
from segkern.explain.paths import (
    backward_field,
    calculators_table,
    count_picture,
    forward_field,
    path_counts,
    save_counts,
)
from segkern.explain.tracer import trace

TO_L3 = [(3, s) for s in (2, 2, 1, 1, 2, 1, 1, 1)]
SPATIAL = [(3, 1, d) for d in (1, 2, 5, 7, 13)]


@pytest.fixture(scope="module")
def golden():
    f = need("sanet_rf")
    return f


# path counts and calculators


def test_counts_equal_the_official_tool(golden):
    trunk = path_counts(TO_L3)
    alone = path_counts(SPATIAL)
    all_of_it = path_counts(TO_L3 + SPATIAL)
    case = golden.spec["cases"]["generator"]
    assert [len(c) for c in trunk] == case["sizes_L3"] and len(np.unique(trunk[-1])) == case[
        "distinct_values_L3"
    ]
    assert [j for _, j in forward_field(TO_L3)] == case["strides_L3"]
    assert [len(c) for c in all_of_it[8:]] == case["sizes_after_dilated"] and [
        c.max() for c in all_of_it[8:]
    ] == case["max_after_dilated"]
    assert [len(c) for c in alone] == case["sizes_dilated_alone"] and [
        c.max() for c in alone
    ] == case["max_dilated_alone"]
    assert [(c > 0).sum() for c in alone] == case["nonzero_dilated_alone"]
    for name, got in (
        ("layer2", trunk[2]),
        ("L3", trunk[-1]),
        ("dilated_alone", alone[-1]),
        ("L3_dp_rows", all_of_it[-1][::16, ::16]),
    ):
        assert np.array_equal(got.astype(np.float32), golden.golden[f"counts_{name}"]), name


def test_picture_equals_the_official_one_bit_for_bit(golden, tmp_path):
    from PIL import Image

    want = golden.golden["image_layer1_bgr"][..., ::-1].astype(np.uint8)
    assert np.array_equal(count_picture(path_counts(TO_L3)[1]), want)
    files = save_counts(TO_L3[:2], tmp_path / "new")
    assert [f.name for f in files] == ["0.png", "1.png"] and np.array_equal(
        np.asarray(Image.open(files[1])), want
    )
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["0.png", "1.png"]


def test_calculators_equal_the_official_ones(golden):
    cases = golden.spec["cases"]
    for name in ("regseg", "sanet_trunk", "sanet_branch"):
        case = cases[f"forward_{name}"]
        assert [
            list(v) for v in forward_field([(k, s, d) for k, s, _, d in case["layers_k_s_p_d"]])
        ] == case["rf_stride"], name
    for name in ("default", "2d"):
        layers = [
            tuple(tuple(v) if isinstance(v, list) else v for v in layer[1:])
            for layer in cases[f"backward_{name}"]["layers"]
        ]
        want = [
            tuple(v) if isinstance(v, list) else v
            for v in cases[f"backward_{name}"]["field_seen_at_layer_input"]
        ]
        assert backward_field(layers, official=True) == want, name


@pytest.mark.parametrize("seed", range(5))
def test_both_calculators_agree_with_each_other_and_with_a_trace(seed):
    rng = random.Random(seed)
    layers = [
        (rng.choice((1, 2, 3, 5)), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 4)))
        for _ in range(5)
    ]
    net = nn.Sequential(*[nn.Conv2d(3, 3, k, s, dilation=d, padding=d * k) for k, s, d in layers])
    row = receptive_fields(net, (64, 64), names=[str(i) for i in range(5)])
    assert [r[3] for r in row.raw[:5]] == [r for r, _ in forward_field(layers)]
    assert backward_field(layers)[0] == forward_field(layers)[-1][0]


def test_the_table_of_calculators_marks_wrong_values():
    t = calculators_table([(3, 2), (3, 1, 2), (3, 1, 4)])
    assert [r[-1] for r in t.raw] == ["wrong: 23 for 27", "wrong: 11 for 13", "wrong: 7 for 9"]
    assert calculators_table([(1, 2), (3, 1)]).raw[0][-1] == "wrong: 6 for 5"
    assert not any(r[-1] for r in calculators_table([(3, 2), (3, 1, 2)]).raw)
    two = calculators_table([(3, 2), ((3, 5), (1, 2)), (3, 1, 2)])
    assert two.raw[0][6] == "15 x 27" and two.raw[0][-1] == ""


@pytest.mark.parametrize("layers", [[(4, 2)], [(3, 2), (2, 1)], [((3, 5), 1)]])
def test_even_kernels_have_no_path_counts(layers):
    with pytest.raises(ValueError, match="odd"):
        path_counts(layers)


@pytest.mark.parametrize("fn", [path_counts, forward_field, backward_field])
@pytest.mark.parametrize("layers", [[(3,)], [(3, 1, 1, 1)], [(0, 1)], [(3, 0)]])
def test_malformed_layers_are_refused(fn, layers):
    with pytest.raises(ValueError, match="layer 0"):
        fn(layers)


def test_counts_too_large_for_int64_stay_exact():
    last = path_counts([(3, 1)] * 40)[-1]
    assert last.dtype == object and last.sum() == 9**40
    count_picture(last, 1)


def test_a_single_count_is_green_and_empty_cells_are_black():
    p = count_picture(np.array([[0, 3], [3, 0]]), 1)
    assert p[0, 0].tolist() == [0, 0, 0] and p[0, 1].tolist() == [0, 255, 128]


# the tracer against gradients


def agree(net, size, places, **kw):
    "Mask by rule and by gradient, pixel by pixel; several outputs by key."
    tracer, seen = trace(net, size, [])
    assert not tracer.assumed
    x, out = P._prepare(net, size, "average", 0, [])
    ours = X.tensor_maps(seen[None])
    theirs = X.tensor_maps(out[None])
    for key, t in theirs.items():
        h, w = t.shape[-2:]
        for i, j in places:
            where = (min(int(i * h), h - 1), min(int(j * w), w - 1))
            want = P._gradient(t, x, where, P._output_weights(t, "average", 0), keep=True) != 0
            r = tracer.get(ours[key])
            got = X.pixel_field(r, where, size).mask if r is not None else np.zeros(size, bool)
            assert np.array_equal(got, want), (key, where, got.sum(), want.sum())


PLACES = [(0.5, 0.5), (0, 0), (1, 1), (0.3, 1), (0, 0.7)]


class Random(nn.Module):
    "A net of random layers on 4 channels; `plan` is made while the first picture goes through."

    def __init__(self, seed, depth=7):
        super().__init__()
        self.rng = random.Random(seed)
        self.parts = nn.ModuleList()
        self.plan = None
        self.depth = depth

    def layer(self):
        rng = self.rng
        r = self.rng.randint
        k = (r(1, 5), r(1, 5))
        d = (r(1, 3), r(1, 3))
        conv = nn.Conv2d(
            4, 4, k, (r(1, 3), r(1, 2)), (r(0, 4), r(0, 4)), d, groups=rng.choice((1, 2, 4))
        )
        up = nn.ConvTranspose2d(
            4,
            4,
            (r(1, 4), r(1, 4)),
            (r(1, 3), r(1, 2)),
            r(0, 1),
            dilation=d,
            groups=rng.choice((1, 2)),
        )
        flat = nn.Conv2d(4, 4, 3, 1, 1)
        mode = rng.choice(("bilinear", "bilinear", "nearest", "nearest-exact", "bicubic"))
        n = r(2, 5)
        p = r(0, 1)
        scale = rng.choice((0.7, 1.5, 2, 2.3))
        corners = {} if mode.startswith("nearest") else {"align_corners": bool(r(0, 1))}

        def resize(m, x):
            return F.interpolate(x, scale_factor=scale, mode=mode, **corners)

        return rng.choice(
            [
                (conv, lambda m, x: m(x).relu()),
                (conv, lambda m, x: m(x)),
                (up, lambda m, x: m(x)),
                (flat, lambda m, x: x + m(x)),
                (flat, lambda m, x: torch.cat([m(x)[:, :2], x[:, 2:]], 1)),
                (flat, lambda m, x: F.channel_shuffle(torch.cat([m(x)[:, 1:], x[:, :1]], 1), 2)),
                (
                    flat,
                    lambda m, x: (
                        x
                        * F.interpolate(
                            m(F.avg_pool2d(x, 3, 2, 1)),
                            x.shape[2:],
                            mode="bilinear",
                            align_corners=bool(p),
                        ).sigmoid()
                    ),
                ),
                (None, lambda m, x: F.avg_pool2d(x, n, 2, p, ceil_mode=bool(p))),
                (None, lambda m, x: F.max_pool2d(x, n, 2, p)),
                (None, lambda m, x: F.adaptive_avg_pool2d(x, (n, 2 * n))),
                (None, resize),
                (None, lambda m, x: F.pad(x, (n, p, 1, -1), value=0.7)),
                (None, lambda m, x: F.pad(x, (1, 0, 2, 1), mode="reflect")),
                (None, lambda m, x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
                (None, lambda m, x: x.flip(2).roll(1, 3)),
                (None, lambda m, x: torch.cat([x, x.mean(3, keepdim=True)], 3)),
                (nn.Conv2d(4, 16, 1, groups=4), lambda m, x: F.pixel_shuffle(m(x), 2)),
                (
                    nn.Conv2d(16, 4, 1, groups=2),
                    lambda m, x: m(
                        F.pixel_unshuffle(x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2], 2)
                    ),
                ),
                (nn.GroupNorm(2, 4), lambda m, x: m(x)),
                (None, lambda m, x: x * x.softmax(3)),
                (None, lambda m, x: x.transpose(2, 3)),
                (flat, lambda m, x: x[:, :, ::2, 1:] + m(x)[:, :, ::2, 1:]),
            ]
        )

    def forward(self, x):
        if self.plan is None:
            x = x[:, [0, 1, 2, 0]]
            self.plan = []
            while len(self.plan) < self.depth:
                m, fn = self.layer()
                try:
                    y = fn(m, x)
                except (RuntimeError, ValueError):
                    continue
                if y.shape[1] != 4 or min(y.shape) < 1 or max(y.shape) > 60:
                    continue
                x = y
                self.parts.append(m or nn.Identity())
                self.plan.append(fn)
            return x
        x = torch.cat([x, x[:, :1]], 1)
        for m, fn in zip(self.parts, self.plan):
            x = fn(m, x)
        return x


def one_random_net(seed):
    size = random.Random(seed).choice([(17, 23), (24, 31), (13, 40), (29, 16)])
    net = Random(seed)
    with torch.no_grad():
        net(torch.rand(1, 3, *size))
    agree(net, size, PLACES)


@pytest.mark.parametrize("seed", range(12))
def test_random_nets_agree_with_their_gradient(seed):
    one_random_net(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_nets_agree_with_their_gradient(block):
    for seed in range(100 + 25 * block, 125 + 25 * block):
        one_random_net(seed)


class Windows(nn.Module):
    "Attention inside windows, rows, columns; tokens cut and joined; unfold."

    def __init__(self, normed=False):
        super().__init__()
        self.normed = normed
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv1d(4, 4, 3, padding=1)

    def attend(self, t):
        return (t @ t.transpose(-1, -2)).softmax(-1) @ t

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        win = x.view(b, c, h // 4, 4, w // 6, 6).permute(0, 2, 4, 3, 5, 1).reshape(-1, 24, c)
        win = (
            self.attend(win)
            .view(b, h // 4, w // 6, 4, 6, c)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(b, c, h, w)
        )
        rows = (
            self.attend(x.permute(0, 2, 3, 1).reshape(b * h, w, c))
            .view(b, h, w, c)
            .permute(0, 3, 1, 2)
        )
        heads = x.flatten(2).transpose(1, 2).reshape(b, h * w, 2, c // 2).transpose(1, 2)
        cut = heads[:, :, 5:9]
        cross = (
            F.scaled_dot_product_attention(heads, cut, cut)
            .transpose(1, 2)
            .reshape(b, h, w, c)
            .permute(0, 3, 1, 2)
        )
        line = self.mix(x.flatten(2)).view(b, c, h, w)
        patches = F.unfold(x, 3, padding=1, stride=2).view(b, c * 9, h // 2, w // 2)
        moved = x.unfold(2, 4, 2).unfold(3, 4, 2).mean((-1, -2))
        gram = torch.einsum("bchw,bchv->bwv", x, x)[:, None]
        stack = torch.stack([x[..., 1:], x[..., :-1]], 1)[:, 1]
        out = dict(
            win=win,
            rows=rows,
            cross=cross,
            line=line,
            patches=patches,
            moved=moved,
            gram=gram,
            stack=stack,
        )
        return out | dict(norm=F.instance_norm(x)) if self.normed else out


def test_windows_tokens_and_patches_agree_with_their_gradient():
    agree(Windows(), (8, 12), PLACES)
    f = receptive_field(Windows(normed=True), (8, 12), output="norm")
    assert f.whole and not f.assumed


def test_channels_keep_their_own_fields():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 4, 3, padding=1)
            self.c = nn.Conv2d(4, 4, (1, 5), groups=4, padding=(0, 2))

        def forward(self, x):
            x = self.a(x)
            y = torch.cat([x[:, :1], self.b(x)[:, 1:3], self.c(x)[:, 3:]], 1)
            z = F.channel_shuffle(y, 2)
            out = {f"{n}{i}": t[:, i : i + 1] for n, t in (("y", y), ("z", z)) for i in range(4)}
            return out | dict(pixels=F.pixel_shuffle(y, 2), grouped=self.c(z), pair=z[:, 1:3])

    agree(Parts(), (9, 10), [*PLACES, (0.55, 0.5), (0.5, 0.55), (0.55, 0.55)])
    sums = [receptive_field(Parts(), (9, 10), output=f"z{i}").mask.sum() for i in range(4)]
    assert sums == [1, 9, 9, 5]


def test_a_softmax_over_one_element_is_constant():
    class One(nn.Module):
        def forward(self, x):
            return x[:, :1].softmax(1)

    assert not receptive_field(One(), (8, 8)).mask.any() and not footprint(One(), (8, 8)).mask.any()


WRITES = [
    (lambda x, y: y.add_(x.flip(3)), True),
    (lambda x, y: y[:, :, :2].add_(x.flip(3)[:, :, :2]), False),
]


@pytest.mark.parametrize("write,exact", WRITES, ids=["whole", "view"])
def test_writing_in_place_is_seen_through_every_name(write, exact):
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            write(x, y)
            return y

    f = receptive_field(InPlace(), (8, 9), where=(0, 1))
    g = footprint(InPlace(), (8, 9), where=(0, 1))
    assert (f.mask >= g.mask).all() and g.mask.sum() == 2 and bool(f.assumed) == (not exact)
    if exact:
        assert np.array_equal(f.mask, g.mask)


def test_hooks_see_a_map_before_it_is_written_over():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = net

        def forward(self, x):
            return self.a(x).add_(x.mean())

    for fn in (receptive_field, footprint):
        assert fn(Add(), (16, 16), at="a").height == 3 and fn(Add(), (16, 16)).whole


def test_weights_made_from_the_picture_are_listed():
    class Dynamic(nn.Module):
        def forward(self, x):
            return F.conv2d(x, F.adaptive_avg_pool2d(x, 3), padding=1)

    f = receptive_field(Dynamic(), (9, 9))
    assert f.whole and f.assumed == ("convolution",)


def test_running_sums_see_what_came_before():
    class Sum(nn.Module):
        def forward(self, x):
            return F.glu(x.cumsum(3)[:, :2].repeat(1, 2, 1, 1), 1)

    agree(Sum(), (6, 7), PLACES)


def test_unknown_operations_are_listed_and_logged(caplog):
    class Sample(nn.Module):
        def forward(self, x):
            return F.grid_sample(
                x[:, :, :8],
                torch.zeros(1, 4, 4, 2, device=x.device, dtype=x.dtype),
                align_corners=False,
            )

    log = logging.getLogger("segkern")
    log.propagate = True
    with caplog.at_level(logging.WARNING, "segkern"):
        f = receptive_field(Sample(), (16, 16))
    assert (
        f.assumed == ("grid_sampler_2d",)
        and f.box == (0, 0, 8, 16)
        and caplog.text.count("grid_sampler_2d") == 1
    )
    assert (
        "assumed" in repr(f)
        and "assumed: grid_sampler_2d" in receptive_fields(Sample(), (16, 16)).raw[-1][-1]
    )


# models of the package

FAMILIES = ["s2fpn_r18", "s2fpn_v1_r18", "spfnet_r18", "dsanet", "sanet_s", "pidnet_s"]


def model(name):
    if name not in segkern.list_models():
        pytest.skip(f"{name} is not in this version")
    return segkern.create_model(name)


def compare(name, size, depth, keep=lambda n: True):
    "Every map of the named modules at its centre: differing maps, number of maps."
    net = model(name)
    names = [n for n, _ in net.named_modules() if n and n.count(".") < depth and keep(n)]
    rows, assumed = X._traced_maps(net, size, names)
    x, seen = P._prepare(net, size, "average", 0, names)
    theirs = {}
    for n in [*names, None]:
        maps = X.tensor_maps(seen.get(n))
        keys = [k for k, t in maps.items() if t.ndim == 4 and t.requires_grad]
        for k in keys:
            theirs[(n or "output") + "".join(f"[{i}]" for i in k if len(keys) > 1)] = maps[k]
    bad = []
    for n, (t, r) in rows.items():
        where = X.output_pixel(None, t.shape)
        other = theirs[n]
        got = X.pixel_field(r, where, size).mask
        if not np.array_equal(
            got,
            P._gradient(other, x, where, P._output_weights(other, "average", 0), keep=True) != 0,
        ):
            bad.append(n)
    assert not assumed
    return bad, len(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_direct_children_agree_with_their_gradient(name):
    bad, n = compare(name, (64, 128), 1)
    assert not bad and n > 5


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 1280), (1280, 64)], ids=["wide", "high"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_blocks_agree_with_their_gradient(name, size):
    bad, n = compare(name, size, 2)
    assert not bad and n > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_see_the_whole_picture_and_nothing_is_assumed(name):
    f = receptive_field(model(name), (512, 1024))
    assert f.assumed == () and (f.whole or name in ("dsanet", "pidnet_s"))


TRUNK = {
    "sanet_s": (39, 95, 159, 271, 495, 559, 607),
    "sanet_m": (55, 143, 239, 799, 1151, 1215, 687),
    # L1 to L6, and the dilated branch from L3 on
    "sanet_l": (55, 143, 239, 1951, 2303, 2367, 1135),
}


class Alone(nn.Module):
    "SANet's trunk, or one of its branches, without what comes in from the side."

    def __init__(self, net, branch=None):
        super().__init__()
        self.net = net
        self.branch = branch

    def forward(self, x):
        n = self.net
        x = n.layer3(n.layer2(n.layer1(n.stem(x))))
        if self.branch == "dp":
            return n.dp2(n.dp1(x[:, :64]))
        x = n.layer6(n.layer5(n.layer4(x[:, 64:])))
        for part in self.branch or ():
            x = part(x)
        return x


@pytest.mark.parametrize("name", TRUNK)
def test_sanets_trunk_has_the_fields_of_the_paper_sheet(name):
    net = model(name)
    names = [f"net.layer{i}" for i in range(1, 7)]
    t = receptive_fields(Alone(net), (512, 1024), names)
    assert tuple(r[3] for r in t.raw[:6]) == tuple(r[4] for r in t.raw[:6]) == TRUNK[name][:6]
    assert receptive_fields(Alone(net, "dp"), (512, 1024), ["net.dp2"]).raw[0][3] == TRUNK[name][6]


def test_sanets_pyramid_branches_have_the_fields_of_the_paper_sheet():
    got = []
    for k, s in ((5, 2), (9, 4), (17, 8)):
        wide = nn.AvgPool2d((1, k), (1, s), (0, k // 2))
        high = nn.AvgPool2d((k, 1), (s, 1), (k // 2, 0))
        branch = nn.Sequential(
            wide, nn.Conv2d(512, 128, 3, 1, 1), high, nn.Conv2d(128, 128, 3, 1, 1)
        )
        got.append(
            tuple(receptive_fields(Alone(model("sanet_s"), branch), (1024, 2048), []).raw[-1][3:5])
        )
    assert got == [(1199, 1327), (1711, 2095), (2735, 3631)]


def test_a_field_larger_than_any_picture_is_not_called_whole(monkeypatch):
    monkeypatch.setattr(X, "LARGEST", 128)
    net = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=40, dilation=40) for _ in range(4)])
    assert receptive_fields(net, (64, 64)).raw[-1][-1] == "cut off"
    monkeypatch.setattr(X, "LARGEST", 1024)
    assert receptive_fields(net, (64, 64)).raw[-1][3:] == [321, 321, "0.0786 %", ""]


def test_whole_rows_alone_are_told_from_the_whole_picture():
    class Strip(nn.Module):
        def forward(self, x):
            return x * F.avg_pool2d(x, (x.shape[2], 1))

    assert receptive_fields(Strip(), (16, 16)).raw[-1][3:] == [None, 1, "100 %", "whole height"]


# footprints and effective fields


def test_the_model_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    (
        receptive_field(net, (9, 9)),
        receptive_fields(net, (9, 9)),
        effective_field(net, torch.rand(2, 3, 9, 9)),
    )
    for fill in P.FILLS:
        footprint(net, (9, 9), fill=fill)
    assert (
        all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        and [m.training for m in net.modules()] == modes
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()) and all(
        p.grad is None for p in net.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_of_any_type_are_followed(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 2, 3),
    ).to(dtype)
    f = receptive_field(net, (12, 14))
    e = effective_field(net, torch.rand(1, 3, 12, 14))
    assert (
        f.height == 5 and e.shape == (12, 14) and not e[~f.mask].any() and abs(e.sum() - 1) < 1e-9
    )


def test_paths_through_pools_and_branches_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 5, 3, padding=1)
            self.b = nn.Conv2d(5, 7, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            return F.max_pool2d(self.b(y), 2) + F.avg_pool2d(
                F.interpolate(self.b(y), scale_factor=1.0), 2
            )

    f = footprint(Net(), (16, 16), fill="paths")
    assert f.gradient.sum() == 2 * 4 * 81 and f.box == (6, 6, 12, 12)


def test_shut_relus_show_with_the_own_weights():
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(-100)
    assert (
        not footprint(net, (8, 8), fill="keep").mask.any()
        and footprint(net, (8, 8)).mask.sum() == 9
    )


def test_effective_field_takes_uint8_pictures_of_models():
    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)
            self.preprocess = segkern.core.IMAGENET

        def forward(self, x):
            return self.conv(x)

    e = effective_field(Known(), [torch.zeros(3, 9, 9, dtype=torch.uint8)])
    assert (e > 0).sum() == 9 and field_shares(e)[0.95] == 3
    with pytest.raises(ValueError, match="preprocess"):
        effective_field(nn.Conv2d(3, 2, 3), [torch.zeros(3, 9, 9, dtype=torch.uint8)])


def test_figures_draw(tmp_path):
    from segkern.viz import save_png

    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1))
    f = receptive_field(net, (20, 30))
    e = effective_field(net, torch.rand(2, 3, 20, 30))
    picture = np.zeros((20, 30, 3), np.uint8)
    figures = [
        field_figure(f),
        field_figure([f, e], torch.from_numpy(picture).permute(2, 0, 1)),
        field_figure({"a": f}, picture, zoom=True),
    ]
    for i, fig in enumerate([*figures, fields_figure({"x": (f, e)})]):
        assert save_png(fig, tmp_path / f"{i}.png").stat().st_size < 60 * 1024
    with pytest.raises(ValueError, match="image"):
        field_figure(f, picture[1:])
    with pytest.raises(ValueError, match="differ"):
        fields_figure({"x": (f, e[1:])})


# what is refused


@pytest.mark.parametrize("fn", [receptive_field, footprint])
def test_user_errors_say_what_to_do(fn):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 5))
    net.add_module("stage_one", nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="near: stage_one"):
        fn(net, (32, 32), at="stage_on")
    with pytest.raises(ValueError, match=r"\(30, 0\) lies outside of the output, which has 24x24"):
        fn(net, (32, 32), where=(30, 0))
    with pytest.raises(ValueError, match="cannot take a picture"):
        fn(net, (4, 4))
    with pytest.raises(ValueError, match="positive"):
        fn(net, (0, 4))
    with pytest.raises(ValueError, match="no output 3"):
        fn(net, (32, 32), output=3)
    with pytest.raises(ValueError, match="multiples of 8"):
        fn(segkern.create_model("dsanet"), (36, 36))


def test_modules_without_a_map_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.unused = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    with pytest.raises(ValueError, match="not a map"):
        receptive_field(Net(), (8, 8), at="fc")
    with pytest.raises(ValueError, match="not called"):
        receptive_field(Net(), (8, 8), at="unused")
    assert len(receptive_fields(Net(), (8, 8))) == 0


def test_networks_that_read_values_are_sent_to_the_gradient():
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(x.mean())

    with pytest.raises(ValueError, match="footprint"):
        receptive_field(Reads(), (8, 8))


@pytest.mark.parametrize("bad", [dict(fill="none")])
def test_unknown_fills_are_refused(bad):
    with pytest.raises(ValueError, match="average, keep, paths"):
        footprint(nn.Conv2d(3, 3, 3), (8, 8), **bad)
