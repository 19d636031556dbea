"Faults of the kernels of prototypes, cosine logits and class sums."

import torch

from segkern.ops.dispatch import use_blocks
from segkern.ops.class_sums import class_sums_ref
from segkern.ops.cosine import cosine_logits_ref
from segkern.ops.prototypes import prototypes_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = ("segkern.ops.prototypes", "segkern.ops.cosine", "segkern.ops.class_sums")
KERNELS = ("segkern.ops.prototypes_kernels", "segkern.ops.cosine_kernels", "segkern.ops.class_sums")
MUTANTS = [
    (
        "_prototypes_stats_kernel",
        "sum not rescaled",
        "total*tl.exp2(high - safe) + tl.sum",
        "total + tl.sum",
    ),
    ("_prototypes_stats_kernel", "padded classes take part", 'other=float("-inf"))', "other=0.0)"),
    (
        "_prototypes_stats_kernel",
        "natural logarithm",
        "total = total*tl.exp2(high - safe) + tl.sum(tl.exp2(m - safe[None, :]), 0)",
        "total = total*tl.exp2(high - safe) + tl.sum(tl.exp(m - safe[None, :]), 0)",
    ),
    (
        "_prototypes_stats_kernel",
        "maximum of another picture",
        "p_top + (b*tiles + tile)*K + k",
        "p_top + tile*K + k",
    ),
    (
        "_prototypes_sums_kernel",
        "padded pixels take part",
        "t = tl.where(inside, tl.exp2(m - peak[:, None]), 0.0)",
        "t = tl.exp2(m - peak[:, None])",
    ),
    (
        "_prototypes_sums_kernel",
        "both centres from the same weights",
        "ap += tl.dot(t, pt",
        "ap += tl.dot(s, pt",
    ),
    (
        "_prototypes_sums_kernel",
        "every split is the first",
        "n0 in range(split*PER,",
        "n0 in range(0,",
    ),
    ("_prototypes_sums_kernel", "the last tile of pixels only", "af += tl.dot", "af = tl.dot"),
    (
        "_prototypes_sums_kernel",
        "splits overwrite each other",
        "row = (b*SPLITS + split)*K + k",
        "row = (b*SPLITS + 0*split)*K + k",
    ),
    (
        "_prototypes_bwd_kernel",
        "delta without the features",
        "if LOGITS: delta += tl.sum(af*tl.load(from_f + c64*s_feat[1], mask=cells, other=0.0).to(tl.float32), 0)",
        "delta += 0.0",
    ),
    (
        "_prototypes_bwd_kernel",
        "delta counts dz in every tile of channels",
        "tl.where(c0 == 0, tl.sum",
        "tl.where(c0 >= 0, tl.sum",
    ),
    (
        "_prototypes_bwd_kernel",
        "dz left out",
        "ds += tl.load(p_dz + b*K + k, mask=in_k, other=0.0)[:, None] - delta[None, :]",
        "ds -= delta[None, :]",
    ),
    (
        "_prototypes_bwd_kernel",
        "hz left out",
        "t*(dt - tl.load(p_hz + b*K + k, mask=in_k, other=0.0)[:, None])",
        "t*dt",
    ),
    ("_prototypes_bwd_kernel", "the last tile of classes only", "ap += tl.dot", "ap = tl.dot"),
    ("_prototypes_bwd_kernel", "the last tile of channels only", "ds += tl.dot", "ds = tl.dot"),
    (
        "_prototypes_bwd_kernel",
        "pixel mask one off",
        "in_n = n < N",
        "in_n = n < N - 1",
    ),
    (
        "_cosine_fwd_kernel",
        "norm of the last tile of channels",
        "square += tl.sum(x*x, 0)",
        "square = tl.sum(x*x, 0)",
    ),
    ("_cosine_fwd_kernel", "positions left out", "x += tl.load(from_p", "x += 0*tl.load(from_p"),
    ("_cosine_fwd_kernel", "square instead of norm", "r = tl.sqrt(square)", "r = square"),
    (
        "_cosine_fwd_kernel",
        "prototypes of the first picture",
        "p_u + b*K*C + (k[:, None]*C",
        "p_u + (k[:, None]*C",
    ),
    ("_cosine_dx_kernel", "not orthogonal to the pixel", "acc -= x*", "acc -= 0*x*"),
    ("_cosine_dx_kernel", "not divided by the norm", "along/tl.where(r == 0, 1.0, r)", "along"),
    ("_cosine_dx_kernel", "the last tile of classes only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_cosine_dx_kernel",
        "positions left out",
        "if POS: x += tl.load(p_pos + b*s_pos[0]",
        "if POS: x += 0*tl.load(p_pos + b*s_pos[0]",
    ),
    (
        "_cosine_du_kernel",
        "norm left out",
        "x = x/(tl.load(p_norm + b*N + n, mask=in_n, other=1.0) + 1e-12)[:, None]",
        "x = x + 0.0",
    ),
    ("_cosine_du_kernel", "every split is the first", "n0 in range(split*PER,", "n0 in range(0,"),
    ("_cosine_du_kernel", "the last tile of pixels only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_class_sums_fwd_kernel",
        "negative labels count",
        "valid = (n < N) & (y >= 0) & (y < K)\n",
        "valid = (n < N) & (y < K)\n        y = tl.abs(y)\n",
    ),
    (
        "_class_sums_fwd_kernel",
        "padded pixels count",
        "valid = (n < N) & (y >= 0)",
        "valid = (y >= 0)",
    ),
    (
        "_class_sums_fwd_kernel",
        "classes one off",
        "hit = y[None, :] == k[:, None]",
        "hit = y[None, :] == k[:, None] + 1",
    ),
    ("_class_sums_fwd_kernel", "the last tile of pixels only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_class_sums_bwd_kernel",
        "pixels of no class get the first row",
        "mask=cells & valid[None, :]",
        "mask=cells",
    ),
    ("_class_sums_bwd_kernel", "rows of the first picture", "p_g + b*gb", "p_g + 0*b*gb"),
    (
        "_class_sums_bwd_kernel",
        "channels one off",
        "tl.where(valid, y, 0)[None, :]*gk + c.to",
        "tl.where(valid, y, 0)[None, :]*gk + (C - 1 - c).to",
    ),
]


