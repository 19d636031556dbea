"Inference: exactness of the rewrites, windows and scales against naive loops, class orders, bad input."

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from segkern.core import IMAGENET, load_table, seeded
from segkern.data import open_dataset
from segkern.ops.graphs import CudaRecorder, Replays, Rerun
from segkern.infer import PackedConv
from segkern.infer.metrics import Confusion
from segkern.infer import (
    class_lookup,
    conv_chains,
    evaluate,
    evaluating,
    fold_norm,
    legal_size,
    multiscale_probs,
    optimize,
    segment,
    sliding_logits,
    whole_logits,
    window_starts,
)
from segkern.backbones.blocks import ConvNormAct, resize
from segkern.testing import relative_l2, shared


class Net(nn.Module):
    "A small model with the interface of segkern's networks."

    def __init__(self, classes=("a", "b", "c", "d"), act="relu", multiple=1):
        super().__init__()
        self.name = "net"
        self.classes = list(classes)
        self.num_classes = len(classes)
        self.preprocess = IMAGENET
        self.multiple = multiple
        self.stem = ConvNormAct(3, 8, 3, stride=2, act=act)
        self.conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(8, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.pre = nn.BatchNorm2d(8, affine=False)
        self.after = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.aux = nn.Conv2d(8, self.num_classes, 1)
        self.classifier = nn.Conv2d(8, self.num_classes, 1)

    def outputs(self, x):
        if any(s % self.multiple for s in x.shape[-2:]):
            raise ValueError(f"sides must be multiples of {self.multiple}")
        y = self.stem(x)
        y = y + self.act(self.bn(self.conv(y)))
        y = self.bn1(self.shared(y)) + self.bn2(self.shared(y.mean(2, keepdim=True)))
        y = F.relu(y + self.after(self.pre(y)))
        return {"logits": self.classifier(y)} | ({} if self.aux is None else {"aux": self.aux(y)})

    def forward(self, x):
        return self.outputs(x)["logits"]

    def upsample(self, logits, size):
        return resize(logits, size, True)

    def predict(self, x, size=None):
        if self.training:
            raise RuntimeError("training mode")
        with torch.inference_mode():
            return self.upsample(self(x), size or x.shape[-2:]).argmax(1).to(torch.uint8)

    def deploy(self):
        self.aux = None
        return self


def net(dtype=torch.float32, seed=0, **kw):
    with seeded(seed):
        m = Net(**kw)
        for b in m.modules():
            if not isinstance(b, nn.BatchNorm2d):
                continue
            b.running_mean.uniform_(-0.5, 0.5)
            b.running_var.uniform_(0.3, 3)
            if b.affine:
                b.weight.data.uniform_(-2, 2)
                b.bias.data.uniform_(-0.5, 0.5)
    return m.to(dtype).eval()


class Images:
    "Pictures with given targets."

    def __init__(self, classes, items, name="images"):
        self.classes = list(classes)
        self.items = items
        self.name = name

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def picture(h, w, seed=0):
    return torch.randint(
        0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---- optimize


@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_folding_is_exact_in_double(act):
    m = net(torch.float64, act=act)
    x = torch.randn(2, 3, 37, 53, dtype=torch.float64)
    fast = optimize(m)
    assert relative_l2(m(x), fast(x)) < 1e-10
    assert fast.facts["bn_folded"] == 3 and not fast.facts["prepacked"]


@pytest.mark.parametrize("act", ["relu", "prelu"])
@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(prepack=False),
        dict(fold_bn=False),
        dict(channels_last=False),
        dict(fold_bn=False, channels_last=False, prepack=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 96), (101, 67), (1, 1), (2, 31)], ids=str)
def test_optimized_gives_the_same(act, kw, size):
    m = net(act=act)
    x = torch.randn(2, 3, *size)
    fast = optimize(m, **kw)
    assert relative_l2(m(x), fast(x)) < 2e-6
    assert (m.predict(x) == fast.predict(x)).float().mean() > 0.999
    assert fast.predict(x, (33, 44)).shape == (2, 33, 44)


