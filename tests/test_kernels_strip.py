"""The strip kernels in the interpreter: sizes, layouts, types, edges, and what surrounds them
(compile, export, autograd, the network)."""

import pytest
import torch

from segkern import create_model, ops
from segkern.ops import strip_attention, strip_pool
from segkern.ops.dispatch import interpreting, use_blocks
from segkern.ops.strip_attention import strip_attention_ref
from segkern.ops.strip_pool import strip_pool_ref
from segkern.testing import assert_close, layouts, make_input, make_labels
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

pytestmark = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
POOL = ("_strip_pool_fwd_kernel", "_strip_pool_bwd_kernel")
ATTENTION = (
    "_strip_attention_fwd_kernel",
    "_strip_attention_dq_kernel",
    "_strip_attention_dkv_kernel",
)
LAYOUTS = ["channels_last", "sliced", "transposed", "expanded"]


def both(x):
    return strip_pool(x, "mean_max")


def both_ref(x):
    return strip_pool_ref(x, "mean_max")


def placed(x, layout):
    return x[:1].expand(len(x), -1, -1, -1) if layout == "expanded" else layouts(x)[layout]


def qkv(b=1, c=19, h=5, w=7, m=11, cv=2):
    return dict(
        q=make_input([b, c, h, w], 1), k=make_input([b, c, m], 2), v=make_input([b, cv, m], 3)
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (13, 1), (5, 17), (37, 131), (67, 3), (64, 32)], ids=str
)
def test_pool_sizes(size):
    "One pixel, one row, one column, primes, more than one block of columns; blocks that fit exactly."
    check_kernel(
        both, both_ref, {"x": make_input([2, 3, *size])}, dtypes=("fp32",), orders=(0,), expect=POOL
    )


