"""Notebooks that register operators and the package in one process, as in JupyterLab and in workers of `nbdev_test`.

    python tests/one_process.py [NB ...]    default: every notebook with an operator

Calls every operator of the package, runs a notebook, calls every operator again, and so on. The results must stay what
they were. Prints one JSON line per notebook. With TRITON_INTERPRET=1 the kernels run in it.
"""

import collections
import json
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from nbtools import test_notebook  # noqa: E402

from segkern import core, ops  # noqa: E402
from segkern.bench.shapes import cases  # noqa: E402
from segkern.ops import ce  # noqa: E402
from segkern.ops.dispatch import interpreting  # noqa: E402
from segkern.ops.operator import REGISTERED  # noqa: E402
from segkern.testing import make_input, relative_l2  # noqa: E402
from segkern.testing.memory import exact_interpreter  # noqa: E402

PREFIX = "segkern::"  # of the package's operators among those of a process
# operators that also run where no kernel does
WITHOUT_KERNELS = {
    "upsample_cross_entropy",
    "affinity_pieces",
    "affinity_pieces_backward",
    "prototypes",
    "prototypes_backward",
    "cosine",
    "cosine_backward",
}


class Counter(TorchDispatchMode):
    "Counts the calls of our operators."

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == "segkern":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def leaf(shape, seed):
    "A reproducible input that wants a gradient."
    return make_input(shape, seed).requires_grad_()


def smallest_cases():
    "The smallest case of every op with a benchmark, as (name, function, inputs)."
    best = {}
    for c in cases(tiny=True):
        # has no operator of its own: strip_pool and axial_attention
        if c.op == "squeeze_axial":
            continue
        with core.seeded(0):
            args = c.make(torch.device("cpu"), torch.float32)
        size = sum(a.numel() for a in args)
        if (c.op, c.grad) not in best or size < best[c.op, c.grad][0]:
            best[c.op, c.grad] = size, c.fn, args
    return [(op, fn, args) for (op, _), (_, fn, args) in sorted(best.items(), key=lambda kv: kv[0])]


def other_calls():
    "What the benchmark has no case for."
    target = torch.from_numpy(make_input([1, 9, 7], 5).numpy() > 0).long()
    z = leaf([1, 3, 4, 5], 1)

    def per_pixel(z, impl=None):
        return ops.upsample_cross_entropy(z, target, reduction="none", impl=impl)

    return [
        ("loss of each pixel", per_pixel, (z,)),
        ("dice", lambda z, impl=None: ops.upsample_dice(z, target, impl=impl), (z,)),
    ]


def results(fn, args, impl):
    "Outputs and gradients of one call, in a row."
    outs = fn(*args, impl=impl)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    wanted = [a for a in args if a.requires_grad]
    graph = [o for o in outs if o.requires_grad]
    grads = torch.autograd.grad(graph, wanted, [torch.ones_like(o) for o in graph]) if graph else []
    return torch.cat([t.detach().double().flatten() for t in (*outs, *grads)])


def call_everything(table):
    "Results by call, and how often each operator ran."
    found = {}
    with Counter() as counter:
        for name, fn, args in table:
            for impl in ("auto", "triton") if interpreting() else ("auto",):
                grad = any(a.requires_grad for a in args)
                with torch.set_grad_enabled(grad):
                    found[f"{name}, {impl}, gradient {grad}"] = results(fn, args, impl)
    return found, counter.calls


def handles(calls):
    "What PyTorch holds under the names of operators; another object after a notebook: it destroyed a registration."
    return {n: getattr(torch.ops.segkern, n).default for n in calls}


def with_operators():
    "The notebooks that register an operator."
    return [
        p
        for p in sorted((ROOT / "nbs").glob("*.ipynb"))
        if '@operator(\\"' in p.read_text(encoding="utf-8")
    ]


def edited_body_runs():
    "Execute a cell of the loss's notebook again, with another body: the package's loss must follow, and come back."
    cells = json.loads((ROOT / "nbs" / "17c_ops.ce.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells]
    (cell,) = (s for s in sources if '@operator("segkern::upsample_cross_entropy")' in s)
    body = "return _upsample_ce_body(\n            logits"
    assert body in cell
    z = make_input([1, 3, 4, 5])
    y = torch.zeros(1, 8, 9, dtype=torch.long)
    before = ops.upsample_cross_entropy(z, y)
    exec(cell.replace(body, body.replace("logits", "2 * logits")), dict(vars(ce)))
    during = ops.upsample_cross_entropy(z, y)
    exec(cell, dict(vars(ce)))
    after = ops.upsample_cross_entropy(z, y)
    assert torch.equal(before, after) and torch.allclose(
        during, ops.upsample_cross_entropy(2 * z, y)
    )
    return not torch.equal(before, during)


def main(names):
    torch.set_num_threads(1)
    os.environ["IN_TEST"] = "1"
    exact_interpreter()
    table = smallest_cases() + other_calls()
    first, calls = call_everything(table)
    ours = {k.removeprefix(PREFIX) for k in REGISTERED if k.startswith(PREFIX)}
    wanted = ours if interpreting() else WITHOUT_KERNELS & ours
    if missing := wanted - set(calls):
        sys.exit(f"no call reaches {', '.join(sorted(missing))}: add one to other_calls")
    registered = handles(calls)
    for path in [ROOT / "nbs" / n for n in names] or with_operators():
        name, passed, seconds = test_notebook(path)
        lost = [n for n, op in handles(calls).items() if op is not registered[n]]
        if lost:
            sys.exit(f"{name} destroyed the registration of {', '.join(lost)}")
        again, calls = call_everything(table)
        worst = max(relative_l2(first[k], again[k]) for k in first)
        row = dict(notebook=name, passed=passed, seconds=round(seconds, 1), operators=len(calls))
        print(json.dumps(row | dict(calls=sum(calls.values()), error=worst)), flush=True)
        if not passed:
            sys.exit(f"{name} failed")
        if not worst < 1e-6:
            sys.exit(f"{name}: the package gives other results in the process that ran it")
    if not edited_body_runs():
        sys.exit("an edited body of an operator has no effect")


if __name__ == "__main__":
    main(sys.argv[1:])
