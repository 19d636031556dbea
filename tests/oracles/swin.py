"UPerNet on Swin (ssa_classifier.md, section 5): keys and equations."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, gelu
from oracles.ssa import ssa_answer, ssa_keys
from oracles.upernet import auxiliary, upernet_feature, upernet_keys
from segkern.testing.official import Keys

# width, depths, heads
SIZES = {"t": (96, (2, 2, 6, 2), (3, 6, 12, 24)), "l": (192, (2, 2, 18, 2), (6, 12, 24, 48))}
WINDOW = 7


def encoder_keys(size):
    c, depths, heads = SIZES[size]
    keys = Keys()
    keys.pair("patch_embed.projection", c, 3, 4, 4)
    keys.pair("patch_embed.norm", c)
    for i, (depth, h) in enumerate(zip(depths, heads)):
        w = c << i
        for j in range(depth):
            b = f"stages.{i}.blocks.{j}"
            keys[f"{b}.attn.w_msa.relative_position_bias_table"] = (169, h)
            keys[f"{b}.attn.w_msa.relative_position_index"] = (49, 49)
            keys.pair(f"{b}.norm1", w)
            keys.pair(f"{b}.norm2", w)
            keys.pair(f"{b}.attn.w_msa.qkv", 3 * w, w)
            keys.pair(f"{b}.attn.w_msa.proj", w, w)
            keys.pair(f"{b}.ffn.layers.0.0", 4 * w, w)
            keys.pair(f"{b}.ffn.layers.1", w, 4 * w)
        if i < 3:
            keys.pair(f"stages.{i}.downsample.norm", 4 * w)
            keys.pair(f"stages.{i}.downsample.reduction", 2 * w, 4 * w, bias=False)
        keys.pair(f"norm{i}", w)
    return keys


def official_keys(size, k=150):
    "With the adaptive classifier."
    widths = [SIZES[size][0] << i for i in range(4)]
    below = encoder_keys(size).under("backbone.") | upernet_keys(widths, k)
    return Keys({**below, **ssa_keys(k, 512)})


def padded(x, multiple):
    "Zeros to the right and below; [b, h, w, c]."
    h, w = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -w % multiple, 0, -h % multiple))


def windows(x):
    "[b, h, w, c] -> [b, rows · columns, 49, c]."
    x = x.unflatten(1, (-1, WINDOW)).unflatten(3, (-1, WINDOW))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def regions(n, shift):
    "Which of the three bands of a shifted side a place lies in."
    place = torch.arange(n)
    return (place >= n - WINDOW).long() + (place >= n - shift).long()


class Swin(Plain):
    "The equations."

    def attention(self, x, at, heads, shift):
        b, h, w, c = x.shape
        x = padded(x, WINDOW)
        rows, columns = x.shape[1:3]
        x = windows(x.roll((-shift, -shift), (1, 2)))
        q, k, v = self.linear(x, f"{at}.qkv").unflatten(3, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        place = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
        apart = place[:, None] - place[None] + WINDOW - 1
        index = apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1]
        bias = self.s[f"{at}.relative_position_bias_table"][index].permute(2, 0, 1)
        scores = q * (c // heads) ** -0.5 @ k.transpose(3, 4) + bias
        if shift:
            band = regions(rows, shift)[:, None] * 3 + regions(columns, shift)
            band = windows(band[None, :, :, None])[0, :, :, 0]
            scores = scores - 100.0 * (band[:, None, :, None] != band[:, None, None, :])
        y = (scores.softmax(4) @ v).transpose(2, 3).flatten(3)
        y = self.linear(y, f"{at}.proj").unflatten(2, (WINDOW, WINDOW))
        y = y.unflatten(1, (rows // WINDOW, -1)).transpose(2, 3).reshape(b, rows, columns, c)
        return y.roll((shift, shift), (1, 2))[:, :h, :w]

    def merged(self, x, at):
        "Neighbours of a channel side by side."
        x = padded(x, 2).permute(0, 3, 1, 2)
        h, w = x.shape[2] // 2, x.shape[3] // 2
        x = F.unfold(x, 2, stride=2).transpose(1, 2)
        x = self.linear(self.norm(x, f"{at}.norm", 1e-5), f"{at}.reduction")
        return x.unflatten(1, (h, w))

    def encoder(self, x, size):
        _, depths, all_heads = SIZES[size]
        w = self.s["backbone.patch_embed.projection.weight"]
        x = padded(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
        x = F.conv2d(x, w, self.s["backbone.patch_embed.projection.bias"], stride=4)
        x = self.norm(x.permute(0, 2, 3, 1), "backbone.patch_embed.norm", 1e-5)
        maps = []
        for i, (depth, heads) in enumerate(zip(depths, all_heads)):
            for j in range(depth):
                at = f"backbone.stages.{i}.blocks.{j}"
                shift = WINDOW // 2 if j % 2 else 0
                y = self.norm(x, f"{at}.norm1", 1e-5)
                x = x + self.attention(y, f"{at}.attn.w_msa", heads, shift)
                y = self.linear(self.norm(x, f"{at}.norm2", 1e-5), f"{at}.ffn.layers.0.0")
                x = x + self.linear(gelu(y), f"{at}.ffn.layers.1")
            maps.append(self.norm(x, f"backbone.norm{i}", 1e-5).permute(0, 3, 1, 2))
            if i < 3:
                x = self.merged(x, f"backbone.stages.{i}.downsample")
        return maps


def answer(state, size, picture):
    net = Swin(state)
    maps = net.encoder(picture.double(), size)
    feat = upernet_feature(net, maps)
    inside = {f"map{i}": t for i, t in enumerate(maps, 1)}
    return {**ssa_answer(net, feat), "aux": auxiliary(net, maps), "feat": feat, **inside}
