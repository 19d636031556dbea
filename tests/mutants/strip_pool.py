"Faults of the strip pooling kernels."

import torch

from segkern.ops.strip_pool import strip_pool_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.strip_pool"
KERNELS = "segkern.ops.strip_pool_kernels"
MUTANTS = [
    (
        "_strip_pool_fwd_kernel",
        "padding counts as a maximum",
        'low = tl.where(inside, v, float("-inf"))',
        "low = tl.where(inside, v, 9.0)",
    ),
    ("_strip_pool_fwd_kernel", "only the last block of rows", "total += v", "total = v"),
    (
        "_strip_pool_fwd_kernel",
        "maximum not carried over",
        "top = tl.where(new, low, top)",
        "top = low",
    ),
    (
        "_strip_pool_fwd_kernel",
        "column mask missing",
        "columns = (c < C)[:, None, None] & (w < W)",
        "columns = (c < C)[:, None, None] & (w < W + 1)",
    ),
    ("_strip_pool_join_kernel", "first part only", "range(0, N)", "range(0, 1)"),
    ("_strip_pool_join_kernel", "sum instead of mean", "(total/n).to", "total.to"),
    (
        "_strip_pool_join_kernel",
        "the last part wins",
        "new = _better(best, m) | (p == 0)",
        "new = (m == m)",
    ),
    (
        "_strip_pool_bwd_kernel",
        "wrong divisor",
        "other=0.0).to(tl.float32)/H)[:, None, :]",
        "other=0.0).to(tl.float32)/W)[:, None, :]",
    ),
    (
        "_strip_pool_bwd_kernel",
        "next row",
        "i[:, None, :] == h[None, :, None]",
        "i[:, None, :] == h[None, :, None] + 1",
    ),
    (
        "_strip_pool_bwd_kernel",
        "maximum over the width left out",
        "j[:, :, None] == w[None, None, :]",
        "j[:, :, None] == -5",
    ),
]


def check(m):
    "Means, maxima and gradient of an odd map, with a tie and all values below zero."
    x = make_input([2, 3, 19, 37]).abs().neg() - 1
    x[0, 0, 3, 5] = x[0, 0, 7, 5] = -0.5
    check_kernel(
        lambda x: m.strip_pool(x, "mean_max"),
        lambda x: strip_pool_ref(x, "mean_max"),
        {"x": x},
        dtypes=("fp32",),
        orders=(0,),
        blocks=("strip_pool", [dict(BH=4, BW=16)]),
        expect=("_strip_pool_fwd_kernel", "_strip_pool_join_kernel", "_strip_pool_bwd_kernel"),
    )
    assert torch.isnan(m.strip_pool(torch.where(x < -3, float("nan"), x), "max", "h")).any()
