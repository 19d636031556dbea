"Faults of the strip attention kernels."

from segkern.ops.strip_attention import strip_attention_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.strip_attention"
KERNELS = "segkern.ops.strip_attention_kernels"
MUTANTS = [
    (
        "_strip_attention_fwd_kernel",
        "sum not rescaled",
        "total = total*keep + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    (
        "_strip_attention_fwd_kernel",
        "products not rescaled",
        "acc = acc*keep[:, None] + tl.dot",
        "acc = acc + tl.dot",
    ),
    (
        "_strip_attention_fwd_kernel",
        "log-sum-exp without the maximum",
        "top + tl.log2(total)",
        "tl.log2(total)",
    ),
    (
        "_strip_attention_fwd_kernel",
        "pixel mask missing",
        "mask=(n < N)[:, None] & (e < CV)[None, :])",
        "mask=(n < N + 1)[:, None] & (e < CV)[None, :])",
    ),
    ("_strip_attention_dq_kernel", "the last block of keys only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_strip_attention_dq_kernel",
        "probabilities for gradients",
        "ds.to(kt.dtype)",
        "p.to(kt.dtype)",
    ),
    (
        "_strip_attention_dq_kernel",
        "next key",
        "m = m0 + tl.arange(0, BM)",
        "m = m0 + 1 + tl.arange(0, BM)",
    ),
    ("_strip_attention_dkv_kernel", "first split only", "n0 in range(split*PER,", "n0 in range(0,"),
    ("_strip_attention_dkv_kernel", "the last block of pixels only", "ak += tl.dot", "ak = tl.dot"),
    ("_strip_attention_dkv_kernel", "values of the last block only", "av += tl.dot", "av = tl.dot"),
    (
        "_strip_attention_dkv_kernel",
        "wrong channels",
        "c = y * BC + tl.arange(0, BC)",
        "c = tl.arange(0, BC)",
    ),
]


def check(m):
    "Output and gradients with several blocks of pixels, keys and channels."
    args = dict(
        q=make_input([2, 19, 5, 11], 1), k=make_input([2, 19, 21], 2), v=make_input([2, 3, 21], 3)
    )
    small = dict(BN=16, BM=16, BC=16)
    m.PROGRAMS = 16  # several blocks of pixels in each split
    from segkern.ops.dispatch import use_blocks

    with use_blocks("strip_attention", **small):
        check_kernel(
            lambda q, k, v: m.strip_attention(q, k, v),
            strip_attention_ref,
            args,
            dtypes=("fp32",),
            orders=(0,),
            blocks=("strip_attention_bwd", [small]),
            expect=(
                "_strip_attention_fwd_kernel",
                "_strip_attention_dq_kernel",
                "_strip_attention_dkv_kernel",
            ),
        )
