"SeaFormer (light_backbones.md, section 3): keys and equations."

import numpy as np
import torch
import torch.nn.functional as F

from oracles import plain
from oracles.ssa import ssa_answer, ssa_keys

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


TABLE = {
    "seaformer_b": dict(
        stem=16,
        smb=[
            "3,1,16,1 3,4,32,2 3,3,32,1",
            "5,3,64,2 5,3,64,1",
            "3,3,128,2 3,3,128,1",
            "5,4,192,2",
            "3,6,256,2",
        ],
        dims=(192, 256),
        keys=(16, 24),
        depths=(4, 4),
        ratios=(2, 4),
        head=(128, 160),
        outs=(64, 192, 256),
        strides=(8, 32, 64),
    ),
    "seaformer_l": dict(
        stem=32,
        smb=[
            "3,3,32,1 3,4,64,2 3,4,64,1",
            "5,4,128,2 5,4,128,1",
            "3,4,192,2 3,4,192,1",
            "5,4,256,2",
            "3,6,320,2",
        ],
        dims=(192, 256, 320),
        keys=(16, 20, 24),
        depths=(3, 3, 3),
        ratios=(2, 4, 6),
        head=(128, 160, 192),
        outs=(128, 192, 256, 320),
        strides=(8, 16, 32, 64),
    ),
}


def blocks(name):
    return [[tuple(map(int, b.split(","))) for b in group.split()] for group in TABLE[name]["smb"]]


