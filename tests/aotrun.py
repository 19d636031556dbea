"""Compile the launches of `tests/aot/OP.py` for three GPUs that are not there; prints one JSON row per kernel.

    python tests/aotrun.py OP [--all|--counted]    in a process without TRITON_INTERPRET

Without an option the first case meets all three GPUs, the others one each, in turn; `--all`: every case all three;
`--counted`: the H100 alone, and only the cases whose instructions are counted (`MOST` in the file of launches)."""

import importlib.util
import json
import sys
from pathlib import Path

from segkern.testing.targets import binary_report, captured, targets
from segkern.testing.sass import code_report


def load(op):
    "The module tests/aot/OP.py."
    spec = importlib.util.spec_from_file_location(
        f"aot_{op}", Path(__file__).parent / "aot" / f"{op}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(kernel, label, target, limits):
    "All that is known about a compiled kernel."
    row = binary_report(kernel) | dict(case=label, target=target)
    if target == "gfx942":
        return row
    counted = target == "sm_90"
    unit = next(
        (
            unit
            for (name, case), (unit, _) in limits.items()
            if counted and name == kernel.name and case in label
        ),
        None,
    )
    return row | code_report(kernel, unit)


def wanted(i, label, t, target, option, limits):
    "Whether a case is compiled for a target."
    if option == "--counted":
        return target == "sm_90" and any(case in label for _, case in limits)
    return option == "--all" or i == 0 or i % 3 == t


def main(op, option=None):
    rows = []
    module = load(op)
    limits = getattr(module, "MOST", {})
    for t, (name, target) in enumerate(targets().items()):
        for i, (label, launch) in enumerate(module.cases()):
            if not wanted(i, label, t, name, option, limits):
                continue
            with captured(target) as kernels:
                launch()
            if not kernels:
                raise RuntimeError(f"{op} {label}: nothing was launched")
            once = {k.hash: k for k in kernels}  # some ops launch a kernel for every few classes
            rows += [report(k, label, name, limits) for k in once.values()]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
