"The paper runner: outcomes, resume, report, and what it refuses."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segkern import reproduce as r
from segkern.core import write_json
from segkern.reproduce import job, notebook, report as report_page, runner

PARAMETERS = (
    "parameters",
    'variant = "toy"\ndataset_root = ""\nscale = "smoke"\nout = "runs/toy"\nseed = 0',
)
GOOD = [
    ("markdown", "# A toy paper\n> It claims that <three> is two."),
    PARAMETERS,
    (
        "code",
        """
import json
from pathlib import Path
from segkern.reproduce import figure_to, record
from segkern.viz import figure
Path(out, "run").mkdir(parents=True, exist_ok=True)
lines = [json.dumps(dict(step=s, loss=1/(s + 1), lr=1e-3)) + chr(10) for s in range(9)]
Path(out, "run", "metrics.jsonl").write_text("".join(lines))
fig, ax = figure(width=3)
figure_to(out, "line", fig, "A line that says <nothing>.")""",
    ),
    (
        "results",
        """
rows = [dict(claim="three", claimed=2, measured=3.25, unit="1", protocol="counting", n=3, why="the paper is wrong"),
        dict(claim="speed", claimed=87.3, measured=None, unit="frames/s", why="no GPU")]
record(out, "good", variant, rows, seconds=0.1, scale=scale, seed=seed)""",
    ),
]
BAD = [
    ("markdown", "# A broken paper"),
    PARAMETERS,
    ("code", "print('so far')\nraise ValueError('the moon is full')"),
]
SILENT = [("markdown", "# A paper without results"), PARAMETERS]
UNTAGGED = [("code", 'scale = "smoke"')]


def papers(folder, **notebooks):
    for name, cells in notebooks.items():
        write_json(Path(folder) / f"{name}.ipynb", r.paper_notebook(cells))
    return Path(folder)


@pytest.fixture(scope="module")
def frozen():
    "The package's sources count as unchanged while these tests run."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(notebook, "_package_digest", lambda: b"unchanged")
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory, frozen):
    "Four papers, run once: (folder, report)."
    d = tmp_path_factory.mktemp("reproduce")
    folder = papers(d / "papers", good=GOOD, bad=BAD, silent=SILENT, untagged=UNTAGGED)
    return d, r.reproduce(out=d / "runs", papers_dir=folder, jobs=3)


def test_one_failure_does_not_stop_the_others(ran):
    d, report = ran
    assert {n: p["state"] for n, p in report["papers"].items()} == dict(
        good="passed", bad="failed", silent="failed", untagged="failed"
    )
    assert (report["passed"], report["failed"], report["total"]) == (1, 3, 4)
    assert (
        "the moon is full" in report["papers"]["bad"]["error"]
        and "bad.ipynb" in report["papers"]["bad"]["error"]
    )
    assert (
        "results.json" in report["papers"]["silent"]["error"]
        and "'parameters'" in report["papers"]["untagged"]["error"]
    )
    assert "so far" in (d / "runs" / "bad" / "bad.html").read_text()


def test_report_json(ran):
    d, report = ran
    stored = json.loads((d / "runs" / "report.json").read_text())
    assert (
        stored["papers"]["good"]["rows"][1]["value"] is None
        and stored["papers"]["good"]["variant"] == "toy"
    )
    assert (
        stored["seconds"] > 0
        and stored["papers"]["good"]["seconds"] > 0
        and stored["versions"]["torch"]
        and stored["scale"] == "smoke"
    )
    assert stored["papers"]["good"]["metrics"] == "good/run/metrics.jsonl"


def test_report_page_stands_alone(ran):
    page = (ran[0] / "runs" / "report.html").read_text()
    assert (
        "http" not in page and 'src="data:image/png;base64,' in page and page.count("<figure>") == 2
    )
    assert (
        "+1.25" in page
        and "not run" in page
        and "the paper is wrong" in page
        and "counting · n = 3" in page
    )
    assert "&lt;three&gt;" in page and "&lt;nothing&gt;" in page and "the moon is full" in page
    assert (
        'href="good/good.html"' in page
        and "1 of 4 passed" in page
        and "prefers-color-scheme: dark" in page
    )


def test_executed_notebook_page(ran):
    page = (ran[0] / "runs" / "good" / "good.html").read_text()
    outside = [line for line in page.split("<script")[1:] if "src=" in line.split(">")[0]]
    assert (
        "figure_to" in page
        and all("mathjax" in s.split(">")[0] for s in outside)
        and "mermaid.esm" not in page
    )
    executed = json.loads((ran[0] / "runs" / "good" / "good.ipynb").read_text())
    assert any(f'out = "{ran[0]}/runs/good"' in "".join(c["source"]) for c in executed["cells"])


