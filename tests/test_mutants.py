"""Tests of the tests: each kernel is broken on purpose in several ways, and the check of its op must notice every one.

A file `tests/mutants/OP.py` names the module, the faults (kernel, what is broken, text, replacement) and the check. The first
fault of each kernel is planted in every run, the others with --slow."""
import importlib.util
import itertools
from pathlib import Path

import pytest

import segkern.ops # noqa: F401
from segkern.ops.dispatch import interpreting

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels run in the interpreter here; set TRITON_INTERPRET=1")
_count = itertools.count()


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = {p.stem: load(p, f"mutants_{p.stem}") for p in sorted((HERE/"mutants").glob("*.py"))}


def source(table): return Path(importlib.util.find_spec(table.MODULE).origin).read_text()


def broken(table, kernel, old, new, folder):
    "The op's module with one fault inside a kernel, under another name and with operators of its own."
    text = source(table)
    start = text.index(f"def {kernel}(")
    end = text.find("\n# %%", start)
    body = text[start:end]
    assert body.count(old) == 1, f"{kernel}: '{old}' occurs {body.count(old)} times"
    n, kernels = next(_count), dict(segkern.ops.dispatch.KERNELS)
    text = (text[:start] + body.replace(old, new) + text[end:]).replace("segkern::", f"segkern_mutant{n}_{table.MODULE.rsplit('.', 1)[1]}::")
    path = folder/f"mutant{n}.py"
    path.write_text(text)
    try: return load(path, f"segkern.ops.mutant{n}")
    finally:
        segkern.ops.dispatch.KERNELS.clear()
        segkern.ops.dispatch.KERNELS.update(kernels)


def faults():
    for op, table in TABLES.items():
        seen = set()
        for kernel, what, old, new in table.MUTANTS:
            yield pytest.param(op, kernel, old, new, id=f"{op} {kernel}: {what}", marks=[pytest.mark.slow] if kernel in seen else [])
            seen.add(kernel)


@pytest.mark.parametrize("op", TABLES)
def test_the_sound_module_passes(op, tmp_path):
    table = TABLES[op]
    kernel = table.MUTANTS[0][0]
    table.check(broken(table, kernel, f"def {kernel}(", f"def {kernel}(", tmp_path))


@pytest.mark.parametrize("op,kernel,old,new", faults())
def test_fault_is_noticed(op, kernel, old, new, tmp_path):
    module = broken(TABLES[op], kernel, old, new, tmp_path)
    with pytest.raises(AssertionError): TABLES[op].check(module)


def test_every_kernel_has_faults():
    "At least three faults for every kernel of every module."
    import re
    for op, table in TABLES.items():
        kernels = set(re.findall(r"^def (_\w+_kernel)\(", source(table), re.M))
        counts = {k: sum(m[0] == k for m in table.MUTANTS) for k in kernels}
        assert kernels and min(counts.values()) >= 3, f"{op}: {counts}"
    modules = {t.MODULE for t in TABLES.values()}
    with_kernels = {f"segkern.ops.{p.stem}" for p in Path(segkern.ops.__file__).parent.glob("*.py") if "\ndef _" in p.read_text() and "_kernel(" in p.read_text()
                    and "@triton.jit" in p.read_text() and p.stem != "dispatch"}
    assert with_kernels <= modules, with_kernels - modules
