"The gate for GPUs: a dry run on the CPU, and what it makes of crashes, time-outs and the sanitizer's words."

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import families  # noqa: E402
import jobs  # noqa: E402
import right  # noqa: E402
import rows as gate_rows  # noqa: E402
import sanitizer  # noqa: E402
import speed  # noqa: E402
import verdict  # noqa: E402

FILES = {
    "gate.json",
    "ops_cpu.csv",
    "nets_cpu.csv",
    "dispatch.json",
    "sanitizer.txt",
    "report.md",
    "log.txt",
}


def gate(out, *options):
    "A dry run of the command, without what a GPU machine lacks."
    blocked = out / "blocked"
    blocked.mkdir(parents=True)
    for name in ("nbdev", "fastcore", "papermill", "execnb"):
        (blocked / f"{name}.py").write_text(
            f"raise ImportError('{name} is not installed on a GPU machine')\n"
        )
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [
        sys.executable,
        str(ROOT / "tests" / "gpu_gate.py"),
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out / "gate"),
        *options,
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env | dict(SEGKERN_GATE_PATH=str(blocked)),
    )
    return run, json.loads((out / "gate" / "gate.json").read_text())


def check(run, state, out, ops):
    "All files, no failures, no claim about what only a GPU shows."
    assert run.returncode == 0, run.stdout + run.stderr
    assert {p.name for p in (out / "gate").iterdir()} == FILES
    report = (out / "gate" / "report.md").read_text()
    assert len(report) <= verdict.LIMIT and report in run.stdout
    assert {op for op, (ok, _) in state["verdicts"].items() if ok} == set(ops), state["verdicts"]
    assert all(r["status"] == "not run: no GPU" for r in state["rows"] if r["phase"] == 2)
    graphs = [
        r
        for r in state["rows"]
        if "captured" in r["label"]
        or "side stream" in r["label"]
        or r.get("form") in ("graph", "compile")
    ]
    assert graphs and all(r["status"] == "not run: no GPU" for r in graphs)
    table = json.loads((out / "gate" / "dispatch.json").read_text())["cpu"]
    assert set(table) == set(ops) and all(v["passed"] and v["code"] for v in table.values())
    with open(out / "gate" / "ops_cpu.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {r["provider"] for r in rows} == {"kernel", "reference"} and {
        r["op"] for r in rows
    } == set(ops)
    with open(out / "gate" / "nets_cpu.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {"latency", "training"} <= {r["what"] for r in rows}


def test_dry_run_of_two_families(tmp_path):
    "Every phase, from the command line."
    ops = ("sr_attention", "strip_pool", "strip_attention")
    run, state = gate(tmp_path, "--families", "sr_attention,strip", "--budget", "240")
    check(run, state, tmp_path, ops)


@pytest.mark.slow
def test_dry_run_of_all_families(tmp_path):
    "Every op of every family."
    run, state = gate(tmp_path, "--budget", "900")
    check(run, state, tmp_path, [op for ops, _ in families.FAMILIES.values() for op in ops])


def test_families_cover_kernels_tests_and_predictions():
    "Every module with kernels, every file of kernel tests and every predicted op belongs to one family."
    modules = {m for _, names in families.FAMILIES.values() for m in names}
    with_kernels = {
        p.stem
        for p in (ROOT / "segkern" / "ops").glob("*.py")
        if re.search(r"@triton\.jit.*\ndef _\w+_kernel\(", p.read_text())
    }
    assert with_kernels <= modules and all(families.kernel_names(f) for f in families.FAMILIES)
    files = [p for f in families.FAMILIES for p in families.test_files(f)]
    assert sorted(files) == sorted((ROOT / "tests").glob("test_kernels_*.py"))
    from segkern.bench.shapes import cases

    known = {(c.op, c.label, "forward and backward" if c.grad else "forward") for c in cases()}
    assert {(p["op"], p["case"], p["direction"]) for p in families.predicted()} <= known
    assert {op for ops, _ in families.FAMILIES.values() for op in ops} == {
        p["op"] for p in families.predicted()
    }


CHILD = """
import os, sys, time
from rows import Rows
rows = Rows(sys.argv[1], 1, "msca")
rows.plan([("rca_gate", "never")] + [("msca", n) for n in ("good", "raises", "crashes", "after", "hangs", "never")])
rows.run("msca", "good", lambda: dict(forward=1e-7))
rows.run("rca_gate", "good", lambda: None)
rows.run("msca", "raises", lambda: 1/0)
rows.run("msca", "crashes", lambda: os._exit(11))
rows.run("msca", "after", lambda: None)
rows.run("msca", "hangs", lambda: time.sleep(60))
rows.run("msca", "never", lambda: None)
rows.run("rca_gate", "never", lambda: None)
"""


def test_a_crash_loses_one_row_and_a_hang_the_rest(tmp_path):
    "The child starts again behind the row that killed it; at the end of its time what is left is named."
    (tmp_path / "child.py").write_text(CHILD)
    rows = tmp_path / "rows.jsonl"
    env = dict(PYTHONPATH=str(ROOT / "tests" / "gpu"))
    job = jobs.Job(
        1, "child", "msca", [sys.executable, str(tmp_path / "child.py"), str(rows)], rows, env
    )
    start = time.monotonic()
    rows = jobs.run_all([job], 4, 1, lambda text: None)
    found = {r["label"]: r["status"] for r in rows if r["op"] == "msca"}
    assert sorted((r["label"], r["status"][:11]) for r in rows if r["op"] == "rca_gate") == [
        ("good", "ok"),
        ("never", "out of time"),
    ]
    assert time.monotonic() - start < 15
    assert found["good"] == found["after"] == "ok" and found["raises"].startswith(
        "failed: ZeroDivisionError"
    )
    assert found["crashes"].startswith("failed: the process died with code 11")
    assert found["hangs"].startswith("out of time") and found["never"].startswith("out of time")


def test_jobs_that_never_start_are_named(tmp_path):
    "No time: a row says so."
    job = jobs.Job(3, "late", "msca", [sys.executable, "-c", "0"], tmp_path / "rows.jsonl")
    (row,) = jobs.run_all([job], 0, 1, lambda text: None)
    assert row["status"] == "out of time: not started" and row["phase"] == 3


SOUND = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
BROKEN = "========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 3 errors\n"
RACES = (
    "========= Error: Potential {} hazard detected at __shared__ 0x0\n========= RACECHECK "
    "SUMMARY: 1 hazard displayed\n"
)


@pytest.mark.parametrize(
    "tool,text,code,want",
    [
        ("memcheck", SOUND, 0, "ok"),
        ("memcheck", BROKEN, 0, "failed: 3 errors: Invalid __global__ read"),
        ("memcheck", SOUND, 1, "failed: the launches"),
        ("synccheck", "========= Error: Device not supported\n", 255, "not run: no summary"),
        ("memcheck", "", None, "out of time"),
        ("racecheck", RACES.format("RAW"), 0, "failed: 1 hazards"),
        ("racecheck", RACES.format("WAW"), 0, "ok"),
        (
            "racecheck",
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            0,
            "ok",
        ),
    ],
)
def test_the_sanitizer_is_understood(tool, text, code, want):
    assert sanitizer.judge(tool, text, code)[0].startswith(want)


def test_the_sanitizer_looks_at_our_kernels_only():
    command = sanitizer.command("compute-sanitizer", "racecheck", "msca", ["python", "child.py"])
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"] and command[-2:] == [
        "python",
        "child.py",
    ]
    assert [
        c for c in command if c.startswith("--kernel-name=kns=_msca_")
    ] and "--racecheck-report" in command


