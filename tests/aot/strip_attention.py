"Production launches of strip_attention."

from functools import partial

import torch

from segkern.ops.strip_attention import CASES, strip_attention_bwd, strip_attention_fwd

KERNELS = {
    "_strip_attention_fwd_kernel",
    "_strip_attention_dq_kernel",
    "_strip_attention_dkv_kernel",
}
MMA = KERNELS

# instructions per score on an H100: (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_strip_attention_fwd_kernel", "1/4 C32 bf16"): ("MUFU.EX2", 8.2),
    ("_strip_attention_dq_kernel", "1/4 C32 bf16"): ("MUFU.EX2", 12.9),
    ("_strip_attention_dkv_kernel", "1/4 C32 bf16"): ("MUFU.EX2", 14.5),
}


def launch(b, c, h, w, dtype, cv=2):
    q, k, v = (
        torch.empty(s, dtype=dtype, device="meta") for s in ((b, c, h, w), (b, c, w), (b, cv, w))
    )
    out, lse = strip_attention_fwd(q, k, v)
    strip_attention_bwd(q, k, v, out, lse, out)


def scale(part, dtype, picture="1024×2048"):
    launch(**CASES[f"{part}, {picture} B1"], dtype=dtype)


def coarse(dtype):
    scale("1/16", dtype)
    scale("1/32", dtype)


def cases():
    bf16 = torch.bfloat16
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        yield f"1/4 C32 {name}", partial(scale, "1/4", dtype)
        yield f"1/8 C64 {name}", partial(scale, "1/8", dtype)
        yield f"1/16 C128, 1/32 C256 {name}", partial(coarse, dtype)
    yield "720x960 bf16", partial(scale, "1/4", bf16, "720×960")
    yield "more than 2**31 elements bf16", partial(launch, 64, 128, 512, 1024, bf16, 3)
