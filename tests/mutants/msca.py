"Faults of the kernels of the strip convolutions."
from segkern.ops.dispatch import use_blocks
from segkern.ops.msca import TAPS, msca_ref
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.msca"
MUTANTS = [
    ("_band", "taps one off", "t = i - j + K // 2", "t = i - j + K // 2 - 1"),
    ("_band", "not turned", "if TURN: t = j - i + K // 2", "if TURN: t = i - j + K // 2"),
    ("_band", "longer than the strip", "(t < K), other=0.0)", "(t < K + 1), other=0.0)"),
    ("_diagonals", "diagonals one off", "i = j + t - K // 2", "i = j + t - K // 2 + 1"),
    ("_diagonals", "outside of the matrix", "tl.sum(tl.where(inside, tl.gather", "tl.sum(tl.where(t < K, tl.gather"),
    ("_rows", "beyond the right border", "return tl.load(x + at, mask=((row >= 0) & (row < H))[:, None] & ((col >= 0) & (col < W))", "return tl.load(x + at, mask=((row >= 0) & (row < H))[:, None] & ((col >= 0) & (col < W + 1))"),
    ("_square", "not cut at the border", "return tl.where(inside, acc + tl.load(taps + 103), 0.0)", "return acc + tl.load(taps + 103)"),
    ("_square", "rows one off", "row + dy - 2", "row + dy - 1"),
    ("_square", "one row of taps", "taps + 5*dy", "taps + 5*0*dy"),
    ("_msca_fwd_kernel", "strips of rows not cut at the border", "a = tl.where(((row >= 0) & (row < H))[:, None], a, 0.0).to(t.dtype)", "a = a.to(t.dtype)"),
    ("_msca_fwd_kernel", "bias of the rows missing", " + tl.load(taps + 104 + i)", ""),
    ("_msca_fwd_kernel", "bias of the columns of another strip", "taps + 107 + i", "taps + 107"),
    ("_msca_fwd_kernel", "columns with the taps of rows", "taps + 64 + at", "taps + 25 + at"),
    ("_msca_fwd_kernel", "the 5×5 convolution missing in the sum", "acc += tl.dot(_band", "acc = tl.dot(_band"),
    ("_msca_fwd_kernel", "taps of the first channel", "(plane % C)*110", "(plane % C)*0"),
    ("_msca_fwd_kernel", "margins of rows too small", "(RH - 2*PH) - PH", "(RH - 2*PH) - PH//2"),
    ("_msca_strips_kernel", "columns not turned", "_band(taps + 25 + at, k, RW, True)", "_band(taps + 25 + at, k, RW, False)"),
    ("_msca_strips_kernel", "the direct path missing", "acc = gt.to(tl.float32)", "acc = 0*gt.to(tl.float32)"),
    ("_msca_strips_kernel", "one strip only", "acc += tl.dot", "acc = tl.dot"),
    ("_msca_strips_kernel", "gradient of the first picture", "(plane // C)*gb + ", "0*(plane // C)*gb + "),
    ("_msca_rows_kernel", "margins counted twice", "u = tl.where(own, tl.dot(", "u = tl.where(own | True, tl.dot("),
    ("_msca_rows_kernel", "columns turned", "k, RH, False)", "k, RH, True)"),
    ("_msca_rows_kernel", "sums of the first picture", "((plane // C)*(TR*TC) + tile)", "((plane // C)*0 + tile)"),
    ("_msca_rows_kernel", "bias at the place of the next strip", "part + 39 + i, ", "part + 39 + (i + 1) % 3, "),
    ("_msca_columns_kernel", "margins counted twice", "gt = tl.where(own, gt, 0.0).to(t.dtype)", "gt = gt.to(t.dtype)"),
    ("_msca_columns_kernel", "rows' bias missing", " + tl.load(taps + 104 + i)", ""),
    ("_msca_columns_kernel", "strips of rows not cut at the border", "a = tl.where(((row >= 0) & (row < H))[:, None], a, 0.0).to(t.dtype)", "a = a.to(t.dtype)"),
    ("_msca_columns_kernel", "taps at the place of the next strip", "part + at + s", "part + at + 4*i + s"),
    ("_msca_square_kernel", "rows moved the other way", "row + 2 - dy", "row + dy - 2"),
    ("_msca_square_kernel", "margins counted twice", "mine = tl.where(own, mine, 0.0).to(mine.dtype)", "mine = mine + 0.0"),
    ("_msca_square_kernel", "map not moved", "_rows(x, row + dy - 2", "_rows(x, row"),
    ("_msca_square_kernel", "bias of one row", "tl.sum(tl.sum(mine.to(tl.float32), 1), 0)", "tl.sum(mine.to(tl.float32), 1).max(0)"),
    ("_msca_square_kernel", "no margin to the sides", "(RW - 2*PW) - PW", "(RW - 2*PW)"),
]


def check(m):
    "Two pictures and two channels, tiles with margins of rows; then tiles with margins to the sides."
    one, taps = dict(dtypes=("fp32",), orders=(0,)), .3*make_input([2, TAPS], 1)
    with use_blocks("msca", RH=32), use_blocks("msca_strips", RH=32), use_blocks("msca_sums", RH=32):
        check_kernel(m.msca, msca_ref, dict(x=make_input([2, 2, 33, 5]), taps=taps), blocks=("msca_square", [dict(RH=16)]), **one)
    with use_blocks("msca", RW=32), use_blocks("msca_strips", RW=32), use_blocks("msca_sums", RW=32):
        check_kernel(m.msca, msca_ref, dict(x=make_input([1, 1, 5, 33]), taps=taps[:1]), blocks=("msca_square", [dict(RW=16)]), **one)
