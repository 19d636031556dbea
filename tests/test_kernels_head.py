"""The head's kernels in the interpreter: sizes, layouts, types, edges, and what surrounds them
(compile, export, autograd)."""

import pytest
import torch
import torch.nn.functional as F

from segkern import ops
from segkern.ops.dispatch import interpreting
from segkern.testing import assert_close, layouts, make_input, make_labels
from segkern.testing.kernels import check_kernel
from segkern.testing.memory import exact_interpreter, launches

pytestmark = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU",
)
exact_interpreter()
CE = ("_upsample_ce_fwd_kernel", "_upsample_ce_bwd_kernel")
QUADS = ("_quad_ce_fwd_kernel", "_quad_ce_bwd_kernel", "_quad_gather_kernel")
DICE = ("_quad_dice_fwd_kernel", "_quad_dice_bwd_kernel", "_quad_gather_kernel")
SIZES = [
    ((5, 7), (37, 45)),
    ((8, 9), (3, 5)),
    ((1, 1), (4, 6)),
    ((3, 4), (1, 1)),
    ((17, 33), (17, 33)),
    ((2, 9), (67, 9)),
    ((18, 3), (101, 5)),
]


def labels(shape, k, void=0.1, seed=0):
    return make_labels(shape, k, seed, void)


def plain(logits, y, align_corners=False, **kw):
    return F.cross_entropy(
        F.interpolate(logits, tuple(y.shape[1:]), mode="bilinear", align_corners=align_corners),
        y,
        ignore_index=255,
        **kw,
    )


def sure_labels(got, z, size, align_corners=False):
    "Equal labels wherever the two best classes are apart."
    up = F.interpolate(z.double(), size, mode="bilinear", align_corners=align_corners)
    top = up.topk(min(2, up.shape[1]), 1).values
    sure = (
        (top[:, 0] - top[:, -1]) > 1e-5 * up.abs().amax()
        if up.shape[1] > 1
        else torch.ones_like(got, dtype=torch.bool)
    )
    assert torch.equal(got.long()[sure], up.argmax(1)[sure])


@pytest.mark.parametrize("align_corners", [False, True], ids=["half-pixel", "corners"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, align_corners):
    "Growing, shrinking and equal sizes, one pixel, several tiles; loss, gradient, labels and counts."
    (h, w), full = size
    z = make_input([2, 3, h, w], 1)
    y = labels((2, *full), 3)
    y[0, 0, 0] = 2
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y, align_corners=align_corners),
        lambda logits: plain(logits, y, align_corners),
        {"logits": z},
        dtypes=("fp32",),
        orders=(0,),
        expect=CE,
    )
    got = ops.upsample_argmax(z, full, align_corners, impl="triton")
    sure_labels(got, z, full, align_corners)
    counts = ops.upsample_confusion(
        z, y.to(torch.uint8), align_corners=align_corners, impl="triton"
    )
    assert torch.equal(counts, ops.confusion(got, y, 3))


def test_types_orders_and_blocks():
    "Three types, three orders of the programs, blocks larger and smaller than the data."
    y = labels((1, 13, 19), 5)
    weight = torch.linspace(0.5, 2, 5)
    for op, small in (
        ("upsample_cross_entropy", dict(BH=1, BW=16)),
        ("upsample_cross_entropy_bwd", dict(BO=16)),
    ):
        large = dict(BH=64, BW=64) if "BH" in small else dict(T=32, BO=64)
        check_kernel(
            lambda logits: ops.upsample_cross_entropy(logits, y, weight=weight),
            lambda logits: plain(logits, y, weight=weight.double()),
            {"logits": make_input([1, 5, 3, 4], 1)},
            blocks=(op, [small, large]),
            expect=CE,
            dtypes=("fp32", "fp16", "bf16") if "BH" in small else ("fp32",),
        )


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_layouts(layout):
    z = make_input([2, 4, 5, 7], 1)
    y = labels((2, 11, 13), 4)
    x = z[:1].expand(2, -1, -1, -1) if layout == "expanded" else layouts(z)[layout]
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y, reduction="sum"),
        lambda logits: plain(logits, y, reduction="sum"),
        {"logits": x},
        dtypes=("fp32",),
        orders=(0,),
        expect=CE,
    )
    sure_labels(ops.upsample_argmax(x, (11, 13), impl="triton"), x, (11, 13))
    strided = torch.stack([y, y], -1)[..., 0]
    assert_close(
        "strided target",
        ops.upsample_cross_entropy(x, y),
        ops.upsample_cross_entropy(x, strided, impl="triton"),
        2e-6,
    )


