"ViT-Adapter with UPerNet (light_backbones.md, section 6): keys and equations."

import numpy as np
import torch
import torch.nn.functional as F

from oracles import plain
from oracles.ssa import ssa_answer, ssa_keys
from oracles.upernet import auxiliary, upernet_feature, upernet_keys
from segkern.testing.official import Keys

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


SMALL = dict(width=32, depth=8, heads=4, inner=8)


LARGE = dict(width=1024, depth=24, heads=16, inner=64)


def plain_keys(width, depth, side=24, **_):
    "The transformer, as the authors' and timm's files have it."
    keys = Keys(pos_embed=(1, side * side + 1, width))
    keys.pair("patch_embed.proj", width, 3, 16, 16)
    for i in range(depth):
        b = f"blocks.{i}"
        for n in ("norm1", "norm2"):
            keys.pair(f"{b}.{n}", width)
        for n, a, o in (
            ("attn.qkv", width, 3 * width),
            ("attn.proj", width, width),
            ("mlp.fc1", width, 4 * width),
            ("mlp.fc2", 4 * width, width),
        ):
            keys.pair(f"{b}.{n}", o, a)
    return keys


def encoder_keys(width, depth, heads, inner):
    "The authors' encoder."
    keys = plain_keys(width, depth)
    keys["level_embed"] = (3, width)
    for i in range(depth):
        keys[f"blocks.{i}.gamma1"] = keys[f"blocks.{i}.gamma2"] = (width,)
    for i, a in ((0, 3), (3, inner), (6, inner)):
        keys.pair(f"spm.stem.{i}", inner, a, 3, 3, bias=False)
        keys.bn(f"spm.stem.{i + 1}", inner)
    for n, a, c in ((2, 1, 2), (3, 2, 4), (4, 4, 4)):
        keys.pair(f"spm.conv{n}.0", c * inner, a * inner, 3, 3, bias=False)
        keys.bn(f"spm.conv{n}.1", c * inner)
    for n, a in enumerate((1, 2, 4, 4), 1):
        keys.pair(f"spm.fc{n}", width, a * inner, 1, 1)

    def attention(at, levels):
        for n in ("query_norm", "feat_norm"):
            keys.pair(f"{at}.{n}", width)
        keys.pair(f"{at}.attn.sampling_offsets", heads * levels * 4 * 2, width)
        keys.pair(f"{at}.attn.attention_weights", heads * levels * 4, width)
        keys.pair(f"{at}.attn.value_proj", width // 2, width)
        keys.pair(f"{at}.attn.output_proj", width, width // 2)

    for i in range(4):
        at = f"interactions.{i}"
        keys[f"{at}.injector.gamma"] = (width,)
        attention(f"{at}.injector", 3)
        for e in (
            f"{at}.extractor",
            *([f"{at}.extra_extractors.0", f"{at}.extra_extractors.1"] if i == 3 else []),
        ):
            attention(e, 1)
            keys.pair(f"{e}.ffn_norm", width)
            keys.pair(f"{e}.ffn.fc1", width // 4, width)
            keys.pair(f"{e}.ffn.dwconv.dwconv", width // 4, 1, 3, 3)
            keys.pair(f"{e}.ffn.fc2", width, width // 4)
    keys.pair("up", width, width, 2, 2)
    for i in (1, 2, 3, 4):
        keys.bn(f"norm{i}", width)
    return keys


def official_keys(k=150, head=512, **size):
    "The authors' segmentor."
    keys = Keys({f"backbone.{n}": s for n, s in encoder_keys(**size).items()})
    c = size["width"]
    return Keys({**keys, **upernet_keys([c] * 4, k, head)})


def params(keys):
    return sum(int(np.prod(s)) for n, s in keys.items() if n.rsplit(".", 1)[-1] not in BN[2:])


class Plain(plain.Plain):
    "The specification's equations on an official state dict, nothing else."

    def __init__(self, state, width, depth, heads, **_):
        super().__init__(state)
        self.c = width
        self.depth = depth
        self.heads = heads

    def conv(self, x, at, **kw):
        return F.conv2d(x, self.s[at + ".weight"], self.s.get(at + ".bias"), **kw)

    def block(self, x, at):
        q, k, v = self.linear(self.norm(x, f"{at}.norm1"), f"{at}.attn.qkv").split(self.c, -1)
        d = self.c // self.heads
        heads = []
        for h in range(self.heads):
            part = slice(h * d, h * d + d)
            heads.append(
                torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / d**0.5, -1)
                @ v[..., part]
            )
        x = x + self.s[f"{at}.gamma1"] * self.linear(torch.cat(heads, -1), f"{at}.attn.proj")
        y = self.linear(self.norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        return x + self.s[f"{at}.gamma2"] * self.linear(plain.gelu(y), f"{at}.mlp.fc2")

    def deform(self, q, grids, tokens, sizes, at):
        "Every reading as a full row of tent weights over the map's cells."
        b = len(q)
        n = q.shape[1]
        heads = self.heads
        levels = len(sizes)
        refs = torch.tensor(
            [((j + 0.5) / w, (i + 0.5) / h) for h, w in grids for i in range(h) for j in range(w)],
            dtype=q.dtype,
        )
        move = self.linear(q, f"{at}.sampling_offsets").view(b, n, heads, levels, 4, 2)
        weight = (
            self.linear(q, f"{at}.attention_weights")
            .view(b, n, heads, levels * 4)
            .softmax(-1)
            .view(b, n, heads, levels, 4)
        )
        value = self.linear(tokens, f"{at}.value_proj").view(b, tokens.shape[1], heads, -1)
        start = 0
        out = []
        for level, (h, w) in enumerate(sizes):
            x = (refs[:, 0].view(1, n, 1, 1) + move[:, :, :, level, :, 0] / w) * w - 0.5
            y = (refs[:, 1].view(1, n, 1, 1) + move[:, :, :, level, :, 1] / h) * h - 0.5

            def tent(t, cells):
                return (1 - (t.unsqueeze(-1) - torch.arange(cells, dtype=t.dtype)).abs()).clamp(
                    min=0
                )

            # b, n, heads, cells
            rows = (
                (
                    tent(y, h).unsqueeze(-1)
                    * tent(x, w).unsqueeze(-2)
                    * weight[:, :, :, level, :, None, None]
                )
                .sum(3)
                .flatten(3)
            )
            out.append(
                (rows.transpose(1, 2) @ value[:, start : start + h * w].transpose(1, 2)).transpose(
                    1, 2
                )
            )
            start += h * w
        return self.linear(sum(out).flatten(2), f"{at}.output_proj")

    def extract(self, c, x, h, w, grids, at):
        c = c + self.deform(
            self.norm(c, f"{at}.query_norm"),
            grids,
            self.norm(x, f"{at}.feat_norm"),
            [(h, w)],
            f"{at}.attn",
        )
        y = self.linear(self.norm(c, f"{at}.ffn_norm"), f"{at}.ffn.fc1")
        n = c.shape[1] // 21
        parts = [y[:, : 16 * n], y[:, 16 * n : 20 * n], y[:, 20 * n :]]
        for i, (a, b) in enumerate(grids):
            p = parts[i].transpose(1, 2).reshape(len(c), -1, a, b)
            parts[i] = (
                self.conv(p, f"{at}.ffn.dwconv.dwconv", padding=1, groups=p.shape[1])
                .flatten(2)
                .transpose(1, 2)
            )
        y = torch.cat(parts, 1)
        return c + self.linear(plain.gelu(y), f"{at}.ffn.fc2")

    def encoder(self, x):
        b, _, height, width = x.shape
        h = height // 16
        w = width // 16
        c = self.c
        grids = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        t = F.relu(self.bn(self.conv(x, "spm.stem.0", stride=2, padding=1), "spm.stem.1"))
        for i in (3, 6):
            t = F.relu(self.bn(self.conv(t, f"spm.stem.{i}", padding=1), f"spm.stem.{i + 1}"))
        maps = [F.max_pool2d(t, 3, 2, 1)]
        for i in (2, 3, 4):
            maps.append(
                F.relu(
                    self.bn(
                        self.conv(maps[-1], f"spm.conv{i}.0", stride=2, padding=1), f"spm.conv{i}.1"
                    )
                )
            )
        maps = [self.conv(t, f"spm.fc{i}") for i, t in enumerate(maps, 1)]
        side = torch.cat(
            [
                t.flatten(2).transpose(1, 2) + self.s["level_embed"][i]
                for i, t in enumerate(maps[1:])
            ],
            1,
        )
        table = self.s["pos_embed"][:, 1:].view(1, 24, 24, c).permute(0, 3, 1, 2)
        x = self.conv(x, "patch_embed.proj", stride=16) + F.interpolate(
            table, size=(h, w), mode="bicubic", align_corners=False
        )
        x = x.flatten(2).transpose(1, 2)
        kept = []
        for i in range(4):
            at = f"interactions.{i}"
            x = x + self.s[f"{at}.injector.gamma"] * self.deform(
                self.norm(x, f"{at}.injector.query_norm"),
                [(h, w)],
                self.norm(side, f"{at}.injector.feat_norm"),
                grids,
                f"{at}.injector.attn",
            )
            for j in range(self.depth // 4):
                x = self.block(x, f"blocks.{i * self.depth // 4 + j}")
            for e in (
                "extractor",
                *(("extra_extractors.0", "extra_extractors.1") if i == 3 else ()),
            ):
                side = self.extract(side, x, h, w, grids, f"{at}.{e}")
            kept.append(x.transpose(1, 2).reshape(b, c, h, w))
        n = side.shape[1] // 21
        c2, c3, c4 = (
            t.transpose(1, 2).reshape(b, c, *g)
            for t, g in zip((side[:, : 16 * n], side[:, 16 * n : 20 * n], side[:, 20 * n :]), grids)
        )
        c1 = F.conv_transpose2d(c2, self.s["up.weight"], self.s["up.bias"], stride=2) + maps[0]

        def scale(t, f):
            return F.interpolate(t, scale_factor=f, mode="bilinear", align_corners=False)

        return [
            self.bn(t, f"norm{i}")
            for i, t in enumerate(
                (
                    c1 + scale(kept[0], 4),
                    c2 + scale(kept[1], 2),
                    c3 + kept[2],
                    c4 + scale(kept[3], 0.5),
                ),
                1,
            )
        ]


def ssa_official_keys(k=150, head=512, **size):
    "With the adaptive classifier."
    return Keys({**official_keys(k, head, **size), **ssa_keys(k, head)})


def answer(state, size, picture):
    "`size` as `SMALL` and `LARGE`."
    net = plain.Plain(state)
    maps = Plain(net.below("backbone.").s, **size).encoder(picture.double())
    feat = upernet_feature(net, maps)
    inside = {f"map{i}": t for i, t in enumerate(maps, 1)}
    return {**ssa_answer(net, feat), "aux": auxiliary(net, maps), "feat": feat, **inside}
