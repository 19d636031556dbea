"""Squeeze-axial attention and its broadcast sum: the kernels in the interpreter, the references,
and what surrounds both."""

import pytest
import torch
import torch.nn.functional as F

from segkern.ops.dispatch import KERNELS, interpreting, use_impl
from segkern.ops.axial_add import axial_add, axial_add_ref
from segkern.ops.squeeze_axial import (
    axial_attention,
    axial_attention_ref,
    positions,
    squeeze_axial,
)
from segkern.testing import assert_close, make_input, relative_l2
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

kernels = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
ATTEND = ("_axial_attention_kernel",)
ADD = ("_axial_add_fwd_kernel", "_axial_add_bwd_kernel")
POOL = ("_strip_pool_fwd_kernel", "_strip_pool_bwd_kernel")
TABLES = ("row_q", "row_k", "column_q", "column_k")
SIZES = [
    dict(b=1, heads=1, d=1, h=1, w=1),
    dict(b=2, heads=3, d=5, h=7, w=13),
    dict(b=1, heads=2, d=20, h=1, w=37),
    dict(b=1, heads=1, d=24, h=101, w=3),
    dict(b=3, heads=2, d=3, h=16, w=16),
    dict(b=1, heads=1, d=33, h=5, w=8),
]


def tables(heads, d, p=16):
    return {n: make_input([1, heads * d, p], i + 10) for i, n in enumerate(TABLES)}


def means(b=2, heads=2, d=5, h=7, w=19, p=16, ratio=2):
    return dict(
        rows=make_input([b, (2 + ratio) * heads * d, h], 1),
        columns=make_input([b, (2 + ratio) * heads * d, w], 2),
        **tables(heads, d, p),
    )


def maps(b=2, heads=2, d=5, h=7, w=19):
    return dict(qkv=make_input([b, 4 * heads * d, h, w], 3), **tables(heads, d))


def summands(b=2, c=5, h=7, w=19):
    return dict(
        v=3 * make_input([b, c, h, w], 4),
        row=2 * make_input([b, c, h], 5),
        column=2 * make_input([b, c, w], 6),
    )


def plain(qkv, heads, **t):
    return axial_attention_ref(qkv.mean(3), qkv.mean(2), **t, heads=heads)


def attended(heads, fn=axial_attention):
    return lambda **t: fn(**t, heads=heads)


