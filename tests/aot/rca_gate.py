"Production launches of rca_gate: the gates of CGRSeg B and L."

from functools import partial

import torch

from segkern.ops.rca_gate import CASES, rca_gate_bwd, rca_gate_fwd

WIDE = {"_rca_gate_fwd_kernel", "_rca_gate_bwd_kernel", "_rca_gate_dx_kernel"}

# instructions per multiplication of the loop over taps, on an H100:
# (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_rca_gate_fwd_kernel", "1/8 bf16"): ("FFMA", 7.4),
    ("_rca_gate_bwd_kernel", "1/8 bf16"): ("FFMA", 7.8),
    ("_rca_gate_dx_kernel", "1/8 bf16"): ("FFMA", 5.4),
}


def gate(b, c, h, w, k, dtype, last=False):
    x = torch.empty(
        (b, c, h, w),
        dtype=dtype,
        device="meta",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    lines = [
        torch.empty(s, device="meta")
        for s in ((b, c, h), (c, w), (b, c, w), (c, k), (c,), (c, 1, 3, 3), (c,))
    ]
    rca_gate_bwd(x, lines, rca_gate_fwd(x, lines))


def cases():
    """Maps of a picture of 512×512 and a training batch, both types; odd sizes, another layout,
    more than 2**31 elements."""
    bf16 = torch.bfloat16
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        yield f"CGRSeg-B 1/8 {name}", partial(gate, **CASES["CGRSeg-B 1/8, 512² B1"], dtype=dtype)
    context = CASES["CGRSeg-L context, 512² B16"]
    yield "CGRSeg-L context B16 bf16, narrow", partial(gate, **context, dtype=bf16)
    yield "CGRSeg-B 1/32, 480×640 bf16, narrow", partial(gate, 2, 288, 15, 20, 11, bf16)
    huge = partial(gate, 40, 512, 512, 1024, 11, bf16)
    yield "more than 2**31 elements bf16", huge
    yield "more than 2**31 elements, channels last bf16, narrow", partial(huge, last=True)