def official_keys(name, k=150):
    "Keys and shapes of the official segmentor, from the specification's tables."
    t = TABLE[name]
    keys = {}

    def unit(at, c_in, c, kernel=1, groups=1, conv="c"):
        keys[f"{at}.{conv}.weight"] = (c, c_in // groups, kernel, kernel)
        keys.update({f"{at}.bn.{n}": () if n == BN[-1] else (c,) for n in BN})

    unit("backbone.smb1.stem_block.0", 3, t["stem"], 3)
    c = t["stem"]
    for i, group in enumerate(blocks(name), 1):
        for j, (kernel, ratio, width, _) in enumerate(group, 1):
            at = f"backbone.smb{i}.layer{j}.conv"
            wide = round(c * ratio)
            if ratio > 1:
                unit(f"{at}.0", c, wide)
            unit(f"{at}.{2 if ratio > 1 else 0}", wide, wide, kernel, wide)
            unit(f"{at}.{4 if ratio > 1 else 2}", wide, width)
            c = width
    for i, (dim, key, depth, ratio) in enumerate(
        zip(t["dims"], t["keys"], t["depths"], t["ratios"]), 1
    ):
        q = 8 * key
        v = 16 * key
        for j in range(depth):
            at = f"backbone.trans{i}.transformer_blocks.{j}"
            for n, w in (("to_q", q), ("to_k", q), ("to_v", v)):
                unit(f"{at}.attn.{n}", dim, w)
            unit(f"{at}.attn.proj.1", v, dim)
            for axis in ("row", "column"):
                unit(f"{at}.attn.proj_encode_{axis}.1", v, v)
                for n in "qk":
                    keys[f"{at}.attn.pos_emb_{axis}{n}.pos_embed"] = (1, q, 16)
            unit(f"{at}.attn.dwconv", 2 * v, 2 * v, 3, 2 * v)
            unit(f"{at}.attn.pwconv", 2 * v, dim)
            unit(f"{at}.mlp.fc1", dim, ratio * dim)
            keys[f"{at}.mlp.dwconv.weight"], keys[f"{at}.mlp.dwconv.bias"] = (
                (ratio * dim, 1, 3, 3),
                (ratio * dim,),
            )
            unit(f"{at}.mlp.fc2", ratio * dim, dim)
    keys["decode_head.conv_seg.weight"], keys["decode_head.conv_seg.bias"] = (
        (k, t["head"][-1], 1, 1),
        (k,),
    )
    fine = t["outs"][0]
    for i, (coarse, w) in enumerate(zip(t["outs"][1:], t["head"]), 1):
        unit(f"decode_head.fuse{i}.local_embedding", fine, w, conv="conv")
        unit(f"decode_head.fuse{i}.global_act", coarse, w, conv="conv")
        fine = w
    unit("decode_head.linear_fuse", fine, fine, 1, fine, conv="conv")
    return keys


def params(keys):
    return sum(int(np.prod(s)) for n, s in keys.items() if n.rsplit(".", 1)[-1] not in BN[2:])


class Plain(plain.Plain):
    "The specification's equations on an official state dict, nothing else."

    def __init__(self, state, name, training=False):
        super().__init__(state, training)
        self.name = name

    def unit(self, x, at, conv="c", stride=1):
        return super().unit(x, at, stride, conv)

    def attention(self, x, at, heads=8):
        def phi(t):
            return t.clamp(0, 6)

        def sigma(t):
            return (t + 3).clamp(0, 6) / 6

        q, k, v = (self.unit(x, f"{at}to_{n}") for n in "qkv")
        y = v
        for axis, name in ((3, "row"), (2, "column")):

            def place(t, n):
                return t.mean(axis) + F.interpolate(
                    self.s[f"{at}pos_emb_{name}{n}.pos_embed"],
                    size=t.shape[5 - axis],
                    mode="linear",
                    align_corners=False,
                )

            a = place(q, "q")
            b = place(k, "k")
            c = v.mean(axis)
            d = a.shape[1] // heads
            found = [
                (
                    c[:, 2 * h * d : 2 * h * d + 2 * d]
                    @ torch.softmax(
                        a[:, h * d : h * d + d].transpose(1, 2) @ b[:, h * d : h * d + d] / d**0.5,
                        2,
                    ).transpose(1, 2)
                )
                for h in range(heads)
            ]
            y = y + self.unit(phi(torch.cat(found, 1)).unsqueeze(axis), f"{at}proj_encode_{name}.1")
        return sigma(self.unit(phi(y), f"{at}proj.1")) * self.unit(
            phi(self.unit(torch.cat([q, k, v], 1), f"{at}dwconv")), f"{at}pwconv"
        )

    def block(self, x, at):
        x = x + self.attention(x, f"{at}.attn.")
        y = self.unit(x, f"{at}.mlp.fc1")
        y = F.conv2d(
            y,
            self.s[f"{at}.mlp.dwconv.weight"],
            self.s[f"{at}.mlp.dwconv.bias"],
            padding=1,
            groups=y.shape[1],
        )
        return x + self.unit(y.clamp(0, 6), f"{at}.mlp.fc2")

    def encoder(self, x):
        t = TABLE[self.name]
        maps = []
        x = F.relu(self.unit(x, "backbone.smb1.stem_block.0", stride=2))
        for i, group in enumerate(blocks(self.name), 1):
            for j, (_, ratio, c, s) in enumerate(group, 1):
                y = x
                at = f"backbone.smb{i}.layer{j}.conv"
                if ratio > 1:
                    y = F.relu(self.unit(y, f"{at}.0"))
                y = F.relu(self.unit(y, f"{at}.{2 if ratio > 1 else 0}", stride=s))
                y = self.unit(y, f"{at}.{4 if ratio > 1 else 2}")
                x = x + y if s == 1 and y.shape == x.shape else y
            n = i - 5 + len(t["dims"])
            for j in range(t["depths"][n - 1] if n > 0 else 0):
                x = self.block(x, f"backbone.trans{n}.transformer_blocks.{j}")
            if i == 2 or n > 0:
                maps.append(x)
        return maps

    def feature(self, x):
        fine, *coarse = self.encoder(x)
        for i, g in enumerate(coarse, 1):
            gate = plain.hard_sigmoid(self.unit(g, f"decode_head.fuse{i}.global_act", "conv"))
            gate = plain.up(gate, fine.shape[2:])
            fine = self.unit(fine, f"decode_head.fuse{i}.local_embedding", "conv") * gate
        return F.relu(self.unit(fine, "decode_head.linear_fuse", "conv"))

    def logits(self, x):
        return self.conv(self.feature(x), "decode_head.conv_seg")


def ssa_official_keys(name, k=150):
    "With the adaptive classifier."
    return {**official_keys(name, k), **ssa_keys(k, TABLE[name]["head"][-1])}


def answer(state, name, picture):
    net = Plain(state, name)
    feat = net.feature(picture.double())
    if "decode_head.center_pos.weight" in net.s:
        return {**ssa_answer(net, feat), "feat": feat}
    return {"logits": net.conv(feat, "decode_head.conv_seg"), "feat": feat}
