"Faults of the kernels of the rectangular gate."

from segkern.ops.dispatch import use_blocks
from segkern.ops.rca_gate import rca_gate_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.rca_gate"
KERNELS = "segkern.ops.rca_gate_kernels"
MUTANTS = [
    ("_rca_gate_fwd_kernel", "the gate is left out", "y = a*_local(", "y = _local("),
    (
        "_rca_gate_fwd_kernel",
        "offset of the first picture",
        "p_offset + bc[:, None]*W",
        "p_offset + c[:, None]*W",
    ),
    (
        "_rca_gate_fwd_kernel",
        "slope of the first channel",
        "p_slope + c[:, None]*W",
        "p_slope + 0*c[:, None]*W",
    ),
    (
        "_rca_gate_fwd_kernel",
        "columns one off",
        "mask=cells[:, None, :] & (h < H)[None, :, None]",
        "mask=cells[:, None, :] & (h < H - 1)[None, :, None]",
    ),
    ("_rca_gate_bwd_kernel", "derivative of the sigmoid", "*a*(1.0 - a)", "*a"),
    (
        "_rca_gate_bwd_kernel",
        "3×3 weights mirrored",
        "1 - t // 3, 1 - t % 3), 2), 1)",
        "t // 3 - 1, t % 3 - 1), 2), 1)",
    ),
    ("_rca_gate_bwd_kernel", "taps one off", "h + t - K // 2", "h + t - K // 2 + 1"),
    (
        "_rca_gate_bwd_kernel",
        "tiles overwrite each other",
        "i*tl.cdiv(W, BW) + j",
        "0*i*tl.cdiv(W, BW) + j",
    ),
    (
        "_rca_gate_bwd_kernel",
        "both biases from the same map",
        "to + 10, tl.sum(tl.sum(back, 2), 1)",
        "to + 10, tl.sum(tl.sum(ahead, 2), 1)",
    ),
    (
        "_rca_gate_dx_kernel",
        "3×3 weights not mirrored",
        "t // 3 - 1, t % 3 - 1",
        "1 - t // 3, 1 - t % 3",
    ),
    ("_rca_gate_dx_kernel", "taps not mirrored", "h - t + K // 2", "h + t - K // 2"),
    (
        "_rca_gate_dx_kernel",
        "gradient where the ReLU is zero",
        "+ o[:, None, :] <= 0)",
        "+ o[:, None, :] <= -9e9)",
    ),
    ("_rca_gate_dx_kernel", "rows beyond the map count", " | (h >= H)[None, :, None]", ""),
    (
        "_rca_gate_dx_kernel",
        "slope as the gradient of the slope",
        "tl.sum(v*r[:, :, None], 1)",
        "tl.sum(v*s[:, None, :], 1)",
    ),
    (
        "_rca_gate_dx_kernel",
        "tiles of rows overwrite each other",
        "p_dslope + (bc[:, None]*down + i)*W",
        "p_dslope + (bc[:, None]*down + 0*i)*W",
    ),
]


def check(m):
    "Several tiles of channels, rows and columns; more rows than a tile on both sides of the taps."
    b = 2
    c = 3
    h = 7
    w = 9
    k = 5
    shapes = dict(
        x=(b, c, h, w),
        rows=(b, c, h),
        slope=(c, w),
        offset=(b, c, w),
        taps=(c, k),
        bias=(c,),
        weight=(c, 1, 3, 3),
        local_bias=(c,),
    )
    small = dict(BC=2, BH=4, BW=8)
    with use_blocks("rca_gate", **small), use_blocks("rca_gate_bwd", **small):
        check_kernel(
            m.rca_gate,
            rca_gate_ref,
            {n: make_input(s, i) for i, (n, s) in enumerate(shapes.items())},
            dtypes=("fp32",),
            orders=(0,),
            blocks=("rca_gate_dx", [small]),
        )