def test_only_exact_pairs_are_folded():
    m = net()
    chains = {id(c): (n, r) for c, n, r in conv_chains(m)}
    assert id(m.shared) not in chains, "a weight used twice"
    assert chains[id(m.conv)] == (m.bn, m.act) and chains[id(m.stem.conv)][0] is not None
    assert chains[id(m.after[0])] == (m.after[1], None) and chains[id(m.classifier)] == (None, None)
    fast = optimize(m)
    left = [n for n, b in fast.named_modules() if isinstance(b, nn.BatchNorm2d)]
    assert left == ["net.bn1", "net.bn2", "net.pre"]


@pytest.mark.parametrize("reader", ["cat", "setitem", "property", "item", "in place", "returned"])
def test_any_other_reader_prevents_folding(reader):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            if reader == "cat":
                return torch.cat([y, self.bn(y)], 1)
            if reader == "setitem":
                out = torch.zeros_like(x[:, :1].expand(-1, 4, -1, -1))
                out[:] = y
                return self.bn(y) + out
            if reader == "property":
                return self.bn(y) + y.mT.mT
            if reader == "item":
                return self.bn(y) * y[0, 0, 0, 0].item()
            if reader == "in place":
                z = self.bn(y)
                return z + y.add_(1)
            return self.bn(y), y

    assert [n for _, n, _ in conv_chains(Two().eval())] == [None]


def test_a_tied_weight_is_left_alone():
    m = net()
    m.after[0] = nn.Conv2d(8, 8, 3, padding=1)
    m.twin = nn.Conv2d(8, 8, 3, padding=1)
    m.twin.weight = m.after[0].weight
    assert all(c is not m.after[0] for c, *_ in conv_chains(m.eval()))


def test_reflect_padding_and_subclasses_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    m = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        Own(4),
    ).eval()
    assert [(c is m[2], n) for c, n, _ in conv_chains(m)] == [(True, None)]


def test_norm_without_statistics_is_left_alone():
    m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert conv_chains(m) == [(m[0], None, None)]


def test_fold_norm_with_and_without_bias():
    for bias in (True, False):
        with seeded(1):
            conv = nn.Conv2d(3, 5, 3, bias=bias).double()
            bn = nn.BatchNorm2d(5).double().eval()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 2)
        x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
        truth = bn(conv(x)).detach()
        assert relative_l2(truth, fold_norm(conv, bn)(x)) < 1e-12


def test_original_is_untouched():
    m = net().train()
    before = copy.deepcopy(m.state_dict())
    modes = [x.training for x in m.modules()]
    optimize(m)(torch.randn(1, 3, 32, 32))
    assert [x.training for x in m.modules()] == modes and m.aux is not None
    after = m.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in m.parameters()) and not any(
        len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules()
    )


def test_optimized_keeps_the_contract():
    m = net()
    fast = optimize(m)
    assert (
        fast.classes == m.classes
        and fast.preprocess == m.preprocess
        and fast.num_classes == 4
        and not fast.training
    )
    assert list(fast.outputs(torch.randn(1, 3, 16, 16))) == ["logits"]
    assert fast.eval() is fast
    for bad in (
        lambda: fast.train(),
        lambda: fast.double(),
        lambda: optimize(m, prepack=True, compile=True),
        lambda: optimize(m, dtype=torch.bfloat16, compile=True),
    ):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(AttributeError):
        fast.nothing


