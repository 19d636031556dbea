"Faults of the kernels that decide and count."

import torch
import torch.nn.functional as F

from segkern.testing import make_input
from segkern.testing.memory import Guarded, exact_interpreter, guarded_memory, shuffled

MODULE = "segkern.ops.labels_kernels"
MUTANTS = [
    (
        "_upsample_argmax_kernel",
        "the last class wins a tie",
        "better = (v > best)",
        "better = (v >= best)",
    ),
    ("_upsample_argmax_kernel", "last class left out", "range(1, K)", "range(1, K - 1)"),
    (
        "_upsample_argmax_kernel",
        "column mask missing",
        "& (ow < W)[None, :]",
        "& (ow < W + 1)[None, :]",
    ),
    ("_upsample_argmax_kernel", "NaN overlooked", "| (v != v) & (best == best)", ""),
    ("_upsample_confusion_kernel", "rows and columns exchanged", "y*K + label", "label*K + y"),
    (
        "_upsample_confusion_kernel",
        "ignored pixels counted as class 0",
        "counted = inside & (y != ignore)",
        "counted = inside\n    y = tl.where(y == ignore, 0, y)",
    ),
    (
        "_upsample_confusion_kernel",
        "one row short",
        "oh = tile // tiles_w * BH + tl.arange(0, BH)",
        "oh = tile // tiles_w * BH + tl.arange(0, BH) + 1",
    ),
]


def placed(x):
    return Guarded(x.shape, x.stride(), x.dtype, x)


def check(m):
    "Labels and counts of a small head."
    exact_interpreter()
    z = make_input([2, 5, 4, 7], 3)
    size = (13, 41)
    z[1, 1] = z[1, 2] = 9.0  # a tie
    z[0, 3, 0, 0] = float("nan")
    y = torch.randint(0, 5, size, generator=torch.Generator().manual_seed(0))
    y = y.repeat(2, 1, 1).to(torch.int32)
    y[:, 2] = 255
    g = placed(z)
    full = F.interpolate(z, size, mode="bilinear")
    with shuffled(1), guarded_memory():
        labels = m.upsample_argmax_fwd(g.tensor, size, False)
        counts = m.upsample_confusion_fwd(g.tensor, placed(y).tensor, 255, False)
    assert torch.equal(labels.long(), full.argmax(1))
    pair = (y * 5 + full.argmax(1))[y != 255].long()
    assert torch.equal(counts.flatten(), torch.bincount(pair, minlength=25))
    g.check("logits", inputs=True)
