"""`make quick`: what a change needs within two minutes: export, its notebooks, the nearest tests, the rules.

    python tests/quick.py [--since REV] [--seconds 110]

A change is what differs from REV (default: the last commit, or where nothing differs, the commit before). Tests are
taken in the order of their distance in the import graph, as long as their stored durations fit; the rest is named."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import house
from nbtools import exported_module
from run import known_seconds

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = 10.0  # seconds of a file that nobody has timed
RULES = "house or ruff or numbers or moved or exported or paper"


def git(*args):
    run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in run.stdout.splitlines() if line]


def changed(since):
    "Files that differ from a commit, new ones too; without a commit: from the last one that differs."
    new = git("ls-files", "--others", "--exclude-standard")
    if since:
        return sorted({*git("diff", "--name-only", since), *new})
    found = {*git("diff", "--name-only", "HEAD"), *new}
    return sorted(found or set(git("diff", "--name-only", "HEAD~1")))


def distances(modules, graph):
    "How many imports lie between each module and the nearest of the given ones."
    far = dict.fromkeys(modules, 0)
    edge = list(modules)
    while edge:
        users = [n for n, targets in graph.items() if n not in far and targets & set(edge)]
        far |= {n: far[edge[0]] + 1 for n in users}
        edge = users
    return far


def nearest_tests(files, seconds, budget):
    "Test files to run, nearest first, and those that no longer fit."
    known = house.modules()
    graph = {name: house.imported(name, path, known) for name, path in known.items()}
    notebooks = [ROOT / f for f in files if f.startswith("nbs/") and (ROOT / f).exists()]
    touched = {f"segkern.{m}".removesuffix(".__init__") for m in map(exported_module, notebooks)}
    far = distances(sorted(touched & set(known)), graph)
    tests = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        used = house.imported(f"tests.{path.stem}", path, known)
        near = [far[m] for m in used if m in far]
        if path.name in {Path(f).name for f in files}:
            tests[path.name] = -1
        elif near:
            tests[path.name] = min(near)
    order = sorted(tests, key=lambda name: (tests[name], seconds.get(name, UNKNOWN)))
    chosen = []
    left = []
    for name in order:
        cost = seconds.get(name, UNKNOWN)
        if cost <= budget:
            chosen.append(name)
            budget -= cost
        else:
            left.append(name)
    return chosen, left


def run(title, *command):
    "A command in the repository; returns whether it failed."
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    print(
        f"-- {title}: {'failed' if code else 'fine'}, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return code != 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", default="", help="a commit")
    parser.add_argument("--seconds", type=float, default=110.0, help="for notebooks and tests")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    start = time.perf_counter()
    failed = run("export", "nbdev_export")
    files = changed(args.since)
    seconds = known_seconds()
    notebooks = [f for f in files if f.startswith("nbs/") and (ROOT / f).exists()]
    notebooks.sort(key=lambda f: seconds.get(Path(f).name, UNKNOWN))
    # two files at a time, and the rules of the house take their share
    budget = (args.seconds - 30) * 2
    taken = []
    for f in notebooks:
        if seconds.get(Path(f).name, UNKNOWN) <= budget:
            taken.append(f)
            budget -= seconds.get(Path(f).name, UNKNOWN)
    if taken:
        failed = run("notebooks", sys.executable, "tests/run.py", "--notebooks", *taken) or failed
    tests, left = nearest_tests(files, seconds, budget)
    rules = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    if tests:
        paths = [f"tests/{name}" for name in tests if name != "test_repo.py"]
        failed = run("tests", *rules, *paths) or failed
    failed = run("rules", *rules[:4], "tests/test_repo.py", "-k", RULES) or failed
    skipped = [f for f in notebooks if f not in taken] + left
    print(f"changed: {len(files)} files; {len(taken)} notebooks and {len(tests)} test files run")
    if skipped:
        print(f"not run, would take longer: {', '.join(skipped)}")
    print(f"{'failed' if failed else 'fine'} after {time.perf_counter() - start:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
