"Faults of the kernels of axial attention and of the broadcast sum."

from segkern.ops.dispatch import use_blocks
from segkern.ops.axial_add import axial_add_ref
from segkern.ops.squeeze_axial import axial_attention_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.squeeze_axial"
MUTANTS = [
    (
        "_axial_attention_kernel",
        "padded keys take part",
        's = tl.where((j < n)[None, :], tl.dot(q, k, input_precision=PRECISION), float("-inf"))',
        "s = tl.dot(q, k, input_precision=PRECISION)",
    ),
    (
        "_axial_attention_kernel",
        "sum not rescaled",
        "total = total*old + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    (
        "_axial_attention_kernel",
        "result not rescaled",
        "acc = acc*old[:, None] + tl.dot",
        "acc = acc + tl.dot",
    ),
    (
        "_axial_attention_kernel",
        "the last block of keys only",
        "acc = acc*old[:, None] + tl.dot",
        "acc = 0*acc*old[:, None] + tl.dot",
    ),
    (
        "_axial_attention_kernel",
        "natural logarithm",
        "q = q*(scale*1.4426950408889634)",
        "q = q*scale",
    ),
    (
        "_axial_attention_kernel",
        "columns as long as rows",
        "n = tl.where(axis == 0, H, W)",
        "n = tl.where(axis == 0, H, H)",
    ),
    (
        "_axial_attention_kernel",
        "values of the first head",
        "b, 2*keys + cv,",
        "b, 2*keys + e[None, :],",
    ),
    ("_axial_attention_kernel", "keys are the queries", "b, keys + ck,", "b, ck,"),
    (
        "_axial_attention_kernel",
        "the first picture's result",
        "(b*values + cv)*n",
        "(0*b*values + cv)*n",
    ),
    ("_axial_attention_kernel", "queries without positions", "q += _places(", "q += 0*_places("),
    (
        "_axial_attention_kernel",
        "keys with the queries' positions",
        "_places(row_k, column_k, ck",
        "_places(row_q, column_q, ck",
    ),
    (
        "_axial_attention_kernel",
        "columns with the rows' positions",
        "_places(row_k, column_k, ck",
        "_places(row_k, row_k, ck",
    ),
    (
        "_axial_attention_kernel",
        "positions with aligned corners",
        "(i + 0.5)*(P/n) - 0.5",
        "i*((P - 1)/(n - 1))",
    ),
    (
        "_axial_attention_kernel",
        "positions of the nearest place",
        "return a + share*(z - a)",
        "return a",
    ),
    (
        "_axial_attention_kernel",
        "every tile is the first",
        "i = tile * BQ + tl.arange(0, BQ)",
        "i = tl.arange(0, BQ)",
    ),
    ("_axial_add_fwd_kernel", "ReLU", "tl.where(s > 6, 6.0, s)", "s"),
    (
        "_axial_add_fwd_kernel",
        "no lower bound",
        "tl.where(s < 0, 0.0, tl.where(s > 6, 6.0, s))",
        "tl.where(s > 6, 6.0, s)",
    ),
    (
        "_axial_add_fwd_kernel",
        "column left out",
        "s = x + r[:, :, None] + k[:, None, :]",
        "s = x + r[:, :, None] + 0*k[:, None, :]",
    ),
    (
        "_axial_add_fwd_kernel",
        "the first picture's rows",
        "tl.load(row + b*rb",
        "tl.load(row + 0*b*rb",
    ),
    (
        "_axial_add_fwd_kernel",
        "no mask over the width",
        "in_w = w < W",
        "in_w = w < W + 1",
    ),
    ("_axial_add_bwd_kernel", "upper bound ignored", "(s <= 0) | (s >= 6)", "s <= 0"),
    ("_axial_add_bwd_kernel", "lower bound ignored", "(s <= 0) | (s >= 6)", "s >= 6"),
    (
        "_axial_add_bwd_kernel",
        "the last tile of rows only",
        "below += tl.sum(d, 1)",
        "below = tl.sum(d, 1)",
    ),
    ("_axial_add_bwd_kernel", "strips overwrite each other", "*strips + strip)*H", "*strips)*H"),
    (
        "_axial_add_bwd_kernel",
        "row left out",
        "s = x + r[:, :, None] + k[:, None, :]",
        "s = x + 0*r[:, :, None] + k[:, None, :]",
    ),
    (
        "_axial_add_bwd_kernel",
        "gradient of the first picture",
        "tl.load(g + b*gb",
        "tl.load(g + 0*b*gb",
    ),
    (
        "_axial_add_bwd_kernel",
        "channels one off",
        "tl.store(dcolumn + (b*C + c[:, None])*W",
        "tl.store(dcolumn + (b*C + C - 1 - c[:, None])*W",
    ),
]


def check(m):
    "Two pictures and heads; several tiles of queries, keys, channels, rows and columns."
    b = 2
    heads = 2
    d = 5
    h = 7
    w = 19
    one = dict(dtypes=("fp32",), orders=(0,))
    means = dict(
        rows=make_input([b, 4 * heads * d, h], 1),
        columns=make_input([b, 4 * heads * d, w], 2),
        **{
            n: make_input([1, heads * d, 16], i)
            for i, n in enumerate(("row_q", "row_k", "column_q", "column_k"), 3)
        },
    )
    check_kernel(
        lambda **t: m.axial_attention(**t, heads=heads),
        lambda **t: axial_attention_ref(**t, heads=heads),
        means,
        grads=(),
        blocks=("axial_attention", [dict(BQ=16, BK=16)]),
        **one,
    )
    with use_blocks("axial_add", BC=2, BH=4, BW=8):
        check_kernel(
            m.axial_add,
            axial_add_ref,
            dict(
                v=3 * make_input([b, 3, h, w]),
                row=3 * make_input([b, 3, h], 1),
                column=3 * make_input([b, 3, w], 2),
            ),
            **one,
        )
