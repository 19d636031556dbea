"The training for GPUs, as a dry run on the CPU: what it leaves, and what it says where the data is not there."

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import segkern

ROOT = Path(__file__).resolve().parent.parent
FILES = {"train.json", "curves.csv", "report.md", "log.txt", "segformer_b0.safetensors"}


def dry_run(data, out, *options):
    "The command on a few pictures."
    command = [
        sys.executable,
        ROOT / "tests" / "gpu_train.py",
        "--data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        "--tiny",
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.run(
        [*map(str, command), *options], capture_output=True, text=True, env=env, cwd=ROOT
    )


def test_what_a_training_leaves(tmp_path, camvid):
    "Curves, the report, and weights in half precision that the network takes."
    run = dry_run(camvid, tmp_path, "--networks", "segformer_b0", "--budget", "240")
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "log.txt").read_text()
    assert {p.name for p in tmp_path.iterdir()} == FILES
    (row,) = json.loads((tmp_path / "train.json").read_text())
    assert row["status"] == "finished" and row["finished"] and row["steps"] == row["planned"] == 4
    assert row["evaluations"] and 0 <= row["best_miou"] <= 1
    with open(tmp_path / "curves.csv", newline="", encoding="utf-8") as f:
        curve = list(csv.DictReader(f))
    # the other lines are evaluations
    assert [int(r["step"]) for r in curve if r["loss"]] == [1, 2, 3, 4]
    assert all(r["loss"] or r["miou"] for r in curve)
    assert (
        "|segformer_b0|finished|4 of 4|" in (tmp_path / "report.md").read_text()
        and "segformer_b0" in run.stdout
    )
    net = segkern.load(tmp_path / "segformer_b0.safetensors")
    assert net.num_classes == 11


def test_a_missing_folder_ends_in_one_line(tmp_path):
    "The network's row says that it failed, and the log why."
    run = dry_run(
        tmp_path / "nowhere", tmp_path / "out", "--networks", "segformer_b0", "--budget", "120"
    )
    assert run.returncode == 1 and "failed with code 1" in run.stdout
    assert "nowhere" in (tmp_path / "out" / "log.txt").read_text()
