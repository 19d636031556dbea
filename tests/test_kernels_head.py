"The head's kernels in the interpreter: sizes, layouts, types, edges, and what surrounds them (compile, export, autograd)."
import pytest
import torch
import torch.nn.functional as F

from segkern import ops
from segkern.ops.dispatch import interpreting
from segkern.ops.head import _upsample_argmax_op, _upsample_confusion_op, _upsample_nll_op
from segkern.ops.head_soft import _dice_op, _kl_op
from segkern.testing import assert_close, layouts, make_input, make_labels
from segkern.testing.kernels import check_kernel, exact_interpreter, launches

pytestmark = pytest.mark.skipif(not interpreting() and not torch.cuda.is_available(), reason="kernels need the interpreter (TRITON_INTERPRET=1) or a GPU")
exact_interpreter()
CE = ("_upsample_ce_fwd_kernel", "_upsample_ce_bwd_kernel")
SIZES = [((5, 7), (37, 45)), ((8, 9), (3, 5)), ((1, 1), (4, 6)), ((3, 4), (1, 1)), ((17, 33), (17, 33)), ((2, 9), (67, 9)), ((18, 3), (101, 5))]


def labels(shape, k, void=0.1, seed=0):
    return make_labels(shape, k, seed, void)


def plain(logits, y, align_corners=False, **kw):
    return F.cross_entropy(F.interpolate(logits, tuple(y.shape[1:]), mode="bilinear", align_corners=align_corners), y, ignore_index=255, **kw)


def sure_labels(got, z, size, align_corners=False):
    "Equal labels wherever the two best classes are apart."
    up = F.interpolate(z.double(), size, mode="bilinear", align_corners=align_corners)
    top = up.topk(min(2, up.shape[1]), 1).values
    sure = (top[:, 0] - top[:, -1]) > 1e-5*up.abs().amax() if up.shape[1] > 1 else torch.ones_like(got, dtype=torch.bool)
    assert torch.equal(got.long()[sure], up.argmax(1)[sure])