@pytest.mark.parametrize(
    "kind", ["none", "weighted none", "ohem", "ohem all", "ohem nothing", "smooth", "smooth sum"]
)
def test_family(kind):
    z = 3 * make_input([2, 7, 5, 6], 1)
    y = labels((2, 13, 19), 7)
    weight = torch.linspace(0.5, 2, 7)
    kw = {
        "none": dict(reduction="none"),
        "weighted none": dict(reduction="none", weight=weight),
        "ohem": dict(ohem=(0.3, 50), weight=weight),
        "ohem all": dict(ohem=(0.9, 10**7)),
        "ohem nothing": dict(ohem=(0.0, 0)),
        "smooth": dict(label_smoothing=0.1, weight=weight),
        "smooth sum": dict(label_smoothing=0.3, reduction="sum"),
    }[kind]
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y, **kw),
        lambda logits: ops.upsample_cross_entropy(logits, y, impl="ref", **kw),
        {"logits": z},
        dtypes=("fp32",),
        orders=(1,),
        expect=CE,
    )
    if "smooth" in kind:
        ref = plain(
            z.double(), y, **{**kw, **({"weight": weight.double()} if "weight" in kw else {})}
        )
        assert_close("reference", ref, ops.upsample_cross_entropy(z, y, **kw), 2e-6)


@pytest.mark.parametrize("k", [1, 2, 33, 150, 300])
def test_numbers_of_classes(k):
    "One class, more classes than a histogram holds, more than a byte holds."
    z = make_input([1, k, 3, 4], 1)
    y = labels((1, 7, 9), k)
    y[0, 1, 1] = k - 1
    y = torch.where(y == 255, -1, y)
    got = ops.upsample_argmax(z, (7, 9), impl="triton")
    assert got.dtype == (torch.uint8 if k <= 256 else torch.int64)
    sure_labels(got, z, (7, 9))
    assert torch.equal(
        ops.upsample_confusion(z, y, -1, impl="triton"), ops.confusion(got, y, k, -1)
    )
    assert_close(
        "loss",
        ops.upsample_cross_entropy(z, y, -1) + 1e-9,
        ops.upsample_cross_entropy(z, y, -1, impl="triton") + 1e-9,
        2e-6,
    )


def test_only_void_and_empty_batches():
    y = torch.full((2, 9, 9), 255, dtype=torch.uint8)
    for kw, value in (
        (dict(empty="zero"), 0.0),
        (dict(ohem=(0.9, 5)), 0.0),
        (dict(reduction="sum"), 0.0),
        ({}, float("nan")),
    ):
        z = make_input([2, 3, 2, 2]).requires_grad_()
        loss = ops.upsample_cross_entropy(z, y, impl="triton", **kw)
        assert loss.item() == value or (value != value and loss.isnan())
        loss.backward()
        assert z.grad.abs().max() == 0, kw
    assert ops.upsample_confusion(z, y, impl="triton").sum() == 0
    with launches() as seen:
        none = make_input([2, 3, 2, 2])[:0]
        assert (
            ops.upsample_argmax(none, (4, 4), impl="triton").shape == (0, 4, 4)
            and ops.upsample_confusion(none, y[:0], impl="triton").sum() == 0
        )
        assert (
            ops.upsample_cross_entropy(none, y[:0], impl="triton", empty="zero") == 0
            and ops.upsample_dice(none, y[:0], impl="triton") == 0
        )
    assert seen == []


