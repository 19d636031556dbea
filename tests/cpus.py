"""A slice of the suite as other processors and other numbers of threads compute it (`make test-cpus`).

    python tests/cpus.py [NAME ...]     default: every setting

PyTorch's own loops, oneDNN's convolutions and MKL's products choose their code by the processor; each can be told to
take older code. Every family of networks, every op and every loop has tests in the slice. A setting counts only where a
probe sees that it takes effect.
"""

import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from run import Outcomes, outcomes, processor, ROOT, WORKERS

OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETTINGS = {
    "this processor": {},
    "2 threads": {"SEGKERN_TEST_THREADS": "2"},
    "4 threads": {"SEGKERN_TEST_THREADS": "4"},
    "loops avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "loops default": {"ATEN_CPU_CAPABILITY": "default"},
    "convolutions AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "convolutions SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "products COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "all three old": OLD,
    "all three old, 4 threads": OLD | {"SEGKERN_TEST_THREADS": "4"},
}
FILES = """
    afformer bench cgrseg hosts infer kernels_affinity kernels_head kernels_msca kernels_prototype kernels_rca_gate
    kernels_squeeze_axial kernels_sr_attention kernels_strip models ops parity pretrain protocols sanet seaformer
    segnext sparse_losses ssa train transformers tree vit_adapter weights
""".split()
SLICE = """
    contract parity round_trip losses specified written network ssam precision bf16 deploy learns kill evaluating
    workers optimized layouts literal_form pieces upsample strip filter published any_tree gradcheck image_to_labels
    multiscale odd_sizes sliding subset sums
""".split()
# long, or nothing that a processor could change
NOT = "compile costs export children every_network triton refused official".split()
X86 = platform.machine().lower() in ("x86_64", "amd64")
WHICH = f"({' or '.join(SLICE)}) and not ({' or '.join(NOT)})"

PROBE = """
import os
import torch
torch.set_num_threads(int(os.environ.get("SEGKERN_TEST_THREADS", "1")))
print("loops", torch.backends.cpu.get_cpu_capability())
print("threads", torch.get_num_threads())
torch.nn.functional.conv2d(torch.randn(2, 64, 64, 64), torch.randn(64, 64, 3, 3))
torch.randn(64, 64) @ torch.randn(64, 64)
"""


def probe(env):
    "What PyTorch, oneDNN and MKL say that they use."
    verbose = env | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", PROBE], env=verbose, capture_output=True, text=True, check=True
    ).stdout
    found = [
        re.search(p, said)
        for p in (r"loops (\S+)", r"cpu,isa:(?:Intel )?(.*)", r"CNR:(\S+)", r"threads (\d+)")
    ]
    return [m[1] if m else "not seen" for m in found]


def takes_effect(setting, seen):
    "Whether the probe sees what was asked for."
    loops, isa, products, threads = seen
    wanted = {
        "ATEN_CPU_CAPABILITY": loops.lower(),
        "MKL_CBWR": products,
        "SEGKERN_TEST_THREADS": threads,
    }
    wanted["ONEDNN_MAX_CPU_ISA"] = re.sub(r"\W", "", isa)
    return all(wanted[k] == v for k, v in setting.items())


def run(name):
    "The slice under one setting: a row of the table, and the end of the log where something failed."
    setting = SETTINGS[name]
    start = time.perf_counter()
    env = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "MPLBACKEND": "Agg", "IN_TEST": "1"}
        | setting
    )
    seen = probe(env)
    report = ROOT / ".cache" / f"cpus-{name.replace(' ', '-').replace(',', '')}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    files = [f"tests/test_{f}.py" for f in FILES]
    command = [sys.executable, "-m", "pytest", "-k", WHICH, f"--junitxml={report}", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    found = Outcomes({}, [f"pytest ended with code {done.returncode} and no report"])
    if report.exists():
        found = outcomes(report)
    failed = list(found.failed)
    if not takes_effect(setting, seen):
        failed.append("the setting has no effect on this machine")
    row = dict(zip(("setting", "loops", "convolutions", "products", "threads"), (name, *seen)))
    row |= {k: found.counts.get(k, 0) for k in ("passed", "skipped")}
    row |= dict(failed=len(failed), seconds=round(time.perf_counter() - start))
    return row, failed, done.stdout[-6000:] if failed else ""


def main(names):
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        sys.exit(f"unknown setting {unknown}; known: {', '.join(SETTINGS)}")
    names = names or [n for n in SETTINGS if X86 or not set(OLD) & set(SETTINGS[n])]
    if not X86:
        print(
            "this is no x86 processor: the settings of loops, convolutions and products are left out"
        )
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(tqdm(pool.map(run, names), desc="settings", total=len(names), disable=None))
    for row, failed, log in found:
        if log:
            print(f"\n{row['setting']}:\n{log}")
    sys.path.insert(0, str(ROOT))
    from segkern.core import Table

    print(Table([row for row, *_ in found]))
    for row, failed, _ in found:
        for name in failed:
            print(f"failed: {row['setting']}: {name}")
    print(f"processor: {processor()}")
    sys.exit(any(failed for _, failed, _ in found))


if __name__ == "__main__":
    main(sys.argv[1:])
