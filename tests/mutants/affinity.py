"Faults of the kernels of affinity propagation."

from segkern.ops.affinity_pieces import affinity_ref
from segkern.ops.dispatch import use_blocks
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.affinity"
KERNELS = "segkern.ops.affinity_kernels"
MUTANTS = [
    (
        "_affinity_fwd_kernel",
        "padded keys take part",
        's = tl.where((m < M)[None, :], s, float("-inf"))',
        "s = s + 0.0",
    ),
    ("_affinity_fwd_kernel", "scale left out", "(scale*LOG2E)", "1.4426950408889634"),
    (
        "_affinity_fwd_kernel",
        "sum not rescaled",
        "total = total*keep + tl.sum(a, 1)",
        "total = total + tl.sum(a, 1)",
    ),
    (
        "_affinity_fwd_kernel",
        "the last block of the stage only",
        "if not FIRST: acc += tl.load(at, mask=inside, other=0.0)",
        "acc += 0.0",
    ),
    (
        "_affinity_fwd_kernel",
        "sum instead of mean",
        "acc*(weight/total)[:, None]",
        "acc/total[:, None] + 0*weight",
    ),
    (
        "_affinity_fwd_kernel",
        "query mask one off",
        "(n < N)[:, None] & (c < C)[None, :] # [b, h, c, n]",
        "(n < N - 1)[:, None] & (c < C)[None, :]",
    ),
    (
        "_affinity_dq_kernel",
        "delta left out",
        "tl.dot(gt, pt, input_precision=PRECISION) - dl[:, None]",
        "tl.dot(gt, pt, input_precision=PRECISION)",
    ),
    (
        "_affinity_dq_kernel",
        "delta of padded keys too",
        "dl += tl.sum(tl.where((m < M)[None, :], a*tl.dot(gt, pt, input_precision=PRECISION), 0.0), 1)",
        "dl += tl.sum(a*(tl.dot(gt, pt, input_precision=PRECISION) + 1.0*(m >= M)[None, :]), 1)",
    ),
    ("_affinity_dq_kernel", "mean left out", "(acc*(scale*weight)).to", "(acc*scale).to"),
    ("_affinity_dq_kernel", "the last tile of keys only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_affinity_dkp_kernel",
        "every split is the first",
        "n0 in range(split*PER,",
        "n0 in range(0,",
    ),
    ("_affinity_dkp_kernel", "scale left out", "ak*(scale*weight)", "ak*weight"),
    ("_affinity_dkp_kernel", "the last tile of queries only", "ap += tl.dot", "ap = tl.dot"),
    (
        "_affinity_dkp_kernel",
        "the last block of the stage only",
        "if not FIRST: ap += tl.load(to, mask=in_p, other=0.0)",
        "ap += 0.0",
    ),
    (
        "_affinity_dkp_kernel",
        "delta of other rows",
        "tl.load(p_delta + row, mask=n < N",
        "tl.load(p_delta + n, mask=n < N",
    ),
    (
        "_affinity_dkp_kernel",
        "padded queries take part",
        "a = tl.where(inside, tl.exp2(tl.dot(qt, kt, "
        "input_precision=PRECISION)*(scale*LOG2E) - l2[:, None]), 0.0)",
        "a = tl.exp2(tl.dot(qt, kt, input_precision=PRECISION)*(scale*LOG2E) - "
        "l2[:, None])\n        gt += 1.0*(n >= N)[:, None]",
    ),
]


def check(m):
    "Two blocks of two heads with several tiles of queries and keys, and several tiles in each split."
    args = {
        n: make_input([1, 2, r, 24], i)
        for i, (n, r) in enumerate(dict(q1=37, q2=37, k1=21, k2=21).items())
    } | dict(p=make_input([1, 21, 7], 9))
    small = dict(BN=16, BM=16)
    m.PROGRAMS = 8

    def both(fn):
        return lambda q1, q2, k1, k2, p: fn([q1, q2], [k1, k2], p)

    with use_blocks("affinity", **small), use_blocks("affinity_dq", **small):
        check_kernel(
            both(m.affinity),
            both(affinity_ref),
            args,
            dtypes=("fp32",),
            orders=(0,),
            blocks=("affinity_dkp", [small]),
            expect=("_affinity_fwd_kernel", "_affinity_dq_kernel", "_affinity_dkp_kernel"),
        )
