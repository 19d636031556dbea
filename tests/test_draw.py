"""Drawing in a notebook: strokes and their label map, and the canvas with a stand-in for ipycanvas
(and with ipycanvas where it is installed)."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.data import open_dataset
from segkern.data.base import read_ids
from segkern.data.sparse import rasterise_points, rasterise_scribbles
from segkern.lab.draw import Annotator, Sketch

CLASSES = ["ground", "crack", "plant"]
PALETTE = [[10, 20, 30], [200, 0, 0], [0, 200, 0]]


def picture(h=24, w=32):
    return np.full((h, w, 3), 99, np.uint8)


# --- strokes


def test_strokes_are_rasterised_like_annotations():
    s = Sketch((24, 32), 3)
    s.begin(1, 4, 4)
    for x in (4.2, 9, 20):
        s.move(x, 10)
    s.end()
    s.point(2, 20, 10)
    assert s.polylines == [(1, [[4, 4], [4.2, 10], [9, 10], [20, 10]]), (2, [[20, 10]])]
    assert (
        s.target == rasterise_scribbles(s.polylines, (24, 32))
    ).all() and s.target.dtype == np.uint8
    s.clear()
    s.point(2, 20, 10)
    assert (s.target == rasterise_points([(2, 20, 10)], (24, 32))).all()


def test_unfinished_strokes_show_and_small_steps_do_not_count():
    s = Sketch((24, 32), 3)
    assert not s.move(3, 3)
    s.begin(1, 5, 5)
    assert not s.move(5.5, 5.5) and s.move(9, 5) and (s.target == 1).any() and s.polylines == []
    s.begin(2, 1, 1)
    assert len(s.polylines) == 1


def test_undo_redo_clear():
    s = Sketch((24, 32), 3)
    maps = []
    assert not s.undo() and not s.redo()
    for k in range(3):
        s.point(k, 5 + 8 * k, 9)
        maps.append(s.target)
    for k in (1, 0):
        assert s.undo() and (s.target == maps[k]).all()
    assert s.redo() and (s.target == maps[1]).all()
    s.point(2, 2, 2)
    assert not s.redo(), "a new stroke ends the redoing"
    s.clear()
    assert (
        (s.target == 255).all()
        and s.redo()
        and s.redo()
        and s.redo()
        and not s.redo()
        and len(s.polylines) == 3
    )
    assert [k for k, _ in s.polylines] == [0, 1, 2]


def test_erasing_and_starting_from_labels():
    start = np.full((24, 32), 255, np.uint8)
    start[:, :10] = 1
    s = Sketch((24, 32), 3, target=start)
    s.point(255, 5, 5)
    s.point(2, 20, 20)
    assert (
        (s.target == 255).sum() == 24 * 22 - 12 + 12
        and s.target[5, 5] == 255
        and s.target[20, 20] == 2
    )
    s.clear()
    assert (s.target == start).all() and (start[:, :10] == 1).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sketch((4, 4), 0), "1 to 255 classes, got 0"),
        (lambda: Sketch((4, 4), 256), "got 256"),
        (lambda: Sketch((4, 4), 3, width=0), "width"),
        (lambda: Sketch((4, 4), 3, target=np.zeros((4, 5), np.uint8)), r"\(4, 5\).*\(4, 4\)"),
        (lambda: Sketch((4, 4), 3, target=np.full((4, 4), 3)), "the id 3, but there are 3"),
        (lambda: Sketch((4, 4), 3).point(3, 0, 0), "expected a class 0..2 or 255, got 3"),
        (lambda: Annotator(np.zeros((4, 4), np.uint8), CLASSES), r"\[4, 4\]"),
        (lambda: Annotator(picture(), CLASSES, PALETTE[:2]), "3 classes, but 2 colours"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("form", ["path", "pil", "tensor", "array"])
def test_pictures_of_every_form(tmp_path, form):
    a = np.random.RandomState(0).randint(0, 256, (24, 32, 3)).astype(np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    image = dict(
        path=str(tmp_path / "a.png"),
        pil=Image.open(tmp_path / "a.png"),
        tensor=torch.from_numpy(a).permute(2, 0, 1),
        array=a,
    )[form]
    assert (Annotator(image, CLASSES).image == a).all()


def test_saved_labels_train(tmp_path):
    "What is saved is what a folder dataset reads, and what one can go on from."
    for folder in ("images", "scribbles"):
        (tmp_path / folder).mkdir()
    Image.fromarray(picture()).save(tmp_path / "images" / "a.png")
    a = Annotator(tmp_path / "images" / "a.png", CLASSES, PALETTE)
    a.sketch.point(1, 10, 10)
    path = a.save(tmp_path / "scribbles" / "a.png")
    ds = open_dataset("folder", tmp_path, "all", classes=CLASSES, annotation="scribbles")
    assert (ds[0][1].numpy() == a.target).all() and (read_ids(path) == a.target).all()
    b = Annotator(picture(), CLASSES, PALETTE, target=path)
    assert (b.target == a.target).all() and b.polylines == []
    with pytest.raises(ValueError, match=".png"):
        a.save(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "size, zoom", [((24, 32), 8), ((200, 256), 3), ((768, 100), 1), ((1536, 1000), 0.5)]
)
def test_zoom(size, zoom):
    assert Annotator(picture(*size), CLASSES).zoom == zoom


# --- the canvas


class Layer:
    "Keeps what it is told to draw."

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, args))


class Canvas(list):
    "A stand-in for ipycanvas.MultiCanvas: three layers and the callbacks."

    def __init__(self, n, width, height):
        super().__init__(Layer() for _ in range(n))
        self.width = width
        self.height = height
        self.layout = types.SimpleNamespace()
        self.on = {}

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda f: self.on.__setitem__(name, f)
        raise AttributeError(name)


class Element:
    "A stand-in for a widget of ipywidgets."

    def __init__(self, children=(), **kwargs):
        self.children = children
        self.style = types.SimpleNamespace()
        self.layout = types.SimpleNamespace()
        self.value = ""
        self.react = None
        self.__dict__.update(kwargs)

    def on_click(self, f):
        self.react = f


@pytest.fixture
def fake(monkeypatch):
    "An annotator with the stand-ins, its canvas, and its buttons by name."
    names = ("Button", "HTML", "Text", "HBox", "VBox", "Layout")
    monkeypatch.setitem(
        sys.modules, "ipywidgets", types.SimpleNamespace(**{n: Element for n in names})
    )
    monkeypatch.setitem(sys.modules, "ipycanvas", types.SimpleNamespace(MultiCanvas=Canvas))
    a = Annotator(picture(), CLASSES, PALETTE)
    top, canvas, bottom = a.widget.children
    found = {
        e.description: e
        for part in (top, bottom)
        for e in part.children
        if hasattr(e, "description")
    }
    return a, canvas, found, bottom


def drag(canvas, *points):
    canvas.on["on_mouse_down"](*points[0])
    for p in points[1:]:
        canvas.on["on_mouse_move"](*p)
    canvas.on["on_mouse_up"](*points[-1])


def test_the_canvas_draws(fake):
    a, canvas, buttons, _ = fake
    assert (canvas.width, canvas.height) == (256, 192) and a.widget is a.widget
    buttons["crack"].react(None)
    drag(canvas, (40, 40), (41, 41), (120, 40))
    assert a.polylines == [(1, [[5, 5], [15, 5]])] and canvas[2].calls[-1] == ("clear", ())
    assert ("stroke_line", (40, 40, 120, 40)) in canvas[2].calls
    shown = [args[0] for name, args in canvas[1].calls if name == "put_image_data"][-1]
    assert (
        shown.shape == (192, 256, 4)
        and ((shown[::8, ::8, 3] > 0) == (a.target != 255)).all()
        and tuple(shown[40, 80, :3]) == (200, 0, 0)
    )
    canvas.on["on_mouse_move"](7, 7)
    canvas.on["on_mouse_up"](7, 7)
    assert len(a.polylines) == 1, "moving without a pressed button draws nothing"


def test_buttons(fake, tmp_path):
    a, canvas, buttons, bottom = fake
    for name in CLASSES:
        buttons[name].react(None)
        drag(canvas, (40, 40))
    buttons["eraser"].react(None)
    drag(canvas, (40, 40))
    assert [k for k, _ in a.polylines] == [0, 1, 2, 255] and (a.target == 255).all()
    buttons["undo"].react(None)
    assert (a.target == 2).sum() == 12
    buttons["redo"].react(None)
    buttons["clear"].react(None)
    assert a.polylines == []
    where, _, said = bottom.children[-3:]
    buttons["save"].react(None)
    assert said.value == "name a .png file first"
    where.value = str(tmp_path / "x.jpg")
    buttons["save"].react(None)
    assert ".png" in said.value and not (tmp_path / "x.jpg").exists()
    where.value = str(tmp_path / "x.png")
    buttons["save"].react(None)
    assert (read_ids(tmp_path / "x.png") == 255).all() and "saved" in said.value


def test_fingers_and_leaving(fake):
    a, canvas, buttons, _ = fake
    canvas.on["on_touch_start"]([(8, 8)])
    canvas.on["on_touch_move"]([(80, 80)])
    canvas.on["on_touch_end"]([])
    canvas.on["on_mouse_down"](8, 80)
    canvas.on["on_mouse_out"](300, 80)
    assert a.polylines == [(0, [[1, 1], [10, 10]]), (0, [[1, 10]])]


def test_without_ipycanvas(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipycanvas", None)
    with pytest.raises(ImportError, match="pip install ipycanvas"):
        Annotator(picture(), CLASSES).widget


def test_with_ipycanvas():
    "The real widgets, fed with the messages of a browser."
    pytest.importorskip("ipycanvas")
    a = Annotator(picture(), CLASSES, PALETTE)
    canvas = a.widget.children[1]
    for event, x, y in (("mouse_down", 40, 40), ("mouse_move", 120, 40), ("mouse_up", 120, 40)):
        canvas[2]._handle_frontend_event(None, {"event": event, "x": x, "y": y}, [])
    assert a.polylines == [(0, [[5, 5], [15, 5]])] and type(a.widget).__name__ == "VBox"
    a.widget.children[0].children[1].click()
    assert a.label == 1