def check(m):
    "Two pictures; several tiles of classes, channels and pixels, and several splits of several tiles."
    b = 2
    k = 19
    c = 20
    h = 3
    w = 11
    small = dict(BN=16, BK=16, BC=16)
    feat = make_input([b, c, h, w], 2)
    pos = make_input([b, c, h, w], 3)
    one = dict(dtypes=("fp32",), orders=(0,))
    labels = torch.randint(-2, k + 2, (b, h, w), generator=torch.Generator().manual_seed(0))
    m.PROGRAMS = 16
    with use_blocks("prototypes_stats", **small), use_blocks("prototypes", **small):
        check_kernel(
            m.prototypes,
            prototypes_ref,
            dict(logits=2 * make_input([b, k, h, w], 1), feat=feat, pos=pos),
            blocks=("prototypes_bwd", [small]),
            **one,
        )
    with use_blocks("cosine_logits", **small), use_blocks("cosine_dx", **small):
        check_kernel(
            m.cosine_logits,
            cosine_logits_ref,
            dict(z=make_input([b, k, c], 4), feat=feat, pos=pos),
            blocks=("cosine_du", [small]),
            **one,
        )
    with use_blocks("class_sums", **small):
        check_kernel(
            lambda x: m.class_sums(x, labels, k, True),
            lambda x: class_sums_ref(x, labels, k, True),
            dict(x=feat),
            blocks=("class_sums_bwd", [small]),
            **one,
        )
