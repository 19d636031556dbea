"Phase 3: the gate's comparisons, the contenders that decide first, what has to be compiled last."

import torch
from child import selected

FIRST = ("kernel", "reference", "kernel in a CUDA graph", "reference in a CUDA graph")
THEN = (
    "eager",
    "eager in a CUDA graph",
    "sdpa flash",
    "sdpa cudnn",
    "sdpa with copies",
    "sdpa with padded copies",
    "channels last, with copies",
    "compile",
    "compile in a CUDA graph",
)


def status_of(row):
    "What a row of the benchmark means here: a peer may be missing, the kernel and its reference may not."
    status = row["status"]
    ours = row["provider"] in ("kernel", "kernel in a CUDA graph", "reference")
    if status == "ok":
        return status
    failed = ours and status != "out of memory"
    return f"{'failed' if failed else 'not run'}: {status}"


def main(rows, family, device, tiny, facts):
    "Time every contender; rows are those of `segkern.bench.ops`."
    from segkern.bench.contenders import run_case

    best = facts["ceilings"]
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    todo = selected(family, tiny)
    groups = (FIRST, THEN) if cuda else (FIRST,)

    def label(c, name):
        return f"{c.label}, {'backward too' if c.grad else 'forward'}, {name}"

    rows.plan([(c.op, label(c, f"group {i}")) for i in range(len(groups)) for c in todo])
    for i, wanted in enumerate(groups):
        for case in todo:

            def timed(case=case, wanted=wanted):
                for row in run_case(case, device, dtype, best, 40 if cuda else 1, wanted):
                    status = status_of(row)
                    facts_of = {k: v for k, v in row.items() if k not in ("op", "status")}
                    rows.add(case.op, label(case, row["provider"]), status, **facts_of)
                    if status != "ok":
                        rows.alive()

            rows.run(case.op, label(case, f"group {i}"), timed)
            if cuda:
                torch.cuda.empty_cache()
            torch.compiler.reset()
