"""Tests of the tests: each kernel is broken on purpose in several ways, and the check of its op must notice every one.

A file `tests/mutants/OP.py` names the modules of the op (MODULE, one or several), those that hold its kernels (KERNELS;
default: MODULE), the faults (kernel, what is broken, text, replacement) and the check. The first fault of each kernel
is planted in every run, the others with --slow."""

import ast
import functools
import importlib.util
import io
import itertools
import re
import sys
import tokenize
from pathlib import Path

import pytest
from proven import skip_if_proven

import segkern.ops  # noqa: F401
from segkern.ops import dispatch
from segkern.ops.dispatch import interpreting
from segkern.ops.verdicts import sources

HERE = Path(__file__).parent
OPS = Path(segkern.ops.__file__).parent
REGISTRIES = dispatch.KERNELS, dispatch.LAUNCHERS  # a module enters its op when it is loaded
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


def several(names):
    "Module names in the room of the ops, whether a table gives one or several."
    names = (names,) if isinstance(names, str) else names
    return [name.rsplit(".", 1)[1] for name in names]


def modules_of(table):
    return several(table.MODULE)


def kernel_modules_of(table):
    return several(getattr(table, "KERNELS", table.MODULE))


@functools.cache
def source(module):
    "The text of a module of the room."
    return (OPS / f"{module}.py").read_text()


@functools.cache
def functions_of(module):
    "The functions that a module defines: name -> node of the syntax tree."
    return {n.name: n for n in ast.parse(source(module)).body if isinstance(n, ast.FunctionDef)}


IMPORT = re.compile(r"^from (?:\.|segkern\.ops\.)(\w+) import", re.M)


@functools.cache
def imports_of(module):
    "What a module takes from others of the room: name -> the other module."
    found = {}
    for node in ast.parse(source(module)).body:
        if isinstance(node, ast.ImportFrom) and (home := IMPORT.match(ast.unparse(node))):
            found |= {alias.name: home[1] for alias in node.names}
    return found


def reached(modules):
    "These modules and all others of the room that they import, directly or not."
    found = list(modules)
    for module in found:
        found += sorted(set(imports_of(module).values()) - set(found))
    return found


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


def with_callees(module, name):
    "A kernel and the functions of the room that it calls, directly or not, each with its module."
    found = [(module, name)]
    for home, caller in found:
        used = {n.id for n in ast.walk(functions_of(home)[caller]) if isinstance(n, ast.Name)}
        own = {(home, n) for n in used & set(functions_of(home))}
        taken = {(imports_of(home)[n], n) for n in used & set(imports_of(home))}
        called = own | {(other, n) for other, n in taken if n in functions_of(other)}
        found += sorted(called - set(found))
    return found


def replaced(table, kernel, old, new):
    """The module and the function of a kernel that hold a piece, and the function's canonical text with
    the piece replaced; layout does not matter."""
    wanted = [word for word, *_ in words(old)]
    (home,) = (m for m in kernel_modules_of(table) if kernel in functions_of(m))
    for module, name in with_callees(home, kernel):
        text = ast.unparse(functions_of(module)[name])
        there = words(text)
        spans = [there[i : i + len(wanted)] for i in range(len(there) - len(wanted) + 1)]
        places = [span for span in spans if [word for word, *_ in span] == wanted]
        if places:
            assert len(places) == 1, f"{name}: '{old}' occurs {len(places)} times"
            return module, name, text[: places[0][0][1]] + new + text[places[0][-1][2] :]
    raise AssertionError(f"{kernel} and what it calls do not hold '{old}'")


def with_function(module, name, text):
    "The text of a module in which one function has another text."
    function = functions_of(module)[name]
    first = min(n.lineno for n in (function, *function.decorator_list)) - 1
    lines = source(module).splitlines()
    lines[first : function.end_lineno] = text.splitlines()
    return "\n".join(lines)


