"UPerNet's head and its auxiliary one (ssa_classifier.md, section 5.1), on four maps."

import torch
import torch.nn.functional as F

from oracles.plain import up
from segkern.testing.official import Keys


def upernet_keys(widths, k, c=512):
    "Of both heads, on maps of four widths."
    keys = Keys()

    def unit(at, c_in, c_out, kernel=1):
        keys.conv(f"{at}.conv", c_out, c_in, kernel, kernel, bias=False)
        keys.bn(f"{at}.bn", c_out)

    for i in range(4):
        unit(f"decode_head.psp_modules.{i}.1", widths[3], c)
    unit("decode_head.bottleneck", widths[3] + 4 * c, c, 3)
    for i in range(3):
        unit(f"decode_head.lateral_convs.{i}", widths[i], c)
        unit(f"decode_head.fpn_convs.{i}", c, c, 3)
    unit("decode_head.fpn_bottleneck", 4 * c, c, 3)
    keys.conv("decode_head.conv_seg", k, c)
    unit("auxiliary_head.convs.0", widths[2], 256, 3)
    keys.conv("auxiliary_head.conv_seg", k, 256)
    return keys


def upernet_feature(net, maps):
    "The map in front of the classifier; `net` is a `Plain`."
    head = "decode_head"
    last = maps[3]
    pooled = [last]
    for i, side in enumerate((1, 2, 3, 6)):
        t = net.cbr(F.adaptive_avg_pool2d(last, side), f"{head}.psp_modules.{i}.1")
        pooled.append(up(t, last.shape[2:]))
    top = net.cbr(torch.cat(pooled, 1), f"{head}.bottleneck")
    lateral = [net.cbr(maps[i], f"{head}.lateral_convs.{i}") for i in range(3)] + [top]
    for i in (3, 2, 1):
        lateral[i - 1] = lateral[i - 1] + up(lateral[i], lateral[i - 1].shape[2:])
    smooth = [net.cbr(lateral[i], f"{head}.fpn_convs.{i}") for i in range(3)] + [top]
    smooth = torch.cat([up(t, maps[0].shape[2:]) for t in smooth], 1)
    return net.cbr(smooth, f"{head}.fpn_bottleneck")


def auxiliary(net, maps):
    "Logits of the head on the third map."
    return net.conv(
        net.cbr(maps[2], "auxiliary_head.convs.0"),
        "auxiliary_head.conv_seg",
    )
