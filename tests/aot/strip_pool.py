"Production launches of strip_pool."

from functools import partial

import torch

from segkern.ops.strip_pool import CASES, strip_pool_bwd, strip_pool_fwd

WIDE = {"_strip_pool_fwd_kernel"}
# one register, outside of the loop
SPILL = {("_strip_pool_fwd_kernel", 90, "over the height"): 10}

# instructions per element on an H100: (kernel, part of the case's name) -> (what is counted per, limit)
MOST = {
    ("_strip_pool_fwd_kernel", "both axes bf16"): ("load2", 18.5),
    ("_strip_pool_fwd_kernel", "channels last bf16"): ("load2", 19),
}


def launch(shape, dtype, last=False, mean=True, top=True, over_h=True, over_w=True):
    x = torch.empty(shape, dtype=dtype, device="meta")
    if last:
        x = x.to(memory_format=torch.channels_last)
    o = strip_pool_fwd(x, mean, top, over_h, over_w)
    grads = [t if t.numel() else None for t in o]
    strip_pool_bwd(x, grads[0], grads[1], o[2], grads[3], grads[4], o[5])


def cases():
    one, eight = (tuple(CASES[f"32×256×512 B{b}"].values()) for b in (1, 8))
    bf16 = torch.bfloat16
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        yield f"both axes {name}", partial(launch, eight, dtype)
        yield f"S2-FPN 1/4 {name}", partial(launch, one, dtype, over_w=False)
        yield f"over the height, batch 8 {name}", partial(launch, eight, dtype, over_w=False)
        yield f"channels last {name}", partial(launch, eight, dtype, last=True)
    yield "odd width, narrow loads bf16", partial(launch, (2, 64, 45, 59), bf16)
    yield "more than 2**31 elements bf16", partial(launch, (64, 256, 512, 512), bf16)
