"Affinity propagation: the kernels in the interpreter, the loop over pieces, and what surrounds both."

import pytest
import torch

from segkern import ops
from segkern.ops import affinity as op
from segkern.ops import AttentionMaps
from segkern.ops.affinity_pieces import affinity_ref
from segkern.ops.dispatch import interpreting
from segkern.testing import assert_close, make_input, relative_l2
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

kernels = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
ALL = ("_affinity_fwd_kernel", "_affinity_dq_kernel", "_affinity_dkp_kernel")


def inputs(b=1, h=2, n=37, m=11, d=16, c=5, blocks=2, grow=1.0):
    "Named queries, keys and values of a stage."
    qs = {f"q{i}": grow * make_input([b, h, n, d], i) for i in range(blocks)}
    return (
        qs
        | {f"k{i}": make_input([b, h, m, d], 50 + i) for i in range(blocks)}
        | dict(p=make_input([b, m, c], 99).softmax(2))
    )


def named(fn, scale=None, **kw):
    "An op of lists as a function of named tensors."

    def call(**t):
        return fn(
            [t[n] for n in t if n[0] == "q"], [t[n] for n in t if n[0] == "k"], t["p"], scale, **kw
        )

    return call


def grads(fn, args, wanted=None):
    "Output and gradients, with a fixed gradient of the output."
    args = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in args.items()}
    out = fn(**args)
    leaves = [n for n, t in args.items() if t.requires_grad]
    return out, dict(
        zip(
            leaves,
            torch.autograd.grad(out, [args[n] for n in leaves], make_input(out.shape, 7).to(out)),
        )
    )


SHAPES = [
    dict(n=1, m=1, c=1),
    dict(n=101, m=45, d=32, c=21),
    dict(n=16, m=64, d=20, c=33),
    dict(n=257, m=3, h=1, d=8),
    dict(n=37, m=131, d=64, h=1, c=2),
    dict(b=3, h=3, n=5, m=7, blocks=1),
    dict(n=7, m=5, blocks=4),
]


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    "Odd, prime and single sizes, heads that are no power of two, one block and several."
    named_inputs = inputs(**shape)
    nothing = shape["m"] == 1  # one key: softmax is one, queries and keys have no gradient
    check_kernel(
        named(op),
        named(affinity_ref),
        named_inputs,
        grads=("p",) if nothing else None,
        dtypes=("fp32",),
        orders=(0,),
        expect=ALL[::2] if nothing else ALL,
    )


