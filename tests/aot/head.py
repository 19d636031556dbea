"Production launches of upsample_argmax, upsample_confusion, upsample_cross_entropy, upsample_dice, upsample_kl."
import torch

from segkern.ops.head_kernels import select, upsample_argmax_fwd, upsample_ce_bwd, upsample_ce_fwd, upsample_confusion_fwd
from segkern.ops.head_soft import dice_bwd, dice_fwd, kl_bwd, kl_fwd

MMA = {"_upsample_ce_bwd_kernel", "_dice_bwd_kernel", "_kl_bwd_kernel"} # 16-bit logits; float32 ones use exact products
WIDE = {"_digit_histogram_kernel"}


def new(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device="meta")


def train(b, k, h, w, H, W, dtype, align=False, **options):
    "Loss, forward and backward."
    z, y, weight = new(b, k, h, w, dtype=dtype), new(b, H, W, dtype=torch.int32), new(k)
    weight = weight if options.pop("weight", False) else None
    pixel = new(b, H, W) if options.pop("pixel", False) else None
    _, _, lse = upsample_ce_fwd(z, y, weight, 255, align, pixels=pixel is not None, **options)
    upsample_ce_bwd(z, y, weight, lse, pixel, new(), 255, align, **options)


def soft(b, k, h, w, H, W, dtype):
    "Dice and divergence, forward and backward."
    z, t, y = new(b, k, h, w, dtype=dtype), new(b, k, h, w, dtype=dtype), new(b, H, W, dtype=torch.int32)
    dice_fwd(z, y, 255, False, False)
    dice_bwd(z, y, new(b, k, 2), 255, False, False)
    _, a, c = kl_fwd(z, t, H, W, None, 1.0, False)
    kl_bwd(z, t, a, c, None, new(), 1.0, False)


def decide(b, k, h, w, H, W, dtype):
    "Labels and counts."
    z = new(b, k, h, w, dtype=dtype)
    upsample_argmax_fwd(z, (H, W), False)
    upsample_confusion_fwd(z, new(b, H, W, dtype=torch.int32), 255, False)


def cases():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield f"Cityscapes {name}", lambda dtype=dtype: train(8, 19, 128, 128, 1024, 1024, dtype)
        yield f"ADE20K {name}", lambda dtype=dtype: (soft(16, 150, 128, 128, 512, 512, dtype), decide(1, 150, 128, 128, 512, 512, dtype))
        yield f"whole picture {name}", lambda dtype=dtype: decide(1, 19, 128, 256, 1024, 2048, dtype)
    yield "weights, smoothing, corners bf16", lambda: train(8, 19, 128, 128, 1024, 1024, torch.bfloat16, True, weight=True, smoothing=.1, total_weight=19.0)
    yield "mining bf16", lambda: (train(8, 19, 128, 128, 1024, 1024, torch.bfloat16, True, pixel=True), select(new(8*1024*1024), new(dtype=torch.int64)))
    yield "more than 2**31 logits fp32", lambda: train(64, 171, 512, 512, 512, 512, torch.float32)
