"VOC 2012: published and generated annotations, every mistake in them, trees of every layout; sparse labels from masks."

import json
import multiprocessing
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segkern.data.voc as voc
import segkern.data.voc_files as voc_files
from segkern.core import load_table
from segkern.data import check, make, open_dataset
from segkern.data.sparse import (
    points_from_mask,
    rasterise_points,
    rasterise_scribbles,
    scribbles_from_mask,
)
from segkern.data.voc_annotations import read_points, read_scribbles
from segkern.data.voc_files import train_names
from segkern.testing import shared

OWN = Path(__file__).parent / "fixtures" / "voc_sparse"
JOINTS = 12  # pixels that another version of Pillow may draw otherwise


def close(got, expected, version):
    "Equal, or nearly so under another Pillow than the one that drew the expected raster."
    ref = np.array(Image.open(expected))
    assert got.dtype == np.uint8 and got.shape == ref.shape
    assert (got != ref).sum() <= (0 if Image.__version__ == version else JOINTS)


def sample(rel=""):
    root = shared("data/voc_sparse_sample")
    if root is None:
        pytest.skip("annotations of real pictures are not ours to copy: no shared VOC sample here")
    return root / rel


# --- rasters

SCRIBBLED = [
    "2007_009897",
    "2008_000003",
    "2008_000008",
    "2011_003223",
]
INVENTED = [
    "synthetic_00_single_point",
    "synthetic_01_border",
    "synthetic_02_overlap_last_wins",
    "synthetic_03_all_classes",
    "synthetic_04_zigzag_repeat",
    "synthetic_05_tag_after_points",
]
CLICKED = ["2007_000032", "2007_000033", "2007_009897", "2008_000003", "2008_000008", "2011_003223"]


@pytest.mark.parametrize("name", SCRIBBLED)
def test_published_scribbles(name):
    "Bit for bit what the reference loader draws."
    meta = json.loads(sample("expected_raster/meta.json").read_text())
    polylines, size = read_scribbles(sample(f"scribbles_xml/{name}.xml"))
    close(
        rasterise_scribbles(polylines, size),
        sample(f"expected_raster/{name}.scribble.png"),
        meta["pillow"],
    )


@pytest.mark.parametrize("name", INVENTED)
def test_corner_cases_of_scribbles(name):
    "Invented annotations, drawn by the reference loader."
    polylines, size = read_scribbles(OWN / f"{name}.xml")
    version = json.loads((OWN / "meta.json").read_text())["pillow"]
    close(rasterise_scribbles(polylines, size), OWN / f"{name}.scribble.png", version)


@pytest.mark.parametrize("name", CLICKED)
def test_published_points(name):
    meta = json.loads(sample("expected_raster/meta.json").read_text())
    clicks = read_points(
        *(sample(f"points/voc_whats_the_point{k}.sample.json") for k in ("", "_bg_from_scribbles"))
    )
    close(
        rasterise_points(clicks[name], meta["sizes"][name][::-1]),
        sample(f"expected_raster/{name}.points.png"),
        meta["pillow"],
    )


def test_published_points_as_a_whole():
    "All classes, pictures without one kind of click, clicks outside the picture."
    parts = [
        read_points(sample(f"points/voc_whats_the_point{k}.sample.json"))
        for k in ("", "_bg_from_scribbles")
    ]
    both = read_points(
        *(sample(f"points/voc_whats_the_point{k}.sample.json") for k in ("", "_bg_from_scribbles"))
    )
    assert len(both) == 30 and {c for clicks in both.values() for c, *_ in clicks} == set(range(21))
    assert both["2007_000032"] == parts[0]["2007_000032"] + parts[1]["2007_000032"]
    outside = [(n, c) for n, clicks in both.items() for c in clicks if c[1] > 500]
    assert outside and all((rasterise_points([c], (375, 500)) == 255).all() for _, c in outside)


def test_own_annotations():
    meta = json.loads((OWN / "meta.json").read_text())
    polylines, size = read_scribbles(OWN / "2031_000001.xml")
    assert size == tuple(meta["size"])
    close(rasterise_scribbles(polylines, size), OWN / "2031_000001.scribble.png", meta["pillow"])
    clicks = read_points(
        OWN / "voc_whats_the_point.json", OWN / "voc_whats_the_point_bg_from_scribbles.json"
    )
    close(
        rasterise_points(clicks["2031_000001"], size),
        OWN / "2031_000001.points.png",
        meta["pillow"],
    )
    assert (rasterise_points(clicks["2031_000002"], size) != 255).sum() == 12


