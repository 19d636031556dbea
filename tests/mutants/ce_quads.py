"Faults of the cross-entropy's kernels in quads, and of the kernel that gathers corners."

import torch
import torch.nn.functional as F

from segkern.testing import assert_close, make_input
from segkern.testing.memory import Guarded, exact_interpreter, guarded_memory, shuffled

MODULE = KERNELS = ("segkern.ops.ce_quads", "segkern.ops.quads")
MUTANTS = [
    (
        "_quad_ce_fwd_kernel",
        "classes of the last block left out",
        "range(K - K % KB, K)",
        "range(K - K % KB, K - 1)",
    ),
    ("_quad_ce_fwd_kernel", "wrong base", "low*th[:, None, :]))*LN2", "low*th[:, None, :]))"),
    ("_quad_ce_fwd_kernel", "weights left out", "part = wy*loss", "part = loss"),
    (
        "_quad_ce_fwd_kernel",
        "patches beyond the picture counted",
        "valid = inside & (y != ignore)",
        "valid = y != ignore",
    ),
    (
        "_quad_ce_bwd_kernel",
        "one-hot of the next class",
        "(k0 + k)[:, None, None, None], q - 1.0",
        "(k0 + k + 1)[:, None, None, None], q - 1.0",
    ),
    (
        "_quad_ce_bwd_kernel",
        "border pixels twice",
        "valid = inside & (y != ignore)",
        "valid = y != ignore",
    ),
    (
        "_quad_ce_bwd_kernel",
        "weight of the first class",
        "p_weight + tl.minimum(tl.maximum(y, 0), K - 1)",
        "p_weight + tl.minimum(y, 0)*0",
    ),
    (
        "_quad_ce_bwd_kernel",
        "every group from class 0",
        "(k0 + first).to(tl.int64)*sc",
        "first.to(tl.int64)*sc",
    ),
    (
        "_quad_gather_kernel",
        "one side only",
        "for side_w in tl.static_range(2)",
        "for side_w in tl.static_range(1)",
    ),
    ("_quad_gather_kernel", "corners exchanged", "2*side_h + side_w", "2*side_w + side_h"),
    (
        "_quad_gather_kernel",
        "incoming gradient dropped",
        "acc *= tl.load(p_scale)*LN2",
        "acc *= LN2",
    ),
]


def placed(x):
    return Guarded(x.shape, x.stride(), x.dtype, x)


def check(m):
    "Loss, sums and gradient of a small head in groups of eight classes, both conventions."
    exact_interpreter()
    m.PARTIALS = 0
    for shape, S, align in (([2, 11, 3, 4], 4, False), ([1, 3, 5, 6], 4, True)):
        z = make_input(shape, 3)
        weight = torch.linspace(0.5, 2, shape[1])
        k = shape[1]
        size = (S * shape[2], S * shape[3])
        y = torch.randint(0, k, (shape[0], *size), generator=torch.Generator().manual_seed(0)).to(
            torch.int32
        )
        y[:, 2] = 255
        ref = z.double().requires_grad_()
        full = F.interpolate(ref, size, mode="bilinear", align_corners=align)
        loss = F.cross_entropy(full, y.long(), weight.double(), ignore_index=255, reduction="sum")
        loss.backward()
        g = placed(z)
        with shuffled(2), guarded_memory():
            sums, _, lse = m.ce_fwd(g.tensor, placed(y).tensor, placed(weight).tensor, 255, align)
            dz = m.ce_bwd(
                g.tensor,
                placed(y).tensor,
                placed(weight).tensor,
                lse,
                None,
                torch.tensor(3.0),
                255,
                align,
            )
        assert_close("loss", loss, sums[0], 2e-6)
        assert_close("weights", weight[y[y != 255].long()].double().sum(), sums[1], 2e-6)
        assert_close("dlogits", 3 * ref.grad, dz, 5e-6)
        g.check("logits", inputs=True)
