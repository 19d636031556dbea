"""Notebook chores that nbdev leaves to quarto or does not do.

python tests/nbtools.py outputs [NB ...]    run notebooks as nbdev_test does and store what they show
python tests/nbtools.py readme [--out DIR]  README.md from nbs/index.ipynb
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def store_outputs(path: Path):
    "Run one notebook, honouring `tst_flags` and `eval: false`, and write its outputs back; cell ids stay."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.config import get_config
    from nbdev.process import extract_directives

    skip = set(get_config().tst_flags.split())

    def skipped(cell):
        if cell.cell_type != "code":
            return True
        flags = extract_directives(cell, remove=False)
        return flags.get("eval:", [""])[0].lower() == "false" or bool(skip & set(flags))

    nb = read_nb(path)
    shell = CaptureShell(path)
    with working_directory(path.parent):
        try:
            shell.run_all(nb, exc_stop=True, preproc=skipped)
        except Exception:
            sys.exit(shell.prettytb(fname=path))
    for cell in nb.cells:
        for name in [k for k in cell if k.endswith("_")]:
            del cell[name]
        if cell.cell_type == "code" and not skipped(cell):
            # what a definition says on the way (a warning, a log line) is no lesson
            shown = [] if directive(cell).startswith("export") else cell.get("outputs", [])
            cell["outputs"] = [tidy(o) for o in shown]
    write_nb(nb, path)


def test_notebook(path: Path, flags=()):
    "Run one notebook as nbdev_test does: its name, whether it passed, seconds; errors go to stderr."
    from nbdev.test import test_nb

    ok, seconds = test_nb(
        path, skip_flags=["notest", "gpu", "slow"], force_flags=flags, basepath=ROOT
    )
    return path.name, ok, seconds


def exported_module(path: Path):
    "The module that a notebook exports to, e.g. 'models.s2fpn'; '' where it exports nothing."
    found = re.search(r"#\| default_exp ([\w.]+)", Path(path).read_text(encoding="utf-8"))
    return found[1] if found else ""


def tidy(output):
    "An output without the parts that change from run to run or hold paths of this machine."
    if "data" in output:
        output["data"].pop("application/vnd.jupyter.widget-view+json", None)
    return output


def directive(cell):
    "The first directive of a code cell, e.g. 'hide' or 'hide_input'."
    m = re.match(r"#\|\s*(\S+)", "".join(cell.source)) if cell.cell_type == "code" else None
    return m[1] if m else ""


def readme(out: Path):
    "README.md from the index notebook as Markdown: `hide` drops a cell, `hide_input` keeps what it shows."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [c for c in nb.cells if directive(c) != "hide"]
    for cell in nb.cells:
        if directive(cell) == "hide_input":
            cell.source = ""
    text, resources = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"^#\|.*\n", "", text, flags=re.M)
    text = re.sub(r"```python\n\s*```\n", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    return resources.get("outputs", {})


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = p.add_subparsers(dest="what", required=True)
    o = sub.add_parser("outputs")
    o.add_argument("notebooks", nargs="*", type=Path)
    r = sub.add_parser("readme")
    r.add_argument("--out", type=Path, default=ROOT)
    a = p.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if a.what == "readme":
        if readme(a.out):
            sys.exit("the index notebook shows pictures; README.md can only hold text and links")
        return
    for nb in a.notebooks or sorted((ROOT / "nbs").glob("*.ipynb")):
        print(nb.name, flush=True)
        store_outputs(nb.resolve())


if __name__ == "__main__":
    main()
