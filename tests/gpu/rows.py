"What a child of the gate writes: a line when a row begins, a line with its result, at once."

import json
import sys
import time
import traceback
from pathlib import Path


class NotRun(Exception):
    "A row that does not apply here, with the reason."


def first_line(e):
    "An exception as one short line."
    text = str(e).strip().replace("\n", " ")
    return f"{type(e).__name__}: {text[:300]}"


class Rows:
    "The file of rows of one child; rows that an earlier attempt began are not begun again."

    def __init__(self, path, phase, family, check=lambda: None):
        self.path = Path(path)
        self.facts = dict(phase=phase, family=family)
        self.check = check
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.known = {
            (r["op"], r.get("begin") or r["label"]) for r in map(json.loads, lines) if "op" in r
        }

    def write(self, row):
        "Append a line."
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def plan(self, pairs):
        "Say what will come: (op, label)."
        self.write(dict(plan=[list(p) for p in pairs]))

    def add(self, op, label, status="ok", **facts):
        "A finished row."
        self.write(self.facts | dict(op=op, label=label, status=status) | facts)

    def run(self, op, label, fn):
        "A row from a function that returns its facts; whatever it raises is the row's status."
        if (op, label) in self.known:
            return
        self.write(dict(begin=label, op=op))
        start = time.perf_counter()
        facts = {}
        status = "ok"
        try:
            facts = fn() or {}
        except NotRun as e:
            status = f"not run: {e}"
        except Exception as e:
            status = f"failed: {first_line(e)}"
            print(f"--- {label}", file=sys.stderr)
            traceback.print_exc()
        self.add(
            op,
            label,
            facts.pop("status", status),
            **facts,
            seconds=round(time.perf_counter() - start, 3),
        )
        if status.startswith("failed"):
            self.alive()

    def alive(self):
        "End the process where a failure has spoiled it (an illegal access does), so that the next rows run in another."
        try:
            self.check()
        except Exception as e:
            print(f"the device is lost to this process: {first_line(e)}", file=sys.stderr)
            sys.exit(3)
