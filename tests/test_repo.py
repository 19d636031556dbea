"The repository's own rules: notebooks are the source, clean, small and free of this machine's paths."

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAPERS = sorted((ROOT / "papers").glob("*.ipynb"))
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
ENV.pop("IN_TEST", None)  # nbdev exports nothing while it is set


def cells(path, kind="code"):
    "Cells of a notebook as (id, source, whole cell)."
    return [
        (c["id"], "".join(c["source"]), c)
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the repository's sources."
    to = tmp_path_factory.mktemp("copy") / "segkern"
    shutil.copytree(
        ROOT,
        to,
        ignore=shutil.ignore_patterns(
            ".git",
            ".venv",
            "runs",
            "*.egg-info",
            "__pycache__",
            ".pytest_cache",
            ".cache",
            "build",
            "dist",
        ),
    )
    return to


def test_export_is_in_step(copy):
    "The package is what the notebooks export, to the byte."
    shutil.rmtree(copy / "segkern")
    subprocess.run(["nbdev_export"], cwd=copy, env=ENV, check=True, capture_output=True)

    def names(root):
        return sorted(str(p.relative_to(root)) for p in root.rglob("*.py"))

    assert names(copy / "segkern") == names(ROOT / "segkern")
    _, different, errors = filecmp.cmpfiles(
        copy / "segkern", ROOT / "segkern", names(ROOT / "segkern"), shallow=False
    )
    assert not different and not errors, f"run `make export`: {different + errors}"


def test_notebooks_are_clean(copy):
    "nbdev_clean changes nothing."
    for folder in ("nbs", "papers"):
        before = {p.name: p.read_bytes() for p in (copy / folder).glob("*.ipynb")}
        subprocess.run(
            ["nbdev_clean", "--fname", folder], cwd=copy, env=ENV, check=True, capture_output=True
        )
        changed = [n for n, b in before.items() if (copy / folder / n).read_bytes() != b]
        assert not changed, f"run `make clean`: {changed}"


def test_readme_is_the_index(tmp_path):
    subprocess.run(
        [sys.executable, "tests/nbtools.py", "readme", "--out", str(tmp_path)],
        cwd=ROOT,
        env=ENV,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), (
        "run `make readme`"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    "Short exported cells, imports by themselves, small outputs without errors or paths of a machine."
    size = 0
    for cid, source, cell in cells(path):
        body = [s for s in ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body]
        exported = re.match(r"#\|\s*export", source)
        lines = [line for line in source.splitlines() if line.strip()]
        if exported:
            beside = house.beside_signatures(source)
            assert beside <= 110, f"exported cell {cid} has {beside} lines beside signatures"
            assert not cell["outputs"], f"exported cell {cid} stores an output"
        imports = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in body]
        if not exported and any(imports):
            assert all(imports), f"cell {cid} mixes imports and code"
        assert max(map(len, lines), default=0) <= 120, (
            f"cell {cid} has a line of {max(map(len, lines))} characters"
        )
        for out in cell["outputs"]:
            assert out["output_type"] != "error", f"cell {cid} shows a traceback"
            text = json.dumps(out)
            size += len(text)
            assert not re.search(
                r"/(home|root|work|tmp)/[\w.]", re.sub(r'"image/png": "[^"]*"', "", text)
            ), f"cell {cid} shows a path of a machine"
    assert size <= 300_000, f"stored outputs are {size // 1000} KB"


def test_numbers_are_unique():
    prefixes = [p.name.split("_")[0] for p in NOTEBOOKS if "_" in p.name]
    assert len(prefixes) == len(set(prefixes))


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_paper(path):
    "One parameters cell with typed literals and the common names, one results cell, no stored outputs."

    def tagged(tag):
        return [s for _, s, c in cells(path) if tag in c["metadata"].get("tags", [])]

    assert len(tagged("parameters")) == 1 and len(tagged("results")) == 1
    body = ast.parse(tagged("parameters")[0]).body
    assert all(isinstance(s, ast.AnnAssign) for s in body)
    for s in body:
        ast.literal_eval(s.value)
    assert {s.target.id for s in body} >= {
        "variant",
        "dataset_root",
        "checkpoint",
        "steps",
        "batch",
        "crop",
        "lr",
        "seed",
        "device",
        "impl",
        "scale",
        "out",
    }
    assert not any(c["outputs"] for _, _, c in cells(path)), (
        "committed paper notebooks carry no outputs"
    )


def test_house():
    "Rooms, arrows, circles, widths and cells are not worse than the last time they were measured."
    figures, where = house.measure()
    limits = json.loads(house.RATCHET.read_text())
    worse = {name: (value, limits[name]) for name, value in figures.items() if value > limits[name]}
    assert not worse, f"(now, before): {worse}; {where}"
    assert figures["upward arrows"] == 0 and figures["circles"] == 0, where


def test_the_tree_is_shown():
    "README and CONTRIBUTING show the rooms as they are (`make readme`)."
    for name in ("README.md", "CONTRIBUTING.md"):
        assert house.tree() in (ROOT / name).read_text(encoding="utf-8"), name


def test_models_are_callables():
    "`infer`, `train` and `bench.models` aside, nothing that takes a model imports one."
    known = house.modules()
    for name, path in known.items():
        if house.room(name) in ("infer", "train", "core", "data", "ops", "losses"):
            rooms = {house.room(target) for target in house.imported(name, path, known)}
            assert "models" not in rooms, name


def test_moved_names_have_homes():
    "Every old module name leads to modules that exist, and is no module itself."
    import segkern

    known = house.modules()
    for old, homes in segkern.MOVED.items():
        assert f"segkern.{old}" not in known, old
        assert all(f"segkern.{home}" in known for home in homes.split()), (old, homes)


def test_import_is_light():
    "`import segkern` adds less than 0.3 s to torch and loads nothing heavy."
    code = (
        "import sys, torch, time; t = time.perf_counter(); import segkern; "
        "print(time.perf_counter() - t, [m for m in ('matplotlib', 'timm', 'triton', "
        "'torchvision', 'accelerate', 'torchmetrics', 'nbdev', 'fastcore') if m in "
        "sys.modules])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.split(" ", 1)
        for _ in range(2)
    ]
    assert min(float(r[0]) for r in runs) < 0.3 and all(r[1].strip() == "[]" for r in runs), runs
    library = (
        "import sys, segkern.core, segkern.ops, segkern.losses, segkern.models, segkern.data, "
        "segkern.metrics; print([m for m in ('matplotlib', 'timm') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", library], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


def jitted(text):
    "The functions in a module's text that Triton compiles: name -> node of the syntax tree."
    return {
        n.name: n
        for n in ast.parse(text).body
        if isinstance(n, ast.FunctionDef)
        and any(ast.unparse(d).startswith("triton.jit") for d in n.decorator_list)
    }


def parameters(function):
    return [a.arg for a in function.args.args]


def addresses(function, known):
    "The expressions of a kernel that are addresses: where it loads and stores, and what other kernels take as `p_…`."
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        called = ast.unparse(call.func)
        if re.fullmatch(r"tl\.(load|store|atomic_\w+)", called):
            yield call.args[0]
        if called in known:
            pairs = zip(parameters(known[called]), call.args)
            yield from (given for name, given in pairs if name.startswith("p_"))


def unmarked(function, known):
    "The parameters of a kernel that are pointers by use and not by name."
    made = {}  # a name -> what it is assigned
    for n in ast.walk(function):
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
            made.setdefault(n.targets[0].id, []).append(n.value)
    found = set()
    open_ends = list(addresses(function, known))
    for end in open_ends:
        while isinstance(end, ast.BinOp):  # an address begins with its pointer
            end = end.left
        if isinstance(end, ast.Name):
            found.add(end.id)
            open_ends += made.pop(end.id, [])
    return {name for name in found & set(parameters(function)) if not name.startswith("p_")}


def test_pointers_have_names():
    "In a kernel what points to memory begins with p_, and strides s_x belong to a pointer p_x."
    bad = jitted("@triton.jit\ndef f(x, p_y, n):\n    at = x + n\n    tl.store(p_y, tl.load(at))")
    assert unmarked(bad["f"], {}) == {"x"}
    by_way = jitted("@triton.jit\ndef g(x, p_y):\n    f(x, x + 1, 1)")
    assert unmarked(by_way["g"], bad) == {"x"}
    known = {}
    for path in (ROOT / "segkern" / "ops").glob("*.py"):
        known |= jitted(path.read_text(encoding="utf-8"))
    assert len([name for name in known if name.endswith("_kernel")]) > 30
    for name, function in known.items():
        assert not unmarked(function, known), f"{name}: {unmarked(function, known)}"
        strides = {p[2:] for p in parameters(function) if p.startswith("s_")}
        pointers = {p[2:] for p in parameters(function) if p.startswith("p_")}
        assert strides <= pointers or not name.endswith("_kernel"), f"{name}: {strides - pointers}"


def test_our_own_code_uses_present_names():
    "Old module names are for other people's scripts: a notebook that uses one shows a warning to its readers."
    from segkern import MOVED

    old = re.compile(rf"segkern\.({'|'.join(map(re.escape, sorted(MOVED)))})(?:\.\w| import )")
    assert old.search("segkern.layers.resize(x)") and old.search(
        "from segkern.layers import resize"
    )
    files = [p for folder in ("nbs", "papers") for p in (ROOT / folder).glob("*.ipynb")]
    files += (ROOT / "tests").rglob("*.py")
    used = {
        p.name: old.findall(p.read_text(encoding="utf-8")) for p in files if p != Path(__file__)
    }
    assert not {name: found for name, found in used.items() if found}


def test_ruff():
    "Neither complaints nor another layout."
    pytest.importorskip("ruff")
    where = ["segkern", "tests", "nbs", "papers", "setup.py"]
    # the package is laid out where it is written: in the notebooks
    for command in (["check", *where], ["format", "--check", *where[1:]]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout


def test_no_stray_words():
    "No open ends in the package, and no path of a developer's machine anywhere."
    files = [
        p
        for p in (
            *NOTEBOOKS,
            *PAPERS,
            *(ROOT / "segkern").rglob("*.py"),
            ROOT / "README.md",
            ROOT / "CHANGELOG.md",
            ROOT / "CONTRIBUTING.md",
            ROOT / "Makefile",
        )
    ]
    for p in files:
        text = re.sub(r'"image/png": "[^"]*"', "", p.read_text(encoding="utf-8"))
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), p.name
        assert not re.search(r"(?<![\w.])/(work|root|home)/[\w.]", text), p.name


def test_data_tables():
    "Every table of class names has as many colours, and weights where it has them."
    for p in (ROOT / "data").glob("*.json"):
        t = json.loads(p.read_text())
        if "classes" not in t:
            continue
        assert len(t["palette"]) == len(t["classes"]) == len(set(t["classes"])), p.name
        assert t.get("class_weights") is None or len(t["class_weights"]) == len(t["classes"]), (
            p.name
        )


IMPORT = (
    "import segkern, segkern.core as c; from segkern.models import create_model; from "
    "segkern.data import open_dataset; "
    "assert c.data_path('camvid.json').exists() and c.load_table('cityscapes'); m = create_model('dsanet', 11); "
    "print(len(segkern.list_models()), c.data_path('camvid.json').parent.name, segkern.__file__)"
)


@pytest.mark.slow
def test_wheel_and_sdist(copy, tmp_path):
    """Both build, hold all sub-packages and tables, and work from an environment that has only
    them and the dependencies."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist")],
        cwd=copy,
        env=ENV,
        check=True,
        capture_output=True,
    )
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    def run(*cmd):
        return subprocess.run(
            cmd, cwd=tmp_path, env=ENV, check=True, capture_output=True, text=True
        ).stdout

    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    )
    for sub in ("ops", "models", "data", "backbones", "_data"):
        assert (tmp_path / "site" / "segkern" / sub).is_dir(), sub
    assert (tmp_path / "site" / "segkern" / "_data" / "bench").is_dir()
    out = run(
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {IMPORT}",
    ).split()
    assert out[1] == "_data" and str(tmp_path / "site") in out[2]


def test_bare_checkout(copy):
    "A checkout works by its path alone."
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(copy)!r}); {IMPORT}"],
        cwd=copy.parent,
        env=ENV,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert out[1] == "data" and str(copy) in out[2]


def test_editable_install():
    "The environment that runs the tests has segkern as an editable install, tables included."
    out = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd="/", env=ENV, check=True, capture_output=True, text=True
    ).stdout.split()
    assert out[1] == "data" and Path(out[2]).resolve() == ROOT / "segkern" / "__init__.py"
