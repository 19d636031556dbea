"""A pytest plugin: every test's outcome as a JSON line in $SEGKERN_GATE_ROWS, at once.

$SEGKERN_GATE_SHARD=i/n keeps every n-th test.
"""

import json
import os

import pytest

PATH = os.environ.get("SEGKERN_GATE_ROWS")
FAMILY = os.environ.get("SEGKERN_GATE_FAMILY")


def _write(row):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return  # the controller hears of everything
    with open(PATH, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def _label(nodeid):
    return nodeid.rsplit("/", 1)[-1]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    i, n = map(int, os.environ.get("SEGKERN_GATE_SHARD", "0/1").split("/"))
    items[:] = items[i::n]
    _write(dict(plan=[["*", _label(item.nodeid)] for item in items]))


def pytest_runtest_logstart(nodeid, location):
    _write(dict(begin=_label(nodeid), op="*"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _write(_row(report))


def _row(report):
    status = dict(passed="ok", failed="failed", skipped="not run")[report.outcome]
    reason = ""
    if report.outcome == "failed":
        reason = getattr(
            getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr)
        )
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
    text = " ".join(reason.split())[:300]
    return dict(
        phase=1,
        family=FAMILY,
        op="*",
        label=_label(report.nodeid),
        status=f"{status}: {text}" if text else status,
        seconds=round(report.duration, 3),
    )
