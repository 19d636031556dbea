"""`make test`: the notebooks as nbdev_test runs them, then pytest, then a summary: counts, what failed, the processor.

python tests/run.py [--all]      --all: slow cells and slow tests too, and tests/cpus.py
"""

import argparse
import faulthandler
import io
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr
from difflib import get_close_matches
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

# a worker's __main__ belongs to the notebook it runs, so the function lives elsewhere
from nbtools import test_notebook

ROOT = Path(__file__).resolve().parent.parent
DURATIONS = ROOT / "tests" / "durations.json"
WORKERS = min(8, os.cpu_count() or 1)
# what most notebooks import, and what takes seconds to import
PRELOADED = (
    "torch torchvision.transforms.v2 matplotlib.pyplot timm triton nbdev.test nbtools "
    "segkern.models segkern.testing segkern.viz segkern.data"
).split()


def send(pipe, path, flags):
    "Run a notebook and send what came of it, with what it wrote to stderr."
    faulthandler.enable(sys.__stderr__)
    with redirect_stderr(io.StringIO()) as said:
        result = test_notebook(path, flags)
    pipe.send((*result, said.getvalue()))


def alone(ctx, path, flags):
    "One notebook in a process of its own: what one leaves behind must not fail the next."
    here, there = ctx.Pipe(duplex=False)
    start = time.perf_counter()
    job = ctx.Process(target=send, args=(there, path, flags))
    job.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = None
    job.join()
    return result or (
        path.name,
        False,
        time.perf_counter() - start,
        f"the process ended with code {job.exitcode}",
    )


def known_seconds():
    "Seconds of notebooks and test files in the run that was kept."
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def longest_first(files):
    "The order in which no core waits long for the other at the end; files that nobody timed come first."
    seconds = known_seconds()
    return sorted(files, key=lambda f: (-seconds.get(f.name, 1e9), f.name))


def notebooks(flags, only=()):
    """Notebooks, two at a time. Returns how many passed, the names of the others with the end of
    their errors, and the seconds of each."""
    from tqdm import tqdm

    files = longest_first([Path(f).resolve() for f in only] or (ROOT / "nbs").glob("*.ipynb"))
    for path in files:
        if not path.exists():
            near = get_close_matches(path.name, os.listdir(ROOT / "nbs"), 3, 0.3)
            sys.exit(f"there is no notebook {path}; did you mean {' or '.join(near) or 'another'}?")
    os.chdir(ROOT / "nbs")
    failed = {}
    took = {}
    ctx = get_context("forkserver")
    # imported once, forked for each notebook
    ctx.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(alone, ctx, f, flags) for f in files]
        for job in tqdm(as_completed(jobs), desc="notebooks", total=len(jobs), disable=None):
            name, ok, seconds, said = job.result()
            took[name] = round(seconds, 1)
            if not ok:
                failed[name] = "\n".join(said.rstrip().splitlines()[-25:])
    os.chdir(ROOT)
    slowest = sorted(took, key=took.get, reverse=True)[:5]
    print("slowest notebooks: " + ", ".join(f"{n} {took[n]:.0f} s" for n in slowest), flush=True)
    return len(files) - len(failed), failed, took


class Outcomes(NamedTuple):
    "What a run of pytest came to."

    counts: dict  # passed, failures, errors, skipped, tests
    failed: list  # names of tests
    seconds: dict = {}  # of each file


def tests(slow):
    "pytest on all cores: its exit code and the outcomes."
    report = ROOT / ".cache" / "pytest.xml"
    report.parent.mkdir(exist_ok=True)
    cmd = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        str(WORKERS),
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        f"--junitxml={report}",
        "--durations=5",
        *(["--slow"] if slow else []),
    ]
    report.unlink(missing_ok=True)
    files = longest_first((ROOT / "tests").glob("test_*.py"))
    code = subprocess.run([*cmd, *map(str, files)], cwd=ROOT).returncode
    if not report.exists():
        return code, Outcomes({}, [f"pytest ended with code {code} and no report"])
    return code, outcomes(report)


def outcomes(report):
    "The outcomes in a JUnit report."
    suite = ET.parse(report).getroot().find("testsuite")
    n = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    n["passed"] = n["tests"] - n["failures"] - n["errors"] - n["skipped"]
    cases = [c for kind in ("failure", "error") for c in suite.iterfind(f"testcase[{kind}]")]
    took = {}
    for case in suite.iterfind("testcase"):
        name = case.get("classname").rpartition(".")[2] + ".py"
        took[name] = took.get(name, 0.0) + float(case.get("time"))
    failed = sorted({f"{c.get('classname')}::{c.get('name')}" for c in cases})
    return Outcomes(n, failed, {name: round(seconds, 1) for name, seconds in took.items()})


def processor():
    "The processor, what PyTorch uses of it, and the versions."
    sys.path.insert(0, str(ROOT))
    from segkern.core import env_info

    info = env_info()
    return f"{info['cpu']}, {info['vectors']}, {os.cpu_count()} cores; torch {info['torch']}, triton {info['triton']}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--all", action="store_true", help="slow cells and tests too")
    p.add_argument("--keep", action="store_true", help="durations plan the next runs")
    p.add_argument("--notebooks", nargs="+", default=[], metavar="NB", help="only these")
    a = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ["IN_TEST"] = "1"
    start = time.perf_counter()
    passed, failed, took = notebooks(["slow"] if a.all else [], a.notebooks)
    if a.notebooks:
        for name in sorted(failed):
            print(f"\nfailed notebook {name}:\n{failed[name]}")
        kernels = "" if os.environ.get("TRITON_INTERPRET") == "1" else "; kernels were NOT run"
        print(f"{passed} notebooks passed, {len(failed)} failed{kernels}")
        sys.exit(1 if failed else 0)
    code, found = tests(a.all)
    n = found.counts
    if a.keep and not a.all:
        DURATIONS.write_text(json.dumps(took | found.seconds, indent=1, sort_keys=True) + "\n")
    other = subprocess.run([sys.executable, "tests/cpus.py"], cwd=ROOT).returncode if a.all else 0
    if a.all and not code:
        subprocess.run([sys.executable, "tests/proven.py", "--keep"], cwd=ROOT, check=True)
    for name in sorted(failed):
        print(f"\nfailed notebook {name}:\n{failed[name]}")
    bad = n.get("failures", 0) + n.get("errors", 0)
    print(
        f"summary: {passed} notebooks passed, {len(failed)} failed; {n.get('passed', 0)} tests passed, {bad} failed, "
        f"{n.get('skipped', 0)} skipped; {time.perf_counter() - start:.0f} s"
    )
    for name in sorted(failed) + found.failed:
        print(f"failed: {name}")
    if other:
        print("failed: the suite under other processors' settings (tests/cpus.py, table above)")
    print(f"processor: {processor()}")
    sys.exit(1 if failed or code or other else 0)


if __name__ == "__main__":
    main()
