"Production launches of prototypes, cosine_logits and class_sums: the heads of the adaptive classifier."

from functools import partial

import torch

from segkern.ops.class_sums import class_sums_bwd, class_sums_fwd
from segkern.ops.cosine import cosine_bwd, cosine_fwd
from segkern.ops.prototypes import CASES, prototypes_bwd, prototypes_fwd

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


def all_of(**kw):
    for op in (centres, cosine, sums):
        op(**kw)


def one_gradient_each(**kw):
    for i in range(3):
        centres(**kw, wanted=tuple(i == j for j in range(3)))


def cases():
    """SegFormer-B5, OCR and SegNeXt-L of kernels' sheet, street scenes, both types; types, layouts
    and sizes that take other paths."""
    bf16 = torch.bfloat16
    segformer = CASES["SegFormer-B5 K150 C256, 512² B16"]
    four = segformer | dict(b=4)
    for name, dtype in (("bf16", bf16), ("fp32", torch.float32)):
        yield f"SegFormer-B5 K150 C256 {name}", partial(all_of, **segformer, dtype=dtype)
        ocr = CASES["OCR K171 C512, 512² B1"]
        yield f"OCR K171 C512 {name}", partial(centres, **ocr, dtype=dtype)
        street = CASES["K19 C256 1/4, 1024×2048 B1"]
        yield f"1024×2048 K19 C256 {name}", partial(all_of, **street, dtype=dtype)
    segnext = CASES["SegNeXt-L K150 C1024, 512² B1"]
    yield "SegNeXt-L K150 C1024 bf16", partial(all_of, **segnext, dtype=bf16)
    yield "K256 C512 bf16", partial(all_of, b=2, k=256, c=512, h=128, w=128, dtype=bf16)
    yield "SegFormer-B5 K150 C256 fp16", partial(all_of, **segformer, dtype=torch.float16)
    name = "logits in float32, features bf16"
    yield name, partial(centres, **segformer, dtype=bf16, values=torch.float32)
    yield "channels last bf16, narrow", partial(all_of, **four, dtype=bf16, last=True)
    odd = CASES["SegNeXt-L K59 C1024, 480² B1"] | dict(w=59)
    yield "480² K59 C1024, odd bf16, narrow", partial(all_of, **odd, dtype=bf16)
    yield "one gradient each bf16", partial(one_gradient_each, **four, dtype=bf16)
    yield "no positions bf16", partial(cosine, **four, dtype=bf16, pos=False)
    name = "sums of one channel, 21 classes fp32"
    yield name, partial(sums, 16, 21, 1, 512, 512, torch.float32, torch.int64)
    huge = dict(b=8, c=512, h=1024, w=2048, dtype=bf16)
    name = "more than 2**31 elements, channels last bf16, narrow"
    yield name, partial(all_of, **huge, k=19, last=True)
    yield "more than 2**31 elements, NCHW bf16", partial(all_of, **huge, k=150)
