"""Are the kernels right on this GPU, and where are they faster? One command, eight minutes.

    python3 tests/gpu_gate.py --out OUT [--budget 470] [--families head,msca] [--ptxas FILE]
    python3 tests/gpu_gate.py --out OUT --device cpu --tiny        a dry run in Triton's interpreter

Phases: warm (caches, ceilings), right (the tests of the kernels, production shapes against double precision, races),
sanitizer, ops (times of the kernels and their peers), networks, learn. Writes gate.json, ops_GPU.csv, nets_GPU.csv,
dispatch.json, sanitizer.txt, report.md and log.txt; prints the report; exit code 1 where something failed. An op that
fails gets no kernel: copy dispatch.json to data/bench to let `auto` use the others. Needs PyTorch, Triton, pytest and
what segkern imports; this process itself imports none of it.
"""

import argparse
import getpass
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))

import sanitizer  # noqa: E402
import verdict  # noqa: E402
from families import FAMILIES, test_files  # noqa: E402
from jobs import Job, run_all  # noqa: E402

# seconds of 465
SHARES = {"warm": 60, "right": 100, "sanitizer": 75, "ops": 110, "networks": 110, "learn": 10}
# the interpreter spends its time on the checks
DRY_SHARES = SHARES | {"right": 280, "sanitizer": 1}
LATENCY = ("s2fpn_r18", "segformer_b0", "segnext_l", "segformer_b5", "seaformer_l", "cgrseg_l")
TRAINING = (
    "segformer_b0",
    "s2fpn_r18",
    "segnext_l",
    "segformer_b5",
    "sasformer_sparse_b4",
    "ocrnet_hr48_ssa",
)
DRY_NETWORKS = (("latency", "segformer_b0"), ("training", "s2fpn_r18"))
SECOND_PTXAS = ("sr_attention", "prototype")  # where reports of wrong code match our kernels


def caches():
    "A folder outside the checkout for compiled kernels; a second run finds those of the first."
    folder = Path(tempfile.gettempdir()) / f"segkern_gate_{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    return folder


