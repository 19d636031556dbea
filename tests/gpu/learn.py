"Phase 5: the dispatch table from the rows of phase 3 and the verdicts of phases 1 and 2."

import json
from pathlib import Path


def main(rows, family, device, tiny, facts):
    "Write `facts['out']`/dispatch.json."
    from segkern.bench.ops import learn
    from segkern.core import write_json

    found = json.loads(Path(facts["found"]).read_text(encoding="utf-8"))
    verdicts = {op: tuple(v) for op, v in found["verdicts"].items()}
    timed = [r for r in found["rows"] if r.get("provider")]
    table = learn(timed, found["gpu"], {}, verdicts, found["codes"], found["versions"])
    for op, verdict in table[found["gpu"]].items():
        if not verdict["passed"]:
            verdict["rows"] = [r | dict(ratio=0) for r in verdict["rows"]]
    write_json(Path(facts["out"]) / "dispatch.json", table)
