"Production launches of upsample_argmax, upsample_confusion, upsample_cross_entropy, upsample_dice."

import torch

from segkern.ops.select import select
from segkern.ops.labels_kernels import upsample_argmax_fwd, upsample_confusion_fwd
from segkern.ops.ce_quads import ce_bwd, ce_fwd
from segkern.ops.dice_quads import dice_bwd, dice_fwd

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


def cases():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield f"Cityscapes {name}", lambda dtype=dtype: train(8, 19, 128, 128, 1024, 1024, dtype)
        yield (
            f"ADE20K {name}",
            lambda dtype=dtype: (
                train(16, 150, 128, 128, 512, 512, dtype),
                dice(16, 150, 128, 128, 512, 512, dtype),
                decide(1, 150, 128, 128, 512, 512, dtype),
            ),
        )
        yield (
            f"whole picture {name}",
            lambda dtype=dtype: decide(1, 19, 128, 256, 1024, 2048, dtype),
        )
        yield (
            f"any scale {name}",
            lambda dtype=dtype: (
                train(8, 19, 128, 128, 1000, 1000, dtype),
                dice(8, 19, 128, 128, 1000, 1000, dtype),
            ),
        )
        yield (
            f"by 2 and by 16 {name}",
            lambda dtype=dtype: (
                train(8, 19, 256, 256, 512, 512, dtype),
                train(8, 19, 32, 32, 512, 512, dtype),
            ),
        )
    for dtype in (torch.bfloat16, torch.float32):
        yield (
            f"weights, smoothing, corners {dtype}",
            lambda dtype=dtype: train(
                8, 19, 128, 128, 1024, 1024, dtype, True, weight=True, smoothing=0.1
            ),
        )
    yield (
        "weights, smoothing, corners, any scale bf16",
        lambda: train(
            8, 19, 128, 128, 1001, 1024, torch.bfloat16, True, weight=True, smoothing=0.1
        ),
    )
    yield (
        "mining bf16",
        lambda: (
            train(8, 19, 128, 128, 1024, 1024, torch.bfloat16, True, pixel=True),
            select(new(8 * 1024 * 1024), new(dtype=torch.int64)),
        ),
    )
    yield "dice, corners bf16", lambda: dice(8, 19, 128, 128, 1024, 1024, torch.bfloat16, True)
    yield "more than 2**31 logits fp32", lambda: train(64, 171, 512, 512, 512, 512, torch.float32)