@pytest.mark.parametrize(
    "x, y, pixels",
    [
        (10, 8, 12),
        (0, 0, 3),
        (19, 0, 5),
        (0, 15, 5),
        (19, 15, 8),
        (-1, 5, 2),
        (300, 5, 0),
        (5, -9, 0),
        (10.5, 8.5, 9),
    ],
)
def test_footprint_of_a_click(x, y, pixels):
    "A 4x4 square without corners from x - 2 and y - 2, cut at the border; off the grid it is another."
    got = rasterise_points([(7, x, y)], (16, 20)) == 7
    if float(x).is_integer():
        yy, xx = np.mgrid[:16, :20]
        dx = xx - x
        dy = yy - y
        want = (
            (dx >= -2)
            & (dx <= 1)
            & (dy >= -2)
            & (dy <= 1)
            & ~(np.isin(dx, (-2, 1)) & np.isin(dy, (-2, 1)))
        )
        assert (got == want).all() and got.sum() == want.sum()
    else:
        assert 4 <= got.sum() <= 16
    if pixels in (0, 12):
        assert got.sum() == pixels


def test_later_shapes_cover_earlier_ones():
    lines = [(1, [(2, 8), (17, 8)]), (2, [(10, 2), (10, 14)])]
    a = rasterise_scribbles(lines, (16, 20))
    b = rasterise_scribbles(lines[::-1], (16, 20))
    assert a[8, 10] == 2 and b[8, 10] == 1 and ((a == 255) == (b == 255)).all()


def test_rasterise_refuses():
    with pytest.raises(ValueError, match="class 3 has no points"):
        rasterise_scribbles([(3, [])], (4, 4))
    with pytest.raises(ValueError, match="0..254, or 255 to erase, got 256"):
        rasterise_points([(256, 1, 1)], (4, 4))


# --- mistakes in XML


def xml(body, size="<size><width>64</width><height>48</height></size>", root="annotation"):
    return f"<{root}>{size}{body}</{root}>".encode()


def polygon(points="<point><X>1</X><Y>2</Y></point>", tag="<tag>cow</tag>"):
    return f"<polygon>{tag}{points}</polygon>"