@pytest.mark.parametrize("align_corners", [False, True], ids=["half-pixel", "corners"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, align_corners):
    "Growing, shrinking and equal sizes, one pixel, several tiles; loss, gradient, labels and counts."
    (h, w), full = size
    z, y = make_input([2, 3, h, w], 1), labels((2, *full), 3)
    y[0, 0, 0] = 2
    check_kernel(lambda logits: ops.upsample_cross_entropy(logits, y, align_corners=align_corners), lambda logits: plain(logits, y, align_corners),
                 {"logits": z}, dtypes=("fp32",), orders=(0,), expect=CE)
    got = ops.upsample_argmax(z, full, align_corners, impl="triton")
    sure_labels(got, z, full, align_corners)
    counts = ops.upsample_confusion(z, y.to(torch.uint8), align_corners=align_corners, impl="triton")
    assert torch.equal(counts, ops.confusion(got, y, 3))


def test_types_orders_and_blocks():
    "Three types, three orders of the programs, blocks larger and smaller than the data."
    y, weight = labels((1, 13, 19), 5), torch.linspace(.5, 2, 5)
    for op, small in (("upsample_cross_entropy", dict(BH=1, BW=16)), ("upsample_cross_entropy_bwd", dict(BO=16))):
        large = dict(BH=64, BW=64) if "BH" in small else dict(T=32, BO=64)
        check_kernel(lambda logits: ops.upsample_cross_entropy(logits, y, weight=weight), lambda logits: plain(logits, y, weight=weight.double()),
                     {"logits": make_input([1, 5, 3, 4], 1)}, blocks=(op, [small, large]), expect=CE, dtypes=("fp32", "fp16", "bf16") if "BH" in small else ("fp32",))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_layouts(layout):
    z, y = make_input([2, 4, 5, 7], 1), labels((2, 11, 13), 4)
    x = z[:1].expand(2, -1, -1, -1) if layout == "expanded" else layouts(z)[layout]
    check_kernel(lambda logits: ops.upsample_cross_entropy(logits, y, reduction="sum"), lambda logits: plain(logits, y, reduction="sum"), {"logits": x},
                 dtypes=("fp32",), orders=(0,), expect=CE)
    sure_labels(ops.upsample_argmax(x, (11, 13), impl="triton"), x, (11, 13))
    strided = torch.stack([y, y], -1)[..., 0]
    assert_close("strided target", ops.upsample_cross_entropy(x, y), ops.upsample_cross_entropy(x, strided, impl="triton"), 2e-6)


@pytest.mark.parametrize("kind", ["none", "weighted none", "ohem", "ohem all", "ohem nothing", "smooth", "smooth sum"])
def test_family(kind):
    z, y, weight = 3*make_input([2, 7, 5, 6], 1), labels((2, 13, 19), 7), torch.linspace(.5, 2, 7)
    kw = {"none": dict(reduction="none"), "weighted none": dict(reduction="none", weight=weight), "ohem": dict(ohem=(.3, 50), weight=weight), "ohem all": dict(ohem=(.9, 10**7)),
          "ohem nothing": dict(ohem=(0.0, 0)), "smooth": dict(label_smoothing=.1, weight=weight), "smooth sum": dict(label_smoothing=.3, reduction="sum")}[kind]
    check_kernel(lambda logits: ops.upsample_cross_entropy(logits, y, **kw), lambda logits: ops.upsample_cross_entropy(logits, y, impl="ref", **kw), {"logits": z},
                 dtypes=("fp32",), orders=(1,), expect=CE)
    if "smooth" in kind:
        ref = plain(z.double(), y, **{**kw, **({"weight": weight.double()} if "weight" in kw else {})})
        assert_close("reference", ref, ops.upsample_cross_entropy(z, y, **kw), 2e-6)


@pytest.mark.parametrize("k", [1, 2, 33, 150, 300])
def test_numbers_of_classes(k):
    "One class, more classes than a histogram holds, more than a byte holds."
    z, y = make_input([1, k, 3, 4], 1), labels((1, 7, 9), k)
    y[0, 1, 1] = k - 1
    y = torch.where(y == 255, -1, y)
    got = ops.upsample_argmax(z, (7, 9), impl="triton")
    assert got.dtype == (torch.uint8 if k <= 256 else torch.int64)
    sure_labels(got, z, (7, 9))
    assert torch.equal(ops.upsample_confusion(z, y, -1, impl="triton"), ops.confusion(got, y, k, -1))
    assert_close("loss", ops.upsample_cross_entropy(z, y, -1) + 1e-9, ops.upsample_cross_entropy(z, y, -1, impl="triton") + 1e-9, 2e-6)


def test_only_void_and_empty_batches():
    y = torch.full((2, 9, 9), 255, dtype=torch.uint8)
    for kw, value in ((dict(empty="zero"), 0.0), (dict(ohem=(.9, 5)), 0.0), (dict(reduction="sum"), 0.0), ({}, float("nan"))):
        z = make_input([2, 3, 2, 2]).requires_grad_()
        loss = ops.upsample_cross_entropy(z, y, impl="triton", **kw)
        assert loss.item() == value or (value != value and loss.isnan())
        loss.backward()
        assert value != value or z.grad.abs().max() == 0, kw
    assert ops.upsample_confusion(z, y, impl="triton").sum() == 0
    with launches() as seen:
        none = make_input([2, 3, 2, 2])[:0]
        assert ops.upsample_argmax(none, (4, 4), impl="triton").shape == (0, 4, 4) and ops.upsample_confusion(none, y[:0], impl="triton").sum() == 0
        assert ops.upsample_cross_entropy(none, y[:0], impl="triton", empty="zero") == 0 and ops.upsample_dice(none, y[:0], impl="triton") == 0
    assert seen == []


def test_extremes():
    "Infinities and NaN come out as in PyTorch; equal logits give the first class; large fp16 logits stay finite."
    y = torch.zeros(1, 6, 6, dtype=torch.int32)
    for bad in (float("nan"), float("inf")):
        z = make_input([1, 3, 3, 3])
        z[0, 1, 1, 1] = bad
        assert ops.upsample_cross_entropy(z, y, impl="triton").isnan() and ops.upsample_cross_entropy(z, y, ohem=(.9, 5), impl="triton").isnan()
    z[0, 1, 1, 1] = float("-inf") # 0 times infinity, wherever the pixel takes part
    for impl in ("ref", "triton"): assert ops.upsample_cross_entropy(z, y, impl=impl).isnan()
    assert (ops.upsample_argmax(torch.ones(1, 5, 2, 2), (5, 5), impl="triton") == 0).all()
    z = (1e4*make_input([1, 4, 3, 3], 3).clamp(-1, 1)).half()
    t = torch.randint(0, 4, (1, 7, 7))
    assert_close("1e4", plain(z.double(), t), ops.upsample_cross_entropy(z, t, impl="triton"), 6e-4)


def test_dispatch_and_gradients():
    "float64 falls back; no gradient is asked for twice; a second derivative is refused."
    z, y = make_input([1, 3, 3, 3]), labels((1, 7, 7), 3)
    with launches() as seen: assert_close("fp64", plain(z.double(), y), ops.upsample_cross_entropy(z.double(), y, impl="triton"), 1e-12)
    assert seen == [] and ops.which("upsample_cross_entropy", z.double(), impl="triton")[0] == "ref"
    with launches() as seen: ops.upsample_cross_entropy(z, y, impl="triton")
    assert seen == ["_upsample_ce_fwd_kernel"]
    with launches() as seen: ops.upsample_cross_entropy(z, y, impl="ref")
    assert seen == []
    z.requires_grad_()
    g, = torch.autograd.grad(ops.upsample_cross_entropy(z, y, impl="triton"), z, create_graph=True)
    with pytest.raises(RuntimeError): g.sum().backward()
    loss = ops.upsample_cross_entropy(z, y, impl="triton")
    with ops.use_impl("ref"), launches() as seen: loss.backward()
    assert seen == ["_upsample_ce_bwd_kernel"] # the choice of the forward pass is kept


def test_operators():
    "The rules of torch's operators: schema, fake kernels, autograd."
    z, y = make_input([2, 3, 3, 4]).requires_grad_(), labels((2, 7, 5), 3).to(torch.int32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_upsample_nll_op.op, (z, y, None, 255, False, 0.0, 0.0, True), test_utils=tests)
    torch.library.opcheck(_upsample_nll_op.op, (z, y, torch.ones(3), 255, True, 0.1, 3.0, False), test_utils=tests)
    torch.library.opcheck(_upsample_argmax_op.op, (z.detach(), 7, 5, False), test_utils=tests)
    torch.library.opcheck(_upsample_confusion_op.op, (z.detach(), y, 255, False), test_utils=tests)
    torch.library.opcheck(_dice_op.op, (z, y, 255, False, True), test_utils=tests)
    torch.library.opcheck(_kl_op.op, (z, z.detach() + 1, None, 7, 5, 2.0, False), test_utils=tests)


def test_compiled():
    "One graph, with the kernels in it, forward and backward, and again for another size."
    def step(z, y):
        with_impl = ops.upsample_cross_entropy(z, y, impl="triton") + ops.upsample_dice(z, y, impl="triton")
        return with_impl, ops.upsample_argmax(z, (11, 9), impl="triton")
    fn = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((3, 4), (5, 6)):
        z, y = make_input([1, 3, *size]).requires_grad_(), labels((1, 11, 9), 3)
        with launches() as seen:
            loss, lab = fn(z, y)
            got, = torch.autograd.grad(loss, z)
        assert {"_upsample_ce_fwd_kernel", "_upsample_ce_bwd_kernel", "_dice_fwd_kernel", "_dice_bwd_kernel", "_upsample_argmax_kernel"} <= set(seen)
        ref = step(z, y)
        assert_close("loss", ref[0], loss, 1e-6)
        assert_close("dlogits", torch.autograd.grad(ref[0], z)[0], got, 1e-6)
        assert torch.equal(lab, ref[1])


def test_exported():
    "Exported graphs hold plain PyTorch whatever is asked for."
    class Head(torch.nn.Module):
        def forward(self, z, y): return ops.upsample_argmax(z, (8, 8)), ops.upsample_cross_entropy(z, y)
    z, y = make_input([1, 3, 4, 4]), labels((1, 8, 8), 3)
    with ops.use_impl("triton"): program = torch.export.export(Head(), (z, y))
    got, want = program.module()(z, y), Head()(z, y)
    assert "segkern" not in str(program.graph) and torch.equal(got[0], want[0])
    assert_close("loss", want[1], got[1], 1e-6)


def test_autocast():
    "A loss under autocast keeps its float32 gradient."
    z, y = make_input([1, 5, 4, 4]).requires_grad_(), labels((1, 13, 11), 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16): loss = ops.upsample_cross_entropy(z, y, impl="triton")
    assert_close("dlogits", torch.autograd.grad(plain(z, y), z)[0], torch.autograd.grad(loss, z)[0], 5e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_soft_losses(reduction):
    "Divergence and dice with other sizes, types and pixel weights."
    z, t, pixel = make_input([2, 3, 5, 4], 1), make_input([2, 3, 2, 9], 2), make_input([2, 19, 37], 3).abs()
    def ref(logits, teacher):
        up = lambda a: (F.interpolate(a, (19, 37), mode="bilinear", align_corners=True)/.5).log_softmax(1)
        per = F.kl_div(up(logits), up(teacher), reduction="none", log_target=True).sum(1)*pixel
        return per.sum() if reduction == "sum" else per.sum()/pixel.double().sum()
    check_kernel(lambda logits, teacher: ops.upsample_kl(logits, teacher, (19, 37), .5, pixel, True, reduction), ref, {"logits": layouts(z)["channels_last"], "teacher": t},
                 grads=("logits",), orders=(0,), expect=("_kl_fwd_kernel", "_kl_bwd_kernel"))
    assert ops.upsample_kl(z, z, (9, 9), impl="triton").abs() < 1e-6
    y = labels((2, 19, 37), 3)
    for a, b in zip(ops.upsample_dice_sums(z, y, impl="triton"), ops.upsample_dice_sums(z.double(), y)): assert_close("sums", b, a, 2e-6)
    with pytest.raises(ValueError, match="temperature"): ops.upsample_kl(z, t, (9, 9), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    "Real size on a real device, twice for races."
    z, y = make_input([2, 19, 64, 96], 1).to(dtype).requires_grad_(), labels((2, 512, 768), 19)
    limits = {torch.float32: (2e-6, 2e-5), torch.float16: (6e-4, 1e-3), torch.bfloat16: (4e-3, 8e-3)}[dtype]
    ref = z.detach().double().requires_grad_()
    plain(ref, y).backward()
    for _ in range(2):
        loss = ops.upsample_cross_entropy(z, y)
        assert_close("loss", plain(ref, y), loss, limits[0])
        assert_close("dlogits", ref.grad, torch.autograd.grad(loss, z)[0], limits[1])
    labels_, m = ops.upsample_argmax(z, (512, 768)), ops.upsample_confusion(z, y)
    assert torch.equal(m, ops.confusion(labels_, y, 19))
    assert ops.which("upsample_argmax", z)[0] == "triton"
