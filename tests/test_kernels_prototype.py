"""Prototypes, cosine logits and class sums: the kernels in the interpreter, the loops over pieces,
and what surrounds both."""

import sys

import pytest
import torch

from segkern import ops
from segkern.ops.dispatch import interpreting
from segkern.ops.class_sums import class_sums_ref
from segkern.ops.cosine import cosine_logits_ref
from segkern.ops.prototypes import prototypes_ref
from segkern.testing import assert_close, make_input, make_labels, relative_l2
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

kernels = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
CENTRES = ("_prototypes_stats_kernel", "_prototypes_sums_kernel", "_prototypes_bwd_kernel")
COSINE = ("_cosine_fwd_kernel", "_cosine_dx_kernel", "_cosine_du_kernel")
SUMS = ("_class_sums_fwd_kernel", "_class_sums_bwd_kernel")
SIZES = [
    dict(b=1, k=1, c=1, h=1, w=1),
    dict(b=2, k=19, c=37, h=7, w=13),
    dict(b=1, k=131, c=33, h=11, w=5),
    dict(b=1, k=7, c=150, h=1, w=101),
    dict(b=3, k=2, c=16, h=45, w=1),
    dict(b=1, k=256, c=17, h=5, w=3),
]
IMPLS = [pytest.param("triton", marks=kernels), "ref"]


def maps(b=2, k=7, c=20, h=5, w=9):
    return dict(
        logits=2 * make_input([b, k, h, w], 1),
        feat=make_input([b, c, h, w], 2),
        pos=make_input([b, c, h, w], 3),
    )


def pixels(b=2, k=7, c=20, h=5, w=9):
    "z, feat, pos"
    return dict(z=make_input([b, k, c], 4)) | {
        n: t for n, t in maps(b, k, c, h, w).items() if n != "logits"
    }


def labelled(b=2, k=7, h=5, w=9, dtype=torch.int64):
    "Labels with some of no class: negative where the type allows, too large, 255."
    y = make_labels((b, h, w), k, 3)
    flat = y.view(-1)
    flat[::5], flat[::7], flat[1::11] = 255 if k <= 255 else 1000, k, -1 if dtype.is_signed else k
    return y.to(dtype)


def tuples(out):
    return tuple(out) if isinstance(out, tuple) else (out,)


def run(fn, args, wanted=None, **kw):
    "Outputs, and gradients by name for fixed gradients of the outputs."
    args = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in args.items()}
    outs = tuples(fn(**args, **kw))
    names = [n for n, t in args.items() if t.requires_grad]
    pairs = [(o, make_input(o.shape, 7 + i).to(o)) for i, o in enumerate(outs) if o.requires_grad]
    return outs, dict(
        zip(
            names,
            torch.autograd.grad(
                [o for o, _ in pairs],
                [args[n] for n in names],
                [g for _, g in pairs],
                allow_unused=True,
            ),
        )
    )


PAIRS = {
    "prototypes": (ops.prototypes, prototypes_ref, maps),
    "cosine": (ops.cosine_logits, cosine_logits_ref, pixels),
}
EXPECT = {"prototypes": CENTRES, "cosine": COSINE}


@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", PAIRS)
def test_sizes(op, size):
    "Odd, prime and single sizes; more classes and channels than a block."
    fn, ref, make = PAIRS[op]
    alone = size["c"] == 1  # a cosine of one channel is a sign: its gradients are zero
    grads = (
        ()
        if alone and op == "cosine"
        else ("feat", "pos")
        if size["k"] == 1 and op == "prototypes"
        else None
    )
    expect = EXPECT[op][:1] if grads == () else EXPECT[op]
    check_kernel(fn, ref, make(**size), grads=grads, dtypes=("fp32",), orders=(0,), expect=expect)


@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_of_sums(size):
    y = labelled(size["b"], size["k"], size["h"], size["w"])
    for per_image in (False, True):
        check_kernel(
            lambda x: ops.class_sums(x, y, size["k"], per_image),
            lambda x: class_sums_ref(x, y, size["k"], per_image),
            dict(x=maps(**size)["feat"]),
            dtypes=("fp32",),
            orders=(0,),
            expect=SUMS,
        )


