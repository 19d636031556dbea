"""Compile the launches of `tests/aot/OP.py` for three GPUs that are not there; prints one JSON row per kernel.

    python tests/aotrun.py OP [--all]    in a process without TRITON_INTERPRET; without --all the first case meets all three GPUs, the others one each, in turn
"""
import importlib.util
import json
import sys
from pathlib import Path

from segkern.testing.kernels import binary_report, captured, targets


def load(op):
    "The module tests/aot/OP.py."
    spec = importlib.util.spec_from_file_location(f"aot_{op}", Path(__file__).parent/"aot"/f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(op, everything):
    rows, module = [], load(op)
    for t, (name, target) in enumerate(targets().items()):
        for i, (label, launch) in enumerate(module.cases()):
            if not everything and i and i % 3 != t: continue
            with captured(target) as kernels: launch()
            if not kernels: raise RuntimeError(f"{op} {label}: nothing was launched")
            rows += [binary_report(k) | dict(case=label, target=name) for k in kernels]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
