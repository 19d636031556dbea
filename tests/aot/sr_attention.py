"Production launches of sr_attention: the stages of the Mix Transformers."

from functools import partial

import torch

from segkern.ops.sr_attention import CASES, sr_attention_bwd, sr_attention_fwd

MMA = {"_sr_attention_fwd_kernel", "_sr_attention_dq_kernel", "_sr_attention_dkv_kernel"}

# instructions per score on an H100: (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_sr_attention_fwd_kernel", "B5 stage 1 bf16"): ("MUFU.EX2", 8.5),
    ("_sr_attention_dq_kernel", "B5 stage 1 bf16"): ("MUFU.EX2", 8.7),
    ("_sr_attention_dkv_kernel", "B5 stage 1 bf16"): ("MUFU.EX2", 11.5),
}

SPILL = {("_sr_attention_dkv_kernel", 80, "B0 stage 1 fp32"): 10}  # bytes, in single precision
# bytes that Triton 3.6 spills and newer ones do not: (kernel, arch, part of the case's name) -> bytes
SPILL_36 = {("_sr_attention_dkv_kernel", 80, "heads of 128"): 12}


def launch(b, h, n, m, d, dtype):
    "As the encoder calls it: views of [b, n, h, d] and [b, m, 2, h, d]."

    def new(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    q = new(b, n, h, d).transpose(1, 2)
    kv = new(b, m, 2, h, d).permute(2, 0, 3, 1, 4)
    out, lse = sr_attention_fwd(q, kv[0], kv[1], d**-0.5)
    sr_attention_bwd(q, kv[0], kv[1], out, lse, out, d**-0.5)


def cases():
    bf16 = torch.bfloat16
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        for net, batch in (("B0", 1), ("B5", 16)):
            sizes = CASES[f"MiT-{net} stage 1, 512² B{batch}"]
            yield f"{net} stage 1 {name}", partial(launch, **sizes, dtype=dtype)
    street = CASES["MiT-B5 stage 3, 1024×2048 B1"]
    yield "B5 stage 3, 1024x2048 bf16", partial(launch, **street, dtype=bf16)
    yield "heads of 128 bf16", partial(launch, 2, 2, 4096, 1024, 128, bf16)
    yield "heads of 24 bf16", partial(launch, 1, 3, 1000, 100, 24, bf16)
    yield "more than 2**31 elements bf16", partial(launch, 512, 2, 65536, 256, 64, bf16)