MISTAKES = {
    "broken": (b"<annotation><size>", "f.xml is not readable XML"),
    "empty file": (b"", "f.xml is not readable XML"),
    "no text": (bytes(range(256)), "f.xml is not readable XML"),
    "encoding": (b'<?xml version="1.0" encoding="martian"?><a/>', "f.xml is not readable XML"),
    "root": (xml(polygon(), root="scribbles"), "root element is <scribbles>"),
    "no size": (xml(polygon(), ""), "needs a <width>"),
    "zero size": (
        xml(polygon(), "<size><width>0</width><height>4</height></size>"),
        "needs a <width> in pixels, got '0'",
    ),
    "size in words": (
        xml(polygon(), "<size><width>64</width><height>high</height></size>"),
        "needs a <height> in pixels, got 'high'",
    ),
    "no polygon": (xml(""), "holds no <polygon>"),
    "no tag": (xml(polygon(tag="")), "polygon 1 has 0 <tag>"),
    "two tags": (
        xml(polygon() + polygon(tag="<tag>cow</tag><tag>cat</tag>")),
        "polygon 2 has 2 <tag>",
    ),
    "class": (
        xml(polygon() + polygon(tag="<tag>airplane</tag>")),
        "polygon 2: unknown class 'airplane', did you mean '(aero)?plane'",
    ),
    "no class": (xml(polygon(tag="<tag/>")), "polygon 1: unknown class ''"),
    "no points": (xml(polygon() + polygon("")), r"polygon 2 \(cow\) is empty"),
    "half a point": (
        xml(polygon("<point><X>1</X></point>")),
        r"polygon 1 \(cow\), point 1 has 1 coordinates",
    ),
    "letters": (
        xml(polygon("<point><X>1</X><Y>2</Y></point><point><X>3</X><Y>4a</Y></point>")),
        r"polygon 1 \(cow\), point 2: Y is '4a', expected a number",
    ),
    "nothing": (
        xml(polygon("<point><X/><Y>2</Y></point>")),
        "point 1: X is None, expected a number",
    ),
    "nan": (
        xml(polygon("<point><X>nan</X><Y>2</Y></point>")),
        "point 1: X is 'nan', expected a number",
    ),
    "far": (
        xml(polygon("<point><X>5</X><Y>5</Y></point><point><X>5</X><Y>-12</Y></point>")),
        r"polygon 1 \(cow\), point 2: \(5, -12\) lies outside the picture of 64x48",
    ),
    "huge": (
        xml(polygon("<point><X>5</X><Y>5</Y></point><point><X>1e12</X><Y>1</Y></point>")),
        "point 2: .* lies outside",
    ),
    "wholly outside": (
        xml(polygon() + polygon("<point><X>64</X><Y>5</Y></point>")),
        r"polygon 2 \(cow\), point 1: \(64, 5\) .* all points of this polygon",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_in_xml(what, tmp_path):
    "The message names file, polygon and point."
    content, message = MISTAKES[what]
    (tmp_path / "f.xml").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"f.xml.*{message}" if "f.xml" not in message else message
    ):
        read_scribbles(tmp_path / "f.xml")
    with pytest.raises(ValueError, match="f.xml"):
        read_scribbles(content, "f.xml")


def test_what_is_no_mistake():
    "Other elements, blanks, real numbers, VOC's own names, a slip over the border, a single point."
    body = (
        polygon(tag="<tag> sofa\n</tag>", points="<point><X> 1.5 </X><Y>\n2</Y></point>")
        + "<object/>"
        + polygon(tag="<tag>diningtable</tag>")
    )
    lines, size = read_scribbles(
        xml(body + polygon("<point><X>60</X><Y>40</Y></point><point><X>73</X><Y>50</Y></point>"))
    )
    assert (
        [k for k, _ in lines] == [18, 11, 10]
        and size == (48, 64)
        and lines[0][1].tolist() == [[1.5, 2]]
    )
    far = xml(polygon("<point><X>600</X><Y>40</Y></point>"))
    assert (rasterise_scribbles(*read_scribbles(far, outside="clip")) == 255).all()
    with pytest.raises(ValueError, match="outside must be"):
        read_scribbles(far, outside="ignore")
    with pytest.raises(FileNotFoundError, match="nowhere.xml"):
        read_scribbles("nowhere.xml")


def test_all_class_names():
    lines, _ = read_scribbles(
        xml(
            "".join(
                polygon(tag=f"<tag>{t}</tag>")
                for t in (
                    "background plane bike bird boat bottle bus car cat chair cow table dog "
                    "horse motorbike person plant sheep sofa train monitor"
                ).split()
            )
        )
    )
    assert [k for k, _ in lines] == list(range(21))


# --- mistakes in JSON

BAD_JSON = {
    "broken": ('{"a": [', "is not readable JSON"),
    "list": ("[]", "must map picture names.*list"),
    "no list": ('{"a": 3}', "picture a: expected a list"),
    "no click": ('{"a": [3]}', "picture a, click 1: expected x, y and cls"),
    "no y": ('{"a": [{"x": 1, "cls": 2}]}', "picture a, click 1 has no y"),
    "text": (
        '{"a": [{"x": 1, "y": 1, "cls": 0}, {"x": "left", "y": 2, "cls": 2}]}',
        "picture a, click 2: x is 'left', expected a number",
    ),
    "nan": ('{"a": [{"x": NaN, "y": 2, "cls": 2}]}', "click 1: x is nan, expected a number"),
    "null": ('{"a": [{"x": 1, "y": null, "cls": 2}]}', "y is None, expected a number"),
    "class": (
        '{"a": [{"x": 1, "y": 2, "cls": 21}]}',
        "picture a, click 1: class 21, expected 0..20",
    ),
    "name": ('{"a": [{"x": 1, "y": 2, "cls": "cow"}]}', "class 'cow', expected"),
    "true": ('{"a": [{"x": 1, "y": 2, "cls": true}]}', "class True, expected"),
    "bytes": (b"\xff\xfe\xfd", "is not readable JSON"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_mistakes_in_json(what, tmp_path):
    content, message = BAD_JSON[what]
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"p.json.*{message}"):
        read_points(tmp_path / "p.json")


def test_json_is_read_again_when_it_changes(tmp_path):
    f = tmp_path / "p.json"
    for n in (1, 2):
        f.write_text(json.dumps({"a": [dict(x=1, y=1, cls=0)] * n}))
        assert len(read_points(f)["a"]) == n
    with pytest.raises(FileNotFoundError, match="q.json"):
        read_points(tmp_path / "q.json")


# --- the dataset

NAMES = ["2007_000001", "2007_000002", "2008_000003", "2008_000004", "2009_000005", "2010_000006"]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def full(k, shift=0):
    return ((np.arange(20 * 30).reshape(20, 30) // 7 + k + shift) % 21).astype(np.uint8)


def scribbled(k):
    return xml(
        polygon(
            f"<point><X>{3 + k}</X><Y>4</Y></point><point><X>25</X><Y>15</Y></point>",
            f"<tag>{'cow' if k % 2 else 'background'}</tag>",
        ),
        "<size><width>30</width><height>20</height></size>",
    )


def tree(root, inner="VOCdevkit/VOC2012", sbd="png", archive=True, val=(5,)):
    "VOC's train: 0, 1; val: 5; SBD's lists: 0, 2, 3 and 4, 5."
    home = root / inner
    for k, n in enumerate(NAMES):
        save(home / "JPEGImages" / f"{n}.jpg", np.full((20, 30, 3), 10 * k, np.uint8))
        if k in (0, 1, *val):
            save(home / "SegmentationClass" / f"{n}.png", full(k))
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(NAMES[:2]) + "\n")
    (lists / "val.txt").write_text("\n".join(NAMES[k] for k in val) + "\n")
    if sbd == "png":
        for k, n in enumerate(NAMES):
            save(root / "SegmentationClassAug" / f"{n}.png", full(k, 1 if k < 2 else 0))
    if sbd == "mat":
        mat_tree(root / "benchmark_RELEASE" / "dataset")
    for k, n in enumerate(NAMES):
        (root / "xml").mkdir(exist_ok=True)
        (root / "xml" / f"{n}.xml").write_bytes(scribbled(k))
    if archive:
        with zipfile.ZipFile(root / "voc_scribbles.zip", "w", zipfile.ZIP_DEFLATED) as z:
            for n in NAMES:
                z.write(root / "xml" / f"{n}.xml", f"voc_scribbles/{n}.xml")
            z.writestr("__MACOSX/voc_scribbles/._2007_000001.xml", "x")
            z.writestr("voc_scribbles/readme.txt", "x")
    (root / "voc_whats_the_point.json").write_text(
        json.dumps(
            {
                n: [dict(x=5, y=6, rank=1, cls=k + 1), dict(x=555, y=6, rank=2, cls=1)]
                for k, n in enumerate(NAMES)
            }
        )
    )
    (root / "voc_whats_the_point_bg_from_scribbles.json").write_text(
        json.dumps({n: [dict(x=20.5, y=10, cls=0)] for n in NAMES[1:]})
    )
    for k, n in enumerate(NAMES):
        save(
            root / "pascal_2012_scribble" / f"{n}.png",
            np.where(full(k) == 3, 3, 255).astype(np.uint8),
        )
    return root


def mat_tree(folder):
    io = pytest.importorskip("scipy.io")
    (folder / "cls").mkdir(parents=True)
    for k in (0, 2, 3, 4, 5):
        io.savemat(
            folder / "cls" / f"{NAMES[k]}.mat",
            {"GTcls": {"Segmentation": full(k, 1), "Boundaries": 0, "CategoriesPresent": [1]}},
        )
    (folder / "train.txt").write_text("\n".join(NAMES[k] for k in (0, 2, 3)))
    (folder / "val.txt").write_text("\n".join(NAMES[k] for k in (4, 5)))
    (folder / "img").mkdir()


def stems(ds):
    return [p.stem for p, _ in ds.files]


def test_table():
    table = load_table("voc2012")

    def colour(i):
        return [sum(((i >> (3 * j + c)) & 1) << (7 - j) for j in range(8)) for c in range(3)]

    assert table["palette"] == [colour(i) for i in range(21)] and set(
        table["aliases"].values()
    ) < set(table["classes"])


def test_train_names_rule():
    "SBD's lists and VOC's train list, without VOC's val list."
    assert train_names(["b", "a"], ["v", "w"], ["c", "v", "a"]) == ["a", "b", "c"]
    rng = np.random.RandomState(0)
    every = [f"2008_{i:06d}" for i in rng.permutation(11900)]
    voc_train = every[:1464]
    voc_val = every[1464:2913]
    sbd = every[400:1464] + every[2000:11900]
    names = train_names(voc_train, voc_val, sbd)
    assert (
        len(names) == 1464 + 11900 - 2913
        and names == sorted(names)
        and not set(names) & set(voc_val)
    )


@pytest.mark.parametrize("sbd", ["png", "mat"])
@pytest.mark.parametrize("inner", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_layouts(tmp_path, inner, sbd):
    tree(tmp_path, inner, sbd)
    ds = {s: open_dataset("voc2012", tmp_path, s) for s in ("train", "val", "trainval")}
    assert (
        stems(ds["train"]) == NAMES[:5]
        and stems(ds["val"]) == NAMES[5:]
        and stems(ds["trainval"]) == NAMES
    )
    assert torch.equal(ds["train"][0][1], torch.from_numpy(full(0))) and torch.equal(
        ds["val"][0][1], torch.from_numpy(full(5))
    ), "VOC's masks replace SBD's"
    assert torch.equal(ds["train"][2][1], torch.from_numpy(full(2, 1 if sbd == "mat" else 0)))
    assert (
        ds["train"].num_classes == 21
        and len(ds["train"].palette) == 21
        and ds["train"].class_weights is None
    )
    assert stems(open_dataset("voc2012", tmp_path, "train", sbd=False)) == NAMES[:2]


def test_without_sbd(tmp_path, caplog):
    "Full masks: VOC's own pictures and a warning. Sparse labels: the annotation names the pictures."
    tree(tmp_path, sbd=None)
    with caplog.at_level("WARNING", "segkern"):
        assert len(open_dataset("voc2012", tmp_path)) == 2
    assert "sbd=False" in caplog.text
    caplog.clear()
    assert len(open_dataset("voc2012", tmp_path, sbd=False)) == 2 and not caplog.text
    for kind in ("scribble", "point", "scribble_png"):
        assert stems(open_dataset("voc2012", tmp_path, annotation=kind)) == NAMES[:5]
    with pytest.raises(FileNotFoundError, match="sbd=.*nowhere"):
        open_dataset("voc2012", tmp_path, sbd=tmp_path / "nowhere")


def test_sbd_elsewhere(tmp_path):
    tree(tmp_path / "a", sbd=None)
    mat_tree(tmp_path / "b" / "benchmark_RELEASE" / "dataset")
    for given in ("b/benchmark_RELEASE/dataset", "b/benchmark_RELEASE", "b"):
        assert (
            stems(open_dataset("voc2012", tmp_path / "a", sbd=str(tmp_path / given))) == NAMES[:5]
        )


def test_pictures_of_sbd_stand_in(tmp_path):
    "A picture that only SBD's folder has."
    tree(tmp_path, sbd="mat")
    (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{NAMES[3]}.jpg").rename(
        tmp_path / "benchmark_RELEASE" / "dataset" / "img" / f"{NAMES[3]}.jpg"
    )
    assert "img" in str(open_dataset("voc2012", tmp_path).files[3][0])


@pytest.mark.parametrize("form", ["zip", "folder", "given"])
def test_scribbles(tmp_path, form):
    tree(tmp_path, archive=form == "zip")
    if form == "folder":
        (tmp_path / "xml").rename(tmp_path / "voc_scribbles")
    ds = open_dataset(
        "voc2012",
        tmp_path,
        annotation="scribble",
        annotations=tmp_path / "xml" if form == "given" else None,
    )
    for i in range(5):
        assert torch.equal(
            ds[i][1], torch.from_numpy(rasterise_scribbles(*read_scribbles(scribbled(i))))
        )
    assert ds[0][1].dtype == torch.uint8 and set(ds[1][1].unique().tolist()) == {10, 255}
    val = open_dataset("voc2012", tmp_path, "val", annotation="scribble")
    assert torch.equal(val[0][1], torch.from_numpy(full(5))), "evaluation has full masks"
    assert (
        len(
            open_dataset(
                "voc2012",
                tmp_path,
                "trainval",
                annotation="scribble",
                annotations=tmp_path / "xml" if form == "given" else None,
            )
        )
        == 6
    )


def test_points(tmp_path):
    tree(tmp_path)
    ds = open_dataset("voc2012", tmp_path, annotation="point")
    assert torch.equal(
        ds[1][1], torch.from_numpy(rasterise_points([(2, 5, 6), (0, 20.5, 10)], (20, 30)))
    )
    assert ds[0][1].unique().tolist() == [1, 255] and str(ds.files[0][1]).endswith(
        "voc_whats_the_point.json"
    )
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="no voc_whats_the_point.json and no voc_whats"):
        open_dataset("voc2012", tmp_path, annotation="point", annotations=tmp_path / "other")


def test_scribble_pngs(tmp_path):
    tree(tmp_path)
    ds = open_dataset("voc2012", tmp_path, annotation="scribble_png")
    assert ds[0][1].unique().tolist() == [3, 255]
    save(tmp_path / "pascal_2012_scribble" / f"{NAMES[0]}.png", np.full((20, 30), 99, np.uint8))
    with pytest.raises(ValueError, match="2007_000001.png holds label 99"):
        ds[0]


def test_published_pngs():
    root = sample("scribbles_png")
    home = None
    for n in ("2007_000032", "2007_000033"):
        sparse, dense = (np.array(Image.open(root / f"{n}.{k}.png")) for k in ("scribble", "dense"))
        source = voc_files.ScribblePngs(root)
        assert (source.labels(n, home) == sparse).all() and source.names >= {n}
        on = (sparse != 255) & (dense != 255)
        assert (sparse[on] == dense[on]).mean() > 0.95


def test_the_archive_is_opened_once(tmp_path, monkeypatch):
    tree(tmp_path)
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(
        voc_files.zipfile, "ZipFile", lambda *a, **k: opened.append(a) or real(*a, **k)
    )
    ds = open_dataset("voc2012", tmp_path, annotation="scribble")
    for _ in range(2):
        for i in range(5):
            ds[i]
    assert len(opened) == 1


def labels_in_a_process(ds):
    return [ds[i][1].numpy().tobytes() for i in range(5)]


@pytest.mark.parametrize("kind", ["scribble", "point", "full"])
def test_other_processes(tmp_path, kind):
    "The dataset pickles small, and forked workers read what the parent reads."
    ds = open_dataset("voc2012", tree(tmp_path), annotation=kind)
    here = labels_in_a_process(ds)
    assert (
        len(pickle.dumps(ds)) < 20_000
        and labels_in_a_process(pickle.loads(pickle.dumps(ds))) == here
    )
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(labels_in_a_process, [ds] * 4) == [here] * 4


def test_a_list_of_ones_own(tmp_path):
    tree(tmp_path)
    (tmp_path / "mine.txt").write_text(
        "JPEGImages/2008_000003.jpg SegmentationClassAug/2008_000003.png\n\n2010_000006\n"
    )
    assert stems(open_dataset("voc2012", tmp_path, list=tmp_path / "mine.txt")) == [
        NAMES[2],
        NAMES[5],
    ]
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no picture"):
        open_dataset("voc2012", tmp_path, list=tmp_path / "mine.txt")


def test_gaps(tmp_path):
    "What is missing is named when the dataset is opened."
    tree(tmp_path)
    jpg = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{NAMES[4]}.jpg"
    jpg.rename(tmp_path / "away.jpg")
    with pytest.raises(
        FileNotFoundError, match="1 of 5 images are missing, the first is .*2009_000005.jpg"
    ):
        open_dataset("voc2012", tmp_path)
    (tmp_path / "away.jpg").rename(jpg)
    (tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / f"{NAMES[0]}.png").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="1 of 5 images have no full annotation, the first is .*2007_000001.png",
    ):
        open_dataset("voc2012", tmp_path)
    for f in ("voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"):
        (tmp_path / f).write_text(
            json.dumps(
                {n: c for n, c in json.loads((tmp_path / f).read_text()).items() if n != NAMES[2]}
            )
        )
    with pytest.raises(
        FileNotFoundError, match="1 of 5 images have no point annotation, the first is 2008_000003"
    ):
        open_dataset("voc2012", tmp_path, annotation="point")
    for f in ("train", "val"):
        (tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / f"{f}.txt").unlink()
    with pytest.raises(FileNotFoundError, match="the list .*train.txt does not exist"):
        open_dataset("voc2012", tmp_path)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(split="test"), ValueError, "got 'test'"),
        (dict(annotation="boxes"), ValueError, "got 'boxes'"),
        (dict(outside="x"), ValueError, "outside must be"),
        (dict(root="nowhere"), FileNotFoundError, "nowhere does not exist"),
        (dict(root="tests"), FileNotFoundError, "no JPEGImages"),
        (dict(root=None), ValueError, "needs root="),
        (
            dict(annotation="scribble", annotations="nowhere"),
            FileNotFoundError,
            "annotations=nowhere",
        ),
        (dict(anotation="point"), ValueError, "anotation"),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    options = {"root": tree(tmp_path), **options}
    if options["root"] == "tests":
        options["root"] = Path(__file__).parent
    with pytest.raises(error, match=message):
        open_dataset("voc2012", **options)


def test_broken_archives_and_masks(tmp_path):
    tree(tmp_path, sbd="mat")
    z = tmp_path / "voc_scribbles.zip"
    whole = z.read_bytes()
    z.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="voc_scribbles.zip is not a readable zip"):
        open_dataset("voc2012", tmp_path, annotation="scribble")
    k = whole.index(b"2007_000001.xml") + 15
    z.write_bytes(whole[: k + 20] + b"\0\1\2\3" + whole[k + 24 :])
    with pytest.raises(ValueError, match="voc_scribbles.zip, 2007_000001.xml"):
        open_dataset("voc2012", tmp_path, annotation="scribble")[0]
    (tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / f"{NAMES[2]}.mat").write_bytes(
        b"MATLAB 5.0"
    )
    with pytest.raises(ValueError, match="2008_000003.mat is not one of SBD's"):
        open_dataset("voc2012", tmp_path)[2]