@pytest.mark.parametrize("piece", [1 << 17, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces(shape, piece, monkeypatch):
    "The loop over pieces against double precision."
    import sys

    monkeypatch.setattr(sys.modules["segkern.ops.affinity_pieces"], "PIECE", piece)
    args = inputs(**shape)
    truth, wide = grads(named(affinity_ref), {n: t.double() for n, t in args.items()})
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        rounded = {n: t.to(dtype) for n, t in args.items()}
        if dtype != torch.float32:
            truth, wide = grads(named(affinity_ref), {n: t.double() for n, t in rounded.items()})
        out, got = grads(named(op, impl="ref"), rounded)
        assert out.dtype == dtype and relative_l2(truth, out) < limit
        for n, g in got.items():
            assert g.dtype == dtype and (wide[n] - g).norm() <= limit * (wide[n].norm() + 1e-3), n


@kernels
@pytest.mark.parametrize("name", ["affinity", "affinity_dq", "affinity_dkp"])
def test_types_orders_and_blocks(name):
    check_kernel(
        named(op, 0.3),
        named(affinity_ref, 0.3),
        inputs(n=45, m=19),
        blocks=(name, [dict(BN=16, BM=16), dict(BN=64, BM=32)]),
        expect=ALL,
    )


@kernels
def test_limits():
    "128 channels or 256 classes in bfloat16, 64 in float32; double and the rest take the loop."
    for size, dtype in ((dict(d=128), "bf16"), (dict(c=150), "bf16"), (dict(c=59, d=32), "fp32")):
        check_kernel(
            named(op),
            named(affinity_ref),
            inputs(h=1, n=19, m=9, **size),
            dtypes=(dtype,),
            orders=(0,),
            expect=ALL,
        )
    for change, dtype in (
        (dict(d=128, c=150), torch.bfloat16),
        (dict(d=128), torch.float32),
        (dict(d=160), torch.bfloat16),
        (dict(c=257), torch.bfloat16),
        (dict(c=100), torch.float32),
        ({}, torch.float64),
    ):
        args = {n: t.to(dtype) for n, t in inputs(n=5, m=3, **change).items()}
        with launches() as seen:
            out = named(op, impl="triton")(**args)
        assert (
            seen == []
            and out.dtype == dtype
            and ops.which("affinity", *args.values(), impl="triton")[0] == "ref"
        )


@kernels
def test_mixed_types():
    "Narrow queries with float32 values, as under autocast: the result is float32, its gradient too."
    args = {n: t if n == "p" else t.to(torch.bfloat16) for n, t in inputs(n=29, m=13, c=21).items()}
    truth, wide = grads(named(affinity_ref), {n: t.double() for n, t in args.items()})
    for impl in ("triton", "ref"):
        out, got = grads(named(op, impl=impl), args)
        assert out.dtype == got["p"].dtype == torch.float32 and got["q0"].dtype == torch.bfloat16
        assert (
            relative_l2(truth, out) < 2e-6
            and relative_l2(wide["p"], got["p"]) < 5e-6
            and relative_l2(wide["q0"], got["q0"]) < 8e-3
        )
    # a loss's gradient: single scores lie below float16's smallest number
    half = {n: t if n == "p" else t.half() for n, t in args.items()}
    truth, wide = grads(
        lambda **t: named(affinity_ref)(**t) * 1e-3, {n: t.double() for n, t in half.items()}
    )
    assert (
        relative_l2(
            wide["q0"] * 1e3,
            grads(lambda **t: named(op, impl="triton")(**t) * 1e-3, half)[1]["q0"].double() * 1e3,
        )
        < 2e-2
    )


@kernels
def test_layouts():
    "Views of projections, values of a map in NCHW, slices, expanded keys: values and gradients, nothing is copied."
    kv = make_input([2, 11, 2, 3, 16], 5)
    q = make_input([2, 29, 3, 16], 4)
    pixel = make_input([2, 48, 29], 6).view(2, 3, 16, 29).transpose(2, 3)
    sliced = make_input([2, 3, 40, 20], 7)[:, :, 5:34, 2:18]
    shared = make_input([1, 3, 11, 16], 8).expand(2, -1, -1, -1)
    planes = make_input([2, 5, 11], 9).transpose(1, 2)
    every = make_input([2, 11, 9], 10)[:, :, 1::2]
    keys = kv.permute(2, 0, 3, 1, 4)[0]
    for a, b, c in (
        (q.transpose(1, 2), keys, planes),
        (pixel, keys, every),
        (sliced, shared, planes),
    ):
        check_kernel(
            named(op),
            named(affinity_ref),
            dict(q=a, k=b, p=c),
            dtypes=("fp32",),
            orders=(1,),
            expect=ALL,
        )
    out = op([q.transpose(1, 2)], [keys], planes, impl="triton")
    assert (
        out.transpose(1, 2).is_contiguous()
        and op([pixel], [keys], planes, impl="ref").transpose(1, 2).is_contiguous()
    )
    p = planes.detach().requires_grad_()
    # an expanded gradient
    (g,) = torch.autograd.grad(op([pixel], [keys], p, impl="triton").sum(), p)
    (r,) = torch.autograd.grad(affinity_ref([pixel], [keys], p).sum(), p)
    assert_close("dp", r, g, 2e-6)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=kernels), "ref"])
