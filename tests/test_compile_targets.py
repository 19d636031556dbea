"Every production launch compiles for A100, H100 or MI300 (--slow: all three, Triton 3.6 too); what its code must show."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aotrun import load
from proven import skip_if_proven
from segkern.ops.dispatch import HAS_TRITON
from segkern.testing.targets import compile_elsewhere

HERE = Path(__file__).parent
OPS = sorted(p.stem for p in (HERE / "aot").glob("*.py"))
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def compiled(op, *options, path=None):
    "The rows of `aotrun.py`; `path`: a folder with another Triton."
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SEGKERN_IMPL")}
    if path:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, HERE / "aotrun.py", op, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def allowed(spill, row):
    "Bytes of spills that are known: {(kernel, arch, part of the case's name): bytes}."
    ours = [
        (case, n)
        for (name, arch, case), n in spill.items()
        if (name, arch) == (row["name"], row["arch"])
    ]
    return max((n for case, n in ours if case in row["case"]), default=0)


def check(rows, module, spill):
    "No spills but named ones, shared memory that fits, no WGMMA that is serialized or loses its factor."
    for r in rows:
        what = f"{r['name']} {r['case']} on {r['target']}: {r}"
        assert r["fits"], what
        assert r["spill"] <= allowed(spill, r), what
        assert not r.get("overwritten"), (
            f"registers that a WGMMA still reads are overwritten: {what}"
        )
        assert not r.get("serialized") or r["name"] in getattr(module, "SERIAL", ()), (
            f"ptxas serializes WGMMAs: {what}"
        )


@pytest.mark.parametrize("op", OPS)
def test_compiles(op, request):
    skip_if_proven(f"aot/{op}", request.config)
    rows = compiled(op, *(["--all"] if request.config.getoption("--slow") else []))
    module = load(op)
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "gfx942"}
    check(rows, module, getattr(module, "SPILL", {}))
    for kind in ("MMA", "WIDE"):
        for name in getattr(module, kind, ()):
            found = [
                r
                for r in rows
                if r["name"] == name
                and (kind == "MMA" or r["target"] != "gfx942")
                and (kind == "MMA" or "narrow" not in r["case"])
                and (kind == "WIDE" or "fp32" not in r["case"])
            ]
            assert found and all(r[kind.lower()] > 0 for r in found), f"{name}: {kind} {found}"


@pytest.mark.parametrize("op", [op for op in OPS if hasattr(load(op), "MOST")])
def test_instructions_per_element(op, request):
    "What an element costs on an H100: each named kernel stays below its limit."
    skip_if_proven(f"aot/{op}", request.config)
    module = load(op)
    rows = compiled(op, "--counted")
    for (name, case), (unit, limit) in module.MOST.items():
        found = [r["per_unit"] for r in rows if r["name"] == name and case in r["case"]]
        assert found and max(found) <= limit, (
            f"{name}, {case}: {found} instructions per {unit}, at most {limit}"
        )


@pytest.fixture(scope="session")
def triton36(tmp_path_factory):
    "A folder with Triton 3.6, which a common GPU installation has; torch and everything else stay as they are."
    folder = tmp_path_factory.mktemp("triton36")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        folder,
        "triton==3.6.0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton 3.6 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiles_with_triton_36(op, triton36):
    "The same rules for the compiler of the GPU image; it spills a little where newer ones do not."
    rows = compiled(op, path=triton36)
    module = load(op)
    check(rows, module, getattr(module, "SPILL", {}) | getattr(module, "SPILL_36", {}))


def test_the_miscompiled_kernel_is_found():
    "The class centres with three stages: registers are refilled while a WGMMA may read them; as they are, not."
    source = """if 1:
        import torch
        from segkern.ops.dispatch import use_blocks
        from segkern.ops.prototypes import prototypes_fwd
        from segkern.testing.sass import code_report
        from segkern.testing.targets import captured, targets
        last = dict(dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        maps = [torch.empty((4, c, 128, 128), **last) for c in (150, 256, 256)]
        def writes(**options):
            with captured(targets()["sm_90"]) as kernels, use_blocks("prototypes", **options): prototypes_fwd(*maps)
            return [len(code_report(k)["overwritten"]) for k in kernels if k.name == "_prototypes_sums_kernel"]
        print(writes(num_stages=3), writes())
    """
    bad, good = map(
        json.loads, compile_elsewhere(source).strip().replace("] [", "]\n[").splitlines()
    )
    assert len(bad) == len(good) == 1 and bad[0] > 0 and good[0] == 0


def test_the_ops_are_covered():
    "Each op with a kernel has a file of production launches."
    from segkern.ops.dispatch import KERNELS
    import segkern.ops  # noqa: F401

    text = "".join((HERE / "aot" / f"{op}.py").read_text() for op in OPS)
    assert not [op for op in KERNELS if op not in text]
