"Production launches of prototypes, cosine_logits and class_sums: the heads of the adaptive classifier."

import torch

from segkern.ops.class_sums import class_sums_bwd, class_sums_fwd
from segkern.ops.cosine import cosine_bwd, cosine_fwd
from segkern.ops.prototypes import prototypes_bwd, prototypes_fwd

MMA = {
    "_prototypes_sums_kernel",
    "_prototypes_bwd_kernel",
    "_cosine_fwd_kernel",
    "_cosine_dx_kernel",
    "_cosine_du_kernel",
    "_class_sums_fwd_kernel",
}
WIDE = {
    "_prototypes_stats_kernel",
    "_prototypes_sums_kernel",
    "_prototypes_bwd_kernel",
    "_cosine_fwd_kernel",
    "_cosine_dx_kernel",
    "_cosine_du_kernel",
    "_class_sums_fwd_kernel",
}

# bytes, in single precision
SPILL = {("_class_sums_fwd_kernel", 90, "SegFormer-B5 K150 C256 fp32"): 12}
# bytes that Triton 3.6 spills and newer ones do not: (kernel, arch, part of the case's name) -> bytes
SPILL_36 = {("_prototypes_bwd_kernel", 80, "480²"): 12}


def new(*shape, dtype, last=False):
    "A map on the meta device."
    return torch.empty(
        shape,
        dtype=dtype,
        device="meta",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def centres(b, k, c, h, w, dtype, wanted=(True, True, True), last=False, values=None):
    logits, feat, pos = (
        new(b, s, h, w, dtype=d, last=last)
        for s, d in ((k, values or dtype), (c, dtype), (c, dtype))
    )
    kept = prototypes_fwd(logits, feat, pos)
    prototypes_bwd(logits, feat, pos, kept, kept[:2], wanted)


def cosine(b, k, c, h, w, dtype, last=False, pos=True):
    u = torch.empty((b, k, c), device="meta")
    feat = new(b, c, h, w, dtype=dtype, last=last)
    pos = torch.empty_like(feat) if pos else None
    kept = cosine_fwd(u, feat, pos)
    cosine_bwd(u, feat, pos, kept, kept[0])


def sums(b, k, c, h, w, dtype, labels=torch.uint8, last=False):
    x = new(b, c, h, w, dtype=dtype, last=last)
    y = torch.empty((b, h, w), dtype=labels, device="meta")
    class_sums_bwd(x, y, class_sums_fwd(x, y, k)[0])


def all_of(*shape, **kw):
    for op in (centres, cosine, sums):
        op(*shape, **kw)


def cases():
    """SegFormer-B5, OCR and SegNeXt-L of kernels' sheet, street scenes, both types; types, layouts
    and sizes that take other paths."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield (
            f"SegFormer-B5 K150 C256 {name}",
            lambda dtype=dtype: all_of(16, 150, 256, 128, 128, dtype=dtype),
        )
        yield f"OCR K171 C512 {name}", lambda dtype=dtype: centres(1, 171, 512, 128, 128, dtype)
        yield (
            f"1024×2048 K19 C256 {name}",
            lambda dtype=dtype: all_of(1, 19, 256, 256, 512, dtype=dtype),
        )
    yield "SegNeXt-L K150 C1024 bf16", lambda: all_of(1, 150, 1024, 64, 64, dtype=torch.bfloat16)
    yield "K256 C512 bf16", lambda: all_of(2, 256, 512, 128, 128, dtype=torch.bfloat16)
    yield "SegFormer-B5 K150 C256 fp16", lambda: all_of(16, 150, 256, 128, 128, dtype=torch.float16)
    yield (
        "logits in float32, features bf16",
        lambda: centres(16, 150, 256, 128, 128, torch.bfloat16, values=torch.float32),
    )
    yield (
        "channels last bf16, narrow",
        lambda: all_of(4, 150, 256, 128, 128, dtype=torch.bfloat16, last=True),
    )
    yield (
        "480² K59 C1024, odd bf16, narrow",
        lambda: all_of(1, 59, 1024, 60, 59, dtype=torch.bfloat16),
    )
    yield (
        "one gradient each bf16",
        lambda: [
            centres(4, 150, 256, 128, 128, torch.bfloat16, tuple(i == j for j in range(3)))
            for i in range(3)
        ],
    )
    yield "no positions bf16", lambda: cosine(4, 150, 256, 128, 128, torch.bfloat16, pos=False)
    yield (
        "sums of one channel, 21 classes fp32",
        lambda: sums(16, 21, 1, 512, 512, torch.float32, torch.int64),
    )
    yield (
        "more than 2**31 elements, channels last bf16, narrow",
        lambda: all_of(8, 19, 512, 1024, 2048, dtype=torch.bfloat16, last=True),
    )
    yield (
        "more than 2**31 elements, NCHW bf16",
        lambda: all_of(8, 150, 512, 1024, 2048, dtype=torch.bfloat16),
    )
