"Processes that run beside each other until their budget ends, and the rows that they leave."

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


# a job may take so much more than its share; a hanging one must not keep the others from running
SLACK = 1.5


@dataclass
class Job:
    "A process, and the file to which it appends one JSON line per row."

    phase: int
    name: str
    family: str
    command: list
    rows: Path
    env: dict = field(default_factory=dict)
    weight: float = 1.0  # share of the time where jobs run one after the other
    restarts: int = 3  # after a crash, without the row that crashed
    # function(text of stdout and stderr, exit code) -> rows, for programs that write none
    read: object = None

    @property
    def log(self):
        return self.rows.with_suffix(".log")


def read_lines(path):
    "The JSON lines of a file; a line that a killed process left half-written is dropped."
    out = []
    if not path.exists():
        return out
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return out


def append(path, row):
    "One more line."
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def unfinished(lines):
    "(op, label) of what was begun and of what was only planned, without the rows that are there."
    done = {(r["op"], r["label"]) for r in lines if "status" in r}
    begun = [(r["op"], r["begin"]) for r in lines if "begin" in r]
    # a child that starts again plans again
    planned = dict.fromkeys(tuple(p) for r in lines for p in r.get("plan", ()))
    known = done.union(begun)
    return [b for b in begun if b not in done], [p for p in planned if p not in known]


class Running:
    "A job's process."

    def __init__(self, job, seconds):
        self.job = job
        self.end = time.monotonic() + seconds
        self.seconds = seconds
        with open(job.log, "ab") as out:
            self.process = subprocess.Popen(
                job.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | job.env,
                start_new_session=True,
            )

    def kill(self):
        "End the process and what it started."
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def close(job, why):
    "Rows for what a job was doing when it ended early."
    begun, planned = unfinished(read_lines(job.rows))
    facts = dict(phase=job.phase, family=job.family, job=job.name)
    for op, label in begun:
        append(job.rows, facts | dict(op=op, label=label, status=why))
    return facts, planned


def ended(running, out_of_time):
    "Write down how a process ended; returns whether it should start again."
    job = running.job
    code = running.process.returncode
    if job.read is not None:
        text = job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""
        for row in job.read(text, None if out_of_time else code):
            append(job.rows, row)
        return False
    if code == 0 and not out_of_time:
        return False
    why = (
        f"out of time: killed after {running.seconds:.0f} s"
        if out_of_time
        else f"failed: the process died with code {code}"
    )
    before = read_lines(job.rows)
    facts, planned = close(job, why)
    if not out_of_time and job.restarts > 0 and unfinished(before)[0]:
        job.restarts -= 1
        return True
    if (
        out_of_time
        and not planned
        and not unfinished(before)[0]
        and any("status" in r for r in before)
    ):
        return False
    if not any("plan" in r or "begin" in r for r in before):
        planned = [("*", job.name)]
    for op, label in planned:
        append(job.rows, facts | dict(op=op, label=label, status=why))
    return False


def run_all(jobs, seconds, parallel, note=print):
    "Run jobs, `parallel` at a time, for so many seconds; returns their rows."
    end = time.monotonic() + seconds
    waiting = list(jobs)
    running = []
    while waiting or running:
        now = time.monotonic()
        while waiting and len(running) < parallel and now < end:
            share = min(1.0, SLACK * parallel * waiting[0].weight / sum(j.weight for j in waiting))
            running.append(Running(waiting.pop(0), (end - now) * share))
        for r in list(running):
            late = time.monotonic() > min(r.end, end)
            if r.process.poll() is None and not late:
                continue
            out_of_time = r.process.poll() is None
            if out_of_time:
                r.kill()
            running.remove(r)
            again = ended(r, out_of_time)
            how = "killed" if out_of_time else f"code {r.process.returncode}"
            note(f"{r.job.name}: {how}{', once more' if again else ''}")
            if again:
                waiting.insert(0, r.job)
        if now >= end:
            for j in waiting:
                facts, planned = close(j, "out of time: not started")
                for op, label in planned or [("*", j.name)]:
                    append(
                        j.rows, facts | dict(op=op, label=label, status="out of time: not started")
                    )
            waiting = []
        time.sleep(0.05)
    return [r for j in jobs for r in read_lines(j.rows) if "status" in r]