class Modules:
    "The modules of an op as one: a name is looked up in all of them, and set wherever it is known."

    def __init__(self, modules):
        self.__dict__["modules"] = modules

    def __getattr__(self, name):
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)

    def __setattr__(self, name, value):
        known = [module for module in self.modules if hasattr(module, name)]
        assert known, f"no module of the op has a '{name}'"
        for module in known:
            setattr(module, name, value)


def copied(table, text_of, folder):
    "Copies of the op's modules and of all between them and the changed ones, under new names and with new operators."
    tag = f"mutant{next(_count)}"
    own = modules_of(table)
    changed = set(text_of)
    copies = {m for m in reached(own) if m in own or changed & set(reached([m]))}

    def new_name(match):
        module = match[1]
        return f"from .{tag}_{module} import" if module in copies else match[0]

    loaded = {}
    try:
        # a module is loaded after those that it imports
        for module in sorted(copies, key=lambda m: len(copies & set(reached([m])))):
            text = text_of.get(module, source(module)).replace("segkern::", f"segkern_{tag}::")
            path = folder / f"{tag}_{module}.py"
            path.write_text(IMPORT.sub(new_name, text))
            name = f"segkern.ops.{tag}_{module}"
            loaded[module] = sys.modules[name] = load(path, name)
    finally:
        for module in loaded:
            del sys.modules[f"segkern.ops.{tag}_{module}"]
    return Modules([loaded[module] for module in own])


def broken(table, kernel, old, new, folder):
    "The modules of an op with one fault inside a kernel."
    module, name, faulty = replaced(table, kernel, old, new)
    held = [dict(registry) for registry in REGISTRIES]
    try:
        return copied(table, {module: with_function(module, name, faulty)}, folder)
    finally:
        for registry, before in zip(REGISTRIES, held):
            registry.clear()
            registry.update(before)


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
def test_the_sound_module_passes(op, tmp_path, request):
    skip_if_proven(f"mutants/{op}", request.config)
    table = TABLES[op]
    kernel = table.MUTANTS[0][0]
    table.check(broken(table, kernel, f"def {kernel}(", f"def {kernel}(", tmp_path))


def test_faults_are_found():
    "Every fault's piece occurs once in its kernel."
    for table in TABLES.values():
        for kernel, _, old, new in table.MUTANTS:
            ast.parse(replaced(table, kernel, old, new)[2])


@pytest.mark.parametrize("op,kernel,old,new", faults())
def test_fault_is_noticed(op, kernel, old, new, tmp_path, request):
    skip_if_proven(f"mutants/{op}", request.config)
    module = broken(TABLES[op], kernel, old, new, tmp_path)
    with pytest.raises(AssertionError):
        TABLES[op].check(module)


def kernels_in(module):
    "The names of the kernels that a module defines."
    jitted = "@triton.jit" in source(module)
    return [n for n in functions_of(module) if jitted and re.fullmatch(r"_\w+_kernel", n)]


def test_every_kernel_has_faults():
    "At least three faults for every kernel of every module."
    covered = set()
    for op, table in TABLES.items():
        modules = kernel_modules_of(table)
        kernels = [n for m in modules for n in kernels_in(m)]
        counts = {k: sum(m[0] == k for m in table.MUTANTS) for k in kernels}
        assert kernels and min(counts.values()) >= 3, f"{op}: {counts}"
        covered |= set(modules)
    with_kernels = {p.stem for p in OPS.glob("*.py") if kernels_in(p.stem)}
    assert with_kernels <= covered, with_kernels - covered


def test_the_hash_covers_every_kernel():
    "What a verdict is about: each kernel is found by following names from the launchers of an op."
    covered = {name for launchers in dispatch.LAUNCHERS.values() for name in sources(launchers)}
    kernels = {f"segkern.ops.{p.stem}.{n}" for p in OPS.glob("*.py") for n in kernels_in(p.stem)}
    assert kernels and kernels <= covered, kernels - covered