def test_scipy_is_optional(tmp_path, monkeypatch):
    tree(tmp_path, sbd="mat")
    monkeypatch.setattr(
        voc.importlib.util, "find_spec", lambda name: None if name == "scipy" else True
    )
    with pytest.raises(ImportError, match="pip install scipy"):
        open_dataset("voc2012", tmp_path)
    with pytest.raises(ImportError, match="pip install scipy"):
        voc_files.read_mat(tmp_path / "x.mat")
    assert (
        len(open_dataset("voc2012", tmp_path, annotation="scribble")) == 5
        and len(open_dataset("voc2012", tmp_path, "val")) == 1
    )
    code = "import sys, segkern.data.voc; print('scipy' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        ).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize("kind", ["full", "scribble", "point", "scribble_png"])
def test_check(tmp_path, kind):
    report = check("voc2012", tree(tmp_path), annotation=kind)
    assert report.ok and report.splits == dict(train=5, val=1) and sum(report.counts) > 0


def test_check_lists_everything(tmp_path):
    tree(tmp_path, archive=False)
    folder = (tmp_path / "xml").rename(tmp_path / "voc_scribbles")
    (folder / f"{NAMES[0]}.xml").unlink()
    (folder / f"{NAMES[1]}.xml").write_bytes(xml(polygon()))
    (folder / f"{NAMES[2]}.xml").write_bytes(xml(polygon(tag="<tag>unicorn</tag>")))
    (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{NAMES[3]}.jpg").unlink()
    found = check("voc2012", tmp_path, annotation="scribble").problems
    wanted = [
        "2007_000001.xml",
        "<size> is 64x48 (width x height)",
        "unknown class 'unicorn'",
        "2008_000004.jpg does not exist",
    ]
    assert all(any(w in p for p in found) for w in wanted) and all("train" in p for p in found), (
        found
    )


def test_size_of_the_picture(tmp_path):
    tree(tmp_path)
    save(
        tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{NAMES[0]}.jpg",
        np.zeros((21, 30, 3), np.uint8),
    )
    with pytest.raises(ValueError, match="30x20.*2007_000001.jpg is 30x21"):
        open_dataset("voc2012", tmp_path, annotation="scribble")[0]
    with pytest.raises(ValueError, match=r"\(21, 30\).*\(20, 30\)"):
        open_dataset("voc2012", tmp_path)[0]
    assert open_dataset("voc2012", tmp_path, annotation="point")[0][1].shape == (21, 30)


# --- sparse labels from full masks


def masks():
    yield "street", open_dataset("streets", size=(96, 128))[3][1].numpy()
    yield "one class", np.full((40, 50), 7, np.uint8)
    yield "void", np.full((10, 10), 255, np.uint8)
    yield "pixel", np.zeros((1, 1), np.uint8)
    yield "stripes", np.repeat(np.arange(8, dtype=np.uint8), 6)[None].repeat(30, 0)


@pytest.mark.parametrize("name, mask", list(masks()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("draw", [scribbles_from_mask, points_from_mask])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_sparse_labels_agree_with_the_mask(name, mask, draw, width):
    sparse = draw(mask, width=width)
    on = sparse != 255
    assert (
        sparse.dtype == np.uint8
        and (sparse[on] == mask[on]).all()
        and (sparse == draw(torch.from_numpy(mask), width=width)).all()
    )
    if name in ("one class", "stripes"):
        assert set(sparse[on]) == set(np.unique(mask)) and on.mean() < 0.65
    if draw is points_from_mask and name == "one class":
        assert on.sum() == width**2


def test_seeds_and_smallest():
    mask = next(masks())[1]
    assert (scribbles_from_mask(mask, 0) != scribbles_from_mask(mask, 1)).any() and (
        points_from_mask(mask, (0, 5)) != points_from_mask(mask, (0, 6))
    ).any()
    assert (points_from_mask(mask, width=1, smallest=400) != 255).sum() < (
        points_from_mask(mask, width=1, smallest=1) != 255
    ).sum()


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((2, 3, 4), np.uint8), "got .2, 3, 4."),
        (np.zeros((3, 4)), "of float64"),
        (np.full((3, 4), 300), "got 300..300"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        scribbles_from_mask(mask)


def own_data(root, nested):
    "A folder dataset of four streets."
    street = open_dataset("streets", size=(60, 80))
    for i in range(4):
        split = ("train" if i < 3 else "val") if nested else "."
        image, target = street[i]
        save(root / split / "images" / f"{i}.png", image.permute(1, 2, 0).numpy())
        save(root / split / "masks" / f"{i}.png", target.numpy())
    (root / "classes.json").write_text(json.dumps(street.classes))
    return root


@pytest.mark.parametrize("kind", ["scribbles", "points"])
@pytest.mark.parametrize("nested", [True, False], ids=["split folders", "one folder"])
def test_make_and_train_on_it(tmp_path, kind, nested):
    root = own_data(tmp_path, nested) / ("train" if nested else ".")
    assert (
        make(kind, root / "masks", root / kind) == (3 if nested else 4)
        and make(kind, root / "masks", root / kind) == 0
    )
    split = "train" if nested else "all"
    sparse = open_dataset("folder", tmp_path, split, annotation=kind if nested else kind)
    dense = open_dataset("folder", tmp_path, split)
    for (_, few), (_, mask) in zip(sparse, dense):
        assert 0 < (few != 255).float().mean() < 0.5 and torch.equal(
            few[few != 255], mask[few != 255]
        )
    if nested:
        assert (
            open_dataset("folder", tmp_path, "val", annotation=kind)[0][1] != 255
        ).float().mean() > 0.8
    if nested:
        assert check("folder", tmp_path, annotation=kind).ok
    assert not list(tmp_path.rglob("*.tmp"))


def test_strokes_depend_on_the_name_only(tmp_path):
    root = own_data(tmp_path, False)
    make("scribbles", root / "masks", root / "a")
    (root / "masks" / "0.png").unlink()
    make("scribbles", root / "masks", root / "b")
    assert all(
        (root / "a" / f"{i}.png").read_bytes() == (root / "b" / f"{i}.png").read_bytes()
        for i in (1, 2, 3)
    )


def test_make_refuses(tmp_path):
    root = own_data(tmp_path, False)
    with pytest.raises(ValueError, match="needs two folders"):
        make("points", root / "masks")
    with pytest.raises(ValueError, match="holds the masks"):
        make("points", root / "masks", root / "masks")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        make("points", root / "nowhere", root / "x")
    with pytest.raises(ValueError, match="takes one folder"):
        make("streets", root, root / "x")
    with pytest.raises(ValueError, match="0.png.*mode RGB"):
        make("points", root / "images", root / "x")
    save(root / "deep" / "in" / "wide.png", np.full((20, 20), 300, np.int32).astype(np.uint16))
    with pytest.raises(ValueError, match="wide.png: masks hold 0..254"):
        make("points", root / "deep", root / "x")


def test_command_line(tmp_path):
    from segkern.cli.app import main

    root = own_data(tmp_path, False)
    assert (
        main(
            [
                "data",
                "make",
                "scribbles",
                str(root / "masks"),
                str(root / "scribbles"),
                "-D",
                "width=2",
            ]
        )
        == 0
    )
    assert len(list((root / "scribbles").glob("*.png"))) == 4
    assert (
        main(["data", "make", "points", str(root / "masks")]) == 1
        and main(["data", "make", "points", str(root / "masks"), "x", "-D", "root=3"]) == 1
    )
    home = tree(tmp_path / "voc")
    for kind in ("full", "scribble", "point"):
        assert main(["data", "check", "voc2012", str(home), "-D", f"annotation={kind}"]) == 0
    (home / "voc_whats_the_point.json").write_text("{")
    assert main(["data", "check", "voc2012", str(home), "-D", "annotation=point"]) == 1
