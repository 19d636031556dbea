"Phase 0: fill the disk caches of Triton and Inductor, so that later phases measure and do not compile."

import torch
from child import selected, synchronise


def main(rows, family, device, tiny, facts):
    "Launch every kernel of the family once at its production shapes, then compile its peers."
    from segkern.bench.contenders import one_step

    todo = selected(family, tiny)
    kinds = [torch.float32] if tiny else [torch.bfloat16, torch.float16, torch.float32]

    def label(c, what):
        return f"{c.label}, {'backward too' if c.grad else 'forward'}, {what}"

    def launch(case, dtype):
        args = case.make(device, dtype)
        one_step(case, lambda *t: case.fn(*t, impl="triton"), args)
        synchronise(device)

    def compile_peer(case):
        args = case.make(device, torch.bfloat16)
        one_step(case, torch.compile(case.plain, dynamic=False), args)
        synchronise(device)

    for dtype in kinds:
        for case in todo[:1] if tiny else todo:
            rows.run(case.op, label(case, str(dtype)), lambda: launch(case, dtype))
    if device.type != "cuda":
        return
    for case in todo:
        rows.run(case.op, label(case, "compile"), lambda: compile_peer(case))
