"""Measures the house, and compares it with the figures of the last time: they may only get better.

python tests/house.py            print the figures; exit code 1 where one got worse
python tests/house.py --keep     write the better ones to tests/house.json
"""

import argparse
import ast
import io
import json
import re
import statistics
import sys
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATCHET = ROOT / "tests" / "house.json"
# from the ground up: a room imports only rooms before it, lazy imports counted
ROOMS = {
    "core": "files, seeds, tables, input rules, labels, the type of a recipe",
    "viz": "figures, labels in colours, curves",
    "weights": "checkpoints of any container, key tables, transfer",
    "ops": "operators with exact references and Triton kernels, one op per file, and who chooses",
    "testing": "fixtures, contracts, toys, kernels without a GPU (aside: notebooks and tests use it)",
    "losses": "what networks minimise",
    "data": "datasets, transforms, checks; a set is a notebook and a table in data/",
    "backbones": "blocks and encoders, each with its key table",
    "models": "a paper is its notebook: network, key table, objective, recipes, `register`",
    "infer": "windows, protocols, one picture, a dataset, the form for use",
    "train": "order, schedule, optimizer, run folder, step, loop; classification",
    "bench": "clock, costs, models, ops against their peers",
    "explain": "receptive fields by tracing and by gradient, heat maps, pictures",
    "lab": "tools that live in a notebook",
    "reproduce": "papers, headlessly, and one report",
    "cli": "the command line, a file per group of commands",
    "__main__": "`python -m segkern`",
}
ORDER = list(ROOMS)
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}
WIDEST = 120  # characters of a line
LONGEST = 400  # lines of a file


def modules(root=ROOT):
    "Every module of the package and its file."
    files = [p for p in (root / "segkern").rglob("*.py") if p.name != "_modidx.py"]
    return {module_of(p, root): p for p in sorted(files)}


def module_of(path, root=ROOT):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(name, path, known):
    "The modules of the package that a file imports, inside of functions too."
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            found.add(full if full in known else base)
    return (found & set(known)) - {name, "segkern"}


def room(module):
    "The room of a module; '' for the package itself."
    return module.split(".")[1] if "." in module else ""


def circles(graph):
    "Groups of files that import each other, directly or not."
    reach = {name: set(targets) for name, targets in graph.items()}
    grown = True
    while grown:
        grown = False
        for name, seen in reach.items():
            more = set().union(*(reach[t] for t in seen if t in reach)) - seen
            if more:
                seen |= more
                grown = True
    rings = {frozenset(m for m in seen if name in reach.get(m, ())) for name, seen in reach.items()}
    return sorted(sorted(ring) for ring in rings if len(ring) > 1)


def is_dense(line):
    "A line over 100 characters with two loops or conditions, or with a body behind its colon."
    words = len(re.findall(r"\b(?:if|for)\b", line))
    compound = bool(re.match(r"\s*(if|for|with)\b.*:\s*\S", line))
    return len(line) > 100 and (words >= 2 or compound)


def tokens_per_line(files):
    "Tokens per line that holds code."
    count = 0
    lines = 0
    for path in files:
        text = io.StringIO(path.read_text(encoding="utf-8"))
        tokens = [t for t in tokenize.generate_tokens(text.readline) if t.type not in LAYOUT]
        count += len(tokens)
        lines += len({t.start[0] for t in tokens})
    return count / lines


