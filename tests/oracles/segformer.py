"SegFormer with both heads (sasformer_icip.md, sections 2 and 3): keys and equations."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, gelu, up
from oracles.ssa import ssa_answer, ssa_keys
from segkern.testing.official import Keys

WIDTHS = {0: (32, 64, 160, 256), 5: (64, 128, 320, 512)}
DEPTHS = {0: (2, 2, 2, 2), 5: (3, 6, 40, 3)}
EMBED = {0: 256, 5: 768}  # of NVlabs' head
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


def names(stage, j, form):
    "What a block's layers are called: `nvlabs` or `mmseg`."
    if form == "nvlabs":
        at = f"backbone.block{stage + 1}.{j}"
        mlp = dict(fc1=f"{at}.mlp.fc1", near=f"{at}.mlp.dwconv.dwconv", fc2=f"{at}.mlp.fc2")
    else:
        at = f"backbone.layers.{stage}.1.{j}"
        mlp = {n: f"{at}.ffn.layers.{i}" for n, i in (("fc1", 0), ("near", 1), ("fc2", 4))}
    return at, mlp


def embed_names(stage, form):
    if form == "nvlabs":
        at = f"backbone.patch_embed{stage + 1}"
        return f"{at}.proj", f"{at}.norm", f"backbone.norm{stage + 1}"
    at = f"backbone.layers.{stage}"
    return f"{at}.0.projection", f"{at}.0.norm", f"{at}.2"


def encoder_keys(size, form):
    keys = Keys()
    before = 3
    for s, (c, depth, r) in enumerate(zip(WIDTHS[size], DEPTHS[size], REDUCTIONS)):
        proj, norm, last = embed_names(s, form)
        side = 3 if s else 7
        keys.pair(proj, c, before, side, side)
        keys.pair(norm, c)
        keys.pair(last, c)
        for j in range(depth):
            at, mlp = names(s, j, form)
            point = (1, 1) if form == "mmseg" else ()
            for n in ("norm1", "norm2"):
                keys.pair(f"{at}.{n}", c)
            if form == "mmseg":
                keys[f"{at}.attn.attn.in_proj_weight"] = (3 * c, c)
                keys[f"{at}.attn.attn.in_proj_bias"] = (3 * c,)
                keys.pair(f"{at}.attn.attn.out_proj", c, c)
            else:
                keys.pair(f"{at}.attn.q", c, c)
                keys.pair(f"{at}.attn.kv", 2 * c, c)
                keys.pair(f"{at}.attn.proj", c, c)
            if r > 1:
                keys.pair(f"{at}.attn.sr", c, c, r, r)
                keys.pair(f"{at}.attn.norm", c)
            keys.pair(mlp["fc1"], 4 * c, c, *point)
            keys.pair(mlp["near"], 4 * c, 1, 3, 3)
            keys.pair(mlp["fc2"], c, 4 * c, *point)
        before = c
    return keys


def official_keys(size, form, k=150, ssa=False):
    "Keys and shapes of a segmentor."
    keys = encoder_keys(size, form)
    head = "decode_head"
    if form == "nvlabs":
        e = EMBED[size]
        for i, c in enumerate(WIDTHS[size], 1):
            keys.pair(f"{head}.linear_c{i}.proj", e, c)
        keys.conv(f"{head}.linear_fuse.conv", e, 4 * e, bias=False)
        keys.bn(f"{head}.linear_fuse.bn", e)
        keys.conv(f"{head}.linear_pred", k, e)
        keys.conv(f"{head}.conv_seg", k, 128)
        return keys
    for i, c in enumerate(WIDTHS[size]):
        keys.conv(f"{head}.convs.{i}.conv", 256, c, bias=False)
        keys.bn(f"{head}.convs.{i}.bn", 256)
    keys.conv(f"{head}.fusion_conv.conv", 256, 1024, bias=False)
    keys.bn(f"{head}.fusion_conv.bn", 256)
    keys.conv(f"{head}.conv_seg", k, 256)
    return Keys({**keys, **(ssa_keys(k, 256) if ssa else {})})


