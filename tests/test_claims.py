"Published numbers: all that the specifications state, none that they do not, each with a source."

import re

import pytest

from segkern.core import load_table
from segkern.models import claims, list_models
from segkern.models.claims import COLUMNS
from segkern.testing import shared

DECIMAL = r"\d+\.\d+"
NUMBER = r"\d+(?:\.\d+)?"
# a place in a specification: file, what it begins with, what it ends with, the numbers in it
PLACES = {
    "S2-FPN": [("s2fpn", "## 10.", "*its heading", "table")],
    "README of DSANet": [("s2fpn", "README of its own repo", "\n", DECIMAL)],
    "SANet": [
        ("sanet", "## 7.", "What the pair means", "table"),
        ("sanet", "CamVid test: S", "GTAV test", rf"{DECIMAL}|\d+(?= FPS)"),
        ("sanet", "GTAV test:", "\n", DECIMAL),
        (
            "sanet",
            "Read off the README's",
            "The paper's own",
            rf"{DECIMAL}(?=/)|(?<=/)<?\d+(?=[,.])",
        ),
    ],
    "SASFormer (sparse)|tree energy|a note on Rewis3d": [
        ("sasformer_sparse", "## 10.", "So the gain", DECIMAL)
    ],
    "SSA classifier|mmsegmentation 0.30": [
        ("ssa_classifier", "| model, K=150", "480x480, K=59", {"README M", "README G"}),
        ("ssa_classifier", "480x480, K=59", "\n", r"(?<=[( ])\d+\.\d(?=[):])"),
        ("ssa_classifier", "| model | latency", "Baselines of mmseg", DECIMAL),
        ("ssa_classifier", "(its test pipeline", "## 11.", DECIMAL),
        ("ssa_classifier", "zoo, ADE20K 160k", "## 11.", DECIMAL),
        ("light_backbones", "## 11.", "Baselines as published", "table"),
    ],
    "SegNeXt|mmsegmentation's re-run|SeaFormer|a user of|AFFormer|CGRSeg|ViT-Adapter|EfficientFormerV2": [
        ("light_backbones", "Baselines as published", "## 12.", rf"{DECIMAL}|\d+(?= [MG]\b)")
    ],
    "mmsegmentation, SegFormer|SegFormer, paper|FeedFormer": [
        ("sasformer_icip", "## 7.", "CPU, one thread", DECIMAL),
        (
            "sasformer_icip",
            "| NVlabs SegFormer |",
            '"FLOPs" in',
            {"SegFormer paper (recalled, see note)"},
        ),
        ("sasformer_icip", "recalled claim", ")", DECIMAL),
    ],
}


def numbers(spec, begin, end, form):
    "The numbers of a place: of a pattern, of a table without its first column, or of named columns."
    text = (shared("specs") / f"{spec}.md").read_text()
    at = text.index(begin)
    text = text[at : text.index(end, at + len(begin))]
    if isinstance(form, str) and form != "table":
        return {float(n.lstrip("<")) for n in re.findall(form, text)}
    rows = [line.strip()[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    head, _, *body = rows
    wanted = [i for i, name in enumerate(head) if (i if form == "table" else name in form)]
    assert wanted, (spec, begin, head)
    pattern = rf"(?<![\w.]){NUMBER}(?![\d.]*²)"
    return {
        float(n)
        for row in body
        for i in wanted
        if i < len(row)
        for n in re.findall(pattern, row[i])
    }


@pytest.mark.parametrize("sources", PLACES)
def test_specifications(sources):
    "Both ways: no number is missing, none is made up."
    if shared("specs") is None:
        pytest.skip("the shared specifications are not beside the checkout")
    stated = set().union(*(numbers(*place) for place in PLACES[sources]))
    ours = {row["value"] for row in claims() if row["source"].startswith(tuple(sources.split("|")))}
    assert ours == stated, (sorted(stated - ours), sorted(ours - stated))


def test_rows():
    "A network of ours or a foreign one, known columns, a source that a specification stands for."
    ours = set(list_models())
    rows = claims()
    prefixes = tuple(prefix for sources in PLACES for prefix in sources.split("|"))
    for row in rows:
        assert (row["model"] in ours) != row.get("foreign", False), row
        assert set(row) <= {*COLUMNS, "foreign"} and {"model", "metric", "source"} <= set(row), row
        assert row["source"].startswith(prefixes), row
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)


def test_the_papers_tables_say_the_same():
    "The figures that papers and README compare with are rows."
    table = load_table("claims")

    def value(*words, **fields):
        rows = claims(*words, **fields)
        return {row["value"] for row in rows}

    for model, said in table["s2fpn"].items():
        for key in ("cityscapes_miou", "cityscapes_fps", "camvid_miou", "camvid_fps"):
            dataset, metric = key.split("_")
            assert said[key] in value(model, dataset=dataset, metric=metric), (model, key)
    for model, said in table["sanet"].items():
        for split in ("val", "test"):
            pair = said.get(f"cityscapes_{split}", [])
            assert set(pair) == value(model, dataset="cityscapes", split=split, metric="miou")
        assert set(said.get("gtav_miou", [])) == value(model, dataset="gtav", metric="miou")
        for key in ("cityscapes_fps", "camvid_miou", "camvid_fps"):
            dataset, metric = key.split("_")
            assert key not in said or said[key] in value(model, dataset=dataset, metric=metric)
    for model, said in table["ssa_classifier"].items():
        keys = dict(
            params_millions="params_millions", gmacs_readme="gmacs", latency_ms="latency_ms"
        )
        for key, metric in keys.items():
            assert key not in said or said[key] in value(model, dataset="ade20k", metric=metric)
        for dataset in ("ade20k", "coco_stuff10k", "pascal_context"):
            assert dataset not in said or {said[dataset]} == value(
                model, dataset=dataset, metric="miou"
            )
    sparse = table["sasformer_sparse"]
    assert {*sparse["voc2012_val"].values()} == value("sasformer_sparse_b4", dataset="voc2012")
