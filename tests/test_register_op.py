"""An op of one's own goes through every door by its module alone: dispatch, gradients, the checks of kernels, the
bench by `CASES` and `add_op`, and the reason why it runs where it runs."""

import importlib
import sys

import pytest
import torch

from segkern import bench
from segkern.bench.case import TABLE
from segkern.bench.contenders import run_case
from segkern.bench.ops import select
from segkern.ops import dispatch, which
from segkern.ops.dispatch import interpreting, use_impl
from segkern.testing import make_input
from segkern.testing.kernels import check_kernel

TOY = """
import torch

from segkern.bench import add_op, Case
from segkern.ops.dispatch import choose, kernels_of, on_device, tl, triton, unsupported
from segkern.ops.operator import operator

CASES = {"1/4, B2": dict(b=2, n=1000)}


def toy_scale_ref(x, factor):
    return x * factor


@triton.jit
def _toy_scale_kernel(p_x, p_out, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(p_out + i, (x * factor).to(p_out.dtype.element_ty), mask=i < n)


def toy_scale_fwd(x, factor):
    x = x.contiguous()
    out = torch.empty_like(x)
    with on_device(x):
        _toy_scale_kernel[(triton.cdiv(x.numel(), 128),)](x, out, factor, x.numel(), BLOCK=128)
    return out


@operator("toys::toy_scale")
def _toy_scale_op(x: torch.Tensor, factor: float) -> torch.Tensor:
    return toy_scale_fwd(x, factor)


_toy_scale_op.register_fake(lambda x, factor: torch.empty_like(x))


def _setup(ctx, inputs, output):
    ctx.factor = inputs[1]


_toy_scale_op.register_autograd(
    lambda ctx, g: (_toy_scale_op(g, ctx.factor), None), setup_context=_setup
)
kernels_of("toy_scale", unsupported, toy_scale_fwd)


def toy_scale(x, factor=2.0, impl=None):
    return _toy_scale_op(x, factor) if choose("toy_scale", x, impl=impl) else x * factor


def toy_case(label, grad, b, n):
    make = lambda device, dtype: (torch.randn(b, n, device=device, dtype=dtype),)
    plain = lambda x: toy_scale_ref(x, 2.0)
    return Case("toy_scale", label, make, toy_scale, plain, 4.0 * b * n, grad=grad)


add_op("toy_scale", CASES, toy_case, grads=(False,))
"""
needs_kernels = pytest.mark.skipif(
    not interpreting(), reason="kernels run in the interpreter here; set TRITON_INTERPRET=1"
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "The module, imported once, and taken back out of the tables afterwards."
    folder = tmp_path_factory.mktemp("toyop")
    (folder / "toy_scale.py").write_text(TOY)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("toy_scale")
    sys.path.remove(str(folder))
    for table in (TABLE, dispatch.KERNELS, dispatch.LAUNCHERS):
        table.pop("toy_scale", None)


def test_who_runs_it(toy):
    x = make_input([3, 5])
    assert which("toy_scale", x) == ("ref", "the tensors are not on a CUDA device")
    assert torch.equal(toy.toy_scale(x), 2 * x)


@needs_kernels
def test_kernel_against_reference(toy):
    "Outputs and gradients in three types, in memory that is watched; the kernel was launched."
    rows = check_kernel(
        lambda x: toy.toy_scale(x, 3.0),
        lambda x: toy.toy_scale_ref(x, 3.0),
        {"x": make_input([7, 37])},
        expect=("_toy_scale_kernel",),
    )
    assert {row[1] for row in rows.raw} >= {"out", "dx"}


@needs_kernels
def test_a_fault_is_noticed(toy, monkeypatch):
    "The check can fail."
    monkeypatch.setattr(toy, "toy_scale_fwd", lambda x, factor: x * (factor + 0.1))
    with pytest.raises(AssertionError):
        check_kernel(
            lambda x: toy.toy_scale(x, 3.0),
            lambda x: toy.toy_scale_ref(x, 3.0),
            {"x": make_input([7, 37])},
        )


@needs_kernels
def test_the_bench_reads_its_cases(toy):
    "`CASES` are what `segkern bench ops --op toy_scale` compares."
    (case,) = select(["toy_scale"], True, "")
    assert case.label == "1/4, B2"
    ceilings = dict(copy_gbs=1.0, matmul_tflops=1.0)
    with use_impl("auto"):
        rows = list(run_case(case, torch.device("cpu"), torch.float32, ceilings, 1))
    assert {"reference", "eager"} <= {r["provider"] for r in rows}
    assert {r["status"] for r in rows} == {"ok"}
    assert bench.add_op.__module__ == "segkern.bench.case"