def test_extremes():
    "Infinities and NaN come out as in PyTorch; equal logits give the first class; large fp16 logits stay finite."
    y = torch.zeros(1, 6, 6, dtype=torch.int32)
    for bad in (float("nan"), float("inf")):
        z = make_input([1, 3, 3, 3])
        z[0, 1, 1, 1] = bad
        assert (
            ops.upsample_cross_entropy(z, y, impl="triton").isnan()
            and ops.upsample_cross_entropy(z, y, ohem=(0.9, 5), impl="triton").isnan()
        )
    z[0, 1, 1, 1] = float("-inf")  # 0 times infinity, wherever the pixel takes part
    for impl in ("ref", "triton"):
        assert ops.upsample_cross_entropy(z, y, impl=impl).isnan()
    assert (ops.upsample_argmax(torch.ones(1, 5, 2, 2), (5, 5), impl="triton") == 0).all()
    z = (1e4 * make_input([1, 4, 3, 3], 3).clamp(-1, 1)).half()
    t = torch.randint(0, 4, (1, 7, 7))
    assert_close("1e4", plain(z.double(), t), ops.upsample_cross_entropy(z, t, impl="triton"), 6e-4)


def test_dispatch_and_gradients():
    "float64 falls back; no gradient is asked for twice; a second derivative is refused."
    z = make_input([1, 3, 3, 3])
    y = labels((1, 7, 7), 3)
    with launches() as seen:
        assert_close(
            "fp64",
            plain(z.double(), y),
            ops.upsample_cross_entropy(z.double(), y, impl="triton"),
            1e-12,
        )
    assert seen == [] and ops.which("upsample_cross_entropy", z.double(), impl="triton")[0] == "ref"
    with launches() as seen:
        ops.upsample_cross_entropy(z, y, impl="triton")
    assert seen == ["_upsample_ce_fwd_kernel"]
    with launches() as seen:
        ops.upsample_cross_entropy(z, y, impl="ref")
    assert seen == []
    z.requires_grad_()
    (g,) = torch.autograd.grad(
        ops.upsample_cross_entropy(z, y, impl="triton"), z, create_graph=True
    )
    with pytest.raises(RuntimeError):
        g.sum().backward()
    loss = ops.upsample_cross_entropy(z, y, impl="triton")
    with ops.use_impl("ref"), launches() as seen:
        loss.backward()
    assert seen == ["_upsample_ce_bwd_kernel"]  # the choice of the forward pass is kept