@kernels
@pytest.mark.parametrize(
    "name",
    ["prototypes_stats", "prototypes", "prototypes_bwd", "cosine_logits", "cosine_dx", "cosine_du"],
)
def test_types_orders_and_blocks(name):
    "Three types, two orders of the programs, small blocks and large ones."
    fn, ref, make = PAIRS[name.split("_")[0]]
    blocks = [dict(BN=16, BK=16, BC=16), dict(BN=128, BK=32, BC=64)]
    check_kernel(
        fn,
        ref,
        make(1, 19, 20, 5, 9),
        orders=(0, 1),
        blocks=(name, blocks),
        expect=EXPECT[name.split("_")[0]],
    )


@kernels
@pytest.mark.parametrize("name", ["class_sums", "class_sums_bwd"])
def test_types_orders_and_blocks_of_sums(name):
    y = labelled(1, 19, 5, 9)
    check_kernel(
        lambda x: ops.class_sums(x, y, 19),
        lambda x: class_sums_ref(x, y, 19),
        dict(x=make_input([1, 20, 5, 9])),
        orders=(0, 1),
        blocks=(name, [dict(BN=16, BK=16, BC=16), dict(BN=128, BK=32, BC=64)]),
        expect=SUMS,
    )


@kernels
def test_wide_maps():
    "1024 channels, 300 classes."
    check_kernel(
        ops.prototypes,
        prototypes_ref,
        maps(1, 300, 70, 6, 5),
        dtypes=("bf16",),
        orders=(0,),
        expect=CENTRES,
    )
    check_kernel(
        ops.cosine_logits,
        cosine_logits_ref,
        pixels(1, 300, 70, 6, 5),
        dtypes=("bf16",),
        orders=(0,),
        expect=COSINE,
    )
    check_kernel(
        ops.prototypes,
        prototypes_ref,
        maps(1, 5, 1024, 4, 5),
        dtypes=("bf16",),
        orders=(0,),
        expect=CENTRES,
    )
    check_kernel(
        ops.cosine_logits,
        cosine_logits_ref,
        pixels(1, 5, 1024, 4, 5),
        dtypes=("bf16",),
        orders=(0,),
        expect=COSINE,
    )
    y = labelled(1, 300, 6, 5)
    check_kernel(
        lambda x: ops.class_sums(x, y, 300),
        lambda x: class_sums_ref(x, y, 300),
        dict(x=make_input([1, 70, 6, 5])),
        dtypes=("bf16",),
        orders=(0,),
        expect=SUMS,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("piece", [1 << 18, 700])
@pytest.mark.parametrize("op", PAIRS)
def test_pieces(op, size, piece, monkeypatch):
    "The loops over pieces against double precision."
    monkeypatch.setattr(sys.modules["segkern.ops.class_maps"], "PIECE", piece)
    fn, ref, make = PAIRS[op]
    for dtype, limit in ((torch.float32, 5e-6), (torch.bfloat16, 8e-3)):
        args = {n: t.to(dtype) for n, t in make(**size).items()}
        truth, wide = run(ref, {n: t.double() for n, t in args.items()})
        outs, got = run(fn, args, impl="ref")
        for r, o in zip(truth, outs):
            assert o.dtype == dtype and o.shape == r.shape and relative_l2(r, o) < limit
        for n, g in got.items():
            assert g.dtype == dtype and (wide[n] - g).norm() <= limit * wide[n].norm() + (
                1e-5 if size["c"] > 1 else 0.05
            ), n


def layouts(b=2, c=20, h=5, w=9):
    "The same size in every layout."
    wide = make_input([b, c + 5, h + 3, 2 * w], 11)
    return {
        "channels last": make_input([b, c, h, w], 12).to(memory_format=torch.channels_last),
        "slice": wide[:, 5:, 1:-2, ::2],
        "offset": wide[:, 2 : 2 + c, :h, :w],
        "transposed": make_input([b, c, w, h], 13).transpose(2, 3),
        "expanded pixels": make_input([b, c, 1, 1], 14).expand(-1, -1, h, w),
        "expanded batch": make_input([1, c, h, w], 15).expand(b, -1, -1, -1),
        "channels after pixels": make_input([b, h * w, c], 16).transpose(1, 2).unflatten(2, (h, w)),
    }


@kernels
@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout):
    "Values and gradients of maps in every layout, read where they lie."
    x = layouts()[layout]
    args = maps()
    more = pixels()
    # equal pixels have equal centres: no gradient
    narrow = layouts(c=7)[layout]
    constant = ("feat", "pos") if layout == "expanded pixels" else None
    for change in (
        dict(feat=x),
        dict(pos=x),
        dict(logits=narrow),
        dict(logits=narrow, feat=x, pos=x),
    ):
        check_kernel(
            ops.prototypes,
            prototypes_ref,
            args | change,
            dtypes=("fp32",),
            orders=(1,),
            expect=CENTRES,
            grads=constant,
        )
    for change in (dict(feat=x), dict(feat=x, pos=x)):
        check_kernel(
            ops.cosine_logits,
            cosine_logits_ref,
            more | change,
            dtypes=("fp32",),
            orders=(1,),
            expect=COSINE,
        )
    y = labelled()
    check_kernel(
        lambda x: ops.class_sums(x, y, 7),
        lambda x: class_sums_ref(x, y, 7),
        dict(x=x),
        dtypes=("fp32",),
        orders=(1,),
        expect=SUMS,
    )


