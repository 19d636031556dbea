"Phase 2: NVIDIA's compute-sanitizer around small launches of our kernels."

import re
import shutil
from pathlib import Path

from families import kernel_names

TOOLS = ("memcheck", "synccheck", "racecheck")


def find():
    "The program, or None."
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def command(program, tool, family, child):
    "The tool on one family's kernels."
    names = [f"--kernel-name=kns={n}" for n in kernel_names(family)]
    options = ["--target-processes", "application-only", "--print-limit", "10"]
    if tool == "racecheck":
        options += ["--racecheck-report", "hazard"]
    return [program, "--tool", tool, *options, *names, *child]


def judge(tool, text, code):
    "Status and the lines that matter of one run; write-after-write hazards of reductions are a known false alarm."
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    if code is None:
        return "out of time: killed", lines[:40]
    if tool == "racecheck":
        kinds = re.findall(r"\b(RAW|WAR|WAW)\b[^\n]*hazard", text)
        summary = re.search(r"RACECHECK SUMMARY: (.*)", text)
        real = [k for k in kinds if k != "WAW"]
        if real:
            return f"failed: {len(real)} hazards (RAW or WAR)", lines[:60]
    else:
        summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
        if summary and int(summary[1]):
            return f"failed: {summary[1]} errors: {first_error(lines)}", lines[:60]
    if not summary:
        said = next(
            (t.strip() for t in reversed(text.splitlines()) if t.strip()), "nothing was printed"
        )
        return f"not run: no summary, code {code}: {said[:160]}", lines[:40]
    if code:
        return f"failed: the launches ended with code {code}", lines[:40]
    return "ok", lines[-1:]


def first_error(lines):
    "What the tool complains of first."
    plain = [line.strip("= ") for line in lines]
    return next(
        (t for t in plain if t and "COMPUTE-SANITIZER" not in t and "SUMMARY" not in t), ""
    )[:160]


def reader(tool, family, keep):
    "A function (text, code) -> rows that also appends to the file of findings."

    def read(text, code):
        status, lines = judge(tool, text, code)
        with open(keep, "a", encoding="utf-8") as f:
            f.write(f"--- {tool} {family}: {status}\n" + "\n".join(lines) + "\n")
        return [dict(phase=2, family=family, op="*", label=f"{tool} of {family}", status=status)]

    return read
