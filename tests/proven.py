"""Which kernels are as they were when their faults were planted and their launches compiled.

    python tests/proven.py                 list the tables whose kernels differ
    python tests/proven.py --keep          say that the present sources passed; a full run does

`make test` plants faults and compiles for the kernels that differ; comments, docstrings and layout do not count,
another Triton does. `make test-all` runs everything whatever is written here."""

import argparse
import ast
import functools
import hashlib
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import house

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "tests" / "proven.json"
ASIDE = {"dispatch", "operator", "verdicts", "graphs"}


def plain(path):
    "A file's code without comments, docstrings, imports and layout."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def known_modules():
    return house.modules()


@functools.cache
def named(path):
    "The files of `ops` that a file imports or names in a string, dispatch and bookkeeping aside."
    known = known_modules()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    used = house.imported(house.module_of(path), path, known) | (texts & set(known))
    found = (m.removeprefix("segkern.ops.") for m in used if m.startswith("segkern.ops."))
    return {known[f"segkern.ops.{m}"] for m in found if m not in ASIDE}


@functools.cache
def hash_of(script):
    "What a table of faults or of launches tests, and itself, in sixteen digits."
    todo = [ROOT / "tests" / f"{script}.py"]
    for path in todo:
        todo += sorted(named(path) - set(todo))
    text = "\n".join(plain(path) for path in [todo[0], *sorted(todo[1:])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored():
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def triton_version():
    "Whose machine code it is."
    return version("triton") if find_spec("triton") else "none"


def is_proven(script):
    "Whether the sources that are there now passed; `script` is e.g. 'aot/msca'."
    held = stored()
    return held.get("triton") == triton_version() and held.get(script) == hash_of(script)


def skip_if_proven(script, config):
    "Leave a test out whose kernels passed as they are, unless everything is asked for."
    if not config.getoption("--slow") and is_proven(script):
        import pytest

        pytest.skip(
            f"{script}: the kernels passed as they are (tests/proven.json); --slow repeats it"
        )


def scripts():
    "The tables of faults and of launches."
    files = [f for kind in ("mutants", "aot") for f in (ROOT / "tests" / kind).glob("*.py")]
    return sorted(f"{f.parent.name}/{f.stem}" for f in files)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="the present sources passed")
    if parser.parse_args().keep:
        hashes = {script: hash_of(script) for script in scripts()}
        STORE.write_text(json.dumps({"triton": triton_version(), **hashes}, indent=1) + "\n")
    differ = [s for s in scripts() if not is_proven(s)]
    same = len(scripts()) - len(differ)
    print(f"{same} tables as in the last full run; changed: {', '.join(differ) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
