"""The pictures of the documentation: up to date, true to the packed order, inside their sheet."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import triton_tied as tt

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_kernels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("channels", "taps"), [(3, 9), (4, 9), (5, 1), (2, 4), (3, 25)])
def test_drawn_places_are_those_that_unpack_fills(script, channels, taps):
    side = round(taps**0.5)
    size = tt.packed_size(channels, side)
    weight = tt.unpack(torch.arange(size, dtype=torch.float64), channels, side)
    drawn = torch.tensor(script.places(channels, taps), dtype=torch.float64)
    assert torch.equal(drawn, weight.flatten(2).movedim(2, 0))


def test_committed_drawings_are_those_of_the_script(script):
    for name, draw in script.DRAWINGS.items():
        committed = (script.IMAGES / name).read_text()
        assert committed == draw().svg(), "run `make figures`"
    found = {path.name for path in script.IMAGES.glob("kernels-*.svg")}
    assert found == set(script.DRAWINGS)


def test_nothing_is_drawn_outside_of_the_sheet(script):
    for name, draw in script.DRAWINGS.items():
        drawing = draw()
        svg = ET.fromstring(drawing.svg())
        wide = 0.0
        for shape in svg:
            for left, right, top, bottom in extents(shape):
                assert left >= -1 and right <= drawing.width + 1, (name, shape.text)
                assert top >= -1 and bottom <= drawing.height + 1, (name, shape.text)
                wide = max(wide, right)
        assert wide > drawing.width / 2  # something was seen


def extents(shape):
    """Left, right, top and bottom of a shape; of a text by the mean width of its letters."""
    kind = shape.tag.rpartition("}")[2]
    if kind == "polyline":
        points = [tuple(map(float, point.split(","))) for point in shape.get("points").split()]
        for x, y in points:
            yield x, x, y, y
    elif kind == "rect" and shape.get("x"):
        x, y, w, h = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
        yield x, x + w, y, y + h
    elif kind == "text" and "rotate" not in shape.get("transform", ""):
        x, y = float(shape.get("x")), float(shape.get("y"))
        letter = 5.8 if shape.get("class") == "small" else 7.2
        width = letter * len(shape.text or "")
        left = {"start": x, "middle": x - width / 2, "end": x - width}[shape.get("text-anchor")]
        yield left, left + width, y - 13, y + 4


def test_both_palettes_colour_the_same_things(script):
    rules = [re.findall(r"(\S[^{}]*) \{", script.colours(p)) for p in (script.LIGHT, script.DARK)]
    assert rules[0] == rules[1] and len(rules[0]) > 10
    assert not set(script.LIGHT) & set(script.DARK)
