"""One child of the gate, whose rows the parent reads.

python child.py PHASE --family F --rows FILE --device cuda [--tiny]
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from families import FAMILIES, predicted
from rows import Rows

PHASES = ("about", "warm", "right", "launch", "speed", "nets", "learn")


def selected(family, tiny):
    "The gate's comparisons of a family, in the order of data/bench/predicted.csv."
    from segkern.bench.shapes import cases

    wanted = [
        (r["op"], r["case"], r["direction"]) for r in predicted() if r["op"] in FAMILIES[family][0]
    ]

    def key(c):
        return (c.op, c.label, "forward and backward" if c.grad else "forward")

    known = {key(c): c for c in cases(tiny=tiny)}
    found = [known[w] for w in wanted if w in known]
    if not tiny:
        return found
    first = {(c.op, c.grad, c.learns): c for c in reversed(found)}  # a dry run: one case each
    return [c for c in found if c is first[c.op, c.grad, c.learns]]


def synchronise(device):
    "Wait for the device, and hear of what went wrong on it."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("phase", choices=PHASES)
    p.add_argument("--family", default="")
    p.add_argument("--number", type=int, default=0, help="of the gate's phase, for the rows")
    p.add_argument("--rows", type=Path, required=True)
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--facts", type=json.loads, default={}, help="what earlier phases found out")
    a = p.parse_args()
    device = torch.device(a.device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if device.type == "cpu":
        from segkern.testing.memory import exact_interpreter

        exact_interpreter()
    rows = Rows(a.rows, a.number, a.family, lambda: synchronise(device))
    module = __import__(a.phase)
    module.main(rows, a.family, device, a.tiny, a.facts)


if __name__ == "__main__":
    sys.exit(main())