def environment(a, cores):
    "What every child sees."
    path = [
        str(ROOT),
        str(GPU),
        *filter(None, [os.environ.get("SEGKERN_GATE_PATH")]),
    ]  # the last: what a test puts in the way
    env = dict(
        PYTHONPATH=os.pathsep.join(path),
        PYTHONUNBUFFERED="1",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS=str(max(1, cores // 8)),
        TRITON_CACHE_DIR=str(caches() / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(caches() / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS="2",
        SEGKERN_TEST_DEVICE=a.device,
        SEGKERN_IMPL="auto",
        TOKENIZERS_PARALLELISM="false",
    )
    if a.device == "cpu":
        env |= dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return env


class Gate:
    "The phases, their time, and everything they found."

    def __init__(self, a):
        self.a = a
        self.start = time.monotonic()
        self.rows = []
        self.cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.env = environment(a, self.cores)
        self.cpu = a.device == "cpu"
        self.left = dict(DRY_SHARES if self.cpu else SHARES)
        self.work = Path(tempfile.mkdtemp(prefix="segkern_gate_rows_"))
        self.out = Path(a.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.gpu = a.device
        self.versions = {}
        self.codes = {}
        self.ceilings = {}
        self.problems = []
        (self.out / "log.txt").write_text(self.nvidia_smi(), encoding="utf-8")
        (self.out / "sanitizer.txt").write_text("", encoding="utf-8")

    def nvidia_smi(self):
        "What the driver says."
        try:
            return (
                subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
                + "\n"
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            return f"nvidia-smi: {e}\n"

    def note(self, text):
        "A line of the log, and of the terminal."
        line = f"{time.monotonic() - self.start:6.1f} s  {text}"
        print(line, file=sys.stderr, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def seconds(self, phase):
        "This phase's share of the time that is left."
        remaining = max(1.0, self.a.budget - (time.monotonic() - self.start))
        shares = sum(self.left.values())
        return remaining * self.left.pop(phase) / shares

    def child(self, phase, name, family="", number=1, facts=None, env=None, **options):
        "A job that runs tests/gpu/child.py."
        rows = self.work / f"{number}_{name}.jsonl"
        tiny = ["--tiny"] if self.a.tiny else []
        command = [
            sys.executable,
            str(GPU / "child.py"),
            phase,
            "--family",
            family,
            "--number",
            str(number),
            "--rows",
            str(rows),
            "--device",
            self.a.device,
            "--facts",
            json.dumps(facts or {}),
            *tiny,
        ]
        return Job(number, name, family, command, rows, self.env | (env or {}), **options)

    def run(self, phase, jobs, seconds, parallel):
        "Run jobs, keep their rows and logs, write what is known."
        self.note(f"{phase}: {len(jobs)} processes, {seconds:.0f} s")
        self.rows += run_all(jobs, seconds, parallel, self.note)
        with open(self.out / "log.txt", "a", encoding="utf-8") as f:
            for j in jobs:
                text = j.log.read_text(encoding="utf-8", errors="replace") if j.log.exists() else ""
                if text.strip():
                    f.write(f"\n===== {phase} {j.name}\n{text[-60_000:]}")
        self.write()

    def write(self):
        "gate.json and the two tables."
        found = verdict.verdicts(self.rows, self.a.families)
        state = dict(
            gpu=self.gpu,
            versions=self.versions,
            ceilings=self.ceilings,
            codes=self.codes,
            seconds=round(time.monotonic() - self.start, 1),
            counts=verdict.counts(self.rows),
            verdicts=found,
            problems=self.problems,
            rows=self.rows,
        )
        verdict.save(self.out / "gate.json", state)
        verdict.write_tables(self.out, self.rows, self.gpu, self.versions)
        return found

    def warm(self):
        "Phase 0: the machine, its ceilings, and compiled kernels."
        seconds = self.seconds("warm")
        began = time.monotonic()
        # a few seconds; a minute where the disk has not seen PyTorch yet, and nothing goes on without it
        self.run("about", [self.child("about", "about", number=0)], max(120.0, seconds / 2), 1)
        by = {r["label"]: r for r in self.rows}
        machine = by.get("machine", {})
        self.gpu = machine.get("gpu", self.gpu)
        self.versions = machine.get("versions", {})
        self.codes = machine.get("codes", {})
        if by.get("ceilings", {}).get("status") == "ok":
            self.ceilings = {k: by["ceilings"][k] for k in ("copy_gbs", "matmul_tflops")}
        if by.get("exponentials", {}).get("status") == "ok":
            self.ceilings["exp_per_second"] = by["exponentials"]["exp_per_second"]
        if machine.get("interpreted") and not self.cpu:
            self.problems.append("TRITON_INTERPRET is set: nothing of this ran on the GPU")
        if machine.get("status") != "ok":
            raise SystemExit("the first child found no usable device: see log.txt")
        jobs = [
            self.child(p, f"{p} {f}", f, 0) for p in ("warm", "launch") for f in self.a.families
        ]
        if self.cpu:
            jobs = jobs[:1]  # the interpreter compiles nothing
        self.run("warm", jobs, max(1.0, seconds - (time.monotonic() - began)), min(12, self.cores))

    def pytest(self, family):
        "The ordinary tests of one family, on this device."
        rows = self.work / f"1_tests {family}.jsonl"
        each = 1 if self.a.tiny else max(1, min(8, round(1.5 * self.cores / len(self.a.families))))
        spread = ["-n", str(each), "--dist", "load"] if each > 1 and self.xdist() else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "gate_rows",
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=short",
            *spread,
            *map(str, test_files(family)),
        ]
        env = self.env | dict(
            SEGKERN_GATE_ROWS=str(rows),
            SEGKERN_GATE_FAMILY=family,
            SEGKERN_GATE_SHARD="0/25" if self.a.tiny else "0/1",
        )
        return Job(
            1,
            f"tests {family}",
            family,
            command,
            rows,
            env,
            weight=len(FAMILIES[family][0]),
            restarts=0,
        )

    def xdist(self):
        "Whether pytest can spread tests over processes."
        done = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True)
        return done.returncode == 0

    def right(self):
        "Phase 1: the tests, and what right.py checks."

        def count(f):
            return len(FAMILIES[f][0])

        jobs = [self.child("right", f"right {f}", f, weight=count(f)) for f in self.a.families] + [
            self.pytest(f) for f in self.a.families
        ]
        second = [f for f in SECOND_PTXAS if f in self.a.families]
        reason = "no GPU" if self.cpu else "" if self.a.ptxas else "no file was given with --ptxas"
        if reason:
            self.rows += [
                dict(phase=1, family=f, op="", label="second ptxas", status=f"not run: {reason}")
                for f in second
            ]
        else:
            other = dict(
                TRITON_PTXAS_PATH=str(Path(self.a.ptxas).resolve()),
                TRITON_CACHE_DIR=str(caches() / "triton_second_ptxas"),
            )
            facts = dict(only="double", prefix="second ptxas: ")
            jobs += [
                self.child("right", f"second ptxas {f}", f, facts=facts, env=other) for f in second
            ]
        self.run("right", jobs, self.seconds("right"), min(12, self.cores))

    def sanitizer(self):
        "Phase 2: memcheck and synccheck first, then racecheck."
        program = sanitizer.find()
        seconds = self.seconds("sanitizer")
        if self.cpu or not program:
            why = "not run: no GPU" if self.cpu else "not run: compute-sanitizer is not installed"
            self.rows += [
                dict(phase=2, family=f, op="*", label=f"{t} of {f}", status=why)
                for t in sanitizer.TOOLS
                for f in self.a.families
            ]
            (self.out / "sanitizer.txt").write_text(why + "\n", encoding="utf-8")
            return
        jobs = []
        for tool in sanitizer.TOOLS:
            for f in self.a.families:
                job = self.child(
                    "launch",
                    f"{tool} {f}",
                    f,
                    2,
                    restarts=0,
                    env=dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                )
                job.command = sanitizer.command(program, tool, f, job.command)
                job.rows = self.work / f"2_{tool}_{f}.found.jsonl"
                job.read = sanitizer.reader(tool, f, self.out / "sanitizer.txt")
                jobs.append(job)
        self.run("sanitizer", jobs, seconds, 4)

    def ops(self):
        "Phase 3: one process after the other, since they are timed."
        if not {"copy_gbs", "matmul_tflops"} <= set(self.ceilings):
            self.problems.append("ops were not timed: the ceilings are missing")
            return

        def count(f):
            return sum(p["op"] in FAMILIES[f][0] for p in verdict.predicted())

        jobs = [
            self.child("speed", f"ops {f}", f, 3, dict(ceilings=self.ceilings), weight=count(f))
            for f in self.a.families
        ]
        self.run("ops", jobs, self.seconds("ops"), self.cores if self.cpu else 1)

    def networks(self):
        "Phase 4: latency and training, the most telling networks first."
        todo = [("latency", n) for n in LATENCY] + [("training", n) for n in TRAINING]
        if self.a.tiny:
            todo = DRY_NETWORKS
        jobs = [self.child("nets", f"{what} {n}", n, 4, dict(what=what)) for what, n in todo]
        self.run("networks", jobs, self.seconds("networks"), self.cores if self.cpu else 1)

    def learn(self):
        "Phase 5: the dispatch table and the report."
        found = self.write()
        file = self.work / "found.json"
        rows = [r for r in self.rows if r["phase"] == 3]
        verdict.save(
            file,
            dict(rows=rows, gpu=self.gpu, codes=self.codes, versions=self.versions, verdicts=found),
        )
        job = self.child("learn", "learn", number=5, facts=dict(found=str(file), out=str(self.out)))
        self.run("learn", [job], max(60.0, self.seconds("learn")), 1)
        if not (self.out / "dispatch.json").exists():
            self.problems.append("dispatch.json was not written: see log.txt")
        found = self.write()
        seconds = time.monotonic() - self.start
        text = verdict.report(
            self.rows, self.gpu, self.versions, self.ceilings, found, seconds, self.problems
        )
        (self.out / "report.md").write_text(text, encoding="utf-8")
        print(text)
        return 1 if self.problems or any(map(verdict.failed, self.rows)) else 0

    def all(self):
        "Every phase; what goes wrong in one does not keep the others from running."
        for phase in (self.warm, self.right, self.sanitizer, self.ops, self.networks):
            try:
                phase()
            except SystemExit as e:
                self.problems.append(str(e))
                break
            except Exception as e:
                self.problems.append(f"phase {phase.__name__}: {type(e).__name__}: {e}")
                self.note(self.problems[-1])
        return self.learn()


def arguments(argv=None):
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", default="runs/gpu_gate", help="folder of the seven files")
    p.add_argument("--budget", type=float, default=470, help="seconds, shared among the phases")
    p.add_argument(
        "--families", default="", help="comma-separated, default all: " + ", ".join(FAMILIES)
    )
    p.add_argument(
        "--ptxas",
        default="",
        help="a newer ptxas, with which some kernels are compiled and checked again",
    )
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="small shapes, few tests: a dry run")
    a = p.parse_args(argv)
    a.families = [f for f in a.families.split(",") if f] or list(FAMILIES)
    if unknown := sorted(set(a.families) - set(FAMILIES)):
        p.error(f"unknown family '{unknown[0]}'; known: {', '.join(FAMILIES)}")
    if a.device == "cpu" and not a.tiny:
        p.error("--device cpu needs --tiny: production shapes would take days in the interpreter")
    if a.ptxas and not Path(a.ptxas).is_file():
        p.error(f"--ptxas: {a.ptxas} is no file")
    return a


if __name__ == "__main__":
    sys.exit(Gate(arguments()).all())
