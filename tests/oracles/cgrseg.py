"CGRSeg on EfficientFormerV2 (light_backbones.md, section 5): keys and equations."

import torch
import torch.nn.functional as F

from oracles.plain import Plain
from oracles.ssa import ssa_answer
from segkern.testing import official

WIDTHS = {
    "s0": (32, 48, 96, 176),
    "s1": (32, 48, 120, 224),
    "s2": (32, 64, 144, 288),
    "l": (40, 80, 192, 384),
}


DEPTHS = {"s0": (2, 2, 6, 4), "s1": (3, 3, 9, 6), "s2": (4, 4, 12, 8), "l": (5, 5, 15, 10)}


LOOKING = {"s0": 2, "s1": 2, "s2": 4, "l": 6}


RATIOS = {
    "s0": ([4, 3, 3, 3, 4, 4], [4, 3, 3, 4]),
    "s1": ([4, 4, 3, 3, 3, 3, 4, 4, 4], [4, 4, 3, 3, 4, 4]),
    "s2": ([4] * 2 + [3] * 6 + [4] * 4, [4] * 2 + [3] * 4 + [4] * 2),
    "l": ([4] * 4 + [3] * 7 + [4] * 4, [4] * 3 + [3] * 4 + [4] * 3),
}


NETS = {
    "cgrseg_t": ("s1", 128, 5, 11),
    "cgrseg_b": ("s2", 256, 6, 11),
    "cgrseg_l": ("l", 256, 5, 9),
}


class Keys(official.Keys):
    "With the layers that these networks repeat."

    def conv_bn(self, conv, bn, c_out, c_in, *k):
        self.conv(conv, c_out, c_in, *k)
        self.bn(bn, c_out)


