"OCRNet on HRNet-W48 (ssa_classifier.md, section 6): keys and equations."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, up
from oracles.ssa import ssa_answer, ssa_keys
from segkern.testing import official

HEAD = "decode_head.1."


class Keys(official.Keys):
    "With the layers that these networks repeat."

    def norm(self, key, c):
        self.pair(key, c)

    def unit(self, key, c_in, c_out, k=1):
        self[f"{key}.conv.weight"] = (c_out, c_in, k, k)
        self.bn(f"{key}.bn", c_out)

    def conv_bn(self, conv, bn, c_in, c_out, k):
        self[f"{conv}.weight"] = (c_out, c_in, k, k)
        self.bn(bn, c_out)


def hrnet_keys(widths=(48, 96, 192, 384)):
    "An official HRNet without a classifier."
    keys = Keys()
    modules = (1, 4, 3)
    keys.conv_bn("conv1", "bn1", 3, 64, 3)
    keys.conv_bn("conv2", "bn2", 64, 64, 3)
    for b in range(4):
        c = 256 if b else 64
        for n, (i, o, k) in enumerate(((c, 64, 1), (64, 64, 3), (64, 256, 1)), 1):
            keys.conv_bn(f"layer1.{b}.conv{n}", f"layer1.{b}.bn{n}", i, o, k)
    keys.conv_bn("layer1.0.downsample.0", "layer1.0.downsample.1", 64, 256, 1)
    keys.conv_bn("transition1.0.0", "transition1.0.1", 256, widths[0], 3)
    keys.conv_bn("transition1.1.0.0", "transition1.1.0.1", 256, widths[1], 3)
    for s in (2, 3):
        keys.conv_bn(
            f"transition{s}.{s}.0.0", f"transition{s}.{s}.0.1", widths[s - 1], widths[s], 3
        )
    for s, count in zip((2, 3, 4), modules):
        for m in range(count):
            for b, c in enumerate(widths[:s]):
                for k in range(4):
                    for n in (1, 2):
                        keys.conv_bn(
                            f"stage{s}.{m}.branches.{b}.{k}.conv{n}",
                            f"stage{s}.{m}.branches.{b}.{k}.bn{n}",
                            c,
                            c,
                            3,
                        )
            for i in range(s):
                for j in range(s):
                    f = f"stage{s}.{m}.fuse_layers.{i}.{j}"
                    if j > i:
                        keys.conv_bn(f"{f}.0", f"{f}.1", widths[j], widths[i], 1)
                    for k in range(i - j):
                        keys.conv_bn(
                            f"{f}.{k}.0",
                            f"{f}.{k}.1",
                            widths[j],
                            widths[i if k == i - j - 1 else j],
                            3,
                        )
    return keys


def ocr_keys(k):
    "Both stages of the official decoder."
    keys = Keys()
    block = "decode_head.1.object_context_block"
    keys.unit("decode_head.0.convs.0", 720, 720)
    keys.pair("decode_head.0.conv_seg", k, 720, 1, 1)
    keys.unit("decode_head.1.bottleneck", 720, 512, 3)
    for p in ("query", "key"):
        keys.unit(f"{block}.{p}_project.0", 512, 256)
        keys.unit(f"{block}.{p}_project.1", 256, 256)
    keys.unit(f"{block}.value_project", 512, 256)
    keys.unit(f"{block}.out_project", 256, 512)
    keys.unit(f"{block}.bottleneck", 1024, 512)
    keys.pair("decode_head.1.conv_seg", k, 512, 1, 1)
    return keys


