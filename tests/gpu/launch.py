"Phase 2: one small launch of every case, for the sanitizer around this process; or phase 0, to compile them before it."

import torch
from child import selected, synchronise


def main(rows, family, device, tiny, facts):
    "Forward and backward of the small cases."
    from segkern.bench.contenders import one_step

    for case in selected(family, tiny=True):

        def once(case=case):
            args = case.make(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
            one_step(case, lambda *t: case.fn(*t, impl="triton"), args)
            synchronise(device)

        rows.run(case.op, f"small {case.label}, {'backward too' if case.grad else 'forward'}", once)