def test_bf16_labels_mostly_agree(caplog):
    m = net()
    x = torch.randn(1, 3, 64, 64)
    fast = optimize(m, dtype=torch.bfloat16)
    logits = fast(x)
    assert logits.dtype == torch.float32 and relative_l2(m(x), logits) < 0.05
    assert (fast.predict(x) == m.predict(x)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_that_the_processor_cannot_pack(dtype, monkeypatch):
    "Where oneDNN does not take a type, weights stay as they are; asked for by name, packing is refused."
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: False)
    m = net()
    x = torch.randn(1, 3, 64, 64)
    fast = optimize(m, dtype=dtype)
    assert not fast.facts["prepacked"] and not any(
        isinstance(c, PackedConv) for c in fast.modules()
    )
    assert relative_l2(m(x), fast(x)) < 0.05
    with pytest.raises(ValueError, match=f"packs no weights in {dtype}"):
        optimize(m, dtype=dtype, prepack=True)


# ---- graphs


class Counting(Rerun):
    "Counts what is recorded."

    def __init__(self):
        super().__init__()
        self.recorded = []

    def record(self, fn, x):
        self.recorded.append((tuple(x.shape), x.dtype))
        return super().record(fn, x)


def graphed(m=None, after=1, recorder=None, **kw):
    "An optimized network that replays on the CPU."
    fast = optimize(m or net(), **kw)
    fast.replays = Replays(fast.replays.limit, fast.replays.copies, after, recorder or Counting())
    return fast


def as_bytes(x):
    return (x * 40 + 128).clamp(0, 255).to(torch.uint8)


CALLS = {
    "forward": lambda m, x: m(x),
    "outputs": lambda m, x: m.outputs(x)["logits"],
    "predict": lambda m, x: m.predict(x, (33, 44)),
    "segment": lambda m, x: segment(m, as_bytes(x)),
    "resized": lambda m, x: segment(m, as_bytes(x), size=(24, 40)),
    "evaluate": lambda m, x: torch.tensor(evaluate(m, answers(net()))["miou"]),
    "sliding": lambda m, x: sliding_logits(m, x, 16, 8),
}


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("call", CALLS)
def test_replays_give_the_same(call, after):
    "Every result of ten calls on pictures of two sizes, compared after the last call."
    fast = graphed(after=after)
    plain = optimize(net())
    inputs = [torch.randn(2, 3, *((37, 53), (40, 24))[i % 2]) for i in range(10)]
    with torch.inference_mode():
        got, want = ([CALLS[call](m, x) for x in inputs] for m in (fast, plain))
    assert (
        all(torch.equal(a, b) for a, b in zip(got, want))
        and 1 <= len(fast.replays.recorder.recorded) <= 8
    )


def test_a_whole_picture_is_one_graph():
    fast = graphed(net(multiple=16), after=3)
    for i in range(5):
        segment(fast, picture(37, 53, i))
    assert fast.replays.recorder.recorded == [((1, 3, 37, 53), torch.uint8)]


def test_results_that_nobody_copies():
    x = torch.randn(1, 3, 32, 32)
    fast = graphed(copies=False)
    first = fast(x)
    second = fast(x + 1)
    assert first is second and torch.equal(second, optimize(net())(x + 1))


def test_the_oldest_graph_goes():
    fast = graphed(graphs=2)
    for size in (16, 24, 16, 32, 16, 24):
        fast(torch.randn(1, 3, size, size))
    assert [s[-1] for s, _ in fast.replays.recorder.recorded] == [16, 24, 32, 24]
    assert [key[2][-1] for key in fast.replays.graphs] == [16, 24]


def test_sizes_that_come_once_are_not_recorded():
    fast = graphed(after=3)
    for size in range(8, 100):
        fast(torch.randn(1, 3, size, 8))
    assert not fast.replays.recorder.recorded and len(fast.replays.calls) == 64


def test_new_weights_forget_the_graphs():
    fast = graphed(prepack=False)
    x = torch.randn(1, 3, 32, 32)
    before = fast(x)
    state = {k: v * 2 for k, v in fast.state_dict().items()}
    for change in (lambda: fast.load_state_dict(state, assign=True), lambda: fast.double().float()):
        change()
        assert not fast.replays.graphs and not torch.equal(before, fast(x)) and fast.replays.graphs
    plain = optimize(net(), prepack=False)
    plain.load_state_dict(state)
    assert torch.equal(fast(x), plain(x))