def test_large_scores_nan_and_determinism(impl):
    """Scores of a thousand stay finite, minus infinity hides a key, NaN comes out where it went
    in, a run repeats its bits."""
    args = inputs(n=9, m=5, grow=300.0)
    assert_close(
        "large",
        named(affinity_ref)(**{n: t.double() for n, t in args.items()}),
        named(op, impl=impl)(**args),
        1e-4,
    )
    args["q0"][0, 0, 3, 2] = float("nan")
    out = named(op, impl=impl)(**args)
    assert out[0, 3].isnan().all() and not out[0, [0, 8]].isnan().any()
    scores = make_input([1, 1, 4, 6])
    scores[..., 2] = -1e30
    hidden = op([scores], [torch.eye(6)[None, None]], make_input([1, 6, 2]), scale=1.0, impl=impl)
    rest = [0, 1, 3, 4, 5]
    assert_close(
        "hidden key",
        scores[0, 0][:, rest].softmax(1) @ make_input([1, 6, 2])[0, rest],
        hidden[0],
        1e-6,
    )
    same = inputs(n=70, m=19)
    a, b = (grads(named(op, impl=impl), same) for _ in range(2))
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in same)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=kernels), "ref"])
def test_subsets(impl):
    "Gradients on request only, of some blocks too; the choice of the forward pass is kept."
    args = inputs(n=9, m=5)
    every = grads(named(affinity_ref), args)[1]
    wants = {
        ("p",): [ALL[2]] * 2,
        ("q0",): [ALL[1]] * 2,
        ("k1",): [*ALL[1:]] * 2,
        ("q1", "p"): [*ALL[1:]] * 2,
        ("q0", "q1", "k0", "k1", "p"): [*ALL[1:]] * 2,
    }
    for wanted, expected in wants.items():
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
        out = named(op, impl=impl)(**leaves)
        with launches() as seen, ops.use_impl("ref"):
            got = torch.autograd.grad(out, [leaves[n] for n in wanted], make_input(out.shape, 7))
        assert seen == (expected if impl == "triton" else [])
        for n, g in zip(wanted, got):
            assert_close(n, every[n], g, 5e-6)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=kernels), "ref"])
def test_empty_and_twice(impl):
    "Empty batches, no queries, no second derivative, refusals."
    args = inputs(n=9, m=5)
    q = args["q0"].clone().requires_grad_()
    k = args["k0"]
    p = args["p"]
    (g,) = torch.autograd.grad(op([q], [k], p, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()
    with launches() as seen:
        assert op([q[:0]], [k[:0]], p[:0], impl=impl).shape == (0, 9, 5)
        assert op([q[:, :, :0]], [k], p, impl=impl).shape == (1, 0, 5)
        assert op([q], [k], p[..., :0], impl=impl).shape == (1, 9, 0)
    assert seen == []
    for bad, word in (
        (([q], [k[:, :, :0]], p[:, :0]), "least one key"),
        (([q], [k, k], p), "as many keys"),
        (([], [], p), "as many keys"),
        (([q], [k[..., :3]], p), "wants queries"),
        (([q, q[:, :, 1:]], [k, k], p), "wants queries"),
        (([q], [k], p[:, 1:]), "wants queries"),
        (([q], [k], p.long()), "floating"),
    ):
        with pytest.raises(ValueError, match=word):
            op(*bad, impl=impl)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=kernels), "ref"])