def attention_keys(keys, at, c, c_out, d, side, old, step=1, reduced=False, imagenet=False):
    "An attention; `old` is the side of the classification network's grid."
    n = side * side
    m = (side // step) ** 2
    if not imagenet:
        keys[at + ".attention_biases_seg"], keys[at + ".attention_bias_idxs_seg"] = (8, n), (m, n)
    keys[at + ".attention_biases"], keys[at + ".attention_bias_idxs"] = (
        (8, old * old),
        (((old + step - 1) // step) ** 2, old * old),
    )
    if reduced:
        keys.conv_bn(at + ".stride_conv.0", at + ".stride_conv.1", c, 1, 3, 3)
    if step == 2:
        keys.conv(at + ".q.local.0", c, 1, 3, 3)
        keys.conv_bn(at + ".q.proj.0", at + ".q.proj.1", 8 * d, c)
    else:
        keys.conv_bn(at + ".q.0", at + ".q.1", 8 * d, c)
    keys.conv_bn(at + ".k.0", at + ".k.1", 8 * d, c)
    keys.conv_bn(at + ".v.0", at + ".v.1", 32 * d, c)
    keys.conv_bn(at + ".v_local.0", at + ".v_local.1", 32 * d, 1, 3, 3)
    if step == 1:
        for i in (1, 2):
            keys.conv(f"{at}.talking_head{i}", 8, 8)
    keys.conv_bn(at + ".proj.1", at + ".proj.2", c_out, 32 * d)


def encoder_keys(size, imagenet=False):
    "An official encoder; the ImageNet form has a norm and two classifiers, and no tables for segmentation."
    keys = Keys()
    widths = WIDTHS[size]
    depths = DEPTHS[size]
    keys.conv_bn("patch_embed.0", "patch_embed.1", widths[0] // 2, 3, 3, 3)
    keys.conv_bn("patch_embed.3", "patch_embed.4", widths[0], widths[0] // 2, 3, 3)
    for s, (c, depth) in enumerate(zip(widths, depths)):
        for j in range(depth):
            at = f"network.{2 * s}.{j}"
            inner = c * (4 if s < 2 else RATIOS[size][s - 2][j])
            keys[at + ".layer_scale_2"] = (c, 1, 1)
            if s >= 2 and j >= depth - LOOKING[size]:
                keys[at + ".layer_scale_1"] = (c, 1, 1)
                attention_keys(
                    keys, at + ".token_mixer", c, c, 32, 16, 7, reduced=s == 2, imagenet=imagenet
                )
            keys.conv_bn(at + ".mlp.fc1", at + ".mlp.norm1", inner, c)
            keys.conv_bn(at + ".mlp.mid", at + ".mlp.mid_norm", inner, 1, 3, 3)
            keys.conv_bn(at + ".mlp.fc2", at + ".mlp.norm2", c, inner)
    for s in (1, 2):
        keys.conv_bn(
            f"network.{2 * s - 1}.proj", f"network.{2 * s - 1}.norm", widths[s], widths[s - 1], 3, 3
        )
    keys.conv_bn("network.5.conv", "network.5.bn", widths[3], widths[2], 3, 3)
    attention_keys(
        keys, "network.5.attn", widths[2], widths[3], 16, 32, 14, step=2, imagenet=imagenet
    )
    if imagenet:
        keys.bn("norm", widths[3])
        for head in ("head", "dist_head"):
            keys[head + ".weight"], keys[head + ".bias"] = (1000, widths[3]), (1000,)
    return keys


def block_keys(keys, at, c, k):
    keys[at + ".gamma"] = (c,)
    keys.conv(at + ".token_mixer.dwconv_hw", c, 1, 3, 3)
    keys.conv_bn(at + ".token_mixer.excite.0", at + ".token_mixer.excite.1", c, 1, 1, k)
    keys.conv(at + ".token_mixer.excite.3", c, 1, k, 1)
    keys.bn(at + ".norm", c)
    keys.conv(at + ".mlp.fc1", 2 * c, c)
    keys.conv(at + ".mlp.fc2", c, 2 * c)


def head_keys(size, c, depth, k, classes, ssa=False):
    "An official decoder; with the adaptive classifier there is no `lgc`."
    keys = Keys()
    widths = WIDTHS[size][1:]
    keys.conv("conv_seg", classes, c)
    keys["linear_fuse.conv.weight"] = (c, 1, 1, 1)
    keys.bn("linear_fuse.bn", c)
    for j in range(depth):
        block_keys(keys, f"trans.transformer_blocks.{j}", sum(widths), k)
    for i, w in enumerate(widths):
        for f in ("fuse1", "fuse2"):
            keys[f"SIM.{i}.{f}.conv.weight"] = (c, w, 1, 1)
            keys.bn(f"SIM.{i}.{f}.bn", c)
        block_keys(keys, f"meta.{i}", w, k)
        if i < 2:
            keys.conv(f"conv.{i}", w, c)
    if ssa:
        keys.conv("get_feat_pos", c, 1, 3, 3)
        keys["center_pos.weight"] = (classes, c)
        for n in (
            "center_content_proj",
            "center_pos_proj",
            "gt_center_content_proj",
            "gt_center_pos_proj",
        ):
            keys[n + ".0.weight"], keys[n + ".2.weight"], keys[n + ".2.bias"] = (
                (c // 2, 2 * c),
                (c, c // 2),
                (c,),
            )
        for n in ("center_proj", "gt_center_proj"):
            keys[n + ".weight"] = (c, c)
        keys["ssa_loss.criterion.empty_weight"] = (classes + 1,)
    else:
        keys.conv("lgc.conv_mask", 1, c)
        for i in (0, 3):
            keys.conv(f"lgc.channel_mul_conv.{i}", c, c)
        keys["lgc.channel_mul_conv.1.weight"] = keys["lgc.channel_mul_conv.1.bias"] = (c, 1, 1)
    return keys


def net_keys(name, classes, ssa=False):
    size, *rest = NETS[name]
    return Keys(
        {
            **encoder_keys(size).under("backbone."),
            **head_keys(size, *rest, classes, ssa).under("decode_head."),
        }
    )


def bn(s, at, x):
    return F.batch_norm(
        x, s[at + ".running_mean"], s[at + ".running_var"], s[at + ".weight"], s[at + ".bias"]
    )


def conv(s, at, x, **kw):
    return F.conv2d(x, s[at + ".weight"], s.get(at + ".bias"), **kw)


def dw(s, at, x, stride=1):
    return conv(
        s,
        at,
        x,
        stride=stride,
        padding=tuple(k // 2 for k in s[at + ".weight"].shape[2:]),
        groups=x.shape[1],
    )


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def position(table, side, step, size):
    "The matrix of biases, pair by pair, resized as an image."
    keys = [(i, j) for i in range(side) for j in range(side)]
    index = torch.tensor(
        [
            [abs(a - i) * side + abs(b - j) for i, j in keys]
            for a in range(0, side, step)
            for b in range(0, side, step)
        ]
    )
    return F.interpolate(table[:, index][None], size, mode="bicubic", align_corners=False)


def attention(s, at, x, reduced):
    if reduced:
        x = bn(s, at + ".stride_conv.1", dw(s, at + ".stride_conv.0", x, 2))
    b, _, h, w = x.shape
    q, k, v = (bn(s, f"{at}.{n}.1", conv(s, f"{at}.{n}.0", x)) for n in "qkv")

    def heads(t):
        return t.reshape(b, 8, -1, h * w)

    scores = torch.einsum("bhdi,bhdj->bhij", heads(q), heads(k)) / 32**0.5 + position(
        s[at + ".attention_biases_seg"], 16, 1, (h * w, h * w)
    )
    p = conv(s, at + ".talking_head2", conv(s, at + ".talking_head1", scores).softmax(3))
    o = torch.einsum("bhij,bhdj->bhdi", p, heads(v)).reshape(b, -1, h, w) + bn(
        s, at + ".v_local.1", dw(s, at + ".v_local.0", v)
    )
    if reduced:
        o = up(o, (2 * h, 2 * w))
    return bn(s, at + ".proj.2", conv(s, at + ".proj.1", F.gelu(o)))


def down(s, at, x):
    b, _, h, w = x.shape
    q = bn(
        s,
        at + ".attn.q.proj.1",
        conv(s, at + ".attn.q.proj.0", dw(s, at + ".attn.q.local.0", x, 2) + x[:, :, ::2, ::2]),
    )
    k, v = (bn(s, f"{at}.attn.{n}.1", conv(s, f"{at}.attn.{n}.0", x)) for n in "kv")
    scores = torch.einsum(
        "bhdi,bhdj->bhij", q.reshape(b, 8, 16, -1), k.reshape(b, 8, 16, -1)
    ) / 4 + position(s[at + ".attn.attention_biases_seg"], 32, 2, (h * w // 4, h * w))
    o = torch.einsum("bhij,bhdj->bhdi", scores.softmax(3), v.reshape(b, 8, 64, -1)).reshape(
        b, -1, h // 2, w // 2
    ) + bn(s, at + ".attn.v_local.1", dw(s, at + ".attn.v_local.0", v, 2))
    return bn(s, at + ".attn.proj.2", conv(s, at + ".attn.proj.1", F.gelu(o))) + bn(
        s, at + ".bn", conv(s, at + ".conv", x, stride=2, padding=1)
    )


def encode(s, x, size):
    "The encoder's equations."
    for i in (0, 3):
        x = F.gelu(
            bn(s, f"patch_embed.{i + 1}", conv(s, f"patch_embed.{i}", x, stride=2, padding=1))
        )
    maps = []
    for stage, depth in enumerate(DEPTHS[size]):
        if stage in (1, 2):
            x = bn(
                s,
                f"network.{2 * stage - 1}.norm",
                conv(s, f"network.{2 * stage - 1}.proj", x, stride=2, padding=1),
            )
        if stage == 3:
            x = down(s, "network.5", x)
        for j in range(depth):
            at = f"network.{2 * stage}.{j}"
            if at + ".layer_scale_1" in s:
                x = x + s[at + ".layer_scale_1"] * attention(s, at + ".token_mixer", x, stage == 2)
            y = F.gelu(bn(s, at + ".mlp.norm1", conv(s, at + ".mlp.fc1", x)))
            y = F.gelu(bn(s, at + ".mlp.mid_norm", dw(s, at + ".mlp.mid", y)))
            x = x + s[at + ".layer_scale_2"] * bn(s, at + ".mlp.norm2", conv(s, at + ".mlp.fc2", y))
        maps.append(x)
    return maps


def block(s, at, x):
    t = at + ".token_mixer."
    p = x.mean(3, keepdim=True) + x.mean(2, keepdim=True)
    a = torch.sigmoid(
        dw(s, t + "excite.3", F.relu(bn(s, t + "excite.1", dw(s, t + "excite.0", p))))
    )
    y = conv(
        s,
        at + ".mlp.fc2",
        F.gelu(conv(s, at + ".mlp.fc1", bn(s, at + ".norm", a * dw(s, t + "dwconv_hw", x)))),
    )
    return x + s[at + ".gamma"].view(-1, 1, 1) * y


def fused(s, maps, depth):
    "The decoder's equations up to its classifier: r and f."
    small = [F.adaptive_avg_pool2d(x, tuple(-(-n // 2) for n in maps[2].shape[2:])) for x in maps]
    z = torch.cat(small, 1)
    r = None
    for j in range(depth):
        z = block(s, f"trans.transformer_blocks.{j}", z)
    parts = z.split([x.shape[1] for x in maps], 1)
    for i in (2, 1, 0):
        x = maps[i] if r is None else maps[i] + conv(s, f"conv.{i}", up(r, maps[i].shape[2:]))
        g = F.relu6(bn(s, f"SIM.{i}.fuse2.bn", conv(s, f"SIM.{i}.fuse2.conv", parts[i])) + 3) / 6
        r = bn(
            s, f"SIM.{i}.fuse1.bn", conv(s, f"SIM.{i}.fuse1.conv", block(s, f"meta.{i}", x))
        ) * up(g, x.shape[2:])
    return r, F.relu(bn(s, "linear_fuse.bn", s["linear_fuse.conv.weight"].view(-1, 1, 1) * r))


def decode(s, maps, depth):
    "Logits of the decoder's own classifier, and f."
    r, f = fused(s, maps, depth)
    centres = torch.einsum(
        "bkn,bcn->bck", conv(s, "conv_seg", f).flatten(2).softmax(2), r.flatten(2)
    )
    share = conv(s, "lgc.conv_mask", centres[..., None])[:, 0, :, 0].softmax(1)
    c = torch.einsum("bck,bk->bc", centres, share)[..., None, None]
    n = F.layer_norm(
        conv(s, "lgc.channel_mul_conv.0", c),
        c.shape[1:],
        s["lgc.channel_mul_conv.1.weight"],
        s["lgc.channel_mul_conv.1.bias"],
    )
    return conv(s, "conv_seg", r * conv(s, "lgc.channel_mul_conv.3", F.relu(n)).sigmoid() + r), f


def answer(state, name, picture):
    "Of the decoder's own classifier, or of the adaptive one where the file has it."
    size, _, depth, _ = NETS[name]
    net = Plain(state)
    maps = encode(net.below("backbone.").s, picture.double(), size)
    head = net.below("decode_head.").s
    if "center_pos.weight" not in head:
        return {"logits": decode(head, maps[1:], depth)[0], "map4": maps[3]}
    _, f = fused(head, maps[1:], depth)
    return {**ssa_answer(net, f), "feat": f, "map4": maps[3]}
