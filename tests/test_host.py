"What `measure_host.py` measures: every operator, called as a GPU would call it."

import measure_host
import torch

from segkern.ops.operator import REGISTERED

# operators without a kernel
REFERENCES = {"segkern::upsample_cross_entropy", "segkern::affinity_pieces"}


def test_every_operator_is_measured():
    "A new operator needs a case in the op benchmark; a call that cannot be made is noticed here."
    ours = {name for name in REGISTERED if name.startswith("segkern::")}
    forward = {name for name in ours if not name.endswith("_backward")} - REFERENCES
    assert {o.name for o in measure_host.operator_calls()} == forward


def test_a_row():
    "The time of each way of calling, above that of the body alone."
    operator, args = next(iter(measure_host.operator_calls().items()))
    assert all(torch.is_tensor(a) or isinstance(a, (int, float, bool, list)) for a in args)
    row = measure_host.measure(operator, args, repeats=3, rounds=2)
    assert {"operator", "training", "no gradient", "inference", "custom_op, training"} <= set(row)
