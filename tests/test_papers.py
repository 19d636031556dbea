"Every paper at smoke scale, as a user runs it."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from segkern.reproduce import read_results

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "papers").glob("*.ipynb"))])
def test_smoke(name, tmp_path):
    "The notebook runs headlessly, shows what it must, and ends in a report."
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from segkern.cli import main; raise SystemExit(main())",
            "reproduce",
            name,
            "--scale",
            "smoke",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\r" not in run.stderr  # quiet where there is no terminal
    results = read_results(tmp_path / name)
    rows = {r["claim"]: r for r in results["rows"]}
    if name == "kernels_report":
        # what was not run is not a number
        assert rows["upsampled loss against eager"]["value"] is None or list(
            (ROOT / "data" / "bench").glob("ops_*.csv")
        )
        assert rows["loss on this machine: peak memory, op over plain"]["value"] < 1 / 3
    else:
        learns = rows["times the mIoU of the most frequent class"]
        assert learns["value"] >= learns["claimed"] == 3
        published = [
            r
            for r in results["rows"]
            if "mIoU" in r["claim"] and "streets" not in r["claim"] and r["unit"] == "%"
        ]
        # a smoke run says nothing about the published accuracies
        assert published and all(r["value"] is None for r in published)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] > 0 and (tmp_path / "report.html").stat().st_size > (
        10_000 if name == "kernels_report" else 20_000
    )
    html = (tmp_path / "report.html").read_text()
    assert "not run" in html and "data:image/png" in html
    captions = json.loads((tmp_path / name / "figures" / "captions.json").read_text())
    assert (
        {"memory"} if name == "kernels_report" else {"data", "predictions", "confusion", "curves"}
    ) <= set(captions)
    assert (tmp_path / name / f"{name}.html").exists()
