"Strip convolutions: the kernels in the interpreter, the reference, and what surrounds both."

import pytest
import torch
import torch.nn.functional as F

from shared import need
from segkern import ops
from segkern.backbones.mscan import StripGate
from segkern.core import seeded
from segkern.ops.dispatch import interpreting, use_blocks
from segkern.ops.msca import TAPS, msca_bwd, msca_ref, pack_taps, tiles_along
from segkern.testing import assert_close, make_input, relative_l2
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

kernels = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
EXPECT = tuple(
    f"_msca_{name}_kernel" for name in ("fwd", "strips", "square", "rows", "columns", "taps")
)
IMPLS = [pytest.param("triton", marks=kernels), "ref"]


def data(b=1, c=2, h=11, w=7):
    return dict(x=make_input([b, c, h, w]), taps=0.3 * make_input([c, TAPS], 1))


def run(args, wanted=("x", "taps"), **kw):
    args = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
    out = ops.msca(**args, **kw)
    return out, dict(
        zip(
            wanted,
            torch.autograd.grad(out, [args[n] for n in wanted], make_input(out.shape, 7).to(out)),
        )
    )


def truth(args):
    args = {n: t.detach().double().requires_grad_() for n, t in args.items()}
    out = msca_ref(**args)
    return out, dict(
        zip(args, torch.autograd.grad(out, list(args.values()), make_input(out.shape, 7).double()))
    )


def loops(x, taps):
    "The definition with one multiplication at a time, places beyond the border left out."
    b, c, h, w = x.shape

    def conv(x, k, height, width, bias):
        y = torch.zeros_like(x) + bias[:, None, None]
        for i in range(height):
            for j in range(width):
                di = i - height // 2
                dj = j - width // 2
                rows = [r for r in range(h) if 0 <= r + di < h]
                cols = [q for q in range(w) if 0 <= q + dj < w]
                if rows and cols:
                    part = (
                        x[:, :, rows[0] + di : rows[-1] + di + 1, cols[0] + dj : cols[-1] + dj + 1]
                        * k[:, i * width + j, None, None]
                    )
                    y[:, :, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] += part
        return y

    t = conv(x, taps[:, :25], 5, 5, taps[:, 103])
    y = t.clone()
    at = 0
    for n, k in enumerate((7, 11, 21)):
        y += conv(
            conv(t, taps[:, 25 + at :], 1, k, taps[:, 104 + n]),
            taps[:, 64 + at :],
            k,
            1,
            taps[:, 107 + n],
        )
        at += k
    return y


@pytest.mark.parametrize("size", [(1, 1), (3, 26), (23, 5)], ids=str)
def test_definition(size):
    args = {n: t.double() for n, t in data(2, 3, *size).items()}
    assert relative_l2(loops(**args), msca_ref(**args)) < 1e-13


@kernels
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (2, 3, 5, 37), (1, 2, 45, 1), (1, 1, 64, 33), (3, 2, 16, 16), (1, 1, 17, 64)],
    ids=str,
)
def test_sizes(size):
    "Odd, prime and single sizes, and those of whole blocks."
    check_kernel(ops.msca, msca_ref, data(*size), dtypes=("fp32",), orders=(0,), expect=EXPECT)


@kernels
@pytest.mark.parametrize("size", [(1, 1, 67, 13), (1, 1, 5, 101), (1, 1, 65, 65)], ids=str)
def test_margins(size):
    "Maps larger than a tile: production tiles."
    check_kernel(ops.msca, msca_ref, data(*size), dtypes=("fp32",), orders=(1,), expect=EXPECT)


@kernels
def test_types_orders_and_blocks():
    "Three types, two orders of the programs, larger and smaller tiles."
    check_kernel(ops.msca, msca_ref, data(1, 2, 13, 11), orders=(0, 1), expect=EXPECT)
    for name, sizes in (
        ("msca", [dict(RH=32, RW=64), dict(RH=16, RW=32)]),
        ("msca_strips", [dict(RH=64, RW=32)]),
        ("msca_sums", [dict(RH=32, RW=64)]),
        ("msca_square", [dict(RH=32, RW=16)]),
        ("msca_taps", [dict(RH=32, RW=16)]),
    ):
        check_kernel(
            ops.msca,
            msca_ref,
            data(1, 1, 13, 11),
            dtypes=("fp32",),
            orders=(0,),
            blocks=(name, sizes),
            expect=EXPECT,
        )
    with (
        use_blocks("msca_strips", RH=32, RW=32),
        use_blocks("msca_sums", RH=32, RW=32),
        use_blocks("msca_square", RH=16, RW=16),
        use_blocks("msca_taps", RH=16, RW=16),
    ):
        check_kernel(
            ops.msca,
            msca_ref,
            data(1, 1, 33, 20),
            dtypes=("fp32",),
            orders=(0,),
            blocks=("msca", [dict(RH=32, RW=32)]),
            expect=EXPECT,
        )


