"Production launches of affinity: the stages of the sparse SASFormer, B0 and B4."

from functools import partial

import torch

from segkern.ops.affinity import CASES, affinity_bwd, affinity_fwd

MMA = {"_affinity_fwd_kernel", "_affinity_dq_kernel", "_affinity_dkp_kernel"}

# instructions per score on an H100: (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_affinity_fwd_kernel", "B4 stage 1 bf16"): ("MUFU.EX2", 11.6),
    ("_affinity_dq_kernel", "B4 stage 1 bf16"): ("MUFU.EX2", 8.6),  # the first of two loops
    ("_affinity_dkp_kernel", "B4 stage 1 bf16"): ("MUFU.EX2", 20.5),
}

# bytes that Triton 3.6 spills and newer ones do not: (kernel, arch, part of the case's name) -> bytes
SPILL_36 = {("_affinity_dq_kernel", 80, "B0 stage 1"): 10}


def launch(b, h, n, m, dtype, d=64, blocks=1, c=21, values=None, wanted=(True, True, True)):
    """As the encoder and the loss call it: views of [b, n, h, d] and [b, m, 2, h, d],
    probabilities of a map in NCHW, under autocast float32."""

    def new(*shape, kind=dtype):
        return torch.empty(shape, dtype=kind, device="meta")

    qs = [new(b, n, h, d).transpose(1, 2) for _ in range(blocks)]
    ks = [new(b, m, 2, h, d).permute(2, 0, 3, 1, 4)[0] for _ in range(blocks)]
    p = new(b, c, m, kind=values or dtype).transpose(1, 2)
    out, lse = affinity_fwd(qs, ks, p, d**-0.5)
    affinity_bwd(qs, ks, p, lse, out, d**-0.5, wanted)


def stage(i):
    "b, h, n, m of a stage of B4."
    sizes = CASES[f"MiT-B4 stage {i}, 512² B4"]
    return tuple(sizes[k] for k in "bhnm")


def cases():
    bf16 = torch.bfloat16
    autocast = dict(values=torch.float32)
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        blocks = 2 if dtype == bf16 else 1
        yield f"B4 stage 1 {name}", partial(launch, *stage(1), dtype, blocks=blocks)
        yield f"59 classes {name}", partial(launch, *stage(3), dtype, c=59)
    yield "B0 stage 1 bf16", partial(launch, *stage(1), bf16, d=32)
    yield "autocast, B4 stage 2 bf16", partial(launch, *stage(2), bf16, **autocast)
    name = "autocast, B4 stage 4, 59 classes fp16"
    yield name, partial(launch, *stage(4), torch.float16, c=59, **autocast)
    yield "B4 stage 4 bf16", partial(launch, *stage(4), bf16)
    yield "autocast, 150 classes bf16", partial(launch, *stage(2), bf16, c=150, **autocast)
    yield "heads of 128 bf16", partial(launch, 2, 2, 4096, 1024, bf16, d=128)
    name = "gradient of the keys only bf16"
    yield name, partial(launch, *stage(4), bf16, wanted=(False, True, False))
    name = "detached maps bf16"
    yield name, partial(launch, *stage(3), bf16, blocks=2, wanted=(False, False, True))
    yield "more than 2**31 elements bf16", partial(launch, 512, 2, 65536, 256, bf16)
