"Attention with few keys in the interpreter: sizes, layouts, types, edges, and what surrounds it."

import pytest
import torch

from segkern import ops
from segkern.ops.dispatch import interpreting, use_blocks
from segkern.ops.sr_attention import sr_attention_ref
from segkern.testing import assert_close, make_input
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

pytestmark = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
ALL = ("_sr_attention_fwd_kernel", "_sr_attention_dq_kernel", "_sr_attention_dkv_kernel")


def inputs(b=1, h=2, n=37, m=11, d=16, dv=None, grow=1.0):
    return dict(
        q=grow * make_input([b, h, n, d], 1),
        k=make_input([b, h, m, d], 2),
        v=make_input([b, h, m, dv or d], 3),
    )


@pytest.mark.parametrize(
    "shape",
    [
        dict(n=1, m=2),
        dict(n=101, m=45, d=32),
        dict(n=16, m=64, d=20, dv=7),
        dict(n=257, m=3, h=1, d=8),
        dict(n=37, m=131, d=64, h=1),
        dict(b=3, h=3, n=5, m=7),
    ],
    ids=str,
)
def test_sizes(shape):
    "Odd, prime and single sizes, heads that are no power of two, values of another width."
    check_kernel(
        lambda q, k, v: ops.sr_attention(q, k, v),
        sr_attention_ref,
        inputs(**shape),
        dtypes=("fp32",),
        orders=(0,),
        expect=ALL,
    )


@pytest.mark.parametrize("op", ["sr_attention", "sr_attention_dq", "sr_attention_dkv"])
def test_types_orders_and_blocks(op):
    check_kernel(
        lambda q, k, v: ops.sr_attention(q, k, v, 0.3),
        lambda q, k, v: sr_attention_ref(q, k, v, 0.3),
        inputs(n=45, m=19),
        blocks=(op, [dict(BN=16, BM=16), dict(BN=64, BM=64)]),
        expect=ALL,
    )


def test_wide_heads():
    "128 in bfloat16; in float32 and beyond 128 the reference runs."
    check_kernel(
        lambda q, k, v: ops.sr_attention(q, k, v),
        sr_attention_ref,
        inputs(h=1, n=19, m=9, d=128),
        dtypes=("bf16",),
        orders=(0,),
        expect=ALL,
    )
    for d, dtype in ((128, torch.float32), (160, torch.bfloat16), (16, torch.float64)):
        args = [t.to(dtype) for t in inputs(d=d).values()]
        with launches() as seen:
            ops.sr_attention(*args, impl="triton")
        assert seen == [] and ops.which("sr_attention", *args, impl="triton")[0] == "ref"


def test_layouts():
    "Views of projections, pixels contiguous, slices, expanded keys: values and gradients, and nothing is copied."
    kv = make_input([2, 11, 2, 3, 16], 5)
    q = make_input([2, 29, 3, 16], 4)
    pixel = make_input([2, 48, 29], 6).view(2, 3, 16, 29).transpose(2, 3)
    sliced = make_input([2, 3, 40, 20], 7)[:, :, 5:34, 2:18]
    shared = make_input([1, 3, 11, 16], 8).expand(2, -1, -1, -1)
    k, v = kv.permute(2, 0, 3, 1, 4)
    for a, b, c in ((q.transpose(1, 2), k, v), (pixel, k, v), (sliced, shared, v)):
        check_kernel(
            lambda q, k, v: ops.sr_attention(q, k, v),
            sr_attention_ref,
            dict(q=a, k=b, v=c),
            dtypes=("fp32",),
            orders=(1,),
            expect=ALL,
        )
    out = ops.sr_attention(q.transpose(1, 2), k, v, impl="triton")
    assert out.transpose(1, 2).is_contiguous()
    leaf = q.transpose(1, 2).detach().requires_grad_()
    # an expanded gradient
    (g,) = torch.autograd.grad(ops.sr_attention(leaf, k, v, impl="triton").sum(), leaf)
    (r,) = torch.autograd.grad(sr_attention_ref(leaf, k, v).sum(), leaf)
    assert_close("dq", r, g, 2e-5)


def test_large_scores_and_nan():
    "Scores of a thousand stay finite; NaN comes out where it went in."
    args = inputs(n=9, m=5, grow=300.0)
    assert_close(
        "large",
        sr_attention_ref(*(t.double() for t in args.values())),
        ops.sr_attention(**args, impl="triton"),
        1e-4,
    )
    args["q"][0, 0, 3, 2] = float("nan")
    out = ops.sr_attention(**args, impl="triton")
    assert (
        out[0, 0, 3].isnan().all()
        and not out[0, 0, [0, 8]].isnan().any()
        and not out[0, 1].isnan().any()
    )
    p = torch.randperm(5)
    same = inputs(n=9, m=5)
    assert_close(
        "order of the keys",
        ops.sr_attention(**same, impl="triton"),
        ops.sr_attention(same["q"], same["k"][:, :, p], same["v"][:, :, p], impl="triton"),
        1e-6,
    )


