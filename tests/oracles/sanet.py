"SANet (sanet.md, section 1): keys and equations of S, M and L with the auxiliary heads."

import torch
import torch.nn.functional as F

from oracles.plain import Plain, up
from segkern.testing.official import Keys

# blocks of layer1 … layer5, dilations of both detail paths
SIZES = {
    "sanet_s": ((2, 2, 2, 2, 2), (1, 2, 5), (7, 13)),
    "sanet_m": ((3, 3, 3, 9, 3), (1, 2, 5), (7, 13)),
    "sanet_l": ((3, 3, 3, 27, 3), (1, 2, 5, 7, 13), (1, 2, 5, 7, 13)),
}
# inputs, outputs and stride of layer1 … layer5
STAGES = ((32, 32, 1), (32, 64, 2), (64, 128, 1), (64, 128, 2), (128, 256, 2))
PIXELS = (("1", 5, 2), ("2", 9, 4), ("3", 17, 8))  # scale, kernel and stride of the pools


def conv_bn(keys, conv, bn, c_out, c_in, *kernel, bias=False):
    keys.conv(conv, c_out, c_in, *kernel, bias=bias)
    keys.bn(bn, c_out)


def bn_conv(keys, bn, conv, c_out, c_in, *kernel, bias=False):
    keys.bn(bn, c_in)
    keys.conv(conv, c_out, c_in, *kernel, bias=bias)


def block_keys(keys, at, c_in, c, stride):
    conv_bn(keys, f"{at}.conv1", f"{at}.bn1", c, c_in, 3, 3)
    conv_bn(keys, f"{at}.conv2", f"{at}.bn2", c, c, 3, 3)
    if stride > 1 or c_in != c:
        conv_bn(keys, f"{at}.downsample.0", f"{at}.downsample.1", c, c_in)


def pyramid_keys(keys):
    for scale, _, _ in PIXELS:
        bn_conv(keys, f"spp.scale{scale}.1", f"spp.scale{scale}.3", 128, 512, 3, 3)
        bn_conv(keys, f"spp.scale{scale * 2}.1", f"spp.scale{scale * 2}.3", 128, 128, 3, 3)
    bn_conv(keys, "spp.scale4.1", "spp.scale4.3", 128, 512)
    for part in ("scale0", "process1", "process2", "process3", "process4", "shortcut"):
        bn_conv(keys, f"spp.{part}.0", f"spp.{part}.2", 128, 512)
    bn_conv(keys, "spp.compression.0", "spp.compression.2", 128, 640)
    keys.conv("spp.atten.conv3", 1, 128)


def official_keys(name, k=19):
    "Keys and shapes of a checkpoint with the auxiliary heads."
    keys = Keys()
    blocks, near, far = SIZES[name]
    conv_bn(keys, "stom.0", "stom.1", 32, 3, 3, 3, bias=True)
    conv_bn(keys, "stom.3", "stom.4", 32, 32, 3, 3, bias=True)
    for i, ((c_in, c, stride), count) in enumerate(zip(STAGES, blocks), 1):
        block_keys(keys, f"layer{i}.0", c_in, c, stride)
        for j in range(1, count):
            block_keys(keys, f"layer{i}.{j}", c, c, 1)
    for n, (c, c_in, *kernel) in enumerate(((256, 256), (256, 256, 3, 3), (512, 256)), 1):
        conv_bn(keys, f"layer6.0.conv{n}", f"layer6.0.bn{n}", c, c_in, *kernel)
    conv_bn(keys, "layer6.0.downsample.0", "layer6.0.downsample.1", 512, 256)
    pyramid_keys(keys)
    keys.conv("dp1.hconv", 128, 64)
    for path, rates in (("dp1", near), ("dp2", far)):
        for i in range(len(rates)):
            conv_bn(keys, f"{path}.conv.{i}.0", f"{path}.conv.{i}.1", 128, 128, 3, 3)
    keys.conv("decoder.conv_H", 128, 128, 1, 3, bias=False)
    keys.conv("decoder.conv_W", 128, 128, 3, 1, bias=False)
    keys.conv("decoder.conv_out", 64, 128, bias=False)
    conv_bn(keys, "compression.0", "compression.1", 128, 256)
    conv_bn(keys, "down4.0", "down4.1", 128, 128, 3, 3)
    conv_bn(keys, "down5.0", "down5.1", 128, 128, 3, 3)
    conv_bn(keys, "down5.3", "down5.4", 256, 128, 3, 3)
    heads = (("final_layer", 64, 64, k), ("seghead_extra", 128, 64, k))
    for at, a, b, c in (*heads, ("seghead_d", 128, 32, 1), ("seghead_d2", 128, 32, 1)):
        bn_conv(keys, f"{at}.bn1", f"{at}.conv1", b, a, 3, 3)
        bn_conv(keys, f"{at}.bn2", f"{at}.conv2", c, b, bias=True)
    keys.pair("classifier.0", 128, 64, bias=False)  # of ImageNet, like the next two
    keys.bn("classifier.1", 128)
    keys.pair("classifier.4", 1000, 128)
    if name == "sanet_s":
        keys.pair("fc", 1000, 128)
    return keys


