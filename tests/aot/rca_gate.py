"Production launches of rca_gate: the gates of CGRSeg B and L."

import torch

from segkern.ops.rca_gate import rca_gate_bwd, rca_gate_fwd

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
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield f"CGRSeg-B 1/8 {name}", lambda dtype=dtype: gate(1, 64, 64, 64, 11, dtype)
    yield "CGRSeg-L context B16 bf16, narrow", lambda: gate(16, 656, 8, 8, 9, torch.bfloat16)
    yield "CGRSeg-B 1/32, 480×640 bf16, narrow", lambda: gate(2, 288, 15, 20, 11, torch.bfloat16)
    yield "more than 2**31 elements bf16", lambda: gate(40, 512, 512, 1024, 11, torch.bfloat16)
    yield (
        "more than 2**31 elements, channels last bf16, narrow",
        lambda: gate(40, 512, 512, 1024, 11, torch.bfloat16, last=True),
    )
