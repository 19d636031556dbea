"Production launches of msca: the blocks of SegNeXt-L at 512×512, larger maps, odd ones."

from functools import partial

import torch

from segkern.ops.msca import CASES, TAPS, msca_bwd, msca_fwd

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
    bf16 = torch.bfloat16
    for sizes in (s for s in CASES.values() if s["b"] == 16):
        narrow = ", narrow" if sizes["h"] > 64 else ""
        yield f"{sizes['c']}×{sizes['h']}² B16 bf16{narrow}", partial(both, **sizes, dtype=bf16)
    one = CASES["SegNeXt-L 128×64², 512² B1"]
    four = partial(both, **one | dict(b=4), dtype=bf16)
    yield "128×64² fp16", partial(both, **one, dtype=torch.float16)
    yield "480², odd bf16, narrow", partial(both, 1, 128, 60, 59, bf16)
    yield "128×64² channels last bf16, narrow", partial(four, last=True)
    yield "64×256×512 bf16, narrow", partial(both, 1, 64, 256, 512, bf16)
    yield "gradient of the map only bf16, narrow", partial(four, wanted=(True, False))
    yield "gradient of the taps only bf16", partial(four, wanted=(False, True))
    yield "more than 2**31 elements bf16, narrow", partial(both, 16, 64, 1024, 2048 + 512, bf16)
