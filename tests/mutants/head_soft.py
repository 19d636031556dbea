"Faults of the kernels of dice and soft targets."
import torch
import torch.nn.functional as F

from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

MODULE = "segkern.ops.head_soft"
MUTANTS = [
    ("_dice_fwd_kernel", "sum over one column too many", "& (ow < W)[None, :]", "& (ow < W + 1)[None, :]"),
    ("_dice_fwd_kernel", "next class", "tl.where((y == k)", "tl.where((y == k + 1)"),
    ("_dice_fwd_kernel", "no sigmoid", "tl.sigmoid(v)", "v"),
    ("_dice_bwd_kernel", "derivative of the sigmoid", "*s*(1.0 - s)", "*s"),
    ("_dice_bwd_kernel", "total left out", "+ g_total)", ")"),
    ("_dice_bwd_kernel", "the last block only", "acc += tl.dot", "acc = tl.dot"),
    ("_kl_fwd_kernel", "cross term not rescaled", "cross*e + (v - u)", "cross + (v - u)"),
    ("_kl_fwd_kernel", "teacher's normaliser left out", "cross/st - lt + lz", "cross/st + lz"),
    ("_kl_fwd_kernel", "temperature left out", "to2 = inv_tau*1.4426950408889634", "to2 = 1.4426950408889634"),
    ("_kl_bwd_kernel", "temperature counted once", "acc *= tl.load(scale)*inv_tau", "acc *= tl.load(scale)"),
    ("_kl_bwd_kernel", "pixel weights dropped", "if PIXEL: d *= tl.load(pixel + at, mask=inside, other=0.0)", "pass"),
    ("_kl_bwd_kernel", "student's size for the teacher", "_corners(oh, step_h2, h2, ALIGN)", "_corners(oh, step_h, h, ALIGN)"),
]


def check(m):
    "Both losses of a small head against full-size maps in double precision."
    size = (13, 37)
    y = torch.randint(0, 3, (2, *size), generator=torch.Generator().manual_seed(0))
    y[0, :2], pixel = 255, (make_input([2, *size], 7) > 0).float()
    def dice(logits):
        p, hit = F.interpolate(logits, size, mode="bilinear").sigmoid(), F.one_hot(y.where(y != 255, 3), 4)[..., :3].permute(0, 3, 1, 2)
        return (1 - (2*(p*hit).sum((2, 3)) + 1)/(p.sum((2, 3)) + hit.sum((2, 3)) + 1)).mean()
    def kl(logits, teacher):
        up = lambda a: (F.interpolate(a, size, mode="bilinear")/2).log_softmax(1)
        return (F.kl_div(up(logits), up(teacher), reduction="none", log_target=True).sum(1)*pixel).sum()
    inputs, options = {"logits": make_input([2, 3, 4, 5], 1), "teacher": 3*make_input([2, 3, 7, 3], 2)}, dict(grads=("logits",), dtypes=("fp32",), orders=(0,))
    check_kernel(lambda logits: m.upsample_dice(logits, y), dice, {"logits": inputs["logits"]}, expect=("_dice_fwd_kernel", "_dice_bwd_kernel"), **options)
    check_kernel(lambda logits, teacher: m.upsample_kl(logits, teacher, size, 2.0, pixel, reduction="sum"), kl, inputs, expect=("_kl_fwd_kernel", "_kl_bwd_kernel"), **options)