def test_replays_stay_out_of_the_way():
    "Of autograd, of tracing, of subclasses; with no graphs and on a device without them nothing is recorded."
    x = torch.randn(1, 3, 32, 32)
    recorder = Counting()
    r = Replays(after=1, recorder=recorder)
    seen = []

    def double(x):
        seen.append(torch.is_grad_enabled())
        return 2 * x

    assert (
        torch.equal(r(double, x.requires_grad_()), 2 * x)
        and r(double, x).requires_grad
        and not recorder.recorded
    )
    x = x.detach()
    with torch.no_grad():
        r(double, nn.Parameter(x))
        torch.compile(lambda t: r(double, t), backend="eager")(x)
        Replays(limit=0, after=1, recorder=recorder)(double, x)
        Replays(after=1)(double, x)
        assert not recorder.recorded
        r(double, x)
    assert len(recorder.recorded) == 1
    with pytest.raises(ValueError, match="0 or more, got -1"):
        optimize(net(), graphs=-1)


def test_kinds_of_calls_have_graphs_of_their_own():
    from segkern.ops import use_impl

    fast = graphed()
    x = torch.randn(1, 3, 32, 32)
    for impl in ("auto", "ref"):
        with use_impl(impl):
            fast.predict(x), fast.predict(x, (16, 16)), fast(x)
    fast.replays.limit = 9
    with torch.autocast("cpu", torch.bfloat16):
        fast(x)
    assert len(fast.replays.recorder.recorded) == 7


class Refusing(Counting):
    "A device on which nothing can be captured."

    def record(self, fn, x):
        super().record(fn, x)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_runs_as_it_is(caplog):
    fast = graphed(recorder=Refusing())
    x = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(fast(x), optimize(net())(x)) for _ in range(3))
    said = (
        "no graph of _forward for (1, 3, 32, 32): operation not permitted when stream is capturing"
    )
    assert [r.getMessage() for r in caplog.records if "graph" in r.message] == [said]
    assert len(fast.replays.recorder.recorded) == 1


def test_an_error_of_the_network_stays_its_error():
    class Deep(Net):
        def outputs(self, x):
            return {"logits": F.conv2d(x, torch.ones(4, 3, 9, 9))}

    fast = graphed()
    fast.net = Deep().eval()
    for _ in range(3):
        with pytest.raises(ValueError, match="cannot take a picture of 4x5"):
            segment(fast, picture(4, 5))


def test_graphs_are_not_copied_or_saved():
    fast = graphed(prepack=False)
    x = torch.randn(1, 3, 32, 32)
    want = fast(x)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not again.replays.graphs and torch.equal(again(x), want) and again.replays.graphs
        again.net.classifier.weight.data.zero_()
        assert not torch.equal(again(x), want) and torch.equal(fast(x), want)


def test_threads_share_a_model():
    fast = graphed(after=2)
    plain = optimize(net())
    inputs = [torch.randn(1, 3, 24 + 8 * (i % 3), 32) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(fast, inputs))
    assert (
        all(torch.equal(a, plain(x)) for a, x in zip(got, inputs))
        and len(fast.replays.recorder.recorded) == 3
    )


class Clock(Counting):
    "Takes a time from the layout that the network has at the moment."

    def __init__(self, times=(1, 2)):
        super().__init__()
        self.times = times
        self.model = None

    def milliseconds(self, run):
        run()
        return self.times[self.model.channels_last]