def test_resume(ran, monkeypatch):
    d, report = ran
    launched = []
    monkeypatch.setattr(
        job.Job,
        "start",
        lambda self: launched.append(self.name) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    again = r.reproduce(["good"], out=d / "runs", papers_dir=d / "papers", resume=True)
    assert (
        again["passed"] == 1
        and not launched
        and again["papers"]["good"]["seconds"] == report["papers"]["good"]["seconds"]
    )
    assert (
        "earlier run" in (d / "runs" / "report.html").read_text()
        and again["papers"]["bad"]["now"] is False
    )

    def made(scale="smoke", **kw):
        return job.Job(d / "papers" / "good.ipynb", d / "runs", scale, {"seed": 0, **kw}, 1)

    assert made().prepare(True)
    assert not made("quick").prepare(True) and not made(variant="other").prepare(True)
    monkeypatch.setattr(notebook, "_package_digest", lambda: b"changed")
    assert not made().prepare(True)


def test_resume_needs_valid_results(tmp_path, ran):
    import shutil

    shutil.copytree(ran[0] / "runs" / "good", tmp_path / "good")

    def made():
        return job.Job(ran[0] / "papers" / "good.ipynb", tmp_path, "smoke", {"seed": 0}, 1)

    assert made().prepare(True)
    results = json.loads((tmp_path / "good" / "results.json").read_text())
    for damage in (
        json.dumps(results)[:-9],
        json.dumps({**results, "scale": "full"}),
        json.dumps(results).replace("3.25", "NaN"),
    ):
        (tmp_path / "good" / "results.json").write_text(damage)
        assert not made().prepare(True)


def test_long_runs_are_moved_aside(tmp_path):
    for scale in ("smoke", "full"):
        folder = tmp_path / scale
        write_json(folder / "run.json", dict(scale=scale, state="passed"))
        notebook.clear_run(folder, notebook.run_info(folder))
        assert not folder.exists()
    kept = [p for p in tmp_path.iterdir()]
    assert (
        len(kept) == 1 and kept[0].name.startswith("full-full-") and (kept[0] / "run.json").exists()
    )


def test_foreign_folder_is_left_alone(tmp_path, ran):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "notes.txt").write_text("mine")
    assert not job.Job(ran[0] / "papers" / "good.ipynb", tmp_path, "smoke", {"seed": 0}, 1).prepare(
        False
    )
    assert (tmp_path / "good" / "notes.txt").exists()


@pytest.mark.parametrize("measured", [float("nan"), float("inf"), "58 %", True], ids=str)
def test_record_refuses(measured, tmp_path):
    with pytest.raises(ValueError, match=r"row 0 \(mIoU\)"):
        r.record(tmp_path, "p", "v", [dict(claim="mIoU", measured=measured)], seconds=1.0)
    assert not list(tmp_path.iterdir())


def test_record_schema(tmp_path):
    row = dict(claim="mIoU", claimed=69.6, measured=61.0)
    for kwargs in (
        dict(rows=[]),
        dict(rows=[dict(claim="x")]),
        dict(rows=[{**row, "value": 1}]),
        dict(rows=[row], scale="huge"),
        dict(rows=[row], seconds=float("nan")),
    ):
        with pytest.raises(ValueError):
            r.record(tmp_path, "p", "v", **{"seconds": 1.0, **kwargs})
    table = r.record(
        tmp_path,
        "p",
        "v",
        [row, dict(claim="FPS", claimed=87.3, measured=None)],
        seconds=1.0,
        gpu_hours=0,
    )
    results = r.read_results(tmp_path)
    assert set(results) == {
        "paper",
        "variant",
        "scale",
        "seed",
        "seconds",
        "hardware",
        "versions",
        "rows",
        "extra",
    }
    assert set(results["rows"][0]) == {"claim", "claimed", "value", "unit", "protocol", "n", "why"}
    assert table.rows[1][2] == "not run" and table.rows[0][3] == "−8.6"


def test_refusals(tmp_path, ran, monkeypatch):
    d = ran[0]
    for match, kwargs in {
        "no paper": dict(papers=["mars"]),
        "scale": dict(scale="huge"),
        "jobs": dict(jobs=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            r.reproduce(**{"out": tmp_path, "papers_dir": d / "papers", **kwargs})
    with pytest.raises(FileNotFoundError, match="no notebooks"):
        r.reproduce(papers_dir=tmp_path, out=tmp_path)
    monkeypatch.setattr(notebook, "package_dir", lambda: tmp_path / "site-packages" / "segkern")
    with pytest.raises(FileNotFoundError, match="wheel"):
        r.reproduce(out=tmp_path)


def test_unknown_parameter_fails_its_paper(tmp_path, ran):
    report = r.reproduce(["good"], out=tmp_path, papers_dir=ran[0] / "papers", learning_rate=1)
    assert report["failed"] == 1 and "learning_rate" in report["papers"]["good"]["error"]


def test_second_runner_is_refused(tmp_path, ran):
    with runner._only_runner(tmp_path), pytest.raises(RuntimeError, match="another"):
        r.reproduce(["good"], out=tmp_path, papers_dir=ran[0] / "papers")


@pytest.mark.parametrize(
    "sig, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_signals(tmp_path, sig, expected):
    "A stopped runner ends quietly and leaves no kernel behind."
    psutil = pytest.importorskip("psutil")
    mark = tmp_path / "started"
    cells = [
        ("markdown", "# Sleeper"),
        PARAMETERS,
        ("code", f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(60)"),
    ]
    papers(tmp_path / "papers", sleeper=cells)
    code = (
        f"import sys; from segkern.cli import main; sys.exit(main(['reproduce', '--papers-dir', "
        f"'{tmp_path}/papers', '--out', '{tmp_path}/runs']))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(r.__file__).parent.parent.parent)}
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # a background job inherits a deaf ear
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while not mark.exists() and time.time() < deadline:
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(sig)
    _, err = run.communicate(timeout=30)
    assert mark.exists() and run.returncode == expected and "Traceback" not in err
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert children and not alive
    assert (
        json.loads((tmp_path / "runs" / "sleeper" / "run.json").read_text())["error"]
        == "interrupted"
    )


def test_links_in_subtitles():
    assert (
        report_page._links("a [paper](https://x.org/1)") == 'a <a href="https://x.org/1">paper</a>'
    )
    assert report_page._links("[x](javascript:alert)") == "[x](javascript:alert)"


def test_killed_kernel_is_named(tmp_path):
    (tmp_path / "log.txt").write_text("...\nnbclient.exceptions.DeadKernelError: Kernel died\n")
    assert "out of memory" in job.failure(tmp_path, "p", 138)
