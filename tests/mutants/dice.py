"Faults of the kernels of dice."

import torch
import torch.nn.functional as F

from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.dice"
KERNELS = ("segkern.ops.dice_tiles", "segkern.ops.dice_quads")
MUTANTS = [
    (
        "_dice_fwd_kernel",
        "sum over one column too many",
        "& (ow < W)[None, :]",
        "& (ow < W + 1)[None, :]",
    ),
    ("_dice_fwd_kernel", "next class", "tl.where((y == k)", "tl.where((y == k + 1)"),
    ("_dice_fwd_kernel", "no sigmoid", "tl.sigmoid(v)", "v"),
    ("_dice_bwd_kernel", "derivative of the sigmoid", "*s*(1.0 - s)", "*s"),
    ("_dice_bwd_kernel", "total left out", "+ g_total)", ")"),
    ("_dice_bwd_kernel", "the last block only", "acc += tl.dot", "acc = tl.dot"),
    ("_quad_dice_fwd_kernel", "pixels outside counted", "s*counted[None, :, :, :]", "s"),
    ("_quad_dice_fwd_kernel", "void is class 0", "tl.where(valid, y, -1)", "tl.where(valid, y, 0)"),
    ("_quad_dice_fwd_kernel", "sign of the exponent", "-tw*LOG2E", "tw*LOG2E"),
    ("_quad_dice_fwd_kernel", "every class from the first one's plane", "plane += KB*wide", "pass"),
    ("_quad_dice_bwd_kernel", "derivative of the sigmoid", "(s - s*s)", "s"),
    (
        "_quad_dice_bwd_kernel",
        "pixels outside counted",
        "tl.where(counted[None, :, :, :], d, 0.0)",
        "d",
    ),
    (
        "_quad_dice_bwd_kernel",
        "total left out on its class",
        "inter + whole, whole",
        "inter, whole",
    ),
]


def check(m):
    "The loss of a small head against full-size maps in double precision, at any scale and with quads."
    for size, kernels in (
        ((13, 37), ("_dice_fwd_kernel", "_dice_bwd_kernel")),
        ((16, 20), ("_quad_dice_fwd_kernel", "_quad_dice_bwd_kernel")),
    ):
        y = torch.randint(0, 3, (2, *size), generator=torch.Generator().manual_seed(0))
        y[0, :2] = 255

        def dice(logits):
            p = F.interpolate(logits, size, mode="bilinear").sigmoid()
            hit = F.one_hot(y.where(y != 255, 3), 4)[..., :3].permute(0, 3, 1, 2)
            return (
                1 - (2 * (p * hit).sum((2, 3)) + 1) / (p.sum((2, 3)) + hit.sum((2, 3)) + 1)
            ).mean()

        check_kernel(
            lambda logits: m.upsample_dice(logits, y),
            dice,
            {"logits": make_input([2, 3, 4, 5], 1)},
            expect=kernels,
            grads=("logits",),
            dtypes=("fp32",),
            orders=(0,),
        )