@pytest.mark.parametrize("times", [(1, 2), (2, 1)], ids=["NCHW", "channels_last"])
def test_the_faster_layout_stays(times):
    fast = graphed(recorder=Clock(times), prepack=False)
    x = torch.randn(1, 3, 32, 48)
    fast.replays.recorder.model = fast
    fast.channels_last = None
    want = net().predict(x)
    chosen = times[1] < times[0]
    labels = [fast.predict(x) for _ in range(3)]
    assert fast.channels_last == fast.facts["channels_last"] == chosen
    assert all((y == want).float().mean() > 0.999 for y in labels)
    weight = fast.net.stem.conv.weight
    layout = torch.channels_last if chosen else torch.contiguous_format
    assert weight.is_contiguous(memory_format=layout) and not weight.is_inference()
    assert len(fast.replays.recorder.recorded) == 3, "two for the times, one to stay"


def test_a_layout_that_cannot_be_measured(caplog):
    fast = graphed(recorder=Refusing(), prepack=False)
    x = torch.randn(1, 3, 32, 48)
    fast.channels_last = None
    assert relative_l2(net()(x), fast(x)) < 2e-6 and fast.channels_last is True
    assert "layouts were not compared" in caplog.text
    with pytest.raises(ValueError, match="True, False or 'auto', got 'nhwc'"):
        optimize(net(), channels_last="nhwc")


def test_the_order_of_a_capture(monkeypatch):
    "Calls of CUDA's interface, without a GPU: warm-up beside, one pool for all graphs, turns that wait for each other."
    cuda = MagicMock()
    cuda.is_current_stream_capturing.return_value = False
    monkeypatch.setattr(torch, "cuda", cuda)
    recorder = CudaRecorder()
    calls = []
    recorder.takes = lambda x: True
    r = Replays(after=1, recorder=recorder)
    x = torch.ones(3)

    def double(x):
        calls.append(
            cuda.graph.return_value.__enter__.call_count
            - cuda.graph.return_value.__exit__.call_count
        )
        return 2 * x

    with torch.no_grad():
        for size in (3, 3, 4):
            r(double, torch.ones(size))
    assert calls == [0, 0, 0, 1] * 2, "three times beside the stream, once in the capture"
    assert (
        cuda.CUDAGraph.return_value.replay.call_count == 3
        and cuda.graph_pool_handle.call_count == 1
    )
    assert {c.kwargs["pool"] for c in cuda.graph.call_args_list} == {
        cuda.graph_pool_handle.return_value
    }
    # five turns: two captures and three replays
    assert cuda.Event.call_count == 1 and cuda.Event.return_value.record.call_count == 5
    assert cuda.current_stream.return_value.wait_event.call_count == 4
    r.clear()
    with torch.no_grad():
        r(double, x)
    assert cuda.graph_pool_handle.call_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False, "auto"], ids=str)
def test_graphs_on_a_gpu(channels_last):
    m = net().cuda()
    fast = optimize(m, channels_last=channels_last)
    bare = optimize(m, channels_last=bool(channels_last), graphs=0)
    x = [torch.randn(1, 3, 64 + 32 * (i % 2), 96, device="cuda") for i in range(12)]
    got = [(fast.predict(t), segment(fast, picture(40, 56, i))) for i, t in enumerate(x)]
    for i, (t, (labels, whole)) in enumerate(zip(x, got)):
        assert (labels == bare.predict(t)).float().mean() > 0.999
        assert (whole == segment(bare, picture(40, 56, i))).float().mean() > 0.999
    assert (
        not fast.replays.failed
        and len(fast.replays.graphs) == 3
        and fast.channels_last in (True, False)
    )
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(fast.predict, x))
    assert all(torch.equal(a, labels) for a, (labels, _) in zip(again, got))


# ---- logits


def test_window_starts_cover():
    for n in range(1, 40):
        for w in (1, 3, 7, 16):
            for s in {1, min(2, w), w}:
                starts = window_starts(n, w, s)
                seen = np.zeros(n)
                for a in starts:
                    seen[a : a + w] += 1
                assert (
                    seen.min() >= 1
                    and starts[-1] + w <= max(n, w)
                    and len(set(starts)) == len(starts)
                )