def write_tree(root=ROOT):
    "Put the present tree where the README's notebook and CONTRIBUTING show it."
    block = "```text\n" + tree(root) + "\n```"
    shown = re.compile(r"```text\nsegkern/.*?\n```", re.DOTALL)
    path = root / "CONTRIBUTING.md"
    path.write_text(shown.sub(lambda _: block, path.read_text("utf-8")), encoding="utf-8")
    path = root / "nbs" / "index.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        source = shown.sub(lambda _: block, "".join(cell["source"]))
        cell["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def beside_signatures(source):
    "Lines of code without blank ones and without the parameters of functions, which stand one per line."
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    parameters = sum(max(0, n.body[0].lineno - 1 - n.lineno) for n in functions)
    return sum(bool(line.strip()) for line in source.splitlines()) - parameters


def exported_cells(root=ROOT):
    """Lines of every exported cell, how many hold over 60 beside signatures, and the longest runs of
    such cells without a lesson, by notebook."""
    lengths = []
    long = 0
    runs = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        run = 0
        longest = 0
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            if re.match(r"#\|\s*export", source):
                body = source.partition("\n")[2]
                if re.match(r"\s*(from|import)\b", body):
                    continue
                lengths.append(len(body.splitlines()))
                long += beside_signatures(body) > 60
                run += 1
                longest = max(longest, run)
            elif not source.startswith("#|"):
                run = 0
        runs[path.stem] = longest
    return lengths, long, runs


def tree(root=ROOT):
    "The rooms from the ground up, a phrase for each, and their files."
    names = sorted(modules(root))
    lines = ["segkern/"]
    for name, phrase in ROOMS.items():
        files = [n.split(".", 2)[2] for n in names if n.startswith(f"segkern.{name}.")]
        lines.append(f"  {name + '/' if files else name + '.py':12} {phrase}")
        lines += textwrap.wrap(
            " · ".join(files), 100, initial_indent=" " * 15, subsequent_indent=" " * 15
        )
    return "\n".join(lines)


def measure(root=ROOT):
    "The figures, and where the worst of them stand."
    files = modules(root)
    graph = {name: imported(name, path, files) for name, path in files.items()}
    arrows = {(room(a), room(b)) for a, targets in graph.items() for b in targets}
    arrows = {(a, b) for a, b in arrows if a and b and a != b}
    # the room's own __init__ only collects names
    inner = {n: t for n, t in graph.items() if files[n].name != "__init__.py"}
    inner = {n: {m for m in targets if m in inner} for n, targets in inner.items()}
    rings = circles(inner)
    tests = sorted((root / "tests").rglob("*.py"))
    ours = [line for path in files.values() for line in path.read_text("utf-8").splitlines()]
    theirs = [line for path in tests for line in path.read_text("utf-8").splitlines()]
    sizes = {n: len(p.read_text("utf-8").splitlines()) for n, p in files.items()}
    lengths, long_cells, runs = exported_cells(root)
    figures = {
        "rooms": len({room(name) for name in files if room(name)}),
        "arrows between rooms": len(arrows),
        "upward arrows": sum(ORDER.index(b) > ORDER.index(a) for a, b in arrows),
        "circles": len(rings),
        f"files over {LONGEST} lines": sum(n > LONGEST for n in sizes.values()),
        f"lines over {WIDEST}": sum(len(line) > WIDEST for line in ours + theirs),
        "dense lines": sum(map(is_dense, ours)),
        "tokens per line": round(tokens_per_line(files.values()), 1),
        "exported cell median": statistics.median(lengths),
        "exported cells over 60 lines": long_cells,
        "longest run without a lesson": max(runs.values()),
    }
    upward = sorted(f"{a} -> {b}" for a, b in arrows if ORDER.index(b) > ORDER.index(a))
    long = [f"{name} {n}" for name, n in sizes.items() if n > LONGEST]
    most = sorted(runs, key=runs.get, reverse=True)[:5]
    return figures, dict(upward=upward, circles=rings, files=long, runs={n: runs[n] for n in most})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="let better figures be the new limits")
    parser.add_argument("--tree", action="store_true", help="write and print the rooms")
    args = parser.parse_args()
    if args.tree:
        write_tree()
        print(tree())
        return 0
    figures, where = measure()
    limits = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
    worse = {n: v for n, v in figures.items() if v > limits.get(n, v)}
    for name, value in figures.items():
        limit = limits.get(name)
        note = "" if limit in (None, value) else f"   (limit {limit})"
        print(f"{name:32} {value}{note}")
    for name, found in where.items():
        if found:
            print(f"{name}: {found}")
    if args.keep:
        best = {n: min(v, limits.get(n, v)) for n, v in figures.items()}
        RATCHET.write_text(json.dumps(best, indent=1) + "\n")
    if worse:
        print(f"worse than before: {', '.join(worse)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
