"Faults of the kernels of attention with few keys."
from segkern.ops.dispatch import use_blocks
from segkern.ops.sr_attention import attention_block_ref, sr_attention_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.sr_attention"
MUTANTS = [
    ("_sr_attention_fwd_kernel", "padded keys take part", 's = tl.where((m < M)[None, :], s, float("-inf"))', "s = s + 0.0"),
    ("_sr_attention_fwd_kernel", "scale left out", "(scale*1.4426950408889634)", "1.4426950408889634"),
    ("_sr_attention_fwd_kernel", "sum not rescaled", "total = total*keep + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    ("_sr_attention_fwd_kernel", "query mask one off", "mask=(n < N)[:, None] & (e < DV)[None, :])\n    tl.store(lse", "mask=(n < N - 1)[:, None] & (e < DV)[None, :])\n    tl.store(lse"),
    ("_sr_attention_dq_kernel", "delta left out", "tl.dot(gt, vt, input_precision=PRECISION) - dl[:, None]", "tl.dot(gt, vt, input_precision=PRECISION)"),
    ("_sr_attention_dq_kernel", "scale left out", "(acc*scale).to", "acc.to"),
    ("_sr_attention_dq_kernel", "the last block of keys only", "acc += tl.dot", "acc = tl.dot"),
    ("_sr_attention_dkv_kernel", "first split only", "n0 in range(split*PER,", "n0 in range(0,"),
    ("_sr_attention_dkv_kernel", "scale left out", "ak*scale", "ak"),
    ("_sr_attention_dkv_kernel", "the last block of queries only", "av += tl.dot", "av = tl.dot"),
    ("_sr_attention_dkv_kernel", "padded queries take part", "p = tl.where((n < N)[:, None], tl.exp2(s - l2[:, None]), 0.0)", "p = tl.exp2(s - l2[:, None])\n        gt += 1.0*(n >= N)[:, None]"),
    ("_attention_block_kernel", "residual left out", "acc = xt + tl.load(bo + c)", "acc = 0*xt + tl.load(bo + c)"),
    ("_attention_block_kernel", "norm without the mean", "centred = xt - tl.sum(xt, 1)[:, None]/C", "centred = xt"),
    ("_attention_block_kernel", "every head is the first", "tl.load(wq + (h*D + d)[None, :]*C + c[:, None])", "tl.load(wq + d[None, :]*C + c[:, None])"),
    ("_attention_block_kernel", "last head only", "acc += tl.dot((o/total", "acc = xt + tl.dot((o/total"),
]


def check(m):
    "Output, gradients and the fused block with several blocks of queries and keys."
    args, small = dict(q=make_input([1, 2, 37, 24], 1), k=make_input([1, 2, 21, 24], 2), v=make_input([1, 2, 21, 20], 3)), dict(BN=16, BM=16)
    m.PROGRAMS = 8 # several blocks of queries in each split
    with use_blocks("sr_attention", **small), use_blocks("sr_attention_dq", **small):
        check_kernel(lambda q, k, v: m.sr_attention(q, k, v), sr_attention_ref, args, dtypes=("fp32",), orders=(0,), blocks=("sr_attention_dkv", [small]),
                     expect=("_sr_attention_fwd_kernel", "_sr_attention_dq_kernel", "_sr_attention_dkv_kernel"))
    shapes = dict(x=[1, 19, 32], k=[1, 2, 11, 16], v=[1, 2, 11, 16], norm_weight=[32], norm_bias=[32], q_weight=[32, 32], q_bias=[32], out_weight=[32, 32], out_bias=[32])
    block = {n: make_input(s, i)*(0.2 if "weight" in n else 1) + (n == "x") for i, (n, s) in enumerate(shapes.items())}
    check_kernel(lambda **kw: m.attention_block(**kw), attention_block_ref, block, grads=(), dtypes=("fp32",), orders=(0,), expect=("_attention_block_kernel",))
