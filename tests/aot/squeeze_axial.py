"Production launches of axial_attention and axial_add: SeaFormer's maps of queries, keys and values, and street scenes."

from functools import partial

import torch

from segkern.ops.axial_add import axial_add_bwd, axial_add_fwd
from segkern.ops.squeeze_axial import CASES, axial_attention_fwd

MMA = {"_axial_attention_kernel"}
WIDE = {"_axial_add_fwd_kernel", "_axial_add_bwd_kernel"}

# instructions on an H100: (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_axial_attention_kernel", "SeaFormer-L 32² bf16"): ("MUFU.EX2", 29),
    ("_axial_add_fwd_kernel", "SeaFormer-L 32² bf16"): ("load2", 18),
    ("_axial_add_bwd_kernel", "SeaFormer-L 32² bf16"): ("load2", 13.2),
}


def new(*shape, dtype, last=False):
    "A map on the meta device."
    return torch.empty(
        shape,
        dtype=dtype,
        device="meta",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def attend(b, key, h, w, dtype, heads=8, places=16):
    keys = heads * key
    means = [torch.empty((b, 4 * keys, n), dtype=dtype, device="meta") for n in (h, w)]
    axial_attention_fwd(
        *means, tuple(torch.empty((1, keys, places), device="meta") for _ in range(4)), heads
    )


def add(b, c, h, w, dtype, last=False, wanted=(True, True, True)):
    # the values are the last channels of a wider map
    qkv = new(b, 2 * c, h, w, dtype=dtype, last=last)
    row, column = (torch.empty((b, c, n), dtype=dtype, device="meta") for n in (h, w))
    out = axial_add_fwd(qkv[:, c:], row, column)
    axial_add_bwd(out, qkv[:, c:], row, column, wanted)


def both(b, key, h, w, dtype, heads=8):
    "Attention, and the sum behind it, with twice as many channels of values as of keys."
    attend(b, key, h, w, dtype, heads)
    add(b, 2 * heads * key, h, w, dtype)


def cases():
    """SeaFormer-L's three stages at 512², one picture and sixteen; street scenes; types, layouts
    and sizes that take other paths."""
    street = CASES["SeaFormer-L stage 1, 1024×2048 B1"]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for stage in (1, 2, 3):
            sizes = CASES[f"SeaFormer-L stage {stage}, 512² B1"]
            narrow = ", narrow" if sizes["h"] == 8 else ""
            yield f"SeaFormer-L {sizes['h']}² {name}{narrow}", partial(both, **sizes, dtype=dtype)
        yield f"SeaFormer-B 16² batch 16 {name}", partial(both, 16, 16, 16, 16, dtype)
        yield f"1024×2048 {name}", partial(both, **street, dtype=dtype)
    yield (
        "SeaFormer-B 16² fp16",
        lambda: [attend(16, 16, 16, 16, torch.float16), add(16, 256, 16, 16, torch.float16)],
    )
    yield "channels last bf16, narrow", lambda: add(4, 256, 32, 32, torch.bfloat16, last=True)
    yield "channels last fp32, narrow", lambda: add(4, 256, 32, 32, torch.float32, last=True)
    yield (
        "odd sides bf16, narrow",
        lambda: [attend(2, 20, 23, 31, torch.bfloat16), add(2, 320, 23, 31, torch.bfloat16)],
    )
    yield (
        "one gradient each bf16, narrow",
        lambda: [
            add(4, 256, 32, 32, torch.bfloat16, wanted=tuple(i == j for j in range(3)))
            for i in range(3)
        ],
    )
    yield (
        "more than 2**31 elements bf16",
        lambda: [
            attend(16, 16, 4096, 4096, torch.bfloat16),
            add(64, 256, 512, 512, torch.bfloat16),
        ],
    )
    yield (
        "more than 2**31 elements, channels last bf16, narrow",
        lambda: add(64, 256, 512, 512, torch.bfloat16, last=True),
    )