def row(phase, op, label, status, **facts):
    return dict(phase=phase, family="strip", op=op, label=label, status=status) | facts


def test_verdicts():
    "One failure anywhere, a check that was not reached, or no comparison at all: no kernel."
    good = [row(1, op, "double", "ok", forward=1e-7) for op in families.FAMILIES["strip"][0]]

    def passed(more):
        return {op for op, (ok, _) in verdict.verdicts(good + more, ["strip"]).items() if ok}

    assert (
        passed([]) == {"strip_pool", "strip_attention"}
        and not verdict.verdicts([], ["strip"])["strip_pool"][0]
    )
    assert passed([row(1, "*", "test_kernels_strip.py::test_pool_sizes", "failed: wrong")]) == {
        "strip_attention"
    }
    assert passed([row(2, "*", "memcheck of strip", "failed: 3 errors")]) == set()
    assert passed([row(1, "strip_attention", "races", "out of time: killed after 3 s")]) == {
        "strip_pool"
    }
    assert passed(
        [
            row(2, "*", "memcheck of strip", "not run: no summary"),
            row(0, "strip_pool", "warm", "failed: x"),
        ]
    ) == {"strip_pool", "strip_attention"}


@pytest.mark.parametrize(
    "provider,status,want",
    [
        ("kernel", "ok", "ok"),
        ("kernel", "wrong: relative error 1.0", "failed"),
        ("kernel in a CUDA graph", "unavailable: RuntimeError: x", "failed"),
        ("reference in a CUDA graph", "unavailable: RuntimeError: x", "not run"),
        ("kernel", "out of memory", "not run"),
        ("compile", "wrong: labels differ", "not run"),
    ],
)
def test_a_kernel_that_differs_from_the_composition_fails(provider, status, want):
    "A peer may be missing; our kernel and our reference may not."
    assert speed.status_of(dict(provider=provider, status=status)).startswith(want)


def test_a_comparison_that_does_not_fit_says_nothing():
    "The reference's memory is not the kernel's fault; the kernel's own is."

    def too_large(*_):
        raise torch.OutOfMemoryError("80 GiB")

    with pytest.raises(gate_rows.NotRun, match="does not fit.*80 GiB"):
        right.oracle(too_large, 1)
    assert right.oracle(max, 1, 2) == 2


def test_the_report_fits():
    "However much goes wrong, it stays below its limit and says where the rest is."
    rows = [
        row(1, "strip_pool", f"{'a long label ' * 20}{i}", "failed: " + "because " * 50)
        for i in range(300)
    ]
    text = verdict.report(
        rows, "GPU", {}, {}, verdict.verdicts(rows, ["strip"]), 1.0, ["a phase broke"] * 400
    )
    assert (
        len(text) <= verdict.LIMIT
        and "cut; all rows are in gate.json" in text
        and "| **no** |".replace(" ", "") in text
    )


def test_refusals(tmp_path):
    "What the command does not take, in one line."
    for options, word in (
        (["--families", "conv"], "unknown family"),
        (["--device", "cpu"], "--tiny"),
        (["--ptxas", "nowhere"], "no file"),
    ):
        run = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "gpu_gate.py"), "--out", str(tmp_path), *options],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2 and word in run.stderr
