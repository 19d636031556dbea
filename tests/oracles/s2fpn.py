"S²-FPN in both forms (s2fpn.md, sections 3 and 4): equations; keys of ResNet-34 from the known ones of ResNet-18."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, up
from segkern.testing import fixture

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)


def official_keys(name, depth):
    "Of `s2fpn` or `s2fpn_v1`: the official list of ResNet-18, and the further blocks that a deeper encoder has."
    keys = {k: tuple(s) for k, s, _ in fixture(f"{name}_r18").spec["keys"]}
    for stage, (c, count) in enumerate(zip(WIDTHS, BLOCKS[depth]), 2):
        known = [k for k in keys if k.startswith(f"conv{stage}_x.1.")]
        for i in range(2, count):
            keys |= {k.replace(f"conv{stage}_x.1.", f"conv{stage}_x.{i}."): keys[k] for k in known}
    return keys


class S2FPN(Plain):
    "The equations; a file with slopes is of the later form."

    def act(self, x, at):
        slope = self.s.get(f"{at}.act.weight")
        return F.relu(x) if slope is None else F.prelu(x, slope)

    def block(self, x, at, stride=1, dilation=1):
        "Convolution, norm, activation."
        x = self.conv(x, f"{at}.conv", stride, dilation)
        return self.act(self.bn(x, f"{at}.bn"), at)

    def bare(self, x, at):
        "The convolution alone, whose norm lies unused in the file."
        return self.conv(x, f"{at}.conv")

    def stage(self, x, at, count, stride):
        for j in range(count):
            b = f"{at}.{j}"
            y = F.relu(self.bn(self.conv(x, f"{b}.conv1", stride if j == 0 else 1), f"{b}.bn1"))
            y = self.bn(self.conv(y, f"{b}.conv2"), f"{b}.bn2")
            if f"{b}.downsample.0.weight" in self.s:
                x = self.conv(x, f"{b}.downsample.0", stride)
                x = self.bn(x, f"{b}.downsample.1")
            x = F.relu(x + y)
        return x

    def encoder(self, x, depth, pool):
        x = F.relu(self.bn(self.conv(x, "conv1_x", 2), "bn1"))
        x = F.max_pool2d(x, 3, 2, 1) if pool else x
        maps = []
        for i, count in enumerate(BLOCKS[depth], 2):
            x = self.stage(x, f"conv{i}_x", count, 1 if i == 2 else 2)
            maps.append(x)
        return maps

    def shared(self, x, at):
        "The projection without its bias."
        return F.conv2d(x, self.s[f"{at}.conv_sh.weight"])

    def early_strips(self, x, at="sa"):
        "Strips gated by two channels of a softmax."
        m = self.bn(self.shared(x.amax(2, keepdim=True), at), f"{at}.bn_sh1")
        a = self.bn(self.shared(x.mean(2, keepdim=True), at), f"{at}.bn_sh2")
        s = (m * a).softmax(1)
        gamma = self.s[f"{at}.gamma"]
        return F.relu(
            gamma * self.bare(s[:, :1] * a + s[:, 1:2] * m, f"{at}.fuse") + (1 - gamma) * x
        )

    def attention(self, x, at):
        "Every pixel attends to the strips."
        k = self.bn(self.shared(x.amax(2, keepdim=True), at), f"{at}.bn_sh1")
        q = self.bn(self.shared(x, at), f"{at}.bn_sh2")
        v = self.conv(x.mean(2, keepdim=True), f"{at}.conv_v")
        share = (k.flatten(2).transpose(1, 2) @ q.flatten(2)).softmax(1)
        gate = self.conv((v.flatten(2) @ share).view_as(x), f"{at}.augmment_conv")
        f = self.bare(gate[:, :1] * q + gate[:, 1:2] * k, f"{at}.fuse")
        gamma = self.s[f"{at}.gamma"]
        return self.bare(F.relu(gamma * f + (1 - gamma) * x), f"{at}.fuse_out")

    def strips(self, x, at):
        if f"{at}.gamma" in self.s:
            return self.early_strips(x, at)
        at = f"{at}.tr.0"
        x = x + self.attention(x, f"{at}.attn")
        parts = [self.block(x, f"{at}.mlp.dconv{i}", dilation=2 * i) for i in (1, 2)]
        return x + self.bare(torch.cat(parts, 1), f"{at}.mlp.fuse").sigmoid()

    def reweighted(self, x, at):
        y = F.relu(self.bare(x.mean((2, 3), keepdim=True), f"{at}.conv_pool.0"))
        return x * self.bare(y, f"{at}.conv_pool.2").sigmoid()

    def pyramid(self, high, low, at):
        "A coarser map meets the encoder's: what goes on, and the logits of its own head."
        low = self.block(low, f"{at}.lateral_low")
        high = up(high, low.shape[2:])
        r = self.block(self.block(torch.cat([low, high], 1), f"{at}.FRB.0"), f"{at}.FRB.1")
        t = self.strips(r, f"{at}.sa") * self.block(high, f"{at}.conv_high")
        t = t + self.reweighted(r, f"{at}.ca") * self.block(low, f"{at}.conv_low")
        sup = self.bare(self.block(t, f"{at}.classifier.0"), f"{at}.classifier.2")
        return self.block(t, f"{at}.apf"), sup

    def upsampled(self, guide, y, at):
        y = F.relu(self.bare(up(y, guide.shape[2:], True), f"{at}.conv2.0"))
        g = self.block(guide, f"{at}.conv1")
        if f"{at}.fuse.conv.weight" not in self.s:
            return self.block(y + g, f"{at}.conv3")
        p, q = self.block(y + g, f"{at}.conv3").chunk(2, 1)
        a = self.block(p, f"{at}.s1")
        b = self.bn(self.bare(q, f"{at}.s2.0"), f"{at}.s2.1").sigmoid()
        return self.block(torch.cat([a * y, b * g], 1), f"{at}.fuse")


def answer(state, depth, pool, picture):
    "Logits of the five heads at their own sizes, and maps of the inside; `pool` is missing in the 34M form."
    net = S2FPN(state)
    maps = net.encoder(picture.double(), depth, pool)
    a = net.block(maps[3], "cfgb.0", stride=2)
    out = {"conv2_x": maps[0], "conv5_x": maps[3]}
    for i in (1, 2, 3, 4):
        a, out[f"sup{i}"] = net.pyramid(a, maps[4 - i], f"apf{i}")
        out[f"apf{i}"] = a
    d = net.block(maps[3], "fab.0")
    for i in (4, 3, 2, 1):
        d = net.upsampled(out[f"apf{5 - i}"], d, f"gfu{i}")
    head = "seghead.fc" if "seghead.fc.conv.weight" in net.s else "classifier.fc"
    return {**out, "gfu1": d, "logits": net.bare(d, head)}