def test_tiles():
    "Own pixels of the tiles cover a side once; a tile without room for its margins is refused."
    for size in range(1, 300, 7):
        for r, margin in ((64, 10), (64, 16), (32, 10), (32, 12), (16, 2), (64, 0)):
            n, m = tiles_along(size, r, margin)
            step = r - 2 * m
            assert (
                (n, m) == (1, 0)
                and size <= r
                or m == margin
                and (n - 2) * step + r < size <= (n - 1) * step + r
            )
    with pytest.raises(ValueError, match="no room"):
        tiles_along(40, 16, 10)


def layouts(b=2, c=2, h=9, w=12):
    wide = make_input([b, c + 5, h + 3, 2 * w], 11)
    return {
        "channels last": make_input([b, c, h, w], 12).to(memory_format=torch.channels_last),
        "slice": wide[:, 5:, 1:-2, ::2],
        "offset": wide[:, 2 : 2 + c, :h, :w],
        "transposed": make_input([b, c, w, h], 13).transpose(2, 3),
        "expanded pixels": make_input([b, c, 1, 1], 14).expand(-1, -1, h, w),
        "expanded batch": make_input([1, c, h, w], 15).expand(b, -1, -1, -1),
    }


@kernels
@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout):
    "Maps are read where they lie; gradients arrive in any layout."
    x = layouts()[layout]
    taps = data()["taps"]
    check_kernel(
        ops.msca, msca_ref, dict(x=x, taps=taps), dtypes=("fp32",), orders=(1,), expect=EXPECT
    )
    g = x
    dx, dtaps = msca_bwd(x, taps.contiguous(), g)
    a = x.detach().double().requires_grad_()
    b = taps.double().requires_grad_()
    for r, o in zip(torch.autograd.grad(msca_ref(a, b), (a, b), g.double()), (dx, dtaps)):
        assert_close(layout, r, o, 5e-6)


