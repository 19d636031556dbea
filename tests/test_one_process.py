"Notebooks and the package in one process: operators keep working, edited bodies run."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOME = ["17c_ops.ce.ipynb", "81_tutorial.write_a_kernel.ipynb"]
ALL = 17  # notebooks that register an operator


@pytest.mark.parametrize(
    "interpret,names",
    [("0", []), ("1", SOME), pytest.param("1", [], marks=pytest.mark.slow)],
    ids=["references", "kernels", "all kernels"],
)
def test_operators_survive_their_notebooks(interpret, names):
    "Every operator gives the same results before and after each notebook that registers it again."
    env = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, HERE / "one_process.py", *names]
    run = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == (len(names) or ALL) and all(r["calls"] >= r["operators"] > 0 for r in rows)