class SegFormer(Plain):
    "The equations; both projects' files, whose norms have other epsilons."

    def __init__(self, state, form):
        super().__init__(state)
        self.form = form
        self.eps = 1e-5 if form == "nvlabs" else 1e-6

    def projections(self, at):
        "Matrices and vectors of query, of key and value together, and the name of the last layer."
        if self.form == "nvlabs":
            parts = [(self.s[f"{at}.{n}.weight"], self.s[f"{at}.{n}.bias"]) for n in ("q", "kv")]
            return *parts, f"{at}.proj"
        w, b = self.s[f"{at}.attn.in_proj_weight"], self.s[f"{at}.attn.in_proj_bias"]
        c = w.shape[1]
        return (w[:c], b[:c]), (w[c:], b[c:]), f"{at}.attn.out_proj"

    def attention(self, x, size, at, heads, r):
        (wq, bq), (wkv, bkv), last = self.projections(at)
        y = x
        if r > 1:
            picture = x.transpose(1, 2).unflatten(2, size)
            w = self.s[f"{at}.sr.weight"]
            y = F.conv2d(picture, w, self.s[f"{at}.sr.bias"], stride=r)
            y = self.norm(y.flatten(2).transpose(1, 2), f"{at}.norm", self.eps)
        q = x @ wq.t() + bq
        k, v = (y @ wkv.t() + bkv).chunk(2, -1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        share = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        return self.linear((share @ v).transpose(1, 2).flatten(2), last)

    def mlp(self, x, size, layers):
        "Its linear layers may be stored as 1×1 convolutions."
        y = x.transpose(1, 2).unflatten(2, size)
        w1, w2 = (self.s[f"{layers[n]}.weight"].flatten(1) for n in ("fc1", "fc2"))
        y = torch.einsum("oi,bihw->bohw", w1, y) + self.s[f"{layers['fc1']}.bias"][:, None, None]
        y = gelu(self.conv(y, layers["near"]))
        return y.flatten(2).transpose(1, 2) @ w2.t() + self.s[f"{layers['fc2']}.bias"]

    def encoder(self, x, depths):
        maps = []
        for s, (depth, heads, r) in enumerate(zip(depths, HEADS, REDUCTIONS)):
            proj, norm, last = embed_names(s, self.form)
            x = self.conv(x, proj, 2 if s else 4)
            size = x.shape[2:]
            x = self.norm(x.flatten(2).transpose(1, 2), norm, self.eps)
            for j in range(depth):
                at, mlp = names(s, j, self.form)
                x = x + self.attention(self.norm(x, f"{at}.norm1"), size, f"{at}.attn", heads, r)
                x = x + self.mlp(self.norm(x, f"{at}.norm2"), size, mlp)
            x = self.norm(x, last).transpose(1, 2).unflatten(2, size)
            maps.append(x)
        return maps

    def feature(self, maps):
        size = maps[0].shape[2:]
        if self.form == "mmseg":
            parts = [self.cbr(t, f"decode_head.convs.{i}") for i, t in enumerate(maps)]
            parts = [up(t, size) for t in parts]
            return self.cbr(torch.cat(parts, 1), "decode_head.fusion_conv")
        parts = []
        for i in (4, 3, 2, 1):
            t = maps[i - 1].flatten(2).transpose(1, 2)
            t = self.linear(t, f"decode_head.linear_c{i}.proj").transpose(1, 2)
            parts.append(up(t.unflatten(2, maps[i - 1].shape[2:]), size))
        return self.cbr(torch.cat(parts, 1), "decode_head.linear_fuse")


def answer(state, size, form, picture):
    net = SegFormer(state, form)
    maps = net.encoder(picture.double(), DEPTHS[size])
    feat = net.feature(maps)
    out = {"feat": feat, **{f"map{i}": t for i, t in enumerate(maps, 1)}}
    if "decode_head.center_pos.weight" in net.s:
        return {**out, **ssa_answer(net, feat)}
    last = "linear_pred" if form == "nvlabs" else "conv_seg"
    return {**out, "logits": net.conv(feat, f"decode_head.{last}")}