def test_sliding_against_a_naive_loop():
    m = net()
    x = torch.randn(2, 3, 47, 60)
    total = torch.zeros(2, 4, 47, 60)
    count = torch.zeros(47, 60)
    tops = [0, 11, 22, 23]
    lefts = [0, 17, 28]
    with torch.no_grad():
        for t in tops:
            for left in lefts:
                total[:, :, t : t + 24, left : left + 32] += m.upsample(
                    m(x[:, :, t : t + 24, left : left + 32]), (24, 32)
                )
                count[t : t + 24, left : left + 32] += 1
        got = sliding_logits(m, x, (24, 32), (11, 17))
    assert relative_l2(total / count, got) < 1e-6


@pytest.mark.parametrize("window", [(60, 47), (100, 100), 64])
def test_window_that_covers_is_the_whole(window):
    m = net()
    x = torch.randn(1, 3, 47, 47)
    with torch.no_grad():
        assert torch.equal(sliding_logits(m, x, window), whole_logits(m, x))


@pytest.mark.parametrize(
    "kw",
    [dict(window=0), dict(window=(8, 8, 8)), dict(window=8, stride=9), dict(window=8.5)],
    ids=str,
)
def test_bad_windows(kw):
    with pytest.raises((ValueError, TypeError)):
        sliding_logits(net(), torch.randn(1, 3, 16, 16), **kw)


def test_multiscale_against_a_naive_loop():
    m = net()
    x = torch.randn(1, 3, 40, 50)
    total = 0
    with torch.no_grad():
        for s in (0.5, 1.3):
            y = F.interpolate(
                x, (round(40 * s), round(50 * s)), mode="bilinear", align_corners=False
            )
            total = (
                total
                + m.upsample(m(y), (40, 50)).softmax(1)
                + m.upsample(m(y.flip(-1)), (40, 50)).flip(-1).softmax(1)
            )
        got = multiscale_probs(m, x, (0.5, 1.3))
        logits = multiscale_probs(m, x, (0.5, 1.3), combine="logits")
    assert (
        relative_l2(total / 4, got) < 1e-6
        and (logits.sum(1) - 1).abs().max() < 1e-5
        and relative_l2(got, logits) > 1e-6
    )
    for bad in (dict(scales=()), dict(scales=(0,)), dict(combine="max")):
        with pytest.raises(ValueError):
            multiscale_probs(m, x, **bad)


# ---- segment


@pytest.mark.parametrize("size", [(1, 1), (101, 67), (64, 64), (3, 200)], ids=str)
@pytest.mark.parametrize("multiple", [1, 32])
def test_segment_any_size(size, multiple):
    m = net(multiple=multiple)
    image = picture(*size)
    labels = segment(m, image)
    assert labels.shape == size and labels.dtype == torch.uint8 and labels.max() < 4
    x = IMAGENET(image[None])
    if legal_size(m, size) != size:
        x = F.interpolate(x, legal_size(m, size), mode="bilinear", align_corners=False)
    assert torch.equal(labels, m.predict(x, size)[0])


def test_segment_takes_what_people_have(tmp_path):
    m = net()
    image = picture(31, 45)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    pil.save(tmp_path / "a.png")
    truth = segment(m, image)
    forms = pil, np.asarray(pil), tmp_path / "a.png", str(tmp_path / "a.png"), pil.convert("RGBA")
    for form in forms:
        assert torch.equal(segment(m, form), truth)
    assert torch.equal(segment(m, torch.stack([image, image]))[1], truth)
    assert segment(m, image, size=(64, 64)).shape == (31, 45)
    m.train()
    segment(m, image)
    assert m.training


