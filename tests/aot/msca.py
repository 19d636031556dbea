"Production launches of msca: the blocks of SegNeXt-L at 512×512, larger maps, odd ones."

import torch

from segkern.ops.msca import TAPS, msca_bwd, msca_fwd

MMA = {f"_msca_{name}_kernel" for name in ("fwd", "strips", "square", "rows", "columns", "taps")}
WIDE = MMA
# bytes, all at widths that are no multiple of 8, where every number of a tile has an address of its own
SPILL = {
    ("_msca_fwd_kernel", 80, "480²"): 12,
    ("_msca_fwd_kernel", 90, "480²"): 150,
    ("_msca_fwd_kernel", "gfx942", "480²"): 134,
    ("_msca_strips_kernel", 80, "480²"): 36,
    ("_msca_strips_kernel", 90, "480²"): 332,
    ("_msca_strips_kernel", "gfx942", "480²"): 128,
}

# bytes that Triton 3.6 spills and newer ones do not: (kernel, arch, part of the case's name) -> bytes
SPILL_36 = {
    ("_msca_taps_kernel", 80, "480²"): 10,
    ("_msca_fwd_kernel", "gfx942", "480²"): 140,
    ("_msca_strips_kernel", "gfx942", "480²"): 152,
}


def both(b, c, h, w, dtype, wanted=(True, True), last=False):
    "Forward and backward launches on the meta device."
    x = torch.empty(
        (b, c, h, w),
        dtype=dtype,
        device="meta",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    taps = torch.empty((c, TAPS), device="meta")
    msca_bwd(x, taps, msca_fwd(x, taps), wanted)


def cases():
    "The published sizes; layouts, sizes and gradients that take other paths. Convolutions do float32."
    for c, side in ((64, 128), (128, 64), (320, 32), (512, 16)):
        yield (
            f"{c}×{side}² B16 bf16" + (", narrow" if side > 64 else ""),
            lambda c=c, side=side: both(16, c, side, side, torch.bfloat16),
        )
    yield "128×64² fp16", lambda: both(1, 128, 64, 64, torch.float16)
    yield "480², odd bf16, narrow", lambda: both(1, 128, 60, 59, torch.bfloat16)
    yield (
        "128×64² channels last bf16, narrow",
        lambda: both(4, 128, 64, 64, torch.bfloat16, last=True),
    )
    yield "64×256×512 bf16, narrow", lambda: both(1, 64, 256, 512, torch.bfloat16)
    yield (
        "gradient of the map only bf16, narrow",
        lambda: both(4, 128, 64, 64, torch.bfloat16, (True, False)),
    )
    yield (
        "gradient of the taps only bf16",
        lambda: both(4, 128, 64, 64, torch.bfloat16, (False, True)),
    )
    yield (
        "more than 2**31 elements bf16, narrow",
        lambda: both(16, 64, 1024, 2048 + 512, torch.bfloat16),
    )
