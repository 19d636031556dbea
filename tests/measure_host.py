"""What a call of each operator costs on the host: processor time of one thread, with bodies that make empty results.

    OMP_NUM_THREADS=1 python tests/measure_host.py [--out FILE.csv]

The body's own time is subtracted: what is left are PyTorch's dispatcher, autograd's node and our
functions around them."""

import argparse
import contextlib
import functools
import time
from unittest.mock import patch

import torch

from segkern.bench.shapes import cases
from segkern.bench.tables import write_csv
from segkern.core import Table
from segkern.ops import dispatch
from segkern.ops.operator import REGISTERED


def microseconds(calls, repeats=200, rounds=25):
    "Processor time of each call: the best of several rounds, in which all take turns."
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], time.process_time() - start)
    return {name: 1e6 * t / repeats for name, t in best.items()}


@contextlib.contextmanager
def empty_bodies(calls):
    "Every operator returns empty results; its first arguments are kept in `calls`."
    operators = list(REGISTERED.values())
    own = {o: o.body for o in operators}

    def kept(o):
        def body(*args):
            calls.setdefault(o, args)
            return o.fake(*args)

        return body

    for o in operators:
        o.body = kept(o)
    try:
        yield
    finally:
        for o, body in own.items():
            o.body = body


def operator_calls():
    "Operator -> arguments, from the tiny cases of the op benchmark as a GPU would run them."
    calls = {}

    def always(op, *tensors, **_):
        return ("triton", "measured here")

    dispatch.forget()
    with empty_bodies(calls), patch.object(dispatch, "which", always):
        for case in cases(tiny=True):
            args = case.make(torch.device("cpu"), torch.float32)
            with contextlib.suppress(RuntimeError):
                case.fn(*args, impl="triton")
    dispatch.forget()
    return calls


def leaves(args, wanted=True):
    "The arguments as leaves; those of floats want a gradient."

    def one(a):
        if not isinstance(a, torch.Tensor):
            return a
        return a.detach().requires_grad_(wanted and a.is_floating_point())

    return [[one(t) for t in a] if isinstance(a, (list, tuple)) else one(a) for a in args]


def as_custom_op(operator):
    "The same operator as `torch.library.custom_op` makes it."
    name = operator.name.replace("segkern::", "as_custom_op::")
    old = torch.library.custom_op(
        name, lambda *args: operator.fake(*args), mutates_args=(), schema=operator.schema
    )
    old.register_fake(lambda *args: operator.fake(*args))
    old.register_autograd(
        lambda ctx, *grads: operator.differentiate(ctx, *grads), setup_context=operator.keep
    )
    return old


def measure(operator, args, repeats=200, rounds=25):
    "A row: microseconds above the body in training, without gradients, in inference mode, and what `custom_op` takes."
    trained = leaves(args)
    run = operator.fake
    old = as_custom_op(operator)
    timed = functools.partial(microseconds, repeats=repeats, rounds=rounds)
    plain = leaves(args, wanted=False)
    with patch.object(operator, "body", run):
        calls = {"body": lambda: run(*plain), "training": lambda: operator(*trained)}
        row = timed(calls | {"custom_op, training": lambda: old(*trained)})
        with torch.no_grad():
            row |= timed({"no gradient": lambda: operator(*plain)})
        with torch.inference_mode():
            calls = {"body there": lambda: run(*plain), "inference": lambda: operator(*plain)}
            row |= timed(calls | {"custom_op, inference": lambda: old(*plain)})
    body = row.pop("body")
    there = row.pop("body there")
    return dict(operator=operator.name) | {
        k: t - (there if "inference" in k else body) for k, t in row.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="also write the rows to this CSV file")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = [measure(o, args) for o, args in operator_calls().items()]
    x = torch.zeros(2, 8, 16, 16)

    def look():
        return dispatch.choose("strip_pool", x)

    rows.append({"operator": "dispatch, CPU tensor", "no gradient": microseconds({0: look})[0]})
    with patch.object(dispatch, "which", lambda *a, **k: ("triton", "")):

        def look():
            return dispatch.choose("strip_pool", x, impl="triton", mode="mean hw")

        rows.append({"operator": "dispatch, remembered", "no gradient": microseconds({0: look})[0]})
    dispatch.forget()
    print(Table([{k: v if isinstance(v, str) else f"{v:.1f}" for k, v in r.items()} for r in rows]))
    if out:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
