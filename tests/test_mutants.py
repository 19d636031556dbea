"""Tests of the tests: each kernel is broken on purpose in several ways, and the check of its op must notice every one.

A file `tests/mutants/OP.py` names the module, the faults (kernel, what is broken, text, replacement) and the check. The first
fault of each kernel is planted in every run, the others with --slow."""

import ast
import importlib.util
import io
import itertools
import tokenize
from pathlib import Path

import pytest

import segkern.ops  # noqa: F401
from segkern.ops.dispatch import interpreting

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not interpreting(), reason="kernels run in the interpreter here; set TRITON_INTERPRET=1"
)
LAYOUT = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
)
_count = itertools.count()


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = {p.stem: load(p, f"mutants_{p.stem}") for p in sorted((HERE / "mutants").glob("*.py"))}


def source(table):
    return Path(importlib.util.find_spec(table.MODULE).origin).read_text()


def functions_of(text):
    return {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}


def words(text):
    "The tokens of Python text, each with its place, without line ends, comments and indentation."
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in LAYOUT or not token.string:
                continue
            start, end = (offsets[row - 1] + column for row, column in (token.start, token.end))
            word = (
                repr(ast.literal_eval(token.string))
                if token.type == tokenize.STRING
                else token.string
            )
            found.append((word, start, end))
    except tokenize.TokenError:  # a piece of an expression may leave brackets open
        pass
    return found


def with_callees(functions, name):
    "A kernel and the functions of its module that it calls, directly or not."
    found = [name]
    for caller in found:
        called = {n.id for n in ast.walk(functions[caller]) if isinstance(n, ast.Name)}
        found += sorted((called & set(functions)) - set(found))
    return [functions[n] for n in found]


def replaced(functions, kernel, old, new):
    """The function of a kernel that holds a piece, and its canonical text with the piece replaced;
    layout does not matter."""
    wanted = [word for word, *_ in words(old)]
    for function in with_callees(functions, kernel):
        text = ast.unparse(function)
        there = words(text)
        spans = [there[i : i + len(wanted)] for i in range(len(there) - len(wanted) + 1)]
        places = [span for span in spans if [word for word, *_ in span] == wanted]
        if places:
            assert len(places) == 1, f"{function.name}: '{old}' occurs {len(places)} times"
            return function, text[: places[0][0][1]] + new + text[places[0][-1][2] :]
    raise AssertionError(f"{kernel} and what it calls do not hold '{old}'")


def broken(table, kernel, old, new, folder):
    "The op's module with one fault inside a kernel, under another name and with operators of its own."
    text = source(table)
    function, faulty = replaced(functions_of(text), kernel, old, new)
    first = min(n.lineno for n in (function, *function.decorator_list)) - 1
    lines = text.splitlines()
    lines[first : function.end_lineno] = faulty.splitlines()
    n = next(_count)
    kernels = dict(segkern.ops.dispatch.KERNELS)
    text = "\n".join(lines).replace(
        "segkern::", f"segkern_mutant{n}_{table.MODULE.rsplit('.', 1)[1]}::"
    )
    path = folder / f"mutant{n}.py"
    path.write_text(text)
    try:
        return load(path, f"segkern.ops.mutant{n}")
    finally:
        segkern.ops.dispatch.KERNELS.clear()
        segkern.ops.dispatch.KERNELS.update(kernels)


def faults():
    for op, table in TABLES.items():
        seen = set()
        for kernel, what, old, new in table.MUTANTS:
            yield pytest.param(
                op,
                kernel,
                old,
                new,
                id=f"{op} {kernel}: {what}",
                marks=[pytest.mark.slow] if kernel in seen else [],
            )
            seen.add(kernel)


@pytest.mark.parametrize("op", TABLES)
def test_the_sound_module_passes(op, tmp_path):
    table = TABLES[op]
    kernel = table.MUTANTS[0][0]
    table.check(broken(table, kernel, f"def {kernel}(", f"def {kernel}(", tmp_path))


def test_faults_are_found():
    "Every fault's piece occurs once in its kernel."
    for table in TABLES.values():
        functions = functions_of(source(table))
        for kernel, _, old, new in table.MUTANTS:
            ast.parse(replaced(functions, kernel, old, new)[1])


@pytest.mark.parametrize("op,kernel,old,new", faults())
def test_fault_is_noticed(op, kernel, old, new, tmp_path):
    module = broken(TABLES[op], kernel, old, new, tmp_path)
    with pytest.raises(AssertionError):
        TABLES[op].check(module)


def test_every_kernel_has_faults():
    "At least three faults for every kernel of every module."
    import re

    for op, table in TABLES.items():
        kernels = set(re.findall(r"^def (_\w+_kernel)\(", source(table), re.M))
        counts = {k: sum(m[0] == k for m in table.MUTANTS) for k in kernels}
        assert kernels and min(counts.values()) >= 3, f"{op}: {counts}"
    modules = {t.MODULE for t in TABLES.values()}
    with_kernels = {
        f"segkern.ops.{p.stem}"
        for p in Path(segkern.ops.__file__).parent.glob("*.py")
        if "\ndef _" in p.read_text()
        and "_kernel(" in p.read_text()
        and "@triton.jit" in p.read_text()
        and p.stem != "dispatch"
    }
    assert with_kernels <= modules, with_kernels - modules