def run(fn, args, g=None):
    "Outputs and gradients by name."
    args = {n: t.detach().requires_grad_() for n, t in args.items()}
    outs = fn(**args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return outs, dict(
        zip(
            args,
            torch.autograd.grad(
                outs,
                list(args.values()),
                [make_input(o.shape, 20 + i).to(o) for i, o in enumerate(outs)],
            ),
        )
    )


@pytest.mark.parametrize("h", [1, 3, 16, 21])
def test_reference_is_the_definition(h):
    "Loops over pictures, heads and places, positions by hand."
    a = {n: t.double() for n, t in means(2, 2, 3, h, 5, p=4).items()}
    got = axial_attention_ref(**a, heads=2)
    for m, q_at, k_at, out in (
        (a["rows"], a["row_q"], a["row_k"], got[0]),
        (a["columns"], a["column_q"], a["column_k"], got[1]),
    ):
        n = m.shape[2]
        spread = []
        for t in (q_at, k_at):
            rows = []
            for i in range(n):
                at = min(max((i + 0.5) * 4 / n - 0.5, 0), 3)
                low = int(at)
                rows.append((1 - at + low) * t[0, :, low] + (at - low) * t[0, :, min(low + 1, 3)])
            spread.append(torch.stack(rows, 1))
            assert_close("positions", spread[-1], positions(t, n)[0], 1e-12)
        for b in range(2):
            for head in range(2):
                s = slice(3 * head, 3 * head + 3)
                q = m[b, s] + spread[0][s]
                k = m[b, 6:12][s] + spread[1][s]
                v = m[b, 12 + 6 * head : 18 + 6 * head]
                for i in range(n):
                    w = torch.stack([q[:, i] @ k[:, j] * 3**-0.5 for j in range(n)]).exp()
                    assert_close(
                        "place", v @ (w / w.sum()), out[b, 6 * head : 6 * head + 6, i], 1e-12
                    )


@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_sizes(size):
    "Odd, prime and single lengths; more places than a block."
    check_kernel(
        attended(size["heads"]),
        attended(size["heads"], axial_attention_ref),
        means(**size),
        grads=(),
        dtypes=("fp32",),
        orders=(0,),
        expect=ATTEND,
    )


@kernels
def test_attention_types_orders_and_blocks():
    """Three types, two orders of the programs, small blocks and large ones; values as wide as
    keys; tables of another length."""
    blocks = [dict(BQ=16, BK=16), dict(BQ=64, BK=16)]
    check_kernel(
        attended(2),
        attended(2, axial_attention_ref),
        means(b=1, h=9, w=21),
        grads=(),
        orders=(0, 1),
        blocks=("axial_attention", blocks),
        expect=ATTEND,
    )
    check_kernel(
        attended(2),
        attended(2, axial_attention_ref),
        means(p=5, ratio=1),
        grads=(),
        dtypes=("fp32",),
        orders=(0,),
        expect=ATTEND,
    )
    check_kernel(
        attended(2),
        attended(2, axial_attention_ref),
        means(p=1, ratio=3),
        grads=(),
        dtypes=("fp32",),
        orders=(0,),
        expect=ATTEND,
    )


@kernels
def test_attention_layouts_and_types_of_tables():
    "Averages that are slices, transposed or expanded; half averages with single tables."
    a = means()
    ref = axial_attention_ref(**a, heads=2)
    wide = torch.full((2, 43, 40), float("nan"))
    wide[:, 1:41, 2::2][..., :19] = a["columns"]
    for change in (
        dict(columns=wide[:, 1:41, 2::2][..., :19]),
        dict(rows=a["rows"].transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        for r, o in zip(ref, axial_attention(**a | change, heads=2, impl="triton")):
            assert_close("layout", r, o, 2e-6)
    one = a | dict(rows=a["rows"][:, :, :1].expand(-1, -1, 7))
    for r, o in zip(
        axial_attention_ref(**one, heads=2), axial_attention(**one, heads=2, impl="triton")
    ):
        assert_close("expanded", r, o, 2e-6)
    half = a | {n: a[n].bfloat16() for n in ("rows", "columns")}
    with launches() as seen:
        got = axial_attention(**half, heads=2, impl="triton")
    assert tuple(seen) == ATTEND
    for r, o in zip(axial_attention_ref(**half, heads=2), got):
        assert o.dtype == torch.bfloat16 and relative_l2(r.float(), o.float()) < 4e-3


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_attention_special_values(bad):
    "What is not a number reaches the same results as in the reference, no other head and no other axis."
    a = means()
    for channel in (1, 11, 21):  # a query, a key, a value of the first head
        rows = a["rows"].clone()
        rows[0, channel, 2] = bad
        ref, got = (
            f(a | dict(rows=rows))
            for f in (
                lambda t: axial_attention_ref(**t, heads=2),
                lambda t: axial_attention(**t, heads=2, impl="triton"),
            )
        )
        for r, o in zip(ref, got):
            assert torch.equal(r.isnan(), o.isnan()) and torch.equal(r.isinf(), o.isinf())
            assert_close("rest", r.nan_to_num(0, 0, 0), o.nan_to_num(0, 0, 0), 2e-6)


@kernels
@pytest.mark.parametrize(
    "size",
    [
        dict(b=1, c=1, h=1, w=1),
        dict(b=2, c=5, h=7, w=13),
        dict(b=1, c=37, h=1, w=101),
        dict(b=3, c=2, h=45, w=1),
        dict(b=1, c=3, h=17, w=131),
    ],
    ids=str,
)
def test_sum_sizes(size):
    check_kernel(
        axial_add,
        axial_add_ref,
        summands(**size)
        if size["w"] > 1 or size["h"] > 1
        else {n: t.abs().clamp(0.5, 1) for n, t in summands(**size).items()},
        dtypes=("fp32",),
        orders=(0,),
        expect=ADD,
    )


@kernels
def test_sum_types_orders_and_blocks():
    check_kernel(
        axial_add,
        axial_add_ref,
        summands(),
        orders=(0, 1),
        blocks=("axial_add", [dict(BC=2, BH=4, BW=8), dict(BC=8, BH=8, BW=32)]),
        expect=ADD,
    )


def layouts(b=2, c=5, h=7, w=19):
    "The same size in every layout."
    wide = 3 * make_input([b, c + 5, h + 3, 2 * w], 11)
    return {
        "channels last": 3 * make_input([b, c, h, w], 12).to(memory_format=torch.channels_last),
        "slice": wide[:, 5:, 1:-2, ::2],
        "last channels": (3 * make_input([b, 3 * c, h, w], 13))[:, 2 * c :],
        "last channels, channels last": (3 * make_input([b, 3 * c, h, w], 13)).to(
            memory_format=torch.channels_last
        )[:, 2 * c :],
        "transposed": make_input([b, c, w, h], 14).transpose(2, 3),
        "expanded": make_input([b, c, 1, 1], 15).expand(-1, -1, h, w),
    }


@kernels
@pytest.mark.parametrize("layout", layouts())
def test_sum_layouts(layout):
    "Values and gradients, read where they lie; vectors in any layout, gradients of the result expanded."
    args = summands() | dict(v=layouts()[layout])
    check_kernel(axial_add, axial_add_ref, args, dtypes=("fp32",), orders=(0,), expect=ADD)
    out = axial_add(**args, impl="triton")
    assert layout == "expanded" or out.is_contiguous(
        memory_format=torch.channels_last if "channels last" in layout else torch.contiguous_format
    )
    args |= dict(
        row=args["row"].transpose(1, 2).contiguous().transpose(1, 2),
        column=args["column"][:1].expand(2, -1, -1),
    )
    leaves = [t.detach().requires_grad_() for t in args.values()]
    ref, got = (
        torch.autograd.grad(f(*leaves).sum(), leaves)
        for f in (axial_add_ref, lambda *t: axial_add(*t, impl="triton"))
    )
    for r, o in zip(ref, got):
        assert_close("gradient of a sum", r, o, 1e-5)


@kernels
def test_sum_special_values():
    "NaN and infinities as in PyTorch; the bounds themselves have no gradient."
    v = torch.tensor([[[[0.0, 6, -1, 7], [float("nan"), float("inf"), float("-inf"), 3]]]])
    row = torch.zeros(1, 1, 2)
    column = torch.zeros(1, 1, 4)
    (ref,), gr = run(axial_add_ref, dict(v=v, row=row, column=column))
    (got,), gg = run(lambda **t: axial_add(**t, impl="triton"), dict(v=v, row=row, column=column))
    assert (
        torch.equal(ref.nan_to_num(99), got.nan_to_num(99))
        and torch.equal(gr["v"], gg["v"])
        and gg["v"][0, 0, 0].abs().max() == 0
        and gg["v"][0, 0, 1, 3] != 0
    )


@kernels
@pytest.mark.parametrize("wanted", [("v",), ("row",), ("column",), ("v", "column")], ids=str)
def test_subset_of_gradients(wanted):
    args = summands()
    g = make_input([2, 5, 7, 19], 30)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in args.items()}
    with launches() as seen:
        got = torch.autograd.grad(
            axial_add(**leaves, impl="triton"), [leaves[n] for n in wanted], g
        )
    assert tuple(seen) == ADD
    for r, o in zip(
        torch.autograd.grad(axial_add_ref(**leaves), [leaves[n] for n in wanted], g), got
    ):
        assert_close("gradient", r, o, 1e-5)


@kernels
def test_both_together():
    "One read for both averages; with gradients the pooling's kernels and PyTorch between them."
    for size in (dict(), dict(b=1, heads=3, d=4, h=33, w=5)):
        heads = size.get("heads", 2)
        wide = {n: t.double() for n, t in maps(**size).items()}
        truth, grads = run(lambda **t: plain(**t, heads=heads), wide)
        with torch.no_grad(), launches() as seen:
            got = squeeze_axial(**maps(**size), heads=heads, impl="triton")
        assert [n for n in seen if "join" not in n] == [POOL[0], *ATTEND]
        for r, o in zip(truth, got):
            assert_close("result", r, o, 2e-6)
        with launches() as seen:
            outs, mine = run(
                lambda **t: squeeze_axial(**t, heads=heads, impl="triton"), maps(**size)
            )
        assert [n for n in seen if "join" not in n] == list(POOL)
        for r, o in zip(truth, outs):
            assert_close("result", r, o, 2e-6)
        for n, r in grads.items():
            assert_close(n, r, mine[n], 1e-5)


def test_the_module_uses_them():
    "SeaFormer's attention launches pooling, attention and sum; the literal form launches nothing."
    from segkern.backbones.seaformer import SqueezeAxialAttention
    from segkern.backbones.blocks import set_literal

    if not interpreting():
        pytest.skip("needs the interpreter")
    torch.manual_seed(0)
    a = SqueezeAxialAttention(6, 3, 2).eval()
    x = make_input([1, 6, 5, 9])
    for m in (a.out, a.row_out, a.column_out):
        torch.nn.init.normal_(m.bn.weight)
    with torch.no_grad():
        ref = set_literal(a)(x)
        with use_impl("triton"), launches() as seen:
            assert_close("kernels", ref, set_literal(a, False)(x), 1e-5)
        assert seen == [POOL[0], *ATTEND, ADD[0]]
        with use_impl("triton"), launches() as seen:
            set_literal(a)(x)
        assert not seen
    x = make_input([2, 6, 5, 9]).requires_grad_()
    g = make_input([2, 6, 5, 9], 2)
    leaves = [x, *a.parameters()]
    want = torch.autograd.grad(set_literal(a.train())(x), leaves, g)
    with use_impl("triton"), launches() as seen:
        got = torch.autograd.grad(set_literal(a, False)(x), leaves, g)
    assert set(seen) == {*POOL, *ADD}
    biggest = max(t.norm() for t in want)
    for r, o in zip(want, got):
        assert (r - o).norm() < 1e-5 * r.norm() + 1e-6 * biggest


def test_edges_and_refusals():
    "Empty batches, double precision, autocast, wrong shapes."
    assert [t.shape for t in squeeze_axial(**maps(b=0), heads=2)] == [
        (0, 20, 7),
        (0, 20, 19),
    ] and axial_add(**summands(b=0)).shape == (0, 5, 7, 19)
    assert "float64" in KERNELS["axial_add"](
        *[t.double() for t in summands().values()]
    ) and "float64" in KERNELS["axial_attention"](*[t.double() for t in means().values()])
    a = {n: t.double() for n, t in maps().items()}
    for r, o in zip(plain(**a, heads=2), squeeze_axial(**a, heads=2)):
        assert o.dtype == torch.float64 and torch.equal(r, o)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert axial_add(**summands()).dtype == torch.bfloat16
    for call, word in (
        (lambda: axial_add(**summands() | dict(row=torch.zeros(2, 5, 19))), "row"),
        (lambda: squeeze_axial(**maps(), heads=3), "3 heads"),
        (
            lambda: squeeze_axial(**maps(h=1) | dict(qkv=torch.zeros(1, 40, 0, 3)), heads=2),
            "h, w > 0",
        ),
        (lambda: axial_attention(**means() | dict(rows=torch.zeros(1, 40, 7)), heads=2), "rows"),
        (
            lambda: axial_attention(**means() | dict(row_q=torch.zeros(1, 10, 3)), heads=2),
            "four position tables",
        ),
        (lambda: squeeze_axial(**maps(), heads=2, impl="cuda"), "unknown implementation"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@kernels
def test_second_derivatives_are_refused():
    leaves = [t.requires_grad_() for t in summands().values()]
    (first,) = torch.autograd.grad(
        axial_add(*leaves, impl="triton").square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), leaves[:1])


def test_gradcheck():
    small = {n: t.double().requires_grad_() for n, t in maps(1, 2, 2, 3, 4).items()}
    assert torch.autograd.gradcheck(lambda *t: squeeze_axial(*t, 2), list(small.values()))
    assert torch.autograd.gradcheck(
        axial_add, [t.double().requires_grad_() for t in summands(1, 2, 3, 4).values()]
    )


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=kernels), "ref"])
def test_operators_and_compile(impl):
    "What the dispatcher asks of an operator; graphs with sizes that change."
    if impl == "triton":
        tests = (
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        )
        for s in (summands(), summands() | dict(v=layouts()["last channels, channels last"])):
            torch.library.opcheck(
                torch.ops.segkern.axial_add.default,
                tuple(t.detach().requires_grad_() for t in s.values()),
                test_utils=tests,
            )
        torch.library.opcheck(
            torch.ops.segkern.axial_attention.default,
            (*means().values(), 2),
            test_utils=("test_schema", "test_faketensor"),
        )
    add = torch.compile(
        lambda **t: axial_add(**t, impl=impl), backend="aot_eager", fullgraph=True, dynamic=True
    )
    attend = torch.compile(
        lambda **t: squeeze_axial(**t, heads=2, impl=impl),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for h in (7, 9):
        outs, grads = run(add, summands(h=h))
        truth, wide = run(axial_add_ref, {n: t.double() for n, t in summands(h=h).items()})
        assert_close("sum", truth[0], outs[0], 2e-6)
        for n in wide:
            assert_close(n, wide[n], grads[n], 1e-5)
        with torch.no_grad():
            for r, o in zip(plain(**maps(h=h), heads=2), attend(**maps(h=h))):
                assert_close("attention", r, o, 5e-6)


def test_export():
    "Exported graphs hold plain PyTorch, whatever is asked for."

    class Net(torch.nn.Module):
        def forward(self, qkv, row_q, row_k, column_q, column_k):
            row, column = squeeze_axial(qkv, row_q, row_k, column_q, column_k, 2)
            return axial_add(qkv[:, 20:], row, column)

    args = tuple(maps().values())
    program = torch.export.export(Net(), args)
    assert "segkern" not in str(program.graph)
    assert_close(
        "exported",
        F.relu6(
            args[0][:, 20:]
            + plain(**maps(), heads=2)[0][..., None]
            + plain(**maps(), heads=2)[1][:, :, None]
        ),
        program.module()(*args),
        1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "SeaFormer-L's shapes, twice for races: results must be the same bits."
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (1e-3, 2e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    for key, side in ((16, 32), (20, 16), (24, 8), (16, 67)):
        a = {n: t.to(dtype) for n, t in means(4, 8, key, side, side + 3).items()}
        truth = axial_attention_ref(**{n: t.double() for n, t in a.items()}, heads=8)
        first, again = (axial_attention(**a, heads=8, impl="triton") for _ in range(2))
        for r, o, p in zip(truth, first, again):
            assert_close("attention", r, o, limits[0])
            assert torch.equal(o, p)
        s = {n: t.to(dtype) for n, t in summands(4, 16 * key, side, side + 3).items()}
        (r,), wide = run(axial_add_ref, {n: t.double() for n, t in s.items()})
        (o,), grads = run(lambda **t: axial_add(**t, impl="triton"), s)
        (p,), same = run(lambda **t: axial_add(**t, impl="triton"), s)
        assert_close("sum", r, o, limits[0])
        assert torch.equal(o, p)
        for n in grads:
            assert_close(n, wide[n], grads[n], limits[1])
            assert torch.equal(grads[n], same[n])