def test_operators():
    "The rules of torch's operators: schema, fake kernels, autograd."
    z = make_input([2, 3, 3, 4]).requires_grad_()
    y = labels((2, 7, 5), 3).to(torch.int32)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    torch.library.opcheck(
        torch.ops.segkern.upsample_nll.default,
        (z, y, None, 255, False, 0.0, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.segkern.upsample_nll.default,
        (z, y, torch.ones(3), 255, True, 0.1, False),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.segkern.upsample_argmax.default, (z.detach(), 7, 5, False), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.segkern.upsample_confusion.default, (z.detach(), y, 255, False), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.segkern.upsample_dice_sums.default, (z, y, 255, False, True), test_utils=tests
    )


def test_compiled():
    "One graph, with the kernels in it, forward and backward, and again for another size."

    def step(z, y):
        with_impl = ops.upsample_cross_entropy(z, y, impl="triton") + ops.upsample_dice(
            z, y, impl="triton"
        )
        return with_impl, ops.upsample_argmax(z, (11, 9), impl="triton")

    fn = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((3, 4), (5, 6)):
        z = make_input([1, 3, *size]).requires_grad_()
        y = labels((1, 11, 9), 3)
        with launches() as seen:
            loss, lab = fn(z, y)
            (got,) = torch.autograd.grad(loss, z)
        assert {
            "_upsample_ce_fwd_kernel",
            "_upsample_ce_bwd_kernel",
            "_dice_fwd_kernel",
            "_dice_bwd_kernel",
            "_upsample_argmax_kernel",
        } <= set(seen)
        ref = step(z, y)
        assert_close("loss", ref[0], loss, 1e-6)
        assert_close("dlogits", torch.autograd.grad(ref[0], z)[0], got, 1e-6)
        assert torch.equal(lab, ref[1])


def test_exported():
    "Exported graphs hold plain PyTorch whatever is asked for."

    class Head(torch.nn.Module):
        def forward(self, z, y):
            return ops.upsample_argmax(z, (8, 8)), ops.upsample_cross_entropy(z, y)

    z = make_input([1, 3, 4, 4])
    y = labels((1, 8, 8), 3)
    with ops.use_impl("triton"):
        program = torch.export.export(Head(), (z, y))
    got = program.module()(z, y)
    want = Head()(z, y)
    assert "segkern" not in str(program.graph) and torch.equal(got[0], want[0])
    assert_close("loss", want[1], got[1], 1e-6)


def test_autocast():
    "A loss under autocast keeps its float32 gradient."
    z = make_input([1, 5, 4, 4]).requires_grad_()
    y = labels((1, 13, 11), 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = ops.upsample_cross_entropy(z, y, impl="triton")
    assert_close(
        "dlogits", torch.autograd.grad(plain(z, y), z)[0], torch.autograd.grad(loss, z)[0], 5e-6
    )


QUAD_SIZES = [(2, (5, 7)), (4, (3, 5)), (4, (1, 1)), (8, (2, 9)), (16, (1, 2)), (2, (1, 33))]
ALIGNED = [(2, (3, 7)), (4, (5, 9)), (8, (9, 10))]


@pytest.mark.parametrize(
    "scale,shape,align_corners",
    [(*q, False) for q in QUAD_SIZES] + [(*q, True) for q in ALIGNED],
    ids=str,
)
def test_quads(scale, shape, align_corners):
    "Whole scales, both conventions, one cell, sizes that fill no program: loss and gradient, dice and its gradient."
    z = make_input([2, 5, *shape], 1)
    full = (scale * shape[0], scale * shape[1])
    y = labels((2, *full), 5)
    y[0, 0, 0] = 2

    def up(x):
        return F.interpolate(x, full, mode="bilinear", align_corners=align_corners)

    options = dict(dtypes=("fp32",), orders=(0,))
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y, align_corners=align_corners),
        lambda logits: plain(logits, y, align_corners),
        {"logits": z},
        expect=QUADS,
        **options,
    )
    hit = F.one_hot(y.where(y != 255, 5), 6)[..., :5].permute(0, 3, 1, 2)
    for exclude in (False, True):
        seen = (y != 255)[:, None] if exclude else torch.ones_like(y, dtype=torch.bool)[:, None]

        def ref(logits):
            return torch.stack(
                [
                    (up(logits).sigmoid() * hit).sum((2, 3)),
                    (up(logits).sigmoid() * seen).sum((2, 3)),
                ]
            )

        def sums(logits):
            return torch.stack(
                ops.upsample_dice_sums(logits, y, align_corners=align_corners, exclude=exclude)[:2]
            )

        check_kernel(sums, ref, {"logits": z}, expect=DICE, **options)