def test_segment_refuses(tmp_path):
    m = net()
    image = picture(8, 8)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(picture(64, 64).permute(1, 2, 0).numpy()).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    bad = [
        image.float(),
        image[:1],
        image[0],
        image.numpy(),
        image.permute(1, 2, 0).numpy()[..., :2],
        image[:, :0],
        None,
        7,
        tmp_path / "bad.png",
        tmp_path / "half.png",
        Image.new("I;16", (8, 8)),
        Image.new("F", (8, 8)),
    ]
    for b in bad:
        with pytest.raises(ValueError):
            segment(m, b)
    with pytest.raises(ValueError):
        segment(m, image, size=0)
    with pytest.raises(FileNotFoundError):
        segment(m, tmp_path / "missing.png")


def test_segment_says_when_a_picture_is_too_small():
    class Deep(Net):
        def outputs(self, x):
            return {"logits": F.conv2d(x, torch.ones(4, 3, 9, 9))}

    with pytest.raises(ValueError, match="cannot take a picture of 4x5"):
        segment(Deep().eval(), picture(4, 5))


# ---- evaluate


def answers(m, order=None, sizes=((20, 30), (20, 30), (33, 17))):
    "A dataset on which `m` is always right, classes renumbered by `order`."
    order = order or list(range(m.num_classes))
    back = torch.tensor(order).argsort().to(torch.uint8)
    images = [picture(*s, seed=i) for i, s in enumerate(sizes)]
    return Images([m.classes[o] for o in order], [(i, back[segment(m, i).long()]) for i in images])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0]], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_classes_are_permuted_by_name(order, batch):
    m = net()
    r = evaluate(m, answers(m, order), batch=batch)
    assert (
        r["miou"] == r["pixel_acc"] == 1
        and r["n_images"] == 3
        and r["permuted"] == (order != [0, 1, 2, 3])
    )
    assert r["classes"] == [m.classes[o] for o in order] and r["protocol"] == "whole"


def test_sanet_order_checkpoint_on_segnet_order_labels():
    orders = load_table("camvid")["orders"]
    m = net(classes=orders["sanet"])
    data = answers(m, [orders["sanet"].index(c) for c in orders["segnet"]])
    assert data.classes == orders["segnet"]
    right = evaluate(m, data)
    wrong = evaluate(m, data, classes=orders["segnet"])
    assert right["miou"] == 1 and wrong["miou"] < 0.5


def test_other_classes_are_refused():
    m = net()
    data = answers(m)
    for classes, word in ((["a", "b", "c", "x"], "x"), (["a", "b", "c"], "d")):
        data.classes = classes
        with pytest.raises(ValueError, match=word):
            evaluate(m, data)
    data.classes = ["a", "b", "c"]
    m.classes = None
    with pytest.raises(ValueError, match="4 classes, the dataset 3"):
        evaluate(m, data)
    assert class_lookup(["x", "y"], ["y", "x"])[:2].tolist() == [1, 0]


def test_void_and_limit_and_modes():
    m = net().train()
    m.bn.eval()
    data = answers(m)
    data.items = [
        (i, torch.where(torch.arange(t.shape[1]) < 5, 255, t).to(torch.uint8))
        for i, t in data.items
    ]
    r = evaluate(m, data, limit=2)
    assert r["n_pixels"] == 2 * 20 * 25 and r["n_images"] == 2 and r["miou"] == 1
    assert m.training and m.stem.training and not m.bn.training
    void = Images(m.classes, [(picture(9, 9), torch.full((9, 9), 255, dtype=torch.uint8))])
    assert evaluate(m, void)["n_pixels"] == 0
    with pytest.raises(RuntimeError), evaluating(m):
        raise RuntimeError
    assert m.training and not m.bn.training and torch.is_grad_enabled()