def test_subsets_empty_and_twice():
    "Gradients on request only, empty batches, no second derivative, the choice of the forward pass is kept."
    args = inputs(n=9, m=5)
    for wanted in (("q",), ("k",), ("q", "v")):
        a = {n: t.clone().requires_grad_(n in wanted) for n, t in args.items()}
        out = ops.sr_attention(**a, impl="triton")
        with launches() as seen, ops.use_impl("ref"):
            got = torch.autograd.grad(out.sum(), [a[n] for n in wanted])
        ref = torch.autograd.grad(sr_attention_ref(**a).sum(), [a[n] for n in wanted])
        for n, r, g in zip(wanted, ref, got):
            assert (r - g).norm() <= 2e-5 * (r.norm() + 1), n
        assert seen == [ALL[1], *([] if wanted == ("q",) else [ALL[2]])]
    q = args["q"].clone().requires_grad_()
    (g,) = torch.autograd.grad(
        ops.sr_attention(q, args["k"], args["v"], impl="triton").sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError):
        g.sum().backward()
    with launches() as seen:
        assert ops.sr_attention(
            args["q"][:0], args["k"][:0], args["v"][:0], impl="triton"
        ).shape == (0, 2, 9, 16)
        assert ops.sr_attention(args["q"][:, :, :0], args["k"], args["v"], impl="triton").shape == (
            1,
            2,
            0,
            16,
        )
    assert seen == []
    with pytest.raises(ValueError, match="least one key"):
        ops.sr_attention(args["q"], args["k"][:, :, :0], args["v"][:, :, :0])


def test_operator_compile_export_autocast():
    args = {n: t.requires_grad_() for n, t in inputs(n=9, m=5).items()}
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    torch.library.opcheck(
        torch.ops.segkern.sr_attention.default, (*args.values(), 0.25), test_utils=tests
    )
    fn = torch.compile(
        lambda q, k, v: ops.sr_attention(q, k, v, impl="triton"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for n in (9, 14):
        a = {k: t.requires_grad_() for k, t in inputs(n=n, m=5).items()}
        with launches() as seen:
            got = torch.autograd.grad(fn(**a).sum(), list(a.values()))
        assert set(ALL) <= set(seen)
        for name, r, g in zip(
            a,
            torch.autograd.grad(
                sr_attention_ref(**a).square().sum() * 0 + sr_attention_ref(**a).sum(),
                list(a.values()),
            ),
            got,
        ):
            assert (r - g).norm() <= 2e-5 * (r.norm() + 1), name

    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.sr_attention(q, k, v)

    with ops.use_impl("triton"):
        program = torch.export.export(Net(), tuple(t.detach() for t in args.values()))
    assert "segkern" not in str(program.graph)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = ops.sr_attention(**args, impl="triton")
    assert out.dtype == torch.bfloat16
    assert_close("autocast", sr_attention_ref(**args), out, 1e-2)


@pytest.mark.parametrize("shape", [dict(n=37, m=11), dict(b=2, n=16, m=64, d=24)], ids=str)
def test_forward_by_flash_attention(shape):
    "PyTorch's flash attention forward, our kernels backward: the same results and gradients."
    got = {}
    for flash in (False, True):
        args = {n: t.requires_grad_() for n, t in inputs(**shape).items()}
        with use_blocks("sr_attention_forward", flash=flash), launches() as seen:
            out = ops.sr_attention(**args, impl="triton")
            got[flash] = [out, *torch.autograd.grad(out.square().sum(), list(args.values()))]
        assert (ALL[0] in seen) != flash and {*ALL[1:]} <= set(seen)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got[False], got[True]):
        assert_close(name, a, b, 5e-6)
    assert got[True][0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(scale):
    "Negative ones turn the queries around; zero gives the mean of the values."
    check_kernel(
        lambda q, k, v: ops.sr_attention(q, k, v, scale),
        lambda q, k, v: sr_attention_ref(q, k, v, scale),
        inputs(n=21, m=9),
        dtypes=("fp32",),
        orders=(0,),
        expect=ALL if scale else (),
    )


def test_transforms():
    "Forward mode is right on the reference's way and refused by the kernels; a second derivative is refused."
    args = tuple(inputs(n=5, m=3).values())
    tangents = tuple(torch.ones_like(t) for t in args)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda *a: ops.sr_attention(*a, impl="triton"), args, tangents)
    leaf = args[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(
        ops.sr_attention(leaf, *args[1:], impl="triton").square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(g.square().sum(), leaf)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "Stage 1 of a Mix Transformer, twice for races: results must be the same bits."
    args = {
        n: t.to(dtype).requires_grad_() for n, t in inputs(b=2, h=1, n=4096, m=256, d=64).items()
    }
    wide = {n: t.detach().double().requires_grad_() for n, t in args.items()}
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (6e-4, 1e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    ref = sr_attention_ref(**wide)
    refs = torch.autograd.grad(ref.sum(), list(wide.values()))
    runs = []
    for _ in range(2):
        out = ops.sr_attention(**args)
        assert_close("out", ref, out, limits[0])
        runs.append(torch.autograd.grad(out.sum(), list(args.values())))
    for name, r, a, b in zip(args, refs, *runs):
        assert torch.equal(a, b), name
        if name == "v":
            assert_close(f"d{name}", r, a, limits[1])
