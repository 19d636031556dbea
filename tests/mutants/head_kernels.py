"Faults of the head's kernels."

import torch
import torch.nn.functional as F

from segkern.testing import assert_close, make_input
from segkern.testing.memory import Guarded, exact_interpreter, guarded_memory, shuffled

MODULE = "segkern.ops.head_kernels"
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
    (
        "_upsample_ce_fwd_kernel",
        "the sum is not rescaled",
        "tl.where(v > m, s*d + 1.0, s + d)",
        "s + d",
    ),
    ("_upsample_ce_fwd_kernel", "wrong base", "loss = (l2 - zy)*LN2", "loss = l2 - zy"),
    ("_upsample_ce_fwd_kernel", "weights left out", "part = wy*loss", "part = loss"),
    ("_upsample_ce_fwd_kernel", "row mask missing", "(oh < H)[:, None]", "(oh < H + 1)[:, None]"),
    (
        "_upsample_ce_bwd_kernel",
        "one-hot of the next class",
        "y == k, p - 1.0",
        "y == k + 1, p - 1.0",
    ),
    ("_upsample_ce_bwd_kernel", "the last block only", "acc += tl.dot", "acc = tl.dot"),
    (
        "_upsample_ce_bwd_kernel",
        "weight of the wrong class",
        "tl.load(weight + y, mask=valid, other=0.0)",
        "tl.load(weight + k)",
    ),
    ("_upsample_ce_bwd_kernel", "incoming gradient dropped", "acc *= tl.load(scale)", "acc *= 1.0"),
    ("_digit_histogram_kernel", "last element left out", "match = (i < n)", "match = (i < n - 1)"),
    (
        "_digit_histogram_kernel",
        "prefix not compared",
        "(bits >> SHIFT + 10 == tl.load(prefix))",
        "(bits >= 0)",
    ),
    (
        "_digit_histogram_kernel",
        "one digit too high",
        "bits >> SHIFT & 1023",
        "(bits >> (SHIFT + 1)) & 1023",
    ),
]


def placed(x):
    return Guarded(x.shape, x.stride(), x.dtype, x)


def check(m):
    "Labels, counts, loss and gradient of a small head, and an order statistic."
    exact_interpreter()
    z = make_input([2, 5, 4, 7], 3)
    weight = torch.linspace(0.5, 2, 5)
    size = (13, 41)
    z[1, 1] = z[1, 2] = 9.0  # a tie
    z[0, 3, 0, 0] = float("nan")
    y = (
        torch.randint(0, 5, size, generator=torch.Generator().manual_seed(0))
        .repeat(2, 1, 1)
        .to(torch.int32)
    )
    y[:, 2], g = 255, placed(z)
    full = F.interpolate(z, size, mode="bilinear")
    with shuffled(1), guarded_memory():
        labels = m.upsample_argmax_fwd(g.tensor, size, False)
        counts = m.upsample_confusion_fwd(g.tensor, placed(y).tensor, 255, False)
    assert torch.equal(labels.long(), full.argmax(1))
    pair = (y * 5 + full.argmax(1))[y != 255].long()
    assert torch.equal(counts.flatten(), torch.bincount(pair, minlength=25))
    z = make_input([2, 5, 4, 7], 3)
    scale = torch.tensor(3.0)
    ref = z.double().requires_grad_()
    loss = F.cross_entropy(
        F.interpolate(ref, size, mode="bilinear"),
        y.long(),
        weight.double(),
        ignore_index=255,
        reduction="sum",
    )
    loss.backward()
    g = placed(z)
    with shuffled(2), guarded_memory():
        sums, _, lse = m.upsample_ce_fwd(
            g.tensor, placed(y).tensor, placed(weight).tensor, 255, False
        )
        dz = m.upsample_ce_bwd(
            g.tensor, placed(y).tensor, placed(weight).tensor, lse, None, scale, 255, False
        )
    assert_close("loss", loss, sums[0], 2e-6)
    assert_close("weights", weight[y[y != 255].long()].double().sum(), sums[1], 2e-6)
    assert_close("dlogits", 3 * ref.grad, dz, 5e-6)
    g.check("logits", inputs=True)
    p = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    p[-1] = 1e-3 * p.min()
    with guarded_memory():
        assert [m.select(p, torch.tensor(r)).item() for r in (0, 500)] == [
            p.sort().values[r].item() for r in (0, 500)
        ]
