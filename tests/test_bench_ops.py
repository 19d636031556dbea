"The op benchmark: a dry run, its file, what dispatch learns from it, and clear refusals."

import pytest
import torch
from typer.testing import CliRunner

from segkern import bench_ops, ops
from segkern.bench import read_csv
from segkern.ops import dispatch
from segkern.ops.verdicts import objection


def test_dry_run_from_the_command_line(tmp_path):
    from segkern.cli.app import app

    run = CliRunner().invoke(
        app,
        [
            "bench",
            "ops",
            "--tiny",
            "--device",
            "cpu",
            "--op",
            "upsample_confusion",
            "--op",
            "strip_pool",
            "--dtype",
            "fp32",
            "--out",
            str(tmp_path),
        ],
    )
    assert run.exit_code == 0, run.output
    rows = read_csv(tmp_path / "ops_cpu_tiny.csv")
    assert {r["op"] for r in rows} == {"upsample_confusion", "strip_pool"} and {
        r["status"] for r in rows
    } == {"ok"}
    assert {"reference", "eager"} <= {r["provider"] for r in rows} and not (
        tmp_path / "dispatch.json"
    ).exists()


def test_refusals():
    with pytest.raises(ValueError, match="CUDA device"):
        bench_ops.bench_ops(device="cpu")
    with pytest.raises(ValueError, match="unknown op 'conv'"):
        bench_ops.cases(["conv"])


def test_a_wrong_result_is_not_timed():
    case = bench_ops.cases(["strip_pool"], tiny=True)[0]
    case.plain = lambda x: x.mean(2)
    case.fn = lambda x, impl=None: x.mean(2) + 1
    rows = list(
        bench_ops.run_case(
            case, torch.device("cpu"), torch.float32, dict(copy_gbs=1.0, matmul_tflops=1.0), 1
        )
    )
    wrong = [r for r in rows if r["provider"] != "eager"]
    assert wrong and all(
        r["status"].startswith("wrong: relative error") and "ms_50" not in r for r in wrong
    )


def doubled(t):
    return t.detach().double() if t.is_floating_point() else t


def as_list(found):
    return list(found) if isinstance(found, (tuple, list)) else [found]


@pytest.mark.parametrize("op", sorted({c.op for c in bench_ops.cases(tiny=True)}))
def test_the_composition_computes_the_same(op):
    "What a kernel is timed against is the same function, in double precision."
    for case in bench_ops.cases([op], tiny=True):
        args = [doubled(t) for t in case.make(torch.device("cpu"), torch.float32)]
        pairs = zip(as_list(case.plain(*args)), as_list(case.fn(*args, impl="ref")), strict=True)
        for i, (want, got) in enumerate(pairs):
            where = f"{case.label}, result {i}"
            torch.testing.assert_close(
                got.double(), want.double(), rtol=1e-6, atol=1e-6, msg=lambda m: f"{where}: {m}"
            )


def timed(case, sizes, provider, ms, **more):
    "A row as `run_case` gives it; the kernel's knows what the op asked."
    facts = dict(
        op="strip_pool",
        dtype="bfloat16",
        layout="nchw",
        grad=False,
        sizes=sizes,
        mode="mean_max hw",
    )
    row = dict(
        op="strip_pool",
        case=case,
        direction="forward",
        dtype="bfloat16",
        provider=provider,
        ms_50=ms,
    )
    return row | (dict(asked=[facts]) if provider == "kernel" else {}) | more


def test_dispatch_follows_the_measurement():
    "The nearest measured sizes of the same kind decide; without the gate nothing does."
    small = [1, 8, 16, 16]
    large = [8, 32, 256, 512]
    rows = [
        timed("a", small, "kernel", 2.0),
        timed("a", small, "reference", 1.0),
        timed("b", large, "kernel", 1.0),
        timed("b", large, "reference", 3.0),
    ]
    table = bench_ops.learn(rows, "GPU", verdicts={"strip_pool": (True, "")})["GPU"]["strip_pool"]

    def ask(sizes, **more):
        return objection(
            table,
            dispatch.code_hash("strip_pool"),
            timed("", sizes, "kernel", 0)["asked"][0] | more,
        )

    assert "0.50" in ask([1, 8, 15, 17]) and ask([8, 32, 200, 500]) is None
    assert "no call like this" in ask(small, dtype="float32") and "no call like this" in ask(
        small, mode="mean h"
    )
    assert "gate" in objection(
        bench_ops.learn(rows, "GPU")["GPU"]["strip_pool"], dispatch.code_hash("strip_pool"), {}
    )


def test_the_slower_way_decides():
    "A kernel that wins eagerly and loses in a captured graph is left out; whole modules teach nothing."
    captured = [
        timed("a", [1, 8, 16, 16], name + bench_ops.GRAPH, ms)
        for name, ms in (("kernel", 1.0), ("reference", 0.5))
    ]
    rows = [
        timed("a", [1, 8, 16, 16], "kernel", 1.0),
        timed("a", [1, 8, 16, 16], "reference", 4.0),
        *captured,
    ]
    assert bench_ops.learn(rows, "GPU")["GPU"]["strip_pool"]["rows"][0]["ratio"] == 0.5
    assert bench_ops.learn([r | dict(learns=False) for r in rows], "GPU") == {}


def test_a_contender_that_breaks_loses_its_row():
    "Whatever is raised: Triton's own errors derive from nothing but `Exception`."
    case = bench_ops.cases(["strip_pool"], tiny=True)[0]

    class OutOfResources(Exception):
        pass

    def broken(x, impl=None):
        raise OutOfResources("shared memory, required: 300000")

    case.fn = broken
    rows = list(
        bench_ops.run_case(
            case, torch.device("cpu"), torch.float32, dict(copy_gbs=1.0, matmul_tflops=1.0), 1
        )
    )
    assert {r["provider"]: r["status"] for r in rows} == {
        "reference": "unavailable: OutOfResources: shared memory, required: 300000",
        "eager": "ok",
    }


def test_a_process_that_dies_or_takes_too_long():
    "The op's row says so, and the others go on."
    job = dict(
        op="strip_pool",
        case="",
        dtypes=["float32"],
        tiny=True,
        device="cpu",
        repeats=1,
        wanted=[],
        ceilings={},
    )
    # no ceilings: the worker raises
    row = [r for rows in bench_ops.apart(job, 60) for r in rows][-1]
    assert row["provider"] == "process" and row["status"].startswith("the process died: code 1")
    row = [r for rows in bench_ops.apart(job, 0.1) for r in rows][-1]
    assert row["status"].startswith("out of time")


def test_one_case_and_one_contender(tmp_path):
    "What --case and --contender keep, each op in a process of its own."
    rows = bench_ops.bench_ops(
        tmp_path, ["strip_pool"], (torch.float32,), True, "cpu", 1, case="B1", contender=("eager",)
    )
    assert {r["provider"] for r in rows} == {"eager"} and all("B1" in r["case"] for r in rows)
    with pytest.raises(ValueError, match="no case"):
        bench_ops.select(["strip_pool"], True, "B99")


def test_every_public_op_with_kernels_is_measured():
    "Ops that the papers call are in the table of comparisons."
    assert {c.op for c in bench_ops.cases()} >= set(dispatch.KERNELS)
    assert all(hasattr(ops, c.op) for c in bench_ops.cases())