def test_patches_cover_every_output_once():
    "Corners aligned: quads of S and S + 1 outputs, up to large maps; counted by the rule that the kernels use."
    from segkern.ops.quads import patch_count

    for S, P, n in (
        (2, 2, 3),
        (2, 2, 100),
        (4, 4, 5),
        (4, 4, 129),
        (8, 4, 9),
        (8, 8, 128),
        (16, 4, 17),
        (32, 4, 40),
    ):
        N = S * n
        first = [-(-q * (N - 1) // (n - 1)) for q in range(n)] + [N]
        assert patch_count(n, N, S, P, True) == sum(
            -(-(b - a) // P) for a, b in zip(first, first[1:])
        ), (S, P, n)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_quads_in_layouts(layout):
    "Any strides; three types; the gradient comes back in the layout of the logits."
    z = make_input([2, 4, 5, 7], 1)
    y = labels((2, 20, 28), 4)
    x = z[:1].expand(2, -1, -1, -1) if layout == "expanded" else layouts(z)[layout]
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y),
        lambda logits: plain(logits, y),
        {"logits": x},
        orders=(0,),
        expect=QUADS,
    )
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(ops.upsample_cross_entropy(leaf, y, impl="triton"), leaf)
    assert got.stride() == leaf.stride()


@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "weighted none",
        "ohem",
        "ohem nothing",
        "smooth",
        "smooth weighted",
        "int64",
        "negative void",
    ],
)
def test_quads_of_the_family(kind):
    z = 3 * make_input([2, 7, 3, 5], 1)
    y = labels((2, 12, 20), 7)
    weight = torch.linspace(0.5, 2, 7)
    kw = {
        "none": dict(reduction="none"),
        "weighted none": dict(reduction="none", weight=weight),
        "ohem": dict(ohem=(0.3, 50), weight=weight),
        "ohem nothing": dict(ohem=(0.0, 0)),
        "smooth": dict(label_smoothing=0.3, reduction="sum"),
        "int64": {},
        "smooth weighted": dict(label_smoothing=0.1, weight=weight),
        "negative void": dict(ignore_index=-1),
    }[kind]
    if kind == "negative void":
        y = y.where(y != 255, -1)
    if kind != "int64":
        y = y.to(torch.int32)
    check_kernel(
        lambda logits: ops.upsample_cross_entropy(logits, y, **kw),
        lambda logits: ops.upsample_cross_entropy(logits, y, impl="ref", **kw),
        {"logits": z},
        dtypes=("fp32",),
        orders=(1,),
        expect=QUADS,
    )


@pytest.mark.parametrize("k", [1, 2, 33, 150, 300])
def test_quads_of_many_classes(k, monkeypatch):
    "One class to 300, in groups of eight classes."
    from segkern.ops import quads

    monkeypatch.setattr(quads, "PARTIALS", 0)
    z = make_input([1, k, 2, 3], 1)
    y = labels((1, 8, 12), k)
    y[0, 1, 1] = k - 1
    y = torch.where(y == 255, -1, y)

    def loss(logits):
        return ops.upsample_cross_entropy(logits, y, -1) + 1e-9

    def ref(logits):
        return (
            F.cross_entropy(F.interpolate(logits, (8, 12), mode="bilinear"), y, ignore_index=-1)
            + 1e-9
        )

    check_kernel(
        loss,
        ref,
        {"logits": z},
        dtypes=("fp32",),
        orders=(0,),
        expect=QUADS[:1] if k == 1 else QUADS,
        grads=() if k == 1 else None,
    )
    hit = F.one_hot(y.where(y >= 0, k), k + 1)[..., :k].permute(0, 3, 1, 2)
    check_kernel(
        lambda logits: ops.upsample_dice_sums(logits, y, -1)[0],
        lambda logits: (F.interpolate(logits, (8, 12), mode="bilinear").sigmoid() * hit).sum(
            (2, 3)
        ),
        {"logits": z},
        dtypes=("fp32",),
        orders=(0,),
        expect=DICE,
    )


def test_quads_give_the_same_bits_in_any_order():
    from segkern.testing.memory import shuffled

    y = labels((2, 40, 72), 5)
    results = []
    for seed in (0, 1, 2):
        z = make_input([2, 5, 5, 9], 1).requires_grad_()
        with shuffled(seed):
            loss = ops.upsample_cross_entropy(z, y, impl="triton") + ops.upsample_dice(
                z, y, impl="triton"
            )
            results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r))


