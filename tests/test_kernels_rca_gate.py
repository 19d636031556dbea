"The rectangular gate: kernels in the interpreter, the reference, and what surrounds both."

import pytest
import torch

from segkern import ops
from segkern.ops.dispatch import interpreting
from segkern.ops.rca_gate import rca_gate_ref
from segkern.ops.strip_pool import strip_means
from segkern.testing import assert_close, make_input, relative_l2
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

kernels = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
KERNELS = ("_rca_gate_fwd_kernel", "_rca_gate_bwd_kernel", "_rca_gate_dx_kernel")
LINES = ("rows", "slope", "offset")
WEIGHTS = ("taps", "bias", "weight", "local_bias")
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, 11),
    (2, 5, 7, 13, 11),
    (1, 3, 17, 5, 9),
    (1, 2, 1, 67, 3),
    (2, 1, 37, 1, 5),
    (1, 37, 3, 2, 7),
    (1, 2, 17, 66, 3),
]
IMPLS = [pytest.param("triton", marks=kernels), "ref"]


def example(b=2, c=3, h=7, w=9, k=5, seed=0):
    "Inputs; the gates are neither all open nor all shut."
    shapes = dict(
        x=(b, c, h, w),
        rows=(b, c, h),
        slope=(c, w),
        offset=(b, c, w),
        taps=(c, k),
        bias=(c,),
        weight=(c, 1, 3, 3),
        local_bias=(c,),
    )
    return {
        n: make_input(s, seed + i) * (k**-0.5 if n == "taps" else 1)
        for i, (n, s) in enumerate(shapes.items())
    }


def run(fn, args, wanted=None, **kw):
    "Output, and gradients by name for a fixed gradient of the output."
    args = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in args.items()}
    out = fn(**args, **kw)
    names = [n for n, t in args.items() if t.requires_grad]
    return out, dict(
        zip(
            names,
            torch.autograd.grad(out, [args[n] for n in names], make_input(out.shape, 99).to(out)),
        )
    )


@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    "Odd, prime and single sizes; maps smaller than the taps; more of everything than a block."
    args = example(*size)
    # else the ReLU may leave nothing
    if size[1:4] == (1, 1, 1):
        args |= dict(rows=torch.ones(1, 1, 1), slope=torch.ones(1, 1), offset=torch.ones(1, 1, 1))
    check_kernel(ops.rca_gate, rca_gate_ref, args, dtypes=("fp32",), orders=(1,), expect=KERNELS)


@kernels
@pytest.mark.parametrize("name", ["rca_gate", "rca_gate_bwd", "rca_gate_dx"])
def test_types_orders_and_blocks(name):
    "Three types, two orders of the programs, small blocks and large ones."
    check_kernel(
        ops.rca_gate,
        rca_gate_ref,
        example(1, 3, 5, 9, 3),
        orders=(0, 1),
        blocks=(name, [dict(BC=2, BH=4, BW=8), dict(BC=4, BH=8, BW=16)]),
        expect=KERNELS,
    )