class OCRNet(Plain):
    "The equations."

    def pair(self, x, conv, bn, stride=1):
        return self.bn(self.conv(x, conv, stride), bn)

    def bottleneck(self, x, at):
        y = F.relu(self.pair(x, f"{at}.conv1", f"{at}.bn1"))
        y = F.relu(self.pair(y, f"{at}.conv2", f"{at}.bn2"))
        y = self.pair(y, f"{at}.conv3", f"{at}.bn3")
        if f"{at}.downsample.0.weight" in self.s:
            x = self.pair(x, f"{at}.downsample.0", f"{at}.downsample.1")
        return F.relu(x + y)

    def basic(self, x, at):
        y = F.relu(self.pair(x, f"{at}.conv1", f"{at}.bn1"))
        return F.relu(x + self.pair(y, f"{at}.conv2", f"{at}.bn2"))

    def fused(self, maps, at):
        "Every output is a sum over all branches: coarser ones enlarged, finer ones halved step by step."
        out = []
        for i, own in enumerate(maps):
            total = own
            for j, x in enumerate(maps):
                f = f"{at}.fuse_layers.{i}.{j}"
                if j > i:
                    x = self.pair(x, f"{f}.0", f"{f}.1")
                    larger = [n * 2 ** (j - i) for n in x.shape[2:]]
                    total = total + up(up(x, larger), own.shape[2:])
                if j < i:
                    for k in range(i - j):
                        x = self.pair(x, f"{f}.{k}.0", f"{f}.{k}.1", 2)
                        x = F.relu(x) if k < i - j - 1 else x
                    total = total + x
            out.append(F.relu(total))
        return out

    def step(self, x, at, stride):
        "Convolution, norm, ReLU of a transition."
        return F.relu(self.pair(x, f"{at}.0", f"{at}.1", stride))

    def encoder(self, x):
        for i in (1, 2):
            x = F.relu(self.pair(x, f"backbone.conv{i}", f"backbone.bn{i}", 2))
        for i in range(4):
            x = self.bottleneck(x, f"backbone.layer1.{i}")
        at = "backbone.transition1"
        maps = [self.step(x, f"{at}.0", 1), self.step(x, f"{at}.1.0", 2)]
        for stage, modules in ((2, 1), (3, 4), (4, 3)):
            if stage > 2:
                at = f"backbone.transition{stage - 1}.{stage - 1}.0"
                maps = [*maps, self.step(maps[-1], at, 2)]
            for m in range(modules):
                at = f"backbone.stage{stage}.{m}"
                for b in range(stage):
                    for k in range(4):
                        maps[b] = self.basic(maps[b], f"{at}.branches.{b}.{k}")
                maps = self.fused(maps, at)
        return maps

    def feature(self, maps):
        "The object-contextual feature, and the soft regions that it was made from."
        x = torch.cat([up(t, maps[0].shape[2:]) for t in maps], 1)
        regions = self.conv(self.cbr(x, "decode_head.0.convs.0"), "decode_head.0.conv_seg")
        f = self.cbr(x, "decode_head.1.bottleneck")
        block = "decode_head.1.object_context_block"
        context = (regions.flatten(2).softmax(2) @ f.flatten(2).transpose(1, 2)).transpose(1, 2)
        context = context.unsqueeze(3)  # [b, 512, k, 1]

        def twice(t, name):
            return self.cbr(self.cbr(t, f"{block}.{name}.0"), f"{block}.{name}.1").flatten(2)

        query = twice(f, "query_project")
        key = twice(context, "key_project")
        value = self.cbr(context, f"{block}.value_project").flatten(2)
        share = (query.transpose(1, 2) @ key / query.shape[1] ** 0.5).softmax(2)
        attended = (value @ share.transpose(1, 2)).unflatten(2, f.shape[2:])
        attended = self.cbr(attended, f"{block}.out_project")
        return self.cbr(torch.cat([attended, f], 1), f"{block}.bottleneck"), regions


def official_keys(k=150):
    "Keys and shapes of the cascade with the adaptive classifier on its second stage."
    return Keys({**hrnet_keys().under("backbone."), **ocr_keys(k), **ssa_keys(k, 512, HEAD)})


def answer(state, picture):
    net = OCRNet(state)
    maps = net.encoder(picture.double())
    feat, regions = net.feature(maps)
    branches = {f"map{i}": t for i, t in enumerate(maps, 1)}
    return {**ssa_answer(net, feat, HEAD), "aux": regions, "feat": feat, **branches}
