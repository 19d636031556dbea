"""Layers as their definitions say, in double precision, on a state dict with official names.

The modules beside this one write networks down from the specifications a second time, with these functions
and none of the package's networks, losses or operators. Where an official output exists the equations are
checked against it (`tests/test_goldens.py`).
"""

import torch
import torch.nn.functional as F


def up(x, size, align_corners=False):
    "Bilinear."
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def hard_sigmoid(x):
    return (x + 3).clamp(0, 6) / 6


def hard_swish(x):
    return x * hard_sigmoid(x)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


class Plain:
    "What every network uses; `training` takes the statistics of the batch."

    def __init__(self, state, training=False):
        self.s = {k: v.double() for k, v in state.items() if v.is_floating_point()}
        self.training = training

    def below(self, prefix):
        "The same functions on the part of the state dict below a prefix."
        part = {k.removeprefix(prefix): v for k, v in self.s.items() if k.startswith(prefix)}
        return type(self)(part, self.training)

    def conv(self, x, at, stride=1, dilation=1):
        "Padded so that stride 1 keeps the size; as many groups as the weight's inputs leave."
        w = self.s[at + ".weight"]
        padding = tuple(dilation * (k // 2) for k in w.shape[2:])
        groups = x.shape[1] // w.shape[1]
        return F.conv2d(x, w, self.s.get(at + ".bias"), stride, padding, dilation, groups)

    def bn(self, x, at, eps=1e-5):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, var = self.s[f"{at}.running_mean"], self.s[f"{at}.running_var"]
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        return x * self.s[f"{at}.weight"].view(shape) + self.s[f"{at}.bias"].view(shape)

    def unit(self, x, at, stride=1, conv="conv"):
        "Convolution and norm."
        return self.bn(self.conv(x, f"{at}.{conv}", stride), f"{at}.bn")

    def cbr(self, x, at, stride=1):
        "Convolution, norm, ReLU."
        return F.relu(self.unit(x, at, stride))

    def linear(self, x, at):
        return x @ self.s[at + ".weight"].t() + self.s.get(at + ".bias", 0.0)

    def norm(self, x, at, eps=1e-6):
        "Over the last axis."
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.s[at + ".weight"] + self.s[at + ".bias"]

    def channel_norm(self, x, at, eps=1e-5):
        "Over the channels of a map."
        return self.norm(x.permute(0, 2, 3, 1), at, eps).permute(0, 3, 1, 2)

    def group_norm(self, x, at, groups=32, eps=1e-5):
        y = x.unflatten(1, (groups, -1))
        mean = y.mean((2, 3, 4), keepdim=True)
        var = y.var((2, 3, 4), correction=0, keepdim=True)
        y = ((y - mean) / (var + eps).sqrt()).flatten(1, 2)
        shape = (1, -1, 1, 1)
        return y * self.s[f"{at}.weight"].view(shape) + self.s[f"{at}.bias"].view(shape)
