"Phase 0: what this machine is, and what it can do at best."

import os
import platform

import torch


def exponentials(device, tiny):
    "Exponentials per second, from 64 in a row on every number."
    from segkern.bench.contenders import clocked

    x = torch.rand(1 << (16 if tiny else 26), device=device)

    def many():
        y = x
        for _ in range(64):
            y = torch.exp(-y)
        return y

    fn = torch.compile(many, dynamic=False) if device.type == "cuda" else many
    return (
        64 * x.numel() / (clocked(fn, device, 40 if device.type == "cuda" else 1)["ms_50"] * 1e-3)
    )


def main(rows, family, device, tiny, facts):
    "Versions, the device, and three ceilings."
    import segkern
    from segkern.bench.contenders import ceilings
    from segkern.ops.dispatch import KERNELS, code_hash, interpreting, triton

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    versions = dict(
        segkern=segkern.__version__,
        torch=torch.__version__,
        triton=getattr(triton, "__version__", ""),
        cuda=torch.version.cuda or "",
        python=platform.python_version(),
        ptxas=os.environ.get("TRITON_PTXAS_PATH", ""),
    )
    import segkern.ops  # noqa: F401  (registers the kernels)

    codes = {op: code_hash(op) for op in KERNELS}
    rows.run(
        "",
        "machine",
        lambda: dict(gpu=name, versions=versions, codes=codes, interpreted=interpreting()),
    )
    rows.run(
        "", "ceilings", lambda: ceilings(device, torch.bfloat16 if cuda else torch.float32, tiny)
    )
    rows.run("", "exponentials", lambda: dict(exp_per_second=exponentials(device, tiny)))
