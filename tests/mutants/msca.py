"Faults of the kernels of the strip convolutions."

from segkern.ops.dispatch import use_blocks
from segkern.ops.msca import TAPS, msca_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.msca"
KERNELS = ("segkern.ops.msca_kernels", "segkern.ops.msca_gradients")
MUTANTS = [
    ("band", "taps one off", "t = i - j + K // 2", "t = i - j + K // 2 - 1"),
    ("band", "not turned", "if TURN: t = j - i + K // 2", "if TURN: t = i - j + K // 2"),
    ("band", "longer than the strip", "(t < K), other=0.0)", "(t < K + 1), other=0.0)"),
    ("square_bands", "the taps of another row", "p_taps + 15", "p_taps + 10"),
    ("strip_bands", "strips one off", "p_taps + 18", "p_taps + 17"),
    ("diagonals", "diagonals one off", "i = j + t - K // 2", "i = j + t - K // 2 + 1"),
    (
        "diagonals",
        "outside of the matrix",
        "tl.sum(tl.where(inside, tl.gather",
        "tl.sum(tl.where(t < K, tl.gather",
    ),
    ("tile_of", "margins of rows too small", "down*(RH - 2*PH) + h", "down*(RH - PH) + h"),
    ("tile_of", "no margin to the sides", "right*(RW - 2*PW) + w", "right*RW + w"),
    ("tile_of", "the first tile without its border", "((h >= PH) | (down == 0))", "(h >= PH)"),
    (
        "tile_of",
        "the last tile without its border",
        "((w < RW - PW) | (right == TC - 1))",
        "(w < RW - PW)",
    ),
    (
        "tile_of",
        "always the first picture",
        "(i // (TR*TC)).to(tl.int64)",
        "(0*(i // (TR*TC))).to(tl.int64)",
    ),
    (
        "load_tile",
        "beyond the right border",
        "& (col < W)[None, :], other=0.0)",
        "& (col < W + 1)[None, :], other=0.0)",
    ),
    (
        "square_conv",
        "not cut at the border",
        "if EDGES: acc = tl.where((row < H)[:, None] & (col < W)[None, :], acc, 0.0)",
        "acc = acc + 0.0",
    ),
    ("square_conv", "rows one off", "row + dy - 2", "row + dy - 1"),
    ("square_conv", "one row of taps", "bands[dy]", "bands[1]"),
    (
        "strip_conv",
        "not cut at the border",
        "if EDGES: a = tl.where(on_map, a, 0.0)",
        "a = a + 0.0",
    ),
    ("strip_conv", "bias missing", " + tl.load(p_bias)", ""),
    ("_msca_fwd_kernel", "bias of a strip of columns missing", "tl.load(p_taps + 108) + ", ""),
    (
        "_msca_fwd_kernel",
        "columns with the taps of rows",
        "strip_bands(p_taps + 64, RH, True, T)",
        "strip_bands(p_taps + 25, RH, True, T)",
    ),
    ("_msca_fwd_kernel", "taps of the first channel", "p_taps += c*110", "p_taps += c*0"),
    (
        "_msca_fwd_kernel",
        "a picture left out",
        "tl.minimum(first + EACH, TASKS)",
        "tl.minimum(first + EACH, TASKS - 1)",
    ),
    (
        "_msca_strips_kernel",
        "columns not turned",
        "strip_bands(p_taps + 25, RW, True, T)",
        "strip_bands(p_taps + 25, RW, False, T)",
    ),
    (
        "_msca_strips_kernel",
        "the direct path missing",
        "acc = gt.to(tl.float32)",
        "acc = 0*gt.to(tl.float32)",
    ),
    (
        "_msca_strips_kernel",
        "gradient of the first picture",
        "p_g + b*s_g[0] + c*s_g[1]",
        "p_g + c*s_g[1]",
    ),
    (
        "_msca_rows_kernel",
        "margins counted twice",
        "if EDGES: u = tl.where(own, u, 0.0)",
        "u = u + 0.0",
    ),
    ("_msca_rows_kernel", "columns turned", "size, RH, False, T)", "size, RH, True, T)"),
    (
        "_msca_rows_kernel",
        "sums of one group",
        "tl.program_id(0).to(tl.int64)*110",
        "(tl.program_id(0) % C).to(tl.int64)*110",
    ),
    (
        "_msca_rows_kernel",
        "bias at the place of the next strip",
        "p_part + 104 + k",
        "p_part + 104 + (k + 1) % 3",
    ),
    (
        "_msca_columns_kernel",
        "margins counted twice",
        "if EDGES: gt = tl.where(own, gt, 0.0)",
        "gt = gt + 0.0",
    ),
    (
        "_msca_columns_kernel",
        "bias of the rows of the first strip",
        "p_taps + c*110 + 104 + k",
        "p_taps + c*110 + 104",
    ),
    (
        "_msca_columns_kernel",
        "taps at the place of the next strip",
        "p_part + 64 + at + s",
        "p_part + 64 + at + 4*k + s",
    ),
    ("_msca_square_kernel", "rows moved the other way", "row + 2 - dy", "row + dy - 2"),
    (
        "_msca_square_kernel",
        "the last row of taps only",
        "square[dy], acc, input_precision",
        "square[dy], 0*acc, input_precision",
    ),
    (
        "_msca_square_kernel",
        "not turned",
        "square_bands(p_taps + c*110, RW, True, T)",
        "square_bands(p_taps + c*110, RW, False, T)",
    ),
    (
        "_msca_taps_kernel",
        "margins counted twice",
        "if EDGES: mine = tl.where(own, mine, 0.0).to(mine.dtype)",
        "mine = mine + 0.0",
    ),
    ("_msca_taps_kernel", "map not moved", "row + dy - 1", "row + dy - 2"),
    (
        "_msca_taps_kernel",
        "one picture only",
        "d1 = tl.dot(tl.trans(load_tile(at, row + dy - 1, col, H, W, s_x)), mine, d1,",
        "d1 = tl.dot(tl.trans(load_tile(at, row + dy - 1, col, H, W, s_x)), mine, 0*d1,",
    ),
]


def check(m):
    "Two pictures and two channels, tiles with margins of rows; then tiles with margins to the sides."
    one = dict(dtypes=("fp32",), orders=(0,))
    taps = 0.3 * make_input([2, TAPS], 1)
    with (
        use_blocks("msca", RH=32),
        use_blocks("msca_strips", RH=32),
        use_blocks("msca_sums", RH=32),
        use_blocks("msca_taps", RH=16),
    ):
        check_kernel(
            m.msca,
            msca_ref,
            dict(x=make_input([2, 2, 33, 5]), taps=taps),
            blocks=("msca_square", [dict(RH=16)]),
            **one,
        )
    with (
        use_blocks("msca", RW=32),
        use_blocks("msca_strips", RW=32),
        use_blocks("msca_sums", RW=32),
        use_blocks("msca_taps", RW=16),
    ):
        check_kernel(
            m.msca,
            msca_ref,
            dict(x=make_input([1, 1, 5, 33]), taps=taps[:1]),
            blocks=("msca_square", [dict(RW=16)]),
            **one,
        )
