"Production launches of upsample_argmax, upsample_confusion, upsample_cross_entropy, upsample_dice."

from functools import partial

import torch

from segkern.ops import ce, labels
from segkern.ops import dice as dice_op
from segkern.ops.ce_quads import ce_bwd, ce_fwd
from segkern.ops.dice_quads import dice_bwd, dice_fwd
from segkern.ops.labels_kernels import upsample_argmax_fwd, upsample_confusion_fwd
from segkern.ops.mining import select

# 16-bit logits; float32 ones use exact products
MMA = {"_upsample_ce_bwd_kernel", "_dice_bwd_kernel"}
WIDE = {"_digit_histogram_kernel"}

# instructions per exponential on an H100; forward has 5 exponentials for 4 pixels and classes, backward one each;
# labels and counts: per load, of which a pixel and class take four
MOST = {
    ("_quad_ce_fwd_kernel", "Cityscapes bf16"): ("MUFU.EX2", 7.6),
    ("_quad_ce_fwd_kernel", "ADE20K bf16"): ("MUFU.EX2", 7.6),
    ("_quad_ce_bwd_kernel", "Cityscapes bf16"): ("MUFU.EX2", 12),
    ("_quad_ce_bwd_kernel", "ADE20K bf16"): ("MUFU.EX2", 13.5),
    ("_quad_dice_fwd_kernel", "ADE20K bf16"): ("MUFU.EX2", 16.5),
    ("_quad_dice_bwd_kernel", "ADE20K bf16"): ("MUFU.EX2", 22.5),
    ("_upsample_argmax_kernel", "whole picture bf16"): ("LDG", 7.4),
    ("_upsample_confusion_kernel", "whole picture bf16"): ("LDG", 7.4),
}

# bytes that Triton 3.6 spills and newer ones do not. Half as many patches per program end it for the quads and cost
# more: the loop takes 15.2 instructions per exponential instead of 10.8 with mining, 22.6 instead of 17.4 for dice
SPILL_36 = {
    ("_quad_ce_fwd_kernel", 80, "weights, smoothing, corners"): 58,
    ("_quad_ce_bwd_kernel", 80, "weights, smoothing, corners"): 214,
    ("_quad_ce_bwd_kernel", 90, "weights, smoothing, corners"): 216,
    ("_quad_ce_bwd_kernel", 80, "mining"): 396,
    ("_quad_ce_bwd_kernel", 90, "mining"): 226,
    ("_quad_dice_bwd_kernel", 80, "dice, corners"): 190,
    ("_quad_dice_bwd_kernel", 90, "dice, corners"): 394,
    ("_upsample_ce_bwd_kernel", 80, "fp32"): 181,
    ("_upsample_ce_bwd_kernel", 90, "fp32"): 131,
    ("_dice_bwd_kernel", 80, "any scale"): 37,
    ("_dice_bwd_kernel", 90, "any scale"): 25,
}


def new(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def train(b, k, h, w, H, W, dtype, align=False, **options):
    "Loss, forward and backward."
    z = new(b, k, h, w, dtype=dtype)
    y = new(b, H, W, dtype=torch.int32)
    weight = new(k)
    weight = weight if options.pop("weight", False) else None
    pixel = new(b, H, W) if options.pop("pixel", False) else None
    _, _, lse = ce_fwd(z, y, weight, 255, align, pixels=pixel is not None, **options)
    ce_bwd(z, y, weight, lse, pixel, new(), 255, align, **options)


def dice(b, k, h, w, H, W, dtype, align=False):
    "Dice, forward and backward."
    z = new(b, k, h, w, dtype=dtype)
    y = new(b, H, W, dtype=torch.int32)
    dice_fwd(z, y, 255, align, False)
    dice_bwd(z, y, new(b, k, 2), 255, align, False)


def decide(b, k, h, w, H, W, dtype):
    "Labels and counts."
    z = new(b, k, h, w, dtype=dtype)
    upsample_argmax_fwd(z, (H, W), False)
    upsample_confusion_fwd(z, new(b, H, W, dtype=torch.int32), 255, False)


def sizes(case):
    "b, k, h, w, H, W."
    return tuple(case.values())


# as the papers train, and as they are used
CITYSCAPES = sizes(ce.CASES["Cityscapes K19 1/8 B8"])
ADE20K = sizes(ce.CASES["ADE20K K150 1/4 B16"])
ONE_PICTURE = sizes(labels.CASES["ADE20K K150 1/4 B1"])
WHOLE_PICTURE = sizes(labels.WHOLE_PICTURES["Cityscapes K19 1/8, 1024×2048 B1"])
ANY_SCALE = *CITYSCAPES[:4], 1000, 1000


def everything(dtype):
    "All ops of a head with many classes."
    train(*ADE20K, dtype)
    dice(*sizes(dice_op.CASES["ADE20K K150 1/4 B16"]), dtype)
    decide(*ONE_PICTURE, dtype)


def any_scale(dtype):
    train(*ANY_SCALE, dtype)
    dice(*ANY_SCALE, dtype)


def by_2_and_by_16(dtype):
    train(8, 19, 256, 256, 512, 512, dtype)
    train(8, 19, 32, 32, 512, 512, dtype)


def mining():
    train(*CITYSCAPES, torch.bfloat16, True, pixel=True)
    select(new(8 * 1024 * 1024), new(dtype=torch.int64))


def cases():
    weighted = dict(weight=True, smoothing=0.1)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield f"Cityscapes {name}", partial(train, *CITYSCAPES, dtype)
        yield f"ADE20K {name}", partial(everything, dtype)
        yield f"whole picture {name}", partial(decide, *WHOLE_PICTURE, dtype)
        yield f"any scale {name}", partial(any_scale, dtype)
        yield f"by 2 and by 16 {name}", partial(by_2_and_by_16, dtype)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"weights, smoothing, corners {dtype}"
        yield name, partial(train, *CITYSCAPES, dtype, True, **weighted)
    odd = *CITYSCAPES[:4], 1001, 1024
    name = "weights, smoothing, corners, any scale bf16"
    yield name, partial(train, *odd, torch.bfloat16, True, **weighted)
    yield "mining bf16", mining
    yield "dice, corners bf16", partial(dice, *CITYSCAPES, torch.bfloat16, True)
    huge = 64, 171, 512, 512, 512, 512
    yield "more than 2**31 logits fp32", partial(train, *huge, torch.float32)
