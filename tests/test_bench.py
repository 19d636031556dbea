"Bench: sane numbers on known sleeps, hand-counted costs, files that read back."

import time

import pytest
import torch
from torch import nn

from segkern.bench import (
    Comparison,
    Timing,
    bench_models,
    compare,
    cost,
    describe,
    image_to_labels,
    latency,
    measure,
    paper_outputs,
    paper_speed,
    quantile,
    read_csv,
    write_csv,
)
from segkern.bench.cost import graph_peers
from segkern.core import IMAGENET, seeded
from segkern.infer import optimize
from segkern.backbones.blocks import ConvNormAct, resize


class Net(nn.Module):
    "Two convolutions and an auxiliary head; `literal` doubles the work."

    literal = False

    def __init__(self):
        super().__init__()
        self.name = "net"
        self.classes = None
        self.num_classes = 3
        self.preprocess = IMAGENET
        self.multiple = 1
        self.calls = 0
        self.body = ConvNormAct(3, 4, 3, stride=2)
        self.classifier = nn.Conv2d(4, 3, 1)
        self.aux = nn.Conv2d(4, 3, 1)

    def outputs(self, x):
        self.calls += 1
        y = self.body(x)
        if self.literal:
            self.body(x)
        return {"logits": self.classifier(y)} | ({} if self.aux is None else {"aux": self.aux(y)})

    def forward(self, x):
        return self.outputs(x)["logits"]

    def upsample(self, logits, size):
        return resize(logits, size)

    def predict(self, x, size=None):
        return self.upsample(self(x), size or x.shape[-2:]).argmax(1).to(torch.uint8)

    def deploy(self):
        self.aux = None
        return self


@pytest.fixture
def net():
    with seeded(0):
        return Net().eval()


def test_quantiles():
    assert [quantile([4, 1, 3, 2], q) for q in (0, 0.5, 1)] == [1, 2.5, 4] and quantile(
        [7], 0.2
    ) == 7
    with pytest.raises(ValueError):
        quantile([], 0.5)


def test_measure_on_a_known_sleep():
    t = measure(lambda: time.sleep(0.02), warmup=1, repeats=6)
    d = t.to_dict()
    assert t.n == 6 and 20 <= d["ms_20"] <= d["ms_50"] <= d["ms_80"] and d["ms_20"] < 200


def test_measure_counts_and_synchronises():
    calls = []
    syncs = []
    measure(lambda: calls.append(1), warmup=2, repeats=4, sync=lambda: syncs.append(1))
    assert len(calls) == 6 and len(syncs) == 8
    assert measure(lambda: time.sleep(0.002), min_time=0.03).n >= 5
    with pytest.raises(ValueError):
        measure(print, repeats=0)


def test_processor_time_does_not_count_sleep():
    assert measure(lambda: time.sleep(0.05), warmup=0, repeats=3, clock="cpu").median < 0.04
    with pytest.raises(ValueError, match="wall, cpu"):
        measure(print, clock="sun")


def test_compare_takes_turns():
    log = []
    c = compare(
        {
            "a": lambda: (log.append("a"), time.sleep(0.09)),
            "b": lambda: (log.append("b"), time.sleep(0.03)),
        },
        rounds=4,
        warmup=1,
    )
    assert log == ["a", "b"] * 5 and 1.3 < c.ratio("b") < 4 and c.ratio("a") == 1
    assert [r["n"] for r in c.rows()] == [4, 4] and "ratio" in str(c)
    for bad in (lambda: compare({}), lambda: compare({"a": print}, rounds=0)):
        with pytest.raises(ValueError):
            bad()


def test_ratio_is_taken_within_rounds():
    c = Comparison({"a": Timing((1.0, 10.0, 2.0)), "b": Timing((0.5, 5.0, 1.0))})
    assert c.ratio("b", 0.2) == c.ratio("b", 0.8) == 2 and c.ratio_of_medians("b") == 2


def test_cost_by_hand(net):
    body = 8 * 16 * 4 * 27
    head = 8 * 16 * 4 * 3
    ours = cost(net, (16, 32))
    paper = cost(net, (16, 32), "paper")
    assert ours["macs"] == body + head and paper["macs"] == 2 * body + 2 * head
    assert paper["params"] - ours["params"] == 15 and net.aux is not None and not net.literal
    assert cost(net, (16, 32), batch=3)["macs"] == 3 * (body + head)
    with pytest.raises(ValueError):
        cost(net, (16, 32), "best")


def test_paper_protocol(net):
    maps = paper_outputs(net, torch.randn(1, 3, 10, 14))
    assert {n: tuple(t.shape) for n, t in maps.items()} == {
        "logits": (1, 3, 10, 14),
        "aux": (1, 3, 10, 14),
    }
    was = torch.backends.cudnn.benchmark
    r = paper_speed(net, (16, 16), 2, 5)
    assert (
        r["iterations"] == 5
        and r["fps"] == pytest.approx(1e3 / r["ms"])
        and torch.backends.cudnn.benchmark == was
        and net.calls == 1
    )


