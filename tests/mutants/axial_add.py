"Faults of the kernels of the broadcast sum."

from segkern.ops.axial_add import axial_add_ref
from segkern.ops.dispatch import use_blocks
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.axial_add"
MUTANTS = [
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
        "tl.load(p_row + b*rb",
        "tl.load(p_row + 0*b*rb",
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
        "tl.load(p_g + b*gb",
        "tl.load(p_g + 0*b*gb",
    ),
    (
        "_axial_add_bwd_kernel",
        "channels one off",
        "tl.store(p_dcolumn + (b*C + c[:, None])*W",
        "tl.store(p_dcolumn + (b*C + C - 1 - c[:, None])*W",
    ),
]


def check(m):
    "Two pictures; several tiles of channels, rows and columns."
    summands = dict(
        v=3 * make_input([2, 3, 7, 19]),
        row=3 * make_input([2, 3, 7], 1),
        column=3 * make_input([2, 3, 19], 2),
    )
    with use_blocks("axial_add", BC=2, BH=4, BW=8):
        check_kernel(m.axial_add, axial_add_ref, summands, dtypes=("fp32",), orders=(0,))