@kernels
def test_layouts_of_labels_and_gradients():
    """Labels of every type, expanded, sliced; gradients that arrive expanded, transposed, of one
    output only; channels last stays."""
    x = make_input([2, 20, 5, 9]).to(memory_format=torch.channels_last).requires_grad_()
    z = make_input([2, 7, 20])
    for y in (
        labelled(dtype=torch.uint8),
        labelled(dtype=torch.int32),
        labelled(dtype=torch.int16),
        labelled(h=8, w=18)[:, 2:7, ::2],
        labelled(1).expand(2, -1, -1),
        labelled(h=9, w=5).transpose(1, 2),
    ):
        got, counts = ops.class_sums(x, y, 7, impl="triton")
        truth, n = class_sums_ref(x.double(), y, 7)
        assert_close("sums", truth, got, 2e-6)
        assert torch.equal(n.float(), counts) and got.dtype == counts.dtype == torch.float32
    labels = labelled()
    for fn, ref in (
        (
            lambda: ops.class_sums(x, labels, 7, impl="triton")[0].sum(),
            lambda: class_sums_ref(x, labels, 7)[0].sum(),
        ),
        (
            lambda: (
                ops.class_sums(x, labels, 7, True, impl="triton")[0]
                .transpose(1, 2)
                .flatten(1)
                .square()
                .sum()
            ),
            lambda: class_sums_ref(x, labels, 7, True)[0].square().sum(),
        ),
        (
            lambda: ops.cosine_logits(z, x, impl="triton").sum(),
            lambda: cosine_logits_ref(z, x).sum(),
        ),
        (
            lambda: ops.cosine_logits(z, x, impl="triton").transpose(2, 3).sigmoid().sum(),
            lambda: cosine_logits_ref(z, x).sigmoid().sum(),
        ),
        (
            lambda: ops.prototypes(x[:, :3], x, x, impl="triton")[0].square().sum(),
            lambda: prototypes_ref(x[:, :3], x, x)[0].square().sum(),
        ),
        (
            lambda: ops.prototypes(x[:, :3], x, x, impl="triton")[1].square().sum(),
            lambda: prototypes_ref(x[:, :3], x, x)[1].square().sum(),
        ),
    ):
        with launches() as seen:
            (g,) = torch.autograd.grad(fn(), x)
        assert seen and g.stride() == x.stride()
        assert_close("dx", torch.autograd.grad(ref(), x)[0], g, 2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_logits_and_nan(impl):
    "A class that is impossible somewhere or everywhere, logits of 10000, ties, NaN."
    args = maps(k=70)
    args["logits"][:, :66, 2] = float("-inf")  # the whole first block of classes, in one row
    args["logits"][0, 67, :, 3] = float("-inf")
    (s, t), grads = run(ops.prototypes, args, impl=impl)
    truth, wide = run(prototypes_ref, {n: v.double() for n, v in args.items()})
    for r, o in zip(truth, (s, t)):
        assert_close("centres", r, o, 5e-6)
    for n in grads:
        assert_close(n, wide[n], grads[n], 1e-5)
    nowhere = maps()
    nowhere["logits"][1, 4] = float("-inf")
    s, t = ops.prototypes(**nowhere, impl=impl)
    r, q = prototypes_ref(**nowhere)
    assert_close("semantic", r, s, 5e-6)
    assert (s[1, 4] == 0).all() and t[1, 4].isnan().all() and torch.equal(t.isnan(), q.isnan())
    big = {n: (1e4 * v.clamp(-1, 1) if n == "logits" else v).half() for n, v in maps().items()}
    for r, o in zip(
        prototypes_ref(**{n: v.double() for n, v in big.items()}), ops.prototypes(**big, impl=impl)
    ):
        assert_close("large", r, o, 1e-2)
    same = maps() | dict(logits=torch.zeros(2, 7, 5, 9))
    for r, n, o in zip(prototypes_ref(**same), ("feat", "pos"), ops.prototypes(**same, impl=impl)):
        assert_close("ties", same[n].mean((2, 3))[:, None].expand(-1, 7, -1), o, 5e-6)
    for name, hit in (
        ("logits", (slice(0, 1), slice(None))),
        ("feat", (slice(0, 1), slice(None))),
        ("pos", (slice(None), slice(0, 0))),
    ):
        args = maps()
        args[name][0, 2, 3, 4] = float("nan")
        s, t = ops.prototypes(**args, impl=impl)
        r, q = prototypes_ref(**args)
        assert torch.equal(s.isnan(), r.isnan()) and torch.equal(t.isnan(), q.isnan()), name
        assert (
            (s.isnan().any() or t.isnan().any())
            and not s[1].isnan().any()
            and not t[1].isnan().any()
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_absent_classes_in_float16(impl):
    "The centre of a class that is nearly nowhere is still the mean that its small weights give."
    args = {n: t.half() for n, t in maps(c=40, h=9).items()}
    args["logits"][:, 2] -= 16
    truth, wide = run(prototypes_ref, {n: t.double() for n, t in args.items()})
    outs, got = run(ops.prototypes, args, impl=impl)
    assert_close("semantic", truth[0][:, 2], outs[0][:, 2], 1e-3)
    for n in got:
        assert_close(n, wide[n], got[n], 2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_and_nan_pixels(impl):
    "A pixel or a prototype that is zero has the cosine zero and a finite gradient; NaN stays in its pixel."
    args = pixels()
    for n in ("feat", "pos"):
        args[n][0, :, 2, 3] = 0
    args["pos"][1, :, 0, 0] = -args["feat"][1, :, 0, 0]
    outs, got = run(ops.cosine_logits, args, impl=impl)
    assert (outs[0][0, :, 2, 3] == 0).all() and (outs[0][1, :, 0, 0] == 0).all()
    assert all(g.isfinite().all() for g in got.values())
    plain = ops.cosine_logits(torch.zeros(2, 7, 20), args["feat"], impl=impl)
    assert (plain == 0).all()
    args["feat"][0, 5, 1, 1] = float("nan")
    out = ops.cosine_logits(**args, impl=impl)
    assert out[0, :, 1, 1].isnan().all() and int(out.isnan().sum()) == 7
    x = make_input([2, 20, 5, 9])
    y = labelled()
    x[y[:, None].expand_as(x) >= 7] = float("nan")  # pixels of no class never count
    x[y[:, None].expand_as(x) < 0] = float("inf")
    assert ops.class_sums(x, y, 7, impl=impl)[0].isfinite().all()
    where = (y[1] == 3).nonzero()[0]
    x[1, 4, where[0], where[1]] = float("nan")
    s = ops.class_sums(x, y, 7, True, impl=impl)[0]
    assert s[1, 3, 4].isnan() and not s[0].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_of_one_kind(impl):
    "All of no class, all of the last class, one class."
    x = make_input([2, 20, 5, 9])
    for value, k in ((255, 7), (6, 7), (0, 1), (-1, 3)):
        s, n = ops.class_sums(x, torch.full((2, 5, 9), value), k, impl=impl)
        hit = 0 <= value < k
        assert n.sum() == (90 if hit else 0)
        assert_close("sums", x.sum((0, 2, 3)), s[value], 5e-6) if hit else (s == 0).all()
        assert s.shape == (k, 20) and int((s != 0).any(1).sum()) == int(hit)


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    for op, (fn, _, make) in PAIRS.items():
        a, b = (run(fn, make(h=23), impl=impl) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0])) and all(
            torch.equal(a[1][n], b[1][n]) for n in a[1]
        ), op
    x = make_input([2, 20, 23, 9])
    y = labelled(h=23)
    assert torch.equal(ops.class_sums(x, y, 7, impl=impl)[0], ops.class_sums(x, y, 7, impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_subsets(impl):
    "Gradients on request only; the choice of the forward pass is kept; maps without positions."
    cases = [
        ("prototypes", maps(), wanted, CENTRES[2:])
        for wanted in (("logits",), ("feat",), ("pos",), ("feat", "pos"), ("logits", "pos"))
    ]
    cases += [
        ("cosine", pixels(), wanted, expect)
        for wanted, expect in (
            (("z",), COSINE[2:]),
            (("feat",), COSINE[1:2]),
            (("pos",), COSINE[1:2]),
            (("z", "pos"), COSINE[1:]),
        )
    ]
    for op, args, wanted, expected in cases:
        fn, ref, _ = PAIRS[op]
        every = run(ref, args)[1]
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
        outs = tuples(fn(**leaves, impl=impl))
        with launches() as seen, ops.use_impl("ref"):
            got = torch.autograd.grad(
                outs,
                [leaves[n] for n in wanted],
                [make_input(o.shape, 7 + i) for i, o in enumerate(outs)],
            )
        assert seen == (list(expected) if impl == "triton" else []), (wanted, seen)
        for n, g in zip(wanted, got):
            assert_close(n, every[n], g, 1e-5)
    args = {n: t for n, t in pixels().items() if n != "pos"}
    (out,), got = run(ops.cosine_logits, args, impl=impl, scale=3.0)
    (truth,), wide = run(cosine_logits_ref, args, scale=3.0)
    assert_close("out", truth, out, 2e-6)
    for n in got:
        assert_close(n, wide[n], got[n], 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_types_and_autocast(impl):
    "Logits and prototypes may have types of their own; under autocast the maps take the narrow type."
    args = {n: t if n == "logits" else t.bfloat16() for n, t in maps().items()}
    for r, o in zip(
        prototypes_ref(**{n: t.double() for n, t in args.items()}),
        ops.prototypes(**args, impl=impl),
    ):
        assert o.dtype == torch.bfloat16
        assert_close("centres", r, o, 4e-3)
    args = {n: t if n == "z" else t.bfloat16() for n, t in pixels().items()}
    assert_close(
        "cosine",
        cosine_logits_ref(**{n: t.double() for n, t in args.items()}),
        ops.cosine_logits(**args, impl=impl),
        4e-3,
    )
    with torch.autocast(torch.get_default_device().type, torch.bfloat16), launches() as seen:
        outs, got = run(ops.prototypes, maps() | dict(pos=maps()["pos"].bfloat16()), impl=impl)
        (out,), more = run(ops.cosine_logits, pixels(), impl=impl)
        sums, _ = ops.class_sums(maps()["feat"].bfloat16(), labelled(), 7, impl=impl)
    assert {o.dtype for o in (*outs, out)} == {torch.bfloat16} and sums.dtype == torch.float32
    assert [got[n].dtype for n in ("logits", "feat", "pos")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ] and {g.dtype for g in more.values()} == {torch.float32}
    truth, wide = run(
        prototypes_ref,
        {n: t.bfloat16().double() if n != "logits" else t.double() for n, t in maps().items()},
    )
    for r, o in zip(truth, outs):
        assert_close("autocast", r, o, 4e-3)
    for n in got:
        assert_close(n, wide[n], got[n], 1e-2)
    assert set(seen) == (set(CENTRES + COSINE + SUMS[:1]) if impl == "triton" else set())
    with launches() as seen:
        assert (
            ops.prototypes(**{n: t.double() for n, t in maps().items()}, impl=impl)[0].dtype
            == torch.float64
        )
        assert (
            ops.class_sums(maps()["feat"].double(), labelled(), 7, impl=impl)[0].dtype
            == torch.float64
        )
    assert seen == []


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_twice_and_refusals(impl):
    "Empty batches, no second derivative, clear errors."
    args = maps()
    y = labelled()
    with launches() as seen:
        assert [
            t.shape for t in ops.prototypes(**{n: t[:0] for n, t in args.items()}, impl=impl)
        ] == [(0, 7, 20)] * 2
        assert ops.cosine_logits(torch.zeros(0, 7, 20), args["feat"][:0], impl=impl).shape == (
            0,
            7,
            5,
            9,
        )
        assert ops.class_sums(args["feat"][:0], y[:0], 7, impl=impl)[0].shape == (
            7,
            20,
        ) and ops.class_sums(args["feat"][:0], y[:0], 7, True, impl=impl)[1].shape == (0, 7)
        assert ops.cosine_logits(torch.zeros(2, 7, 20), args["feat"][..., :0], impl=impl).shape == (
            2,
            7,
            5,
            0,
        )
    assert seen == []
    x = args["feat"].clone().requires_grad_()
    for fn in (
        lambda: ops.prototypes(args["logits"], x, args["pos"], impl=impl)[0],
        lambda: ops.cosine_logits(pixels()["z"], x, impl=impl),
    ):
        (g,) = torch.autograd.grad(fn().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            g.sum().backward()
    z, f, p = pixels().values()
    for call, word in (
        (lambda: ops.prototypes(f[:, :, :2], f, p), "logits"),
        (lambda: ops.prototypes(args["logits"], f, p[:, 1:]), "pos"),
        (lambda: ops.prototypes(f[0], f[0], p[0]), "maps"),
        (lambda: ops.prototypes(args["logits"].long(), f, p), "floating"),
        (lambda: ops.cosine_logits(z[..., 1:], f, p), "wants z"),
        (lambda: ops.cosine_logits(z, f, p[:1]), "pos"),
        (lambda: ops.class_sums(f, y[:, 1:], 7), "labels"),
        (lambda: ops.class_sums(f, y.float(), 7), "integer"),
        (lambda: ops.class_sums(f, y, 0), "at least one"),
        (lambda: ops.class_sums(f.long(), y, 3), "floating"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_and_compile(impl):
    "What the dispatcher asks of an operator; graphs with sizes that change."
    kernel = impl == "triton"
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )

    def leaf(d):
        return [t.clone().requires_grad_() for t in d.values()]

    torch.library.opcheck(
        torch.ops.segkern.prototypes.default, (*leaf(maps()), kernel), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.segkern.cosine.default, (*leaf(pixels()), kernel), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.segkern.cosine.default, (*leaf(pixels())[:2], None, kernel), test_utils=tests
    )
    if kernel:
        torch.library.opcheck(
            torch.ops.segkern.class_sums.default,
            (make_input([2, 20, 5, 9]).requires_grad_(), labelled(), 7),
            test_utils=tests,
        )
    for op, (fn, ref, make) in PAIRS.items():
        compiled = torch.compile(
            lambda fn=fn, **kw: fn(**kw, impl=impl),
            backend="aot_eager",
            fullgraph=True,
            dynamic=True,
        )
        for h in (5, 8):
            args = make(h=h)
            with launches() as seen:
                outs, got = run(compiled, args)
            assert set(seen) == (set(EXPECT[op]) if kernel else set())
            truth, wide = run(ref, args)
            for r, o in zip(truth, outs):
                assert_close(op, r, o, 5e-6)
            for n in got:
                assert_close(n, wide[n], got[n], 1e-5)
    compiled = torch.compile(
        lambda x, y: ops.class_sums(x, y, 7, impl=impl),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for h in (5, 8):
        x = make_input([2, 20, h, 9]).requires_grad_()
        y = labelled(h=h)
        s, n = compiled(x, y)
        assert_close("sums", class_sums_ref(x.double(), y, 7)[0], s, 2e-6)
        (g,) = torch.autograd.grad(s.square().sum(), x)
        assert_close(
            "dx", torch.autograd.grad(class_sums_ref(x, y, 7)[0].square().sum(), x)[0], g, 1e-5
        )


def test_export_and_double():
    "Exported graphs hold plain PyTorch; double precision passes gradcheck."

    class Net(torch.nn.Module):
        def forward(self, m, f, p, y):
            s, t = ops.prototypes(m, f, p)
            return ops.cosine_logits(s + t, f, p), ops.class_sums(f, y, 7)[0]

    args = (*maps().values(), labelled())
    program = torch.export.export(Net(), args)
    assert "segkern" not in str(program.graph)
    for r, o in zip(Net()(*args), program.module()(*args)):
        assert_close("exported", r, o, 1e-5)
    small = [
        make_input(s, i).double().requires_grad_()
        for i, s in enumerate(((2, 3, 2, 3), (2, 4, 2, 3), (2, 4, 2, 3), (2, 3, 4)))
    ]
    assert torch.autograd.gradcheck(ops.prototypes, small[:3]) and torch.autograd.gradcheck(
        ops.cosine_logits, (small[3], *small[1:3])
    )
    assert torch.autograd.gradcheck(
        lambda x: ops.class_sums(x, labelled(2, 3, 2, 3), 3)[0], small[1:2]
    )


def test_memory_of_a_step():
    "The largest tensor of a step on a CPU is a gradient; the composition keeps two probability maps and more."
    from torch.utils._python_dispatch import TorchDispatchMode

    args = {n: t.requires_grad_() for n, t in maps(1, 64, 32, 128, 128).items()}
    z = make_input([1, 64, 32]).requires_grad_()
    total = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and "_prototypes" not in str(func):
                    total[self.name] = max(total.get(self.name, 0), t.untyped_storage().nbytes())
            return out

    with Watch() as w:
        w.name = "forward"
        s, t = ops.prototypes(**args)
        w.name = "backward"
        torch.autograd.grad(s.sum() + t.sum(), list(args.values()))
        w.name = "cosine"
        torch.autograd.grad(
            ops.cosine_logits(z, args["feat"], args["pos"]).sum(), [z, args["feat"], args["pos"]]
        )
    plane = 4 * 128 * 128
    assert (
        total["forward"] <= max(4 << 18, plane)
        and total["backward"] <= 64 * plane
        and total["cosine"] <= 64 * plane
    ), total


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "SegFormer's head, twice for races: results must be the same bits."
    size = dict(b=2, k=150, c=256, h=64, w=61)
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (1e-3, 2e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    y = labelled(2, 150, 64, 61)
    sums = (
        (lambda feat, **kw: ops.class_sums(feat, y, 150, **kw)[0]),
        (lambda feat: class_sums_ref(feat, y, 150)[0]),
        lambda **kw: dict(feat=maps(**kw)["feat"]),
    )
    for op, (fn, ref, make) in (PAIRS | {"sums": sums}).items():
        args = {n: t.to(dtype) for n, t in make(**size).items()}
        truth, wide = run(ref, {n: t.double() for n, t in args.items()})
        a, b = (run(fn, args, impl="triton") for _ in range(2))
        for r, o, again in zip(truth, a[0], b[0]):
            assert_close(op, r, o, limits[0])
            assert torch.equal(o, again)
        for n, g in a[1].items():
            assert_close(f"{op} {n}", wide[n], g, limits[1])
            assert torch.equal(g, b[1][n]), n
