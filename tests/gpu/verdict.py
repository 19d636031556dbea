"What the rows of the gate say: which ops pass, and the report."

import csv
import json
import re
from pathlib import Path

from families import FAMILIES, ops_of, predicted

LIMIT = 10_000  # characters of the report
PHASE = {0: "warm", 1: "right", 2: "sanitizer", 3: "ops", 4: "networks", 5: "learn"}


def failed(row):
    return row["status"].startswith("failed")


def late(row):
    return row["status"].startswith("out of time")


def concerns(row):
    "The ops that a row is about."
    if row["op"] not in ("*", ""):
        return (row["op"],)
    return ops_of(row["family"], row["label"]) if row["family"] in FAMILIES else ()


def verdicts(rows, families):
    "op -> (passed, why): right and clean, checked to the end in phase 1, and at least once against double precision."
    out = {}
    for op in (op for f in families for op in FAMILIES[f][0]):
        mine = [r for r in rows if r["phase"] in (1, 2) and op in concerns(r)]
        bad = [r for r in mine if failed(r)]
        open_ = [r for r in mine if r["phase"] == 1 and late(r)]
        proven = [
            r
            for r in mine
            if r["phase"] == 1
            and r["status"] == "ok"
            and r["op"] == op
            and r.get("forward") is not None
        ]
        if bad:
            out[op] = (
                False,
                f"{len(bad)} failed, first: {bad[0]['label']}: {bad[0]['status'][8:140]}",
            )
        elif open_:
            out[op] = False, f"{len(open_)} checks were not reached"
        elif not proven:
            out[op] = False, "nothing was compared with double precision"
        else:
            clean = sum(r["phase"] == 2 and r["status"] == "ok" for r in mine)
            out[op] = (
                True,
                f"{sum(r['status'] == 'ok' for r in mine)} checks, {clean} of the sanitizer",
            )
    return out


def counts(rows):
    "phase -> {ok, failed, not run, out of time}."
    out = {}
    for r in rows:
        kind = (
            "failed"
            if failed(r)
            else "out of time"
            if late(r)
            else "ok"
            if r["status"] == "ok"
            else "not run"
        )
        c = out.setdefault(PHASE[r["phase"]], dict(ok=0, failed=0))
        c[kind] = c.get(kind, 0) + 1
    return out