def test_protocols():
    m = net(multiple=8)
    data = answers(m, sizes=((40, 48), (41, 50)))
    assert evaluate(m, data)["miou"] == 1
    assert evaluate(m, data, "sliding", window=64)["miou"] == 1
    assert evaluate(m, data, "multiscale", scales=(1.0,), flip=False)["miou"] == 1
    r = evaluate(m, data, "multiscale", scales=(0.75, 1.0), window=24, miou="all")
    assert (
        r["scales"] == [0.75, 1.0] and r["flip"] and r["miou_over"] == "all" and 0 < r["miou"] <= 1
    )
    for bad in (
        dict(protocol="tiles"),
        dict(protocol="sliding"),
        dict(limit=0),
        dict(batch=0),
        dict(miou="best"),
    ):
        with pytest.raises(ValueError):
            evaluate(m, data, **bad)
    with pytest.raises(ValueError):
        evaluate(m, Images(m.classes, []))
    uneven = Images(m.classes, [(picture(8, 8), torch.zeros(8, 9, dtype=torch.uint8))])
    with pytest.raises(ValueError, match="differ in size"):
        evaluate(m, uneven)


def test_evaluate_takes_an_optimized_model_and_workers():
    m = net()
    assert evaluate(optimize(m), answers(m), workers=1)["pixel_acc"] > 0.999


@pytest.mark.slow
def test_compiled_equals_eager():
    m = net()
    fast = optimize(m, compile=True)
    for size in ((32, 48), (33, 47)):
        x = torch.randn(1, 3, *size)
        assert (
            relative_l2(m(x), fast(x)) < 2e-6
            and (m.predict(x) == fast.predict(x)).float().mean() > 0.999
        )


# ---- real data


def test_camvid_in_both_orders_scores_the_same():
    root = shared("data/camvid")
    if root is None:
        pytest.skip("the shared CamVid folder is absent")
    orders = load_table("camvid")["orders"]
    m = net(classes=orders["sanet"])
    r = {o: evaluate(m, open_dataset("camvid", root, "val", order=o), limit=2) for o in orders}
    assert (
        r["segnet"]["permuted"] and not r["sanet"]["permuted"] and r["segnet"]["n_pixels"] > 100_000
    )
    iou = {o: dict(zip(r[o]["classes"], r[o]["iou"])) for o in orders}
    assert (
        iou["segnet"] == iou["sanet"]
        and r["segnet"]["miou"] == pytest.approx(r["sanet"]["miou"])
        and r["sanet"]["miou"] > 0
    )


@pytest.mark.parametrize("restrict", [False, True])
def test_whole_pictures_are_counted_from_small_logits(restrict, monkeypatch):
    "With the same counts as from labels, classes in another order, batches and a model with more outputs than classes."
    from segkern import create_model

    module = sys.modules["segkern.infer.evaluate"]

    with seeded(0):
        m = create_model("s2fpn_r18", num_classes=5 if restrict else 4).eval()
    m.classes = None if restrict else list("abcd")
    order = [0, 1, 2, 3] if restrict else [2, 0, 3, 1]
    targets = [
        torch.randint(0, 5, (70, 90), generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    items = [
        (picture(70, 90, seed=i), t.where(t < 4, 255).to(torch.uint8))
        for i, t in enumerate(targets)
    ]
    data = Images([list("abcd")[o] for o in order], items)
    calls = []
    counted = Confusion.update_logits
    monkeypatch.setattr(
        Confusion, "update_logits", lambda self, *a: calls.append(1) or counted(self, *a)
    )
    got = evaluate(m, data, batch=2, restrict=restrict)
    assert len(calls) == 2
    monkeypatch.setattr(module, "one_bilinear_step", lambda model: False)
    want = evaluate(m, data, batch=2, restrict=restrict)
    assert len(calls) == 2 and {k: v for k, v in got.items() if k != "seconds"} == {
        k: v for k, v in want.items() if k != "seconds"
    }
    items[1][1][3, 3] = 200
    monkeypatch.undo()
    with pytest.raises(ValueError, match="id 200"):
        evaluate(m, data, restrict=restrict)
