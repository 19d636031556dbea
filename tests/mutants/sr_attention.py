"Faults of the kernels of attention with few keys."

from segkern.ops.dispatch import use_blocks
from segkern.ops.sr_attention import sr_attention_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.sr_attention"
KERNELS = "segkern.ops.sr_attention_kernels"
MUTANTS = [
    (
        "_sr_attention_fwd_kernel",
        "padded keys take part",
        'if not EVEN: s = tl.where((m < M)[None, :], s, float("-inf"))',
        "s = s + 0.0",
    ),
    (
        "_sr_attention_fwd_kernel",
        "scale left out",
        "scale2 = scale*LOG2E",
        "scale2 = LOG2E",
    ),
    (
        "_sr_attention_fwd_kernel",
        "sum not rescaled",
        "total = total*keep + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    (
        "_sr_attention_fwd_kernel",
        "query mask one off",
        "mask=(n < N)[:, None] & (e < DV)[None, :])\n    tl.store(p_lse",
        "mask=(n < N - 1)[:, None] & (e < DV)[None, :])\n    tl.store(p_lse",
    ),
    (
        "_sr_attention_dq_kernel",
        "delta left out",
        "tl.dot(gt, vt, input_precision=PRECISION) - dl[:, None]",
        "tl.dot(gt, vt, input_precision=PRECISION)",
    ),
    ("_sr_attention_dq_kernel", "scale left out", "(acc*scale).to", "acc.to"),
    ("_sr_attention_dq_kernel", "the last block of keys only", "acc += tl.dot", "acc = tl.dot"),
    ("_sr_attention_dkv_kernel", "first split only", "n0 in range(split*PER,", "n0 in range(0,"),
    ("_sr_attention_dkv_kernel", "scale left out", "ak*scale", "ak"),
    ("_sr_attention_dkv_kernel", "the last block of queries only", "av += tl.dot", "av = tl.dot"),
    (
        "_sr_attention_dkv_kernel",
        "padded queries take part",
        "p = tl.exp2(s - l2[:, None])",
        "p = tl.exp2(s - l2[:, None])\n        gt += 1.0*(n >= N)[:, None]",
    ),
]


def check(m):
    "Output and gradients with several blocks of queries and keys."
    args = dict(
        q=make_input([1, 2, 37, 24], 1),
        k=make_input([1, 2, 21, 24], 2),
        v=make_input([1, 2, 21, 20], 3),
    )
    small = dict(BN=16, BM=16)
    m.PROGRAMS = 8  # several blocks of queries in each split
    with use_blocks("sr_attention", **small), use_blocks("sr_attention_dq", **small):
        check_kernel(
            lambda q, k, v: m.sr_attention(q, k, v),
            sr_attention_ref,
            args,
            dtypes=("fp32",),
            orders=(0,),
            blocks=("sr_attention_dkv", [small]),
            expect=(
                "_sr_attention_fwd_kernel",
                "_sr_attention_dq_kernel",
                "_sr_attention_dkv_kernel",
            ),
        )
