"The op benchmark: a dry run, its file, what dispatch learns from it, and clear refusals."
import json

import pytest
import torch
from typer.testing import CliRunner

from segkern import bench_ops, ops
from segkern.bench import read_csv
from segkern.ops import dispatch


def test_dry_run_from_the_command_line(tmp_path):
    from segkern.cli import app
    run = CliRunner().invoke(app, ["bench", "ops", "--tiny", "--device", "cpu", "--op", "upsample_confusion", "--op", "strip_pool", "--dtype", "fp32", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    rows = read_csv(tmp_path/"ops_cpu_tiny.csv")
    assert {r["op"] for r in rows} == {"upsample_confusion", "strip_pool"} and {r["status"] for r in rows} == {"ok"}
    assert {"reference", "eager"} <= {r["provider"] for r in rows} and not (tmp_path/"dispatch.json").exists()


def test_refusals():
    with pytest.raises(ValueError, match="CUDA device"): bench_ops.bench_ops(device="cpu")
    with pytest.raises(ValueError, match="unknown op 'conv'"): bench_ops.cases(["conv"])


def test_a_wrong_result_is_not_timed():
    case = bench_ops.cases(["strip_pool"], tiny=True)[0]
    case.plain, case.fn = (lambda x: x.mean(2)), (lambda x, impl=None: x.mean(2) + 1)
    rows = bench_ops.run_case(case, torch.device("cpu"), torch.float32, dict(copy_gbs=1.0, matmul_tflops=1.0), 1)
    wrong = [r for r in rows if r["provider"] != "eager"]
    assert wrong and all(r["status"].startswith("wrong: relative error") and "ms_50" not in r for r in wrong)


def test_dispatch_follows_the_measurement(tmp_path, monkeypatch):
    "The nearest measured shape of the same type decides; nothing measured means the kernel."
    row = lambda shape, provider, ms: dict(op="strip_pool", case=shape, direction="forward", dtype="bfloat16", shape=shape, provider=provider, ms_50=ms)
    rows = [row("1x8x16x16", "kernel", 2.0), row("1x8x16x16", "reference", 1.0), row("8x32x256x512", "kernel", 1.0), row("8x32x256x512", "reference", 3.0)]
    table = bench_ops.learn(rows, "GPU")
    (tmp_path/"dispatch.json").write_text(json.dumps(table))
    monkeypatch.setattr(dispatch, "data_path", lambda name: tmp_path/"dispatch.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    dispatch.measured.cache_clear()
    try:
        small, large = torch.zeros(1, 8, 15, 17, dtype=torch.bfloat16), torch.zeros(8, 32, 200, 500, dtype=torch.bfloat16, device="meta")
        assert "0.50 times" in dispatch._slower("strip_pool", [small]) and dispatch._slower("strip_pool", [large]) is None
        assert dispatch._slower("strip_pool", [small.float()]) is None and dispatch._slower("sr_attention", [small]) is None
    finally: dispatch.measured.cache_clear()


def test_every_public_op_with_kernels_is_measured():
    "Ops that the papers call are in the table of comparisons."
    assert set(dispatch.KERNELS) - {c.op for c in bench_ops.cases()} <= {"attention_block", "upsample_dice", "upsample_kl"}
    assert all(hasattr(ops, c.op) for c in bench_ops.cases())