def slug(text):
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def write_csv(path, rows):
    "Rows of dicts as a table; columns in the order of their first appearance."
    names = list(
        dict.fromkeys(
            n for r in rows for n in r if n not in ("asked", "learns", "phase", "job", "seconds")
        )
    )
    with open(path, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_tables(out, rows, gpu, versions):
    "ops_GPU.csv and nets_GPU.csv."
    facts = dict(device=gpu, **{n: versions.get(n, "") for n in ("torch", "triton", "cuda")})
    timed = [r | facts for r in rows if r["phase"] == 3 and r.get("provider")]
    write_csv(out / f"ops_{slug(gpu)}.csv", with_ratios(timed))
    nets = [r | facts for r in rows if r["phase"] == 4]
    write_csv(out / f"nets_{slug(gpu)}.csv", nets)


GRAPH = " in a CUDA graph"


def with_ratios(rows):
    "Time over that of the kernel, captured ones over the captured kernel."

    def key(r, name):
        return (r["op"], r["case"], r["direction"], name)

    times = {key(r, r["provider"]): r["ms_50"] for r in rows if r.get("ms_50")}
    out = []
    for r in rows:
        base = times.get(key(r, "kernel" + (GRAPH if r["provider"].endswith(GRAPH) else "")))
        out.append(r | (dict(ratio=r["ms_50"] / base) if base and r.get("ms_50") else {}))
    return out


def table(header, lines):
    "A Markdown table; nothing for no lines."
    if not lines:
        return ["not run"]

    def text(v):
        return "-" if v in (None, "") else f"{v:.3g}" if isinstance(v, float) else str(v)

    return [
        "|" + "|".join(header) + "|",
        "|" + "---|" * len(header),
        *("|" + "|".join(map(text, line)) + "|" for line in lines),
    ]


def op_lines(rows):
    "Microseconds by contender beside what was predicted."
    by = {}
    for r in rows:
        if r["phase"] == 3 and r.get("provider"):
            by.setdefault((r["op"], r["case"], r["direction"]), {})[r["provider"]] = r
    out = []
    for p in predicted():
        found = by.get((p["op"], p["case"], p["direction"]))
        if not found:
            continue

        def us(name):
            return 1e3 * found[name]["ms_50"] if found.get(name, {}).get("ms_50") else None

        peers = {
            n: us(n)
            for n in found
            if n not in ("kernel", "reference") and not n.endswith(GRAPH) and us(n)
        }
        best = min(peers, key=peers.get, default=None)
        names = ("kernel", "kernel" + GRAPH, "reference", "reference" + GRAPH)
        way = " +bwd" if "backward" in p["direction"] else ""
        out.append(
            (
                f"{p['op']}: {p['case']}{way}",
                *(us(n) for n in names),
                f"{best} {peers[best]:.3g}" if best else "-",
                p["bandwidth_us"],
                p["issue_us"],
                p["expected_us"],
            )
        )
    return out


def net_lines(rows, what):
    "One line per network and form: reference and kernels."
    by = {}
    for r in rows:
        if r["phase"] == 4 and r.get("what") == what:
            by.setdefault((r["network"], r["layout"], r["form"]), {})[r["impl"]] = r

    def ms(found, impl):
        return found.get(impl, {}).get("ms_50")

    def mb(found, impl):
        return found.get(impl, {}).get("peak_mb")

    def pick(found, fn):
        return [
            fn(found, "ref"),
            fn(found, "triton") if "triton" in found else fn(found, "auto"),
        ]

    return [
        (*key, *pick(found, ms), *(pick(found, mb) if what == "training" else ()))
        for key, found in by.items()
    ]


def report(rows, gpu, versions, ceilings, found, seconds, problems):
    "The report; at most `LIMIT` characters."
    lines = [
        f"# Gate on {gpu}",
        ", ".join(f"{k} {v}" for k, v in versions.items() if v) + f"; {seconds:.0f} s",
        "ceilings: " + (", ".join(f"{k} {v:.4g}" for k, v in ceilings.items()) or "not run"),
        "",
    ]
    kinds = ("ok", "failed", "not run", "out of time")
    lines += table(
        ("phase", *kinds),
        [(phase, *(c.get(k, 0) for k in kinds)) for phase, c in counts(rows).items()],
    )
    lines += [
        "",
        "## Ops",
        *table(
            ("op", "passed", "why"),
            [(op, "yes" if ok else "**no**", why[:150]) for op, (ok, why) in found.items()],
        ),
    ]
    bad = [r for r in rows if failed(r)]
    lines += [
        "",
        f"## Failures: {len(bad)}",
        *(
            f"* {PHASE[r['phase']]} {r['family']}: {r['label'][:90]}: {r['status'][8:130]}"
            for r in bad[:25]
        ),
    ]
    if len(bad) > 25:
        lines.append(f"* and {len(bad) - 25} more in gate.json")
    lines += [f"* {p}" for p in problems]
    measured = ("kernel us", "captured", "reference", "captured", "best peer")
    known = ("bandwidth", "issue", "predicted")
    head = ("op", *measured, *(f"H200: {k}" for k in known))
    lines += ["", "## Times of ops", *table(head, op_lines(rows))]
    lines += [
        "",
        "## Latency, ms",
        *table(("network", "layout", "form", "reference", "kernels"), net_lines(rows, "latency")),
    ]
    head = ("network", "layout", "form", "reference ms", "kernels ms", "reference MB", "kernels MB")
    lines += ["", "## Training steps", *table(head, net_lines(rows, "training"))]
    text = "\n".join(lines) + "\n"
    return (
        text if len(text) <= LIMIT else text[: LIMIT - 40] + "\n… cut; all rows are in gate.json\n"
    )


def save(path, value):
    "JSON, in one piece or not at all."
    tmp = Path(f"{path}.tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tmp.replace(path)