@kernels
def test_layouts_of_taps():
    "Transposed and expanded taps, gradients of a sum."
    args = data(1, 3, 6, 7)
    for taps in (
        make_input([TAPS, 3], 2).t(),
        make_input([1, TAPS], 2).expand(3, -1),
        make_input([3, 2 * TAPS], 3)[:, ::2],
    ):
        x = args["x"].clone().requires_grad_()
        taps = taps.detach().requires_grad_()
        with launches() as seen:
            got = torch.autograd.grad(ops.msca(x, taps, impl="triton").sum(), (x, taps))
        assert set(seen) == set(EXPECT)
        for r, o in zip(torch.autograd.grad(msca_ref(x, taps).sum(), (x, taps)), got):
            assert_close("gradients", r, o, 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_subsets(impl):
    "Gradients on request only; the choice of the forward pass is kept."
    args = data(2)
    every = truth(args)[1]
    for wanted in (("x",), ("taps",), ("x", "taps")):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
        out = ops.msca(**leaves, impl=impl)
        with launches() as seen, ops.use_impl("ref"):
            got = torch.autograd.grad(out, [leaves[n] for n in wanted], make_input(out.shape, 7))
        skipped = EXPECT[3:] if "taps" not in wanted else EXPECT[2:3] if "x" not in wanted else ()
        assert seen == ([] if impl == "ref" else [n for n in EXPECT[1:] if n not in skipped])
        for n, g in zip(wanted, got):
            assert_close(n, every[n], g, 5e-6)
    frozen = ops.msca(**args, impl=impl)
    assert not frozen.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_border(impl):
    """Zeros beyond the border stand behind every bias: a constant map is no constant, and 21×21
    taps in one would differ."""
    x = torch.zeros(1, 1, 25, 25)
    taps = torch.zeros(1, TAPS)
    taps[0, 103:] = 1  # biases only
    taps[0, 64:103] = 1  # and the columns
    y = ops.msca(x, taps, impl=impl)
    rows = torch.arange(25.0)

    def inside(k):
        return (rows + k // 2).clamp(max=24) - (rows - k // 2).clamp(min=0) + 1

    assert torch.equal(
        y[0, 0], (1 + sum(inside(k) + 1 for k in (7, 11, 21)))[:, None].expand(-1, 25)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_shift(impl):
    "Away from the border, a shifted map gives the shifted result."
    args = data(1, 1, 60, 64)
    inner = args["x"].clone()
    for t in (inner[:, :, :25], inner[:, :, -26:], inner[..., :25], inner[..., -26:]):
        t.zero_()
    args["taps"][:, 103:] = 0
    a = ops.msca(inner, args["taps"], impl=impl)
    b = ops.msca(inner.roll((3, -2), (2, 3)), args["taps"], impl=impl)
    assert_close("shifted", a.roll((3, -2), (2, 3)), b, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_large_values(impl):
    "A NaN reaches what it reaches in the definition, at least; large values stay finite."
    args = data(2, 2, 40, 9)
    args["x"][1, 0, 3, 4] = float("nan")
    out = ops.msca(**args, impl=impl)
    ref = msca_ref(**args)
    assert (
        ref.isnan().any()
        and (out.isnan() | ~ref.isnan()).all()
        and not out[0].isnan().any()
        and not out[1, 1].isnan().any()
    )
    big = {n: (1e3 * t if n == "x" else 0.1 * t).half() for n, t in data().items()}
    got = ops.msca(**big, impl=impl)
    assert got.isfinite().all()
    assert_close("large", msca_ref(**{n: t.double() for n, t in big.items()}), got, 2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    (a, ga), (b, gb) = (run(data(2, 2, 70, 9), impl=impl) for _ in range(2))
    assert torch.equal(a, b) and all(torch.equal(ga[n], gb[n]) for n in ga)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_types_and_autocast(impl):
    "Taps keep their type; under autocast the map takes the narrow one; double precision has no kernel."
    args = data()
    mixed = args | dict(x=args["x"].bfloat16())
    out, got = run(mixed, impl=impl)
    assert out.dtype == got["x"].dtype == torch.bfloat16 and got["taps"].dtype == torch.float32
    ref, wide = truth(mixed)
    assert_close("bf16", ref, out, 1e-2)
    for n in got:
        assert_close(n, wide[n], got[n], 2e-2)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16), launches() as seen:
        out, got = run(args, impl=impl)
    assert (
        out.dtype == torch.bfloat16
        and {g.dtype for g in got.values()} == {torch.float32}
        and set(seen) == (set(EXPECT) if impl == "triton" else set())
    )
    assert_close("autocast", truth(args)[0], out, 1e-2)
    with launches() as seen:
        assert ops.msca(args["x"].double(), args["taps"], impl=impl).dtype == torch.float64
    assert seen == []


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_twice_and_refusals(impl):
    "Empty batches and channels, no second derivative through the kernels, clear errors."
    args = data()
    with launches() as seen:
        assert ops.msca(args["x"][:0], args["taps"], impl=impl).shape == (0, 2, 11, 7)
    assert seen == []
    if impl == "triton":
        x = args["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(
            ops.msca(x, args["taps"], impl=impl).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError):
            g.sum().backward()
    for call, word in (
        (lambda: ops.msca(args["x"][0], args["taps"]), "map"),
        (lambda: ops.msca(args["x"], args["taps"][:1]), "taps"),
        (lambda: ops.msca(args["x"], args["taps"][:, 1:]), "taps"),
        (lambda: ops.msca(args["x"].long(), args["taps"]), "x in floating"),
        (lambda: ops.msca(args["x"], args["taps"].long()), "taps in floating"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@kernels
def test_pictures_share_a_program():
    "Several pictures per program, and a last program with fewer; channels last goes in and comes out."
    args = data(5, 2, 5, 6)
    args["x"] = args["x"].to(memory_format=torch.channels_last)
    with (
        use_blocks("msca", SHARE=2),
        use_blocks("msca_strips", SHARE=2),
        use_blocks("msca_square", SHARE=3),
        use_blocks("msca_sums", SHARE=2),
    ):
        out, got = run(args, impl="triton")
    assert out.stride() == got["x"].stride() == args["x"].stride()
    ref, wide = truth(args)
    assert_close("out", ref, out, 2e-6)
    for n in got:
        assert_close(n, wide[n], got[n], 5e-6)


@kernels
def test_no_forward_mode():
    "A derivative in forward mode is refused, not wrong."
    args = data()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: ops.msca(x, args["taps"], impl="triton"), (args["x"],), (args["x"],)
        )


@kernels
def test_operator_and_compile():
    "What the dispatcher asks of an operator; graphs with sizes that change; export takes the reference."
    args = data()
    leaf = [t.clone().requires_grad_() for t in args.values()]
    torch.library.opcheck(
        torch.ops.segkern.msca.default,
        tuple(leaf),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )
    compiled = torch.compile(
        lambda x, taps: ops.msca(x, taps, impl="triton"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for h in (5, 8):
        sized = data(h=h)
        leaves = {n: t.requires_grad_() for n, t in sized.items()}
        with launches() as seen:
            got = torch.autograd.grad(
                compiled(**leaves), list(leaves.values()), make_input(sized["x"].shape, 7)
            )
        assert set(seen) == set(EXPECT)
        for r, o in zip(truth(sized)[1].values(), got):
            assert_close("compiled", r, o, 5e-6)


def test_gradcheck_and_export():
    small = [t.double().requires_grad_() for t in data(1, 1, 3, 4).values()]
    assert torch.autograd.gradcheck(ops.msca, small)

    class Net(torch.nn.Module):
        def forward(self, x, taps):
            return ops.msca(x, taps)

    args = tuple(data().values())
    graph = torch.export.export(Net(), args)
    assert "segkern" not in str(graph.graph) and torch.equal(graph.module()(*args), msca_ref(*args))


def official():
    "The fixture of the official block, its module and its input."
    f = need("mscan_gate")
    gate = StripGate(32)
    s = f.state()
    names = {
        "conv0": gate.square,
        "conv3": gate.mix,
        **{f"conv{i}_1": r for i, r in enumerate(gate.rows)},
        **{f"conv{i}_2": c for i, c in enumerate(gate.columns)},
    }
    with torch.no_grad():
        for n, conv in names.items():
            conv.weight.copy_(s[f"{n}.weight"])
            conv.bias.copy_(s[f"{n}.bias"])
    return f, gate, names, f.inputs()["x"].requires_grad_()


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=[kernels, pytest.mark.slow]), "ref"])
def test_the_block(impl):
    "The official block and its gradients, through the module."
    f, gate, names, x = official()
    with ops.use_impl(impl), launches() as seen:
        out = gate(x)
        out.backward(f.inputs()["grad_out"])
    assert set(seen) == (set(EXPECT) if impl == "triton" else set())
    assert f.error("out", out) < 1e-5 and f.error("grad_x", x.grad) < 1e-5
    for n, conv in names.items():
        assert f.error(f"grad.{n}.weight", conv.weight.grad.flatten(1)) < 1e-5, n
        assert f.error(f"grad.{n}.bias", conv.bias.grad) < 1e-5, n


@kernels
def test_two_channels_of_the_block():
    "The kernels' gradients of the taps of two channels against the official ones."
    f, gate, names, x = official()
    taps = pack_taps(gate.square, gate.rows, gate.columns).detach()
    y = msca_ref(x.detach(), taps).requires_grad_()
    (g,) = torch.autograd.grad(gate.mix(y) * x, y, f.inputs()["grad_out"])
    few = taps[:2].clone().requires_grad_()
    out = ops.msca(x[:, :2].detach(), few, impl="triton")
    assert_close("out", y[:, :2], out, 2e-6)
    out.backward(g[:, :2])
    order = ["conv0", *(f"conv{i}_1" for i in range(3)), *(f"conv{i}_2" for i in range(3))]
    for n, d in zip(
        [f"{n}.weight" for n in order] + [f"{n}.bias" for n in order],
        few.grad.split([25, 7, 11, 21, 7, 11, 21] + [1] * 7, 1),
    ):
        assert_close(n, f.golden[f"grad.{n}"][:2].reshape(2, -1), d, 1e-5)


def test_packing():
    "Every number of the seven convolutions has its place."
    with seeded(0):
        gate = StripGate(3)
    with torch.no_grad():
        for p in gate.parameters():
            p.copy_(make_input(p.shape, 5))
    taps = pack_taps(gate.square, gate.rows, gate.columns)
    x = make_input([2, 3, 9, 30])
    t = gate.square(x)
    assert taps.shape == (3, TAPS)
    assert_close(
        "modules",
        t + sum(c(r(t)) for r, c in zip(gate.rows, gate.columns)),
        msca_ref(x, taps),
        1e-6,
    )
    assert_close("gate", gate.mix(msca_ref(x, taps)) * x, gate(x), 1e-6)
    assert F.conv2d(x, gate.square.weight, gate.square.bias, padding=2, groups=3).equal(t)


PRODUCTION = [
    ((2, 64, 128, 128), torch.bfloat16),
    ((2, 320, 32, 32), torch.bfloat16),
    ((1, 16, 100, 135), torch.bfloat16),
    # larger maps in single precision are the reference's
    ((2, 320, 32, 32), torch.float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape,dtype", PRODUCTION, ids=str)
def test_on_a_gpu(shape, dtype):
    "Production tiles on a GPU against double precision; the kernel must have run."
    args = {n: t.to(dtype) if n == "x" else t for n, t in data(*shape).items()}
    with ops.use_impl("triton"), launches() as seen:
        out, got = run(args)
    assert seen, "the reference ran"
    ref, wide = truth(args)
    limit = 5e-6 if dtype == torch.float32 else 1e-2
    assert_close("out", ref, out, limit)
    for n in got:
        assert_close(n, wide[n], got[n], 4 * limit)
