"Second derivatives and forward mode of every op: right, or refused with a word; never wrong in silence."

import pytest
import torch

from segkern.bench.shapes import cases
from segkern.ops.dispatch import interpreting
from segkern.testing.memory import exact_interpreter, launches

exact_interpreter()
# the first one of each op
CASES = {c.op: c for c in reversed(cases(tiny=True)) if c.grad and c.learns}
# ours and PyTorch's
REFUSALS = ("differentiated once", "forward-mode", "is not implemented", "not support it")
LIMIT = 2e-4  # relative: single precision against double


def moved(case, dtype):
    "A function of the case's float tensors that want gradients, their values, and a direction for each."
    torch.manual_seed(0)
    args = case.make(torch.device("cpu"), torch.float32)
    places = [i for i, t in enumerate(args) if t.requires_grad]
    still = [t.detach().to(dtype) if t.is_floating_point() else t for t in args]
    values = [still[i] for i in places]
    ways = [torch.randn(v.shape, dtype=torch.float64).to(dtype) for v in values]

    def whole(fn, *floats):
        given = list(still)
        for i, t in zip(places, floats):
            given[i] = t
        outs = fn(*given)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        return [o for o in outs if o.is_floating_point()]

    return whole, values, ways


def seeds(outs):
    return [torch.linspace(-1, 1, max(1, o.numel()), dtype=o.dtype).view(o.shape) for o in outs]


def tangents(case, fn, dtype):
    "What forward mode gives."
    whole, values, ways = moved(case, dtype)
    return torch.func.jvp(lambda *f: tuple(whole(fn, *f)), tuple(values), tuple(ways))[1]


def curvature(case, fn, dtype):
    "The derivative of the gradient along a direction."
    whole, values, ways = moved(case, dtype)
    leaves = [v.clone().requires_grad_() for v in values]
    outs = [o for o in whole(fn, *leaves) if o.requires_grad]
    first = torch.autograd.grad(outs, leaves, seeds(outs), create_graph=True)
    along = sum((g * w).sum() for g, w in zip(first, ways))
    if not along.requires_grad:
        return [torch.zeros_like(v) for v in leaves]  # linear
    return torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("what", [tangents, curvature])
@pytest.mark.parametrize("op", sorted(CASES))
def test_right_or_refused(op, what, impl):
    if impl == "triton" and not interpreting():
        pytest.skip("kernels run on a CPU with TRITON_INTERPRET=1")
    case = CASES[op]
    want = what(case, case.plain, torch.float64)
    try:
        with launches() as seen:
            got = what(case, lambda *t: case.fn(*t, impl=impl), torch.float32)
    except RuntimeError as e:
        assert any(word in str(e) for word in REFUSALS), e
        return
    assert impl == "ref" or seen, "no kernel ran"
    scale = max(float(w.norm()) for w in want)
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        error = float((w - g).norm()) / (scale + 1e-12)
        assert error < LIMIT, f"result {i} differs by {error:.1e}: neither right nor refused"
