"Faults of the kernel of axial attention."

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
        "q = q*(scale*LOG2E)",
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
        "_places(p_row_k, p_column_k, ck",
        "_places(p_row_q, p_column_q, ck",
    ),
    (
        "_axial_attention_kernel",
        "columns with the rows' positions",
        "_places(p_row_k, p_column_k, ck",
        "_places(p_row_k, p_row_k, ck",
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
]


def check(m):
    "Two pictures and heads; several tiles of queries and keys."
    names = ("row_q", "row_k", "column_q", "column_k")
    tables = {n: make_input([1, 10, 16], i) for i, n in enumerate(names, 3)}
    check_kernel(
        lambda **t: m.axial_attention(**t, heads=2),
        lambda **t: axial_attention_ref(**t, heads=2),
        dict(rows=make_input([2, 40, 7], 1), columns=make_input([2, 40, 19], 2), **tables),
        grads=(),
        blocks=("axial_attention", [dict(BQ=16, BK=16)]),
        dtypes=("fp32",),
        orders=(0,),
    )