def test_reference_is_the_composition():
    "Against the maps written out, tap by tap."
    a = {n: t.double() for n, t in example(2, 3, 6, 8, 5).items()}
    z = (a["rows"][..., None] * a["slope"][:, None] + a["offset"][:, :, None]).clamp(min=0)
    gate = a["bias"][:, None, None].expand(2, 3, 6, 8).clone()
    local = a["local_bias"][:, None, None].expand(2, 3, 6, 8).clone()
    for i in range(6):
        for t in range(5):
            if 0 <= i + t - 2 < 6:
                gate[:, :, i] += a["taps"][:, t, None] * z[:, :, i + t - 2]
        for j in range(8):
            for t in range(9):
                if 0 <= i + t // 3 - 1 < 6 and 0 <= j + t % 3 - 1 < 8:
                    local[:, :, i, j] += (
                        a["weight"][:, 0, t // 3, t % 3]
                        * a["x"][:, :, i + t // 3 - 1, j + t % 3 - 1]
                    )
    assert_close("out", local / (1 + (-gate).exp()), rca_gate_ref(**a), 1e-12)


@kernels
@pytest.mark.parametrize(
    "layout",
    ["channels last", "slice", "offset", "transposed", "expanded pixels", "expanded batch"],
)
def test_layouts(layout):
    "Maps in every layout, read where they lie; vectors that are views."
    wide = make_input([2, 8, 10, 18], 11)
    x = {
        "channels last": make_input([2, 3, 7, 9], 12).to(memory_format=torch.channels_last),
        "slice": wide[:, 5:, 1:-2, ::2],
        "offset": wide[:, 2:5, :7, 3:12],
        "transposed": make_input([2, 3, 9, 7], 13).transpose(2, 3),
        "expanded pixels": make_input([2, 3, 1, 1], 14).expand(-1, -1, 7, 9),
        "expanded batch": make_input([1, 3, 7, 9], 15).expand(2, -1, -1, -1),
    }[layout]
    views = dict(
        rows=make_input([2, 7, 3], 16).transpose(1, 2),
        slope=make_input([3, 18], 17)[:, ::2],
        taps=make_input([5, 3], 18).t(),
        bias=make_input([6], 19)[::2],
    )
    check_kernel(
        ops.rca_gate,
        rca_gate_ref,
        example() | dict(x=x) | views,
        dtypes=("fp32",),
        orders=(1,),
        expect=KERNELS,
    )


@kernels
def test_layout_of_the_gradient():
    "Gradients that arrive expanded or transposed; channels last stays."
    args = example(2, 8, 7, 9)
    x = args["x"].to(memory_format=torch.channels_last).requires_grad_()
    for loss in (
        lambda y: y.sum(),
        lambda y: y.transpose(2, 3).contiguous().square().sum(),
        lambda y: y[:, :, ::2].square().sum(),
    ):
        out = ops.rca_gate(**args | dict(x=x), impl="triton")
        (g,) = torch.autograd.grad(loss(out), x)
        assert out.stride() == g.stride() == x.stride()
        assert_close(
            "dx", torch.autograd.grad(loss(rca_gate_ref(**args | dict(x=x))), x)[0], g, 5e-6
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_subsets(impl):
    "Gradients on request only; the choice of the forward pass is kept."
    args = example()
    every = run(rca_gate_ref, args)[1]
    for wanted, expect in (
        (("x",), KERNELS[1:]),
        (("rows",), KERNELS[1:]),
        (("slope", "x"), KERNELS[1:]),
        (("taps",), KERNELS[1:2]),
        (("weight", "local_bias"), KERNELS[1:2]),
        (("offset", "bias"), KERNELS[1:]),
    ):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
        out = ops.rca_gate(**leaves, impl=impl)
        with launches() as seen, ops.use_impl("ref"):
            got = torch.autograd.grad(out, [leaves[n] for n in wanted], make_input(out.shape, 99))
        assert seen == (list(expect) if impl == "triton" else []), (wanted, seen)
        for n, g in zip(wanted, got):
            assert_close(n, every[n], g, 5e-6)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("impl", IMPLS)
def test_extremes(impl):
    """NaN reaches what its taps reach and no other picture; gates that are open or shut have
    finite gradients; a plane of zeros."""
    args = example(2, 2, 9, 4, 3)
    args["rows"][0, 1, 4] = float("nan")
    out = ops.rca_gate(**args, impl=impl).isnan()
    assert out[0, 1, 3:6].all() and int(out.sum()) == 12
    args = example(2, 2, 9, 4, 3)
    args["x"][1, 0, 2, 2] = float("nan")
    assert int(ops.rca_gate(**args, impl=impl).isnan().sum()) == 9
    for value in (1e4, -1e4):
        args = example() | dict(bias=torch.full((3,), value))
        out, got = run(ops.rca_gate, args, impl=impl)
        truth, wide = run(rca_gate_ref, {n: t.double() for n, t in args.items()})
        assert_close("out", truth, out, 2e-6) if value > 0 else (out == 0).all()
        assert all(g.isfinite().all() for g in got.values())
    args = example() | dict(rows=torch.zeros(2, 3, 7), offset=torch.zeros(2, 3, 9))
    out, got = run(ops.rca_gate, args, impl=impl)
    assert (got["rows"] == 0).all() and (got["offset"] == 0).all()  # nothing passes a ReLU at zero


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_types_and_autocast(impl):
    "Vectors may have types of their own; under autocast the map takes the narrow type."
    args = {n: t.bfloat16() if n == "x" else t for n, t in example().items()}
    out, got = run(ops.rca_gate, args, impl=impl)
    truth, wide = run(rca_gate_ref, {n: t.double() for n, t in args.items()})
    assert out.dtype == got["x"].dtype == torch.bfloat16 and {
        g.dtype for n, g in got.items() if n != "x"
    } == {torch.float32}
    assert_close("out", truth, out, 8e-3)
    for n in got:
        assert_close(n, wide[n], got[n], 1e-2)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16), launches() as seen:
        out, got = run(ops.rca_gate, example(), impl=impl)
    assert (
        out.dtype == torch.bfloat16
        and {g.dtype for g in got.values()} == {torch.float32}
        and set(seen) == (set(KERNELS) if impl == "triton" else set())
    )
    assert_close(
        "autocast", rca_gate_ref(**{n: t.double() for n, t in example().items()}), out, 8e-3
    )
    with launches() as seen:
        assert (
            ops.rca_gate(**{n: t.double() for n, t in example().items()}, impl=impl).dtype
            == torch.float64
        )
    assert seen == []


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_twice_and_refusals(impl):
    "Empty maps, no second derivative through the kernels, clear errors, the same bits twice."
    args = example()
    with launches() as seen:
        assert ops.rca_gate(
            **{n: t[:0] if n in ("x", "rows", "offset") else t for n, t in args.items()}, impl=impl
        ).shape == (0, 3, 7, 9)
        assert ops.rca_gate(
            **args | dict(x=args["x"][:, :, :0], rows=args["rows"][..., :0]), impl=impl
        ).shape == (2, 3, 0, 9)
    assert seen == []
    a, b = (run(ops.rca_gate, args, impl=impl) for _ in range(2))
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in a[1])
    if impl == "triton":
        x = args["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(
            ops.rca_gate(**args | dict(x=x), impl=impl).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError):
            g.sum().backward()
    for change, word in (
        (dict(x=args["x"][0]), "wants x"),
        (dict(rows=args["rows"][:, :, 1:]), "rows"),
        (dict(slope=args["slope"][None]), "slope"),
        (dict(weight=args["weight"][:, 0]), "weight"),
        (dict(taps=args["taps"][:, 1:]), "odd"),
        (dict(bias=args["bias"].long()), "floating"),
        (dict(local_bias=args["local_bias"][:1]), "local_bias"),
    ):
        with pytest.raises(ValueError, match=word):
            ops.rca_gate(**args | change, impl=impl)


@kernels
def test_operators():
    "What the dispatcher asks of an operator."
    x, *lines = (t.requires_grad_() for t in example().values())
    torch.library.opcheck(
        torch.ops.segkern.rca_gate.default,
        (x, list(lines)),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_compile(impl):
    "Graphs with sizes that change."
    compiled = torch.compile(
        lambda **kw: ops.rca_gate(**kw, impl=impl),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for h in (5, 8):
        args = example(h=h)
        with launches() as seen:
            out, got = run(compiled, args)
        assert set(seen) == (set(KERNELS) if impl == "triton" else set())
        truth, wide = run(rca_gate_ref, {n: t.double() for n, t in args.items()})
        assert_close("out", truth, out, 2e-6)
        for n in got:
            assert_close(n, wide[n], got[n], 5e-6)


def test_export_and_double():
    "Exported graphs hold plain PyTorch; double precision passes gradcheck."

    class Net(torch.nn.Module):
        def forward(self, *args):
            return ops.rca_gate(*args)

    args = tuple(example().values())
    program = torch.export.export(Net(), args)
    assert "segkern" not in str(program.graph)
    assert_close("exported", Net()(*args), program.module()(*args), 1e-6)
    assert torch.autograd.gradcheck(
        ops.rca_gate, [t.double().requires_grad_() for t in example(2, 2, 3, 4, 3).values()]
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_strip_means(impl):
    x = make_input([2, 3, 5, 7])
    with launches() as seen:
        columns, rows = strip_means(x, impl=impl)
    assert (
        bool(seen) == (impl == "triton")
        and relative_l2(x.mean(2), columns) < 1e-6
        and relative_l2(x.mean(3), rows) < 1e-6
    )
    assert [t.shape for t in strip_means(x[:0])] == [(0, 3, 7), (0, 3, 5)]


@kernels
def test_in_the_network():
    "The block takes the kernels where they run, in training and evaluation, with the gradients of the written form."
    import copy
    from segkern.models.cgrseg_blocks import RectangularGate

    torch.manual_seed(0)
    new = RectangularGate(6, 5)
    x = make_input([2, 6, 7, 9]) + 1
    g = make_input([2, 6, 7, 9], 3)
    old = copy.deepcopy(new)
    old.literal = True
    for mode in (True, False):
        got = {}
        for name, m in (("old", old.train(mode)), ("new", new.train(mode))):
            z = x.clone().requires_grad_()
            with launches() as seen, ops.use_impl("triton"):
                out = m(z)
                got[name] = out, *torch.autograd.grad(out, [z, *m.parameters()], g)
            assert set(KERNELS) <= set(seen) if name == "new" else seen == []
        for a, b in zip(*got.values()):
            assert (a - b).norm() <= 1e-5 * max(1, a.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "CGRSeg-B's maps, twice for races: results must be the same bits."
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (6e-4, 2e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    for size in ((2, 64, 64, 64, 11), (4, 496, 8, 8, 11), (2, 144, 31, 35, 9)):
        args = {n: t.to(dtype) for n, t in example(*size).items()}
        for last in (False, True):
            if last:
                args["x"] = args["x"].to(memory_format=torch.channels_last)
            truth, wide = run(rca_gate_ref, {n: t.double() for n, t in args.items()})
            a, b = (run(ops.rca_gate, args, impl="triton") for _ in range(2))
            assert_close("out", truth, a[0], limits[0])
            assert torch.equal(a[0], b[0])
            for n, got in a[1].items():
                assert_close(n, wide[n], got, limits[1])
                assert torch.equal(got, b[1][n]), n