def test_quads_at_extremes():
    "Infinities and NaN as in PyTorch, the cell beyond the border included; logits of 1e4 stay finite; only void."
    y = torch.zeros(1, 12, 12, dtype=torch.int32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        z = make_input([1, 3, 3, 3])
        z[0, 1, 1, 1] = bad
        want = F.cross_entropy(
            F.interpolate(z, (12, 12), mode="bilinear"), y.long(), reduction="none"
        )
        got = ops.upsample_cross_entropy(z, y, reduction="none", impl="triton")
        assert torch.equal(want.isnan(), got.isnan()) and want.isnan().any()
        assert_close("finite pixels", want[~want.isnan()] + 1e-9, got[~want.isnan()] + 1e-9, 2e-6)
    z = (1e4 * make_input([1, 4, 3, 3], 3).clamp(-1, 1)).half()
    t = torch.randint(0, 4, (1, 12, 12))
    assert_close("1e4", plain(z.double(), t), ops.upsample_cross_entropy(z, t, impl="triton"), 6e-4)
    void = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    for kw, value in (
        (dict(empty="zero"), 0.0),
        (dict(ohem=(0.9, 5)), 0.0),
        (dict(reduction="sum"), 0.0),
        ({}, float("nan")),
    ):
        z = make_input([2, 3, 2, 2]).requires_grad_()
        loss = ops.upsample_cross_entropy(z, void, impl="triton", **kw)
        loss.backward()
        assert loss.item() == value or (value != value and loss.isnan())
        assert z.grad.abs().max() == 0, kw


@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=["quads", "any scale"])
@pytest.mark.parametrize("loss", ["mean", "none", "ohem", "dice"])
def test_second_derivatives(loss, size, impl):
    "Right or refused, never zero by accident; forward mode likewise."
    y = labels((1, *size), 3)
    z = make_input([1, 3, 2, 3]).double() if impl == "ref" else make_input([1, 3, 2, 3])
    y[0, 0, :2] = 1
    kw = (
        dict(impl=impl)
        | {"mean": {}, "none": dict(reduction="none"), "ohem": dict(ohem=(0.9, 5)), "dice": {}}[
            loss
        ]
    )

    def fn(x):
        return (ops.upsample_dice if loss == "dice" else ops.upsample_cross_entropy)(
            x, y, **kw
        ).sum()

    x = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(x), x, create_graph=True)
    step = make_input(z.shape, 5).to(z.dtype)
    far = z + 1e-5 * step
    near = z - 1e-5 * step
    try:
        second = torch.autograd.grad((g * step).sum(), x)[0]
    except RuntimeError as e:
        assert "once" in str(e)
    else:
        assert impl == "ref"
        slopes = [torch.autograd.grad(fn(p.requires_grad_()), p)[0] for p in (far, near)]
        assert_close("second derivative", (slopes[0] - slopes[1]) / 2e-5, second, 1e-6)
    try:
        slope = torch.func.jvp(fn, (z,), (step,))[1]
    except (NotImplementedError, RuntimeError) as e:
        assert "forward" in str(e).lower(), e
    else:
        assert_close(
            "forward mode", (g * step).sum().detach(), slope, 1e-9 if impl == "ref" else 1e-5
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "Real size on a real device, twice for races."
    z = make_input([2, 19, 64, 96], 1).to(dtype).requires_grad_()
    y = labels((2, 512, 768), 19)
    limits = {
        torch.float32: (2e-6, 2e-5),
        torch.float16: (6e-4, 1e-3),
        torch.bfloat16: (4e-3, 8e-3),
    }[dtype]
    ref = z.detach().double().requires_grad_()
    plain(ref, y).backward()
    for _ in range(2):
        loss = ops.upsample_cross_entropy(z, y)
        assert_close("loss", plain(ref, y), loss, limits[0])
        assert_close("dlogits", ref.grad, torch.autograd.grad(loss, z)[0], limits[1])
    labels_ = ops.upsample_argmax(z, (512, 768))
    m = ops.upsample_confusion(z, y)
    assert torch.equal(m, ops.confusion(labels_, y, 19))
    assert ops.which("upsample_argmax", z)[0] == "triton"
