"Production launches of strip_attention."

import torch

from segkern.ops.strip_attention import strip_attention_bwd, strip_attention_fwd

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


def cases():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield f"1/4 C32 {name}", lambda dtype=dtype: launch(1, 32, 256, 512, dtype)
        yield f"1/8 C64 {name}", lambda dtype=dtype: launch(1, 64, 128, 256, dtype)
        yield (
            f"1/16 C128, 1/32 C256 {name}",
            lambda dtype=dtype: (launch(1, 128, 64, 128, dtype), launch(1, 256, 32, 64, dtype)),
        )
    yield "720x960 bf16", lambda: launch(1, 32, 180, 240, torch.bfloat16)
    yield "more than 2**31 elements bf16", lambda: launch(64, 128, 512, 1024, torch.bfloat16, 3)