def test_operator_compile_and_autocast(impl):
    args = {n: t.requires_grad_() for n, t in inputs(n=9, m=5).items()}
    lists = list(args.values())[:2], list(args.values())[2:4]
    name = "affinity" if impl == "triton" else "affinity_pieces"
    torch.library.opcheck(
        getattr(torch.ops.segkern, name).default,
        (*lists, args["p"], 0.25),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )
    fn = torch.compile(named(op, impl=impl), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (9, 14):
        a = inputs(n=n, m=5)
        with launches() as seen:
            got = grads(fn, a)
        assert set(seen) == (set(ALL) if impl == "triton" else set())
        truth = grads(named(affinity_ref), a)
        assert_close("out", truth[0], got[0], 2e-6)
        for name, g in got[1].items():
            assert_close(name, truth[1][name], g, 5e-6)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out, got = grads(named(op, impl=impl), args)
    assert out.dtype == got["p"].dtype == got["q0"].dtype == torch.float32
    rounded = {
        n: t.detach() if n == "p" else t.detach().bfloat16().double() for n, t in args.items()
    }
    assert_close(
        "only queries and keys are rounded",
        named(affinity_ref)(**rounded | dict(p=args["p"].detach().double())),
        out,
        2e-6,
    )


def test_export_and_double():
    class Net(torch.nn.Module):
        def forward(self, q, k, p):
            return ops.affinity([q], [k], p)

    args = list(inputs(n=9, m=5, blocks=1).values())
    program = torch.export.export(Net(), tuple(args))
    assert "segkern" not in str(program.graph)
    assert_close(
        "exported", ops.affinity(args[:1], args[1:2], args[2]), program.module()(*args), 1e-6
    )
    small = [t.double().requires_grad_() for t in inputs(n=4, m=3, d=3, c=2).values()]
    assert torch.autograd.gradcheck(lambda a, b, c, d, p: ops.affinity([a, b], [c, d], p), small)


def test_memory_of_a_step():
    "What a step allocates at most on a CPU, above its inputs and gradients: a fraction of one map."
    from torch.utils._python_dispatch import TorchDispatchMode

    qs, ks = (
        [make_input([1, 2, r, 32], i).requires_grad_() for i in range(3)] for r in (4096, 256)
    )
    p = make_input([1, 256, 21]).requires_grad_()
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.untyped_storage().nbytes())
            return out

    with Watch():
        torch.autograd.grad(ops.affinity(qs, ks, p).sum(), [*qs, *ks, p])
    # no tensor is larger than a gradient or a piece; a map has 8 MB
    assert largest[0] <= max(4 * 4096 * 2 * 32, 4 << 17), largest


def test_maps_on_request():
    "A lazy stage: single maps, their mean, one row, propagation, no gradient after detach."
    args = list(inputs(b=2, n=35, m=6, blocks=3).values())
    for t in args:
        t.requires_grad_()
    maps = AttentionMaps(args[:3], args[3:6], (5, 7), (2, 3))
    assert (
        len(maps) == 3
        and "3 blocks" in repr(maps)
        and [m.shape for m in maps] == [(2, 2, 35, 6)] * 3
    )
    assert_close("rows", torch.ones(2, 2, 35), maps[1].sum(3), 1e-6)
    assert_close("mean", torch.stack([m.mean(1) for m in maps]).mean(0), maps.average(), 1e-6)
    p = make_input([2, 4, 2, 3]).requires_grad_()
    out = maps.propagate(p)
    assert out.shape == (2, 4, 5, 7) and out.is_contiguous()
    assert_close(
        "propagated",
        (maps.average() @ p.flatten(2).transpose(1, 2)).transpose(1, 2).view(2, 4, 5, 7),
        out,
        2e-6,
    )
    assert_close("one query", maps.average()[:, 3 * 7 + 2].view(2, 2, 3), maps.at(3, 2), 1e-6)
    out.sum().backward()
    assert all(t.grad is not None for t in (*args[:6], p))
    assert (
        not maps.detach().propagate(p.detach()).requires_grad and maps.detach().scale == maps.scale
    )
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert maps[0].dtype == maps.average().dtype == torch.float32
    for call, word in (
        (lambda: AttentionMaps(args[:3], args[3:6], (5, 6), (2, 3)), "grid"),
        (lambda: AttentionMaps([], [], (1, 1), (1, 1)), "at least one"),
        (lambda: maps.propagate(p[..., :2]), "2, 3"),
        (lambda: maps.at(5, 0), "outside"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "Two blocks of stage 2 of a Mix Transformer, twice for races: results must be the same bits."
    args = {
        n: (t if n == "p" else t.to(dtype))
        for n, t in inputs(b=2, h=2, n=4096, m=256, d=64, c=21).items()
    }
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (1e-3, 2e-3),
        torch.bfloat16: (1e-3, 8e-3),
    }[dtype]
    truth, wide = grads(named(affinity_ref), {n: t.double() for n, t in args.items()})
    runs = [grads(named(op), args) for _ in range(2)]
    assert_close("out", truth, runs[0][0], limits[0])
    assert torch.equal(runs[0][0], runs[1][0])
    for n, g in runs[0][1].items():
        assert torch.equal(g, runs[1][1][n]), n
        assert_close(n, wide[n], g, limits[1])
