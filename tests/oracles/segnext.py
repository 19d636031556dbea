"SegNeXt (light_backbones.md, section 2): keys and equations."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, gelu, up
from oracles.ssa import ssa_answer, ssa_keys
from segkern.testing import official

WIDTHS = {
    "t": (32, 64, 160, 256),
    "s": (64, 128, 320, 512),
    "b": (64, 128, 320, 512),
    "l": (64, 128, 320, 512),
}


DEPTHS = {"t": (3, 3, 5, 2), "s": (2, 2, 4, 2), "b": (3, 3, 12, 3), "l": (3, 5, 27, 3)}


HEADS = {"t": (256, 16), "s": (256, 16), "b": (512, 64), "l": (1024, 64)}


class Keys(official.Keys):
    "With the layers that these networks repeat."

    def norm(self, key, c, running=True):
        self[key + ".weight"], self[key + ".bias"] = (c,), (c,)
        if running:
            self.update(
                {
                    f"{key}.running_mean": (c,),
                    f"{key}.running_var": (c,),
                    f"{key}.num_batches_tracked": (),
                }
            )


def encoder_keys(v, doubled=True):
    "The authors' encoder, or with OpenMMLab's single `dwconv`."
    keys = Keys()
    before = 3
    for s, (c, depth, ratio) in enumerate(zip(WIDTHS[v], DEPTHS[v], (8, 8, 4, 4)), 1):
        if s == 1:
            keys.conv("patch_embed1.proj.0", c // 2, 3, 3, 3)
            keys.norm("patch_embed1.proj.1", c // 2)
            keys.conv("patch_embed1.proj.3", c, c // 2, 3, 3)
            keys.norm("patch_embed1.proj.4", c)
        else:
            keys.conv(f"patch_embed{s}.proj", c, before, 3, 3)
            keys.norm(f"patch_embed{s}.norm", c)
        for j in range(depth):
            b = f"block{s}.{j}"
            g = f"block{s}.{j}.attn.spatial_gating_unit"
            keys[f"{b}.layer_scale_1"] = keys[f"{b}.layer_scale_2"] = (c,)
            keys.norm(f"{b}.norm1", c)
            keys.conv(f"{b}.attn.proj_1", c, c)
            keys.conv(f"{g}.conv0", c, 1, 5, 5)
            for i, k in enumerate((7, 11, 21)):
                keys.conv(f"{g}.conv{i}_1", c, 1, 1, k)
                keys.conv(f"{g}.conv{i}_2", c, 1, k, 1)
            keys.conv(f"{g}.conv3", c, c)
            keys.conv(f"{b}.attn.proj_2", c, c)
            keys.norm(f"{b}.norm2", c)
            keys.conv(f"{b}.mlp.fc1", ratio * c, c)
            keys.conv(f"{b}.mlp.dwconv" + (".dwconv" if doubled else ""), ratio * c, 1, 3, 3)
            keys.conv(f"{b}.mlp.fc2", c, ratio * c)
        keys.norm(f"norm{s}", c, False)
        before = c
    return keys


def head_keys(v, k):
    keys, (d, _) = Keys(), HEADS[v]
    keys.conv("conv_seg", k, d)
    for name, c_in in (("squeeze", sum(WIDTHS[v][1:])), ("hamburger.ham_out", d), ("align", d)):
        keys.conv(f"{name}.conv", d, c_in, bias=False)
        keys.norm(f"{name}.gn", d, False)
    keys.conv("hamburger.ham_in.conv", d, d)
    return keys


def bases(d, rank):
    "What the published code draws right after `torch.manual_seed(0)`, of unit length."
    start = torch.rand((1, d, rank), generator=torch.Generator().manual_seed(0))
    return F.normalize(start, dim=1).double()


class SegNeXt(Plain):
    "The equations."

    def gate(self, a, at):
        t = self.conv(a, f"{at}.conv0")
        rows = [self.conv(self.conv(t, f"{at}.conv{i}_1"), f"{at}.conv{i}_2") for i in range(3)]
        return self.conv(t + sum(rows), f"{at}.conv3") * a

    def block(self, x, at):
        n = self.bn(x, f"{at}.norm1")
        a = gelu(self.conv(n, f"{at}.attn.proj_1"))
        g = self.gate(a, f"{at}.attn.spatial_gating_unit")
        scale = [self.s[f"{at}.layer_scale_{i}"][:, None, None] for i in (1, 2)]
        x = x + scale[0] * (self.conv(g, f"{at}.attn.proj_2") + n)
        h = self.conv(self.bn(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        h = gelu(self.conv(h, f"{at}.mlp.dwconv.dwconv"))
        return x + scale[1] * self.conv(h, f"{at}.mlp.fc2")

    def encoder(self, x, depths):
        maps = []
        for i, depth in enumerate(depths, 1):
            at = f"backbone.patch_embed{i}"
            if i == 1:
                x = gelu(self.bn(self.conv(x, f"{at}.proj.0", 2), f"{at}.proj.1"))
                x = self.bn(self.conv(x, f"{at}.proj.3", 2), f"{at}.proj.4")
            else:
                x = self.bn(self.conv(x, f"{at}.proj", 2), f"{at}.norm")
            for j in range(depth):
                x = self.block(x, f"backbone.block{i}.{j}")
            x = self.channel_norm(x, f"backbone.norm{i}")
            maps.append(x)
        return maps

    def factorised(self, x, m, steps=7):
        "Non-negative factors of a map: rank columns `m` and their coefficients, step by step."
        size = x.shape[2:]
        x = x.flatten(2)
        z = (x.transpose(1, 2) @ m).softmax(2)
        for step in range(steps + 1):
            z = z * (x.transpose(1, 2) @ m) / (z @ (m.transpose(1, 2) @ m) + 1e-6)
            if step < steps:
                m = m * (x @ z) / (m @ (z.transpose(1, 2) @ z) + 1e-6)
        return (m @ z.transpose(1, 2)).unflatten(2, size)

    def feature(self, maps, start):
        def unit(t, at):
            return self.group_norm(self.conv(t, f"decode_head.{at}.conv"), f"decode_head.{at}.gn")

        x = torch.cat([up(t, maps[1].shape[2:]) for t in maps[1:]], 1)
        s = F.relu(unit(x, "squeeze"))
        low = self.factorised(F.relu(self.conv(s, "decode_head.hamburger.ham_in.conv")), start)
        return F.relu(unit(F.relu(s + unit(low, "hamburger.ham_out")), "align"))


def answer(state, v, picture, start=None):
    "`v` is the size's letter."
    net = SegNeXt(state)
    maps = net.encoder(picture.double(), DEPTHS[v])
    feat = net.feature(maps, bases(*HEADS[v]) if start is None else start)
    if "decode_head.center_pos.weight" in net.s:
        return {**ssa_answer(net, feat), "feat": feat, "map4": maps[3]}
    return {"logits": net.conv(feat, "decode_head.conv_seg"), "map4": maps[3]}


def official_keys(v, k=150):
    "With the adaptive classifier."
    below = encoder_keys(v).under("backbone.") | head_keys(v, k).under("decode_head.")
    return Keys({**below, **ssa_keys(k, HEADS[v][0])})