def test_pool_types_orders_and_blocks():
    check_kernel(
        both,
        both_ref,
        {"x": make_input([1, 2, 19, 261])},
        blocks=("strip_pool", [dict(BH=4, BW=16), dict(BH=64, BW=64)]),
        expect=(*POOL, "_strip_pool_join_kernel"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pool_layouts(layout):
    "Any strides, and a gradient in the memory format of the map."
    x = placed(make_input([2, 5, 11, 37]), layout)
    check_kernel(both, both_ref, {"x": x}, dtypes=("fp32", "bf16"), orders=(1,), expect=POOL)
    if layout == "channels_last":
        y = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        (g,) = torch.autograd.grad(
            sum(t.sum() for t in strip_pool(y, "mean_max", impl="triton")), y
        )
        assert g.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dim", ["h", "w", "hw"])
@pytest.mark.parametrize("mode", ["mean", "max", "mean_max"])
def test_pool_choices(mode, dim):
    check_kernel(
        lambda x: strip_pool(x, mode, dim),
        lambda x: tuple(strip_pool_ref(x, mode, dim)),
        {"x": make_input([1, 2, 9, 21])},
        dtypes=("fp32",),
        orders=(0,),
        expect=POOL,
    )


def test_pool_one_part_needs_no_second_kernel():
    with launches() as seen:
        got = strip_pool(make_input([1, 2, 13, 9]), "mean_max", impl="triton")
    assert seen == ["_strip_pool_fwd_kernel"]
    for a, b in zip(got, strip_pool_ref(make_input([1, 2, 13, 9]), "mean_max")):
        assert_close("one part", b, a, 2e-6)


def test_pool_ties_infinities_and_nan():
    "The first of equal maxima gets the gradient, over blocks, parts and strips; NaN stays NaN; all minus infinity."
    for shape, block in (
        ([1, 1, 19, 37], dict(BH=4, BW=16)),
        ([1, 2, 19, 5], {}),
        ([1, 1, 3, 3], {}),
    ):
        x = torch.ones(shape).requires_grad_()
        want = torch.autograd.grad(sum(t.sum() for t in strip_pool_ref(x, "max")), x)[0]
        with use_blocks("strip_pool", **block):
            got = torch.autograd.grad(sum(t.sum() for t in strip_pool(x, "max", impl="triton")), x)[
                0
            ]
        assert torch.equal(want, got)
        y = make_input(shape)
        y[0, 0, 1, 2], y[0, 0, 2, 0], y[0, 0, 0, 1] = float("nan"), float("inf"), float("-inf")
        with use_blocks("strip_pool", **block):
            for a, b in zip(
                strip_pool_ref(y, "mean_max"), strip_pool(y, "mean_max", impl="triton")
            ):
                torch.testing.assert_close(b, a, equal_nan=True)
    lone = make_input([1, 2, 19, 37])
    lone[0, 1, 9, 20], lone[0, 1, 3, 20], lone[0, 1, 9, 4] = (
        float("nan"),
        float("inf"),
        float("inf"),
    )
    lone.requires_grad_()
    got, want = (
        torch.autograd.grad(sum(t.sum() for t in strip_pool(lone, "max", impl=impl)), lone)[0]
        for impl in ("triton", "ref")
    )
    assert torch.equal(got, want)  # a NaN, not the infinity before it
    low = torch.full([1, 1, 5, 6], float("-inf"))
    assert all((t == float("-inf")).all() for t in strip_pool(low, "mean_max", impl="triton"))


def test_pool_unused_outputs_and_dispatch():
    """Absent gradients are skipped; float64, empty batches and the reference launch nothing; a
    second derivative is refused."""
    x = make_input([1, 2, 7, 9]).requires_grad_()
    for i in range(4):
        got, want = (
            torch.autograd.grad(strip_pool(x, "mean_max", impl=impl)[i].square().sum(), x)[0]
            for impl in ("triton", "ref")
        )
        assert_close(f"output {i}", want, got, 2e-6)
    with launches() as seen:
        strip_pool(x.double(), impl="triton")
        strip_pool(x, impl="ref")
        assert [t.shape for t in strip_pool(x[:0], "mean_max", impl="triton")] == [
            (0, 2, 9),
            (0, 2, 9),
            (0, 2, 7),
            (0, 2, 7),
        ]
    assert seen == []
    (g,) = torch.autograd.grad(strip_pool(x, impl="triton")[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 1, 7, 5, 2),
        (1, 19, 13, 11, 67, 1),
        (1, 40, 3, 5, 17, 3),
        (1, 16, 37, 5, 3, 8),
    ],
    ids=str,
)
def test_attention_sizes(shape):
    "One pixel and key, odd widths, several blocks of keys, one to eight value channels."
    check_kernel(
        strip_attention,
        strip_attention_ref,
        qkv(*shape),
        dtypes=("fp32",),
        orders=(0,),
        expect=ATTENTION,
    ) if shape[4] > 1 else assert_close(
        "one key",
        strip_attention_ref(**qkv(*shape)),
        strip_attention(**qkv(*shape), impl="triton"),
        2e-6,
    )


def test_attention_types_orders_and_blocks():
    small = dict(BN=16, BM=16, BC=16)
    with use_blocks("strip_attention", **small):
        check_kernel(
            strip_attention,
            strip_attention_ref,
            qkv(),
            blocks=("strip_attention_bwd", [small, {}]),
            orders=(0, 1),
            expect=ATTENTION,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_layouts(layout):
    args = qkv(b=2, c=17, m=13)
    args |= dict(
        q=placed(args["q"], layout),
        k=args["k"].transpose(1, 2).contiguous().transpose(1, 2),
        v=args["v"][:, :1].expand(2, 2, 13),
    )
    check_kernel(
        strip_attention, strip_attention_ref, args, dtypes=("fp32",), orders=(0,), expect=ATTENTION
    )


@pytest.mark.parametrize("names", ["q", "k", "v", "qv"])
def test_attention_some_gradients(names):
    "Kernels whose gradients nobody wants are not launched."
    args = {n: x.requires_grad_(n in names) for n, x in qkv().items()}
    with launches() as seen:
        got = torch.autograd.grad(
            strip_attention(**args, impl="triton").square().sum(), [args[n] for n in names]
        )
    want = torch.autograd.grad(strip_attention_ref(**args).square().sum(), [args[n] for n in names])
    for n, a, b in zip(names, want, got):
        assert_close(n, a, b, 5e-6)
    assert (ATTENTION[1] in seen) == ("q" in names) and (ATTENTION[2] in seen) == (names != "q")


def test_attention_extremes():
    "Large and equal scores, keys at minus infinity, NaN in one pixel and in one key."
    args = qkv(c=16, m=37)
    for q, k in ((300 * args["q"], args["k"]), (0 * args["q"], args["k"])):
        assert_close(
            "scores",
            strip_attention_ref(q.double(), k.double(), args["v"].double()),
            strip_attention(q, k, args["v"], impl="triton"),
            1e-4,
        )
    q = args["q"].abs()
    k = args["k"].clone()
    k[..., :20] = float("-inf")
    with use_blocks("strip_attention", BM=16):
        assert_close(
            "-inf",
            strip_attention_ref(q, k[..., 20:], args["v"][..., 20:]),
            strip_attention(q, k, args["v"], impl="triton"),
            2e-6,
        )
    q = args["q"].clone()
    q[0, 3, 1, 2] = float("nan")
    bad = strip_attention(q, args["k"], args["v"], impl="triton").isnan()
    assert torch.equal(bad, strip_attention_ref(q, args["k"], args["v"]).isnan()) and bad.sum() == 2
    k = args["k"].clone()
    k[0, 0, 5] = float("nan")
    assert strip_attention(args["q"], k, args["v"], impl="triton").isnan().all()


def test_attention_dispatch():
    "float64, empty batches, wide values and the reference launch nothing; a second derivative is refused."
    args = qkv()
    with launches() as seen:
        strip_attention(**{n: x.double() for n, x in args.items()}, impl="triton")
        strip_attention(**args, impl="ref")
        strip_attention(args["q"], args["k"], args["k"][:, :9], impl="triton")
        assert strip_attention(**{n: x[:0] for n, x in args.items()}, impl="triton").shape == (
            0,
            2,
            5,
            7,
        )
    assert (
        seen == []
        and ops.which("strip_attention", *(x.double() for x in args.values()), impl="triton")[0]
        == "ref"
    )
    q = args["q"].requires_grad_()
    (g,) = torch.autograd.grad(
        strip_attention(**args, impl="triton").square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_autocast():
    "Mixed types under autocast take the kernel in the type of autocast."
    args = qkv()
    args["k"] = args["k"].bfloat16()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16), launches() as seen:
        got = strip_attention(**args, impl="triton")
    assert seen == [ATTENTION[0]] and got.dtype == torch.bfloat16
    ref = strip_attention_ref(args["q"].bfloat16().double(), args["k"].double(), args["v"].double())
    assert_close("autocast", ref, got, 4e-3)


def test_operators():
    "The rules of torch's operators: schema, fake kernels, autograd."
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    x = make_input([1, 2, 5, 6])
    torch.library.opcheck(
        torch.ops.segkern.strip_pool.default,
        (x.requires_grad_(), True, True, True, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.segkern.strip_pool.default,
        (x.detach().contiguous(memory_format=torch.channels_last), True, False, True, False),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.segkern.strip_attention.default,
        [t.requires_grad_() for t in qkv().values()],
        test_utils=tests,
    )


def test_compiled():
    "One graph, with the kernels in it, forward and backward, and again for another size."

    def step(x, k, v):
        return strip_attention(x, k, v, impl="triton").sum() + sum(
            t.square().sum() for t in strip_pool(x, "mean_max", impl="triton")
        )

    fn = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((5, 7), (9, 6)):
        args = [t.requires_grad_() for t in qkv(1, 16, *size).values()]
        with launches() as seen:
            got = torch.autograd.grad(fn(*args), args)
        assert {*POOL, *ATTENTION} <= set(seen)
        for a, b in zip(torch.autograd.grad(step(*args), args), got):
            assert_close("gradient", a, b, 1e-6)


def test_exported():
    "Exported graphs hold plain PyTorch whatever is asked for."

    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            return strip_attention(q, k, v), strip_pool(q, "mean_max", "h")

    args = tuple(qkv().values())
    with ops.use_impl("triton"):
        program = torch.export.export(Net(), args)
    assert "segkern" not in str(program.graph)
    assert_close("exported", Net()(*args)[0], program.module()(*args)[0], 1e-6)


@pytest.mark.parametrize(
    "op",
    [lambda x: both(x), lambda x: strip_attention(x, x[:, :, 0], x[:, :2, 0])],
    ids=["pool", "attention"],
)
def test_gradcheck(op):
    assert torch.autograd.gradcheck(op, make_input([1, 3, 3, 4]).double().requires_grad_())


@pytest.mark.parametrize("name", ["pool", "attention"])
def test_forward_mode_is_refused(name):
    def pool(x):
        return strip_pool(x, impl="triton")[0]

    def attention(x):
        return strip_attention(x, x[:, :, 0], x[:, :2, 0], impl="triton")

    x = make_input([1, 3, 3, 4])
    op = dict(pool=pool, attention=attention)[name]
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(op, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", ["s2fpn_r18", "s2fpn_v1_r18"])
def test_network(name):
    "S2-FPN with the strip kernels: outputs, losses and the gradient of the picture as without."
    x = make_input([2, 3, 64, 64])
    y = make_labels((2, 64, 64), 5).to(torch.uint8)
    results = {}
    others = {n: o for n, o in ops.dispatch.KERNELS.items() if "strip" not in n}
    for impl in ("ref", "triton"):
        m = create_model(name, num_classes=5)
        with torch.no_grad():
            for i, p in enumerate(m.parameters()):
                # what starts at zero would hide the strips
                if p.numel() and (p == p.flatten()[0]).all():
                    p += 0.5 * make_input(p.shape, i)
        for n in others:
            ops.dispatch.KERNELS[n] = lambda *t: "left out"
        try:
            picture = x.clone().requires_grad_()
            torch.manual_seed(0)  # of dropout
            with ops.use_impl(impl), use_blocks("strip_pool", BC=64), launches() as seen:
                with torch.no_grad():
                    out = m.eval()(x)
                parts = m.train()(picture, y)
                (g,) = torch.autograd.grad(parts["loss"], picture)
        finally:
            ops.dispatch.KERNELS.update(others)
        results[impl] = out, g, parts
        # version 1 has no attention over strips
        wanted = {*POOL} | (set() if "v1" in name else {*ATTENTION})
        assert set(seen) >= wanted if impl == "triton" else seen == [], set(seen)
    ref = results["ref"]
    got = results["triton"]
    assert not torch.equal(ref[1], got[1])  # the strips matter
    assert_close("logits", ref[0], got[0], 1e-5)
    assert_close("gradient", ref[1], got[1], 1e-3)
    for n in ref[2]:
        assert_close(n, ref[2][n], got[2][n], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "Real sizes on a real device, twice for races."
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (6e-4, 1e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    args = [t.to(dtype).requires_grad_() for t in qkv(2, 32, 96, 128, 128).values()]
    wide = [t.detach().double().requires_grad_() for t in args]
    for run, ref in (
        (lambda *a: (strip_attention(*a),), lambda *a: (strip_attention_ref(*a),)),
        (lambda q, k, v: both(q), lambda q, k, v: both_ref(q)),
    ):
        want = ref(*wide)
        gwant = torch.autograd.grad(sum(t.sin().sum() for t in want), wide, allow_unused=True)
        for _ in range(2):
            got = run(*args)
            grads = torch.autograd.grad(
                sum(t.float().sin().sum() for t in got), args, allow_unused=True
            )
            for a, b in zip(want, got):
                assert_close("out", a, b, limits[0])
            for a, b in zip(gwant, grads):
                if a is not None:
                    assert_close("gradient", a, b, limits[1])
