"AFFormer (light_backbones.md, section 4): keys with their aliases, and the equations."

import numpy as np
import torch
import torch.nn.functional as F

from oracles import plain
from oracles.ssa import ssa_answer, ssa_keys

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


DIMS = (32, 96, 176, 216)


LAYERS = (0, 2, 6, 2)


STRIDES = ((1, 1), (2, 1), (1, 2), (1, 4))


OUT = (96, 176, 216, 216)


SHARED = ("cpe.", "crpe.", "factoratt_crpe.crpe.")


def official_keys(k=150):
    "Keys and shapes of the authors' segmentor, aliases included, from the specification's text."
    keys = {}

    def bn(at, c):
        keys.update({f"{at}.{n}": () if n == BN[-1] else (c,) for n in BN})

    def unit(at, a, c, kernel=1, conv="conv"):
        keys[f"{at}.{conv}.weight"] = (c, a, kernel, kernel)
        bn(f"{at}.bn", c)

    def pair(at, *shape):
        keys.update({f"{at}.weight": shape, f"{at}.bias": shape[:1]})

    unit("backbone.stem.0", 3, 16, 3)
    unit("backbone.stem.1", 16, 32, 3)
    for i, (c, n, o) in enumerate(zip(DIMS, LAYERS, OUT)):
        for j in (0, 1):
            at = f"backbone.patch_embed_stages.{i}.patch_embeds.{j}.patch_conv"
            keys[f"{at}.dwconv.weight"] = (c, 1, 3, 3)
            unit(at, c, c, conv="pwconv")
        at = f"backbone.mhca_stages.{i}"
        unit(f"{at}.Restore.conv1", c, c // 2)
        keys[f"{at}.Restore.dwconv.weight"] = (c // 2, 1, 3, 3)
        bn(f"{at}.Restore.norm", c // 2)
        unit(f"{at}.Restore.conv2", c // 2, c)
        unit(f"{at}.aggregate", c, o)

        def shared(at, position=True):
            if position:
                pair(f"{at}cpe.proj", c, 1, 3, 3)
            for m, (heads, window) in enumerate(((2, 3), (3, 5), (3, 7))):
                pair(f"{at}crpe.conv_list.{m}", heads * c // 8, 1, window, window)

        at += ".mhca_blks.0."
        if n:
            shared(at)
        for j in range(n):
            layer = f"{at}MHCA_layers.{j}."
            shared(layer)
            shared(f"{layer}factoratt_crpe.", position=False)
            pair(f"{layer}factoratt_crpe.qkv", 3 * c, c)
            pair(f"{layer}factoratt_crpe.proj", c, c)
            for m in ("norm1", "norm2"):
                pair(layer + m, c)
            pair(f"{layer}mlp.fc1", 2 * c, c)
            pair(f"{layer}mlp.dwconv", 2 * c, 1, 3, 3)
            pair(f"{layer}mlp.fc2", c, 2 * c)
    pair("decode_head.conv_seg", k, 256, 1, 1)
    for n, a in (("squeeze", 216), ("align", 256)):
        keys[f"decode_head.{n}.conv.weight"] = (256, a, 1, 1)
        pair(f"decode_head.{n}.gn", 256)
    return keys


def root(key):
    "The stage's own name of a shared tensor, or the key itself."
    at, _, rest = key.partition("MHCA_layers.")
    inner = rest.partition(".")[2].removeprefix("factoratt_crpe.")
    return at + inner if inner.startswith(SHARED[:2]) else key


def params(keys):
    return sum(
        int(np.prod(s))
        for n, s in keys.items()
        if n.rsplit(".", 1)[-1] not in BN[2:] and root(n) == n
    )


class Plain(plain.Plain):
    "The specification's equations on an official state dict; every layer reads the copy that it holds itself."

    def low(self, v):
        "Averages of fields whose borders are rounded outwards, resized by weights at half-pixel centres."
        out = []
        for part, s in zip(v.split(v.shape[1] // 4, 1), (1, 2, 3, 6)):

            def ends(n):
                return [((i * n) // s, -((-(i + 1) * n) // s)) for i in range(s)]

            mean = torch.stack(
                [
                    torch.stack(
                        [part[:, :, a:b, c:d].mean((2, 3)) for c, d in ends(v.shape[3])], -1
                    )
                    for a, b in ends(v.shape[2])
                ],
                -2,
            )

            def rows(n):
                at = (((torch.arange(n, dtype=v.dtype) + 0.5) * s / n) - 0.5).clamp(min=0)
                return (1 - (at[:, None] - torch.arange(s)).abs()).clamp(min=0) + (
                    at[:, None] > s - 1
                ) * (torch.arange(s) == s - 1) * (at[:, None] - s + 1)

            out.append(rows(v.shape[2]) @ mean @ rows(v.shape[3]).t())
        return torch.cat(out, 1).clamp(min=0)

    def layer(self, x, at):
        b, c, h, w = x.shape
        x = x + self.conv(x, f"{at}.cpe.proj")
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.linear(self.norm(t, f"{at}.norm1"), f"{at}.factoratt_crpe.qkv").split(c, -1)
        d = c // 8
        far = []
        for i in range(8):
            part = slice(i * d, i * d + d)
            e = torch.exp(k[..., part] - k[..., part].amax(1, keepdim=True))
            far.append(
                q[..., part]
                @ ((e / e.sum(1, keepdim=True)).transpose(1, 2) @ v[..., part])
                / d**0.5
            )
        picture = v.transpose(1, 2).reshape(b, c, h, w)
        high = torch.cat(
            [
                self.conv(picture[:, a * d : z * d], f"{at}.factoratt_crpe.crpe.conv_list.{i}")
                for i, (a, z) in enumerate(((0, 2), (2, 5), (5, 8)))
            ],
            1,
        )
        near = q * high.flatten(2).transpose(1, 2) + self.low(picture).flatten(2).transpose(1, 2)
        t = t + self.linear(torch.cat(far, -1) + near, f"{at}.factoratt_crpe.proj")
        y = self.linear(self.norm(t, f"{at}.norm2"), f"{at}.mlp.fc1")
        y = y + self.conv(y.transpose(1, 2).reshape(b, 2 * c, h, w), f"{at}.mlp.dwconv").flatten(
            2
        ).transpose(1, 2)
        return (t + self.linear(plain.gelu(y), f"{at}.mlp.fc2")).transpose(1, 2).reshape(b, c, h, w)

    def restore(self, x, at):
        y = plain.hard_swish(self.unit(x, f"{at}.conv1"))
        return x + self.unit(
            plain.hard_swish(self.bn(self.conv(y, f"{at}.dwconv"), f"{at}.norm")), f"{at}.conv2"
        )

    def encoder(self, x):
        for i in (0, 1):
            x = plain.hard_swish(self.unit(x, f"backbone.stem.{i}", 2))
        maps = []
        for i, (n, strides) in enumerate(zip(LAYERS, STRIDES)):
            e = [x]
            for j, s in enumerate(strides):
                at = f"backbone.patch_embed_stages.{i}.patch_embeds.{j}.patch_conv"
                e.append(
                    plain.hard_swish(
                        self.unit(self.conv(e[-1], f"{at}.dwconv", s), at, conv="pwconv")
                    )
                )
            at, (_, fine, coarse) = f"backbone.mhca_stages.{i}", e
            if n:
                for j in range(n):
                    coarse = self.layer(coarse, f"{at}.mhca_blks.0.MHCA_layers.{j}")
                if coarse.shape != fine.shape:
                    coarse = F.interpolate(
                        coarse, size=fine.shape[2:], mode="bilinear", align_corners=True
                    )
                y = self.restore(fine, f"{at}.Restore") + coarse
            else:
                y = self.restore(fine + coarse, f"{at}.Restore")
            x = plain.hard_swish(self.unit(y, f"{at}.aggregate"))
            maps.append(x)
        return maps

    def feature(self, x):
        y = self.conv(self.encoder(x)[-1], "decode_head.squeeze.conv")
        return self.group_norm(y, "decode_head.squeeze.gn").clamp(min=0)

    def logits(self, x):
        return self.conv(self.feature(x), "decode_head.conv_seg")


def ssa_official_keys(k=150):
    "With the adaptive classifier."
    return {**official_keys(k), **ssa_keys(k, 256)}


def answer(state, picture):
    net = Plain(state)
    maps = net.encoder(picture.double())
    feat = net.feature(picture.double())
    inside = {f"map{i}": t for i, t in enumerate(maps, 1)}
    return {**ssa_answer(net, feat), "feat": feat, **inside}


def aliases():
    "Every name of a shared tensor but the last, and that last name: its numbers are in force."
    last = {root(key): key for key in official_keys()}
    return {key: last[root(key)] for key in official_keys() if last[root(key)] != key}