class SANet(Plain):
    "The equations."

    def pair(self, x, conv, bn, stride=1, dilation=1):
        return self.bn(self.conv(x, conv, stride, dilation), bn)

    def before(self, x, bn, conv):
        "Norm, ReLU, convolution."
        return self.conv(F.relu(self.bn(x, bn)), conv)

    def stage(self, x, i, count):
        "Blocks; the last sum of several has no ReLU."
        for j in range(count):
            at = f"layer{i}.{j}"
            stride = STAGES[i - 1][2] if j == 0 else 1
            y = F.relu(self.pair(x, f"{at}.conv1", f"{at}.bn1", stride))
            y = self.pair(y, f"{at}.conv2", f"{at}.bn2")
            if f"{at}.downsample.0.weight" in self.s:
                x = self.pair(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = x + y if j == count - 1 else F.relu(x + y)
        return x

    def bottleneck(self, x, at="layer6.0"):
        y = F.relu(self.pair(x, f"{at}.conv1", f"{at}.bn1"))
        y = F.relu(self.pair(y, f"{at}.conv2", f"{at}.bn2", 2))
        y = self.pair(y, f"{at}.conv3", f"{at}.bn3")
        return y + self.pair(x, f"{at}.downsample.0", f"{at}.downsample.1", 2)

    def detail(self, x, path, rates):
        if f"{path}.hconv.weight" in self.s:
            x = self.conv(x, f"{path}.hconv")
        for i, rate in enumerate(rates):
            at = f"{path}.conv.{i}"
            x = F.relu(self.pair(x, f"{at}.0", f"{at}.1", dilation=rate))
        return x

    def pyramid(self, x):
        "Widths are pooled first, then heights; zeros of the border count in the means."
        parts = [self.before(x, "spp.scale0.0", "spp.scale0.2")]
        for scale, kernel, stride in PIXELS:
            y = F.avg_pool2d(x, (1, kernel), (1, stride), (0, kernel // 2))
            y = self.before(y, f"spp.scale{scale}.1", f"spp.scale{scale}.3")
            y = F.avg_pool2d(y, (kernel, 1), (stride, 1), (kernel // 2, 0))
            y = self.before(y, f"spp.scale{scale * 2}.1", f"spp.scale{scale * 2}.3")
            parts.append(up(y, x.shape[2:]))
        whole = self.before(x.mean((2, 3), keepdim=True), "spp.scale4.1", "spp.scale4.3")
        parts.append(whole.expand(-1, -1, *x.shape[2:]))
        c = self.before(torch.cat(parts, 1), "spp.compression.0", "spp.compression.2")
        s = self.before(x, "spp.shortcut.0", "spp.shortcut.2")
        gate = self.conv(F.relu(s + c), "spp.atten.conv3").sigmoid()
        return s * gate + c * (1 - gate)

    def decode(self, d1, d2, x, y):
        y = up(F.relu(y), x.shape[2:])
        d = d1 + d2
        a = self.conv(d, "decoder.conv_H").sigmoid() + self.conv(d, "decoder.conv_W").sigmoid()
        return self.conv(x * a + x + y * (1 - a) + y, "decoder.conv_out")

    def head(self, x, at):
        return self.before(self.before(x, f"{at}.bn1", f"{at}.conv1"), f"{at}.bn2", f"{at}.conv2")


def answer(state, name, picture):
    "The three heads and what official fixtures hold of the inside."
    net = SANet(state)
    blocks, near, far = SIZES[name]
    fine = tuple(n // 8 for n in picture.shape[2:])
    x = F.relu(net.pair(picture.double(), "stom.0", "stom.1", 2))
    x = F.relu(net.pair(x, "stom.3", "stom.4", 2))
    x1 = net.stage(x, 1, blocks[0])
    x3 = net.stage(F.relu(net.stage(F.relu(x1), 2, blocks[1])), 3, blocks[2])
    path1 = net.detail(F.relu(x3[:, :64]), "dp1", near)
    x4 = net.stage(F.relu(x3[:, 64:]), 4, blocks[3])
    x = F.relu(x4 + net.pair(path1, "down4.0", "down4.1", 2))
    d1 = path1 + up(F.relu(x4), fine) + x3
    x5 = net.stage(x, 5, blocks[4])
    d2 = net.detail(d1, "dp2", far)
    y = net.pair(F.relu(net.pair(d2, "down5.0", "down5.1", 2)), "down5.3", "down5.4", 2)
    x = F.relu(x5 + y)
    dp = d2 + up(net.pair(x, "compression.0", "compression.1"), fine)
    spp = net.pyramid(F.relu(net.bottleneck(x)))
    z = net.decode(d1, d2, dp, spp)
    inside = dict(layer1=x1, layer3=x3, layer4=x4, layer5=x5, dp1=path1, dp2=d2, dp=dp)
    heads = dict(logits=net.head(z, "final_layer"), aux=net.head(x4, "seghead_extra"))
    return {**heads, "boundary": net.head(dp, "seghead_d"), **inside, "spp": spp, "decoder": z}
