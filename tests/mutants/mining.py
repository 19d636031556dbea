"Faults of the kernel that finds an order statistic."

import torch

from segkern.testing.memory import exact_interpreter, guarded_memory

MODULE = "segkern.ops.mining"
MUTANTS = [
    ("_digit_histogram_kernel", "last element left out", "match = (i < n)", "match = (i < n - 1)"),
    (
        "_digit_histogram_kernel",
        "prefix not compared",
        "(bits >> SHIFT + 10 == tl.load(p_prefix))",
        "(bits >= 0)",
    ),
    (
        "_digit_histogram_kernel",
        "one digit too high",
        "bits >> SHIFT & 1023",
        "(bits >> (SHIFT + 1)) & 1023",
    ),
]


def check(m):
    "The smallest of a thousand numbers, which comes last, and the one in the middle."
    exact_interpreter()
    p = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    p[-1] = 1e-3 * p.min()
    with guarded_memory():
        found = [m.select(p, torch.tensor(r)).item() for r in (0, 500)]
    assert found == [p.sort().values[r].item() for r in (0, 500)]
