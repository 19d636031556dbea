"Every production launch compiles for A100, H100 or MI300, with --slow for all three: no spills, shared memory that fits, tensor cores and wide loads where they are meant."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aotrun import load
from segkern.ops.dispatch import HAS_TRITON

HERE = Path(__file__).parent
OPS = sorted(p.stem for p in (HERE/"aot").glob("*.py"))
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.mark.parametrize("op", OPS)
def test_compiles(op, request):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SEGKERN_IMPL")}
    done = subprocess.run([sys.executable, HERE/"aotrun.py", op, *(["--all"] if request.config.getoption("--slow") else [])], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, module = json.loads(done.stdout.splitlines()[-1]), load(op)
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "gfx942"}
    spill = getattr(module, "SPILL", {})
    for r in rows:
        what = f"{r['name']} {r['case']} on {r['target']}: {r}"
        assert r["fits"], what
        assert r["spill"] <= spill.get((r["name"], r["arch"]), 0), what
    for kind in ("MMA", "WIDE"):
        for name in getattr(module, kind, ()):
            found = [r for r in rows if r["name"] == name and (kind == "MMA" or r["target"] != "gfx942") and (kind == "MMA" or "narrow" not in r["case"])
                     and (kind == "WIDE" or "fp32" not in r["case"])]
            assert found and all(r[kind.lower()] > 0 for r in found), f"{name}: {kind} {found}"


def test_the_ops_are_covered():
    "Each op with a kernel has a file of production launches."
    from segkern.ops.dispatch import KERNELS
    import segkern.ops # noqa: F401
    text = "".join((HERE/"aot"/f"{op}.py").read_text() for op in OPS)
    assert not [op for op in KERNELS if op not in text]
