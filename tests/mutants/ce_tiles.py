"Faults of the cross-entropy's kernels in tiles."

import torch
import torch.nn.functional as F

from segkern.testing import assert_close, make_input
from segkern.testing.memory import Guarded, exact_interpreter, guarded_memory, shuffled

MODULE = "segkern.ops.ce_tiles"
MUTANTS = [
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
        "tl.load(p_weight + y, mask=valid, other=0.0)",
        "tl.load(p_weight + k)",
    ),
    (
        "_upsample_ce_bwd_kernel",
        "incoming gradient dropped",
        "acc *= tl.load(p_scale)",
        "acc *= 1.0",
    ),
]


def placed(x):
    return Guarded(x.shape, x.stride(), x.dtype, x)


def check(m):
    "Loss and gradient of a small head."
    exact_interpreter()
    weight = torch.linspace(0.5, 2, 5)
    size = (13, 41)
    y = torch.randint(0, 5, size, generator=torch.Generator().manual_seed(0))
    y = y.repeat(2, 1, 1).to(torch.int32)
    y[:, 2] = 255
    z = make_input([2, 5, 4, 7], 3)
    scale = torch.tensor(3.0)
    ref = z.double().requires_grad_()
    full = F.interpolate(ref, size, mode="bilinear")
    loss = F.cross_entropy(full, y.long(), weight.double(), ignore_index=255, reduction="sum")
    loss.backward()
    g = placed(z)
    with shuffled(2), guarded_memory():
        given = g.tensor, placed(y).tensor, placed(weight).tensor
        sums, _, lse = m.upsample_ce_fwd(*given, 255, False)
        dz = m.upsample_ce_bwd(*given, lse, None, scale, 255, False)
    assert_close("loss", loss, sums[0], 2e-6)
    assert_close("weights", weight[y[y != 255].long()].double().sum(), sums[1], 2e-6)
    assert_close("dlogits", 3 * ref.grad, dz, 5e-6)
    g.check("logits", inputs=True)