def test_describe_and_latency(net):
    x = torch.zeros(2, 3, 8, 12)
    plain = describe(net, x)
    fast = describe(optimize(net), x)
    assert (
        plain["layout"] == "NCHW"
        and plain["bn_folded"] == 0
        and plain["dtype"] == "float32"
        and plain["device"]
    )
    assert (
        fast["layout"] == "channels_last"
        and fast["bn_folded"] == 1
        and fast["aux_heads"] == "dropped"
    )
    r = latency(net, (8, 12), batch=2, repeats=3)
    assert (
        r["n"] == 3
        and r["fps"] == pytest.approx(2e3 / r["ms_50"])
        and (r["height"], r["width"], r["batch"]) == (8, 12, 2)
    )


def test_peers_of_the_graphs_give_the_same_labels(net, monkeypatch):
    compiler = torch.compile
    asked = []

    def eager(f, **kw):
        asked.append(kw)
        return compiler(f, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", eager)
    image = torch.randint(0, 256, (1, 3, 24, 40), dtype=torch.uint8)
    forms = graph_peers(net, None, "optimized")
    assert list(forms) == ["optimized without graphs", "optimized reduce-overhead"]
    assert asked == [dict(mode="reduce-overhead", dynamic=False)]
    want = net.predict(net.preprocess(image))
    for m, f in forms.values():
        assert (f(m, image) == want).float().mean() > 0.999 and m.replays.limit == 0


@pytest.mark.gpu
def test_graphs_and_their_peers_on_a_gpu(net):
    rows = {r["form"]: r for r in image_to_labels(net.cuda(), (96, 160), rounds=5, dtypes=())}
    assert list(rows)[2:] == ["optimized", "optimized without graphs", "optimized reduce-overhead"]
    assert all(r["agreement"] > 0.99 for r in rows.values()) and rows["optimized"]["graphs"] == 4


def test_image_to_labels(net):
    image = torch.randint(
        0, 256, (1, 3, 33, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rows = image_to_labels(net, image, rounds=3, warmup=1)
    assert [r["form"] for r in rows] == ["paper", "plain", "optimized", "optimized bfloat16"]
    assert (
        rows[0]["ratio"] == 1
        and rows[1]["ratio_plain"] == 1
        and rows[1]["agreement"] == 1
        and rows[2]["agreement"] > 0.999
    )
    assert (
        rows[0]["aux_heads"] == "computed"
        and rows[3]["dtype"] == "bfloat16"
        and rows[2]["dtype"] == "float32"
    )


def test_csv_round_trip(tmp_path):
    rows = [dict(name="a", ms=1.25, note=None), dict(name="b, quoted", ms=3, extra=True)]
    back = read_csv(write_csv(tmp_path / "new" / "x.csv", rows))
    assert (
        back[0]["ms"] == 1.25
        and back[1]["name"] == "b, quoted"
        and back[1]["ms"] == 3
        and back[0]["note"] is None
    )
    assert all(r["date"] and r["torch"] and r["cpu"] for r in back) and [
        p.name for p in (tmp_path / "new").iterdir()
    ] == ["x.csv"]


def test_bench_models(net, tmp_path):
    made = []

    def create(name):
        made.append(name)
        return Net()

    rows = bench_models(
        ["one", net],
        [(16, 24), (9, 7)],
        tmp_path / "m.csv",
        create=create,
        device="cpu",
        paper=True,
        warmup=1,
        repeats=2,
    )
    assert made == ["one"] and len(rows) == 12 and len(read_csv(tmp_path / "m.csv")) == 12
    assert {r["form"] for r in rows} == {"plain", "optimized", "paper protocol"} and all(
        r["ms_50"] > 0 and r["gmacs"] > 0 for r in rows
    )
    assert len(bench_models([net], [(8, 8)], optimized=False, device="cpu", repeats=2)) == 1


@pytest.mark.parametrize("protocol", ["s2fpn", "ddrnet", "mmseg"])
def test_a_papers_clock_on_a_run(protocol, tmp_path, capsys):
    "A run folder by the protocol of a paper: its classes, its size, what is on the clock."
    from segkern.bench.published import SPEED
    from segkern.bench.tables import read_csv
    from segkern.cli import main
    from segkern.models import create_model, save

    net = create_model("dsanet", num_classes=11, dataset="camvid")
    save(net, tmp_path / "net.safetensors")
    out = tmp_path / "speed.csv"
    how = ["--protocol", protocol, "--repeats", "1", "--device", "cpu", "--out", str(out)]
    # the paper's own size once; it takes seconds
    how += [] if protocol == "s2fpn" else ["--size", "64x96"]
    assert main(["bench", "models", str(tmp_path / "net.safetensors"), *how]) in (0, None)
    text = capsys.readouterr().out
    assert SPEED[protocol].holds in text and "threads" in text
    (row,) = read_csv(out)
    assert SPEED["ddrnet"].sizes["camvid"] == (720, 960)
    size = (360, 480) if protocol == "s2fpn" else (64, 96)
    assert (row["height"], row["width"]) == size
    assert row["passes"] == 1 and row["fps"] > 0 and row["model"] == "dsanet"
    assert (row["bn_folded"] > 0) == (protocol == "ddrnet")
