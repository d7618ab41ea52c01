"""Sheets: every image in its place, nothing cut off, whatever the sizes and texts are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from simpletuner.generate.sheet import Cell, Row, draw_sheet

COLOURS = ((200, 0, 0), (0, 160, 0), (0, 0, 200), (200, 160, 0), (0, 160, 160), (160, 0, 160))


@pytest.fixture
def images(tmp_path):
    def make(*sizes):
        cells = []
        for index, size in enumerate(sizes):
            path = tmp_path / f"{index}.png"
            Image.new("RGB", size, COLOURS[index]).save(path)
            cells.append(Cell(file=path))
        return cells

    return make


def centre(sheet, colour):
    """Middle (x, y) of what has that colour, and its size."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2, xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


def test_rows_and_columns_are_where_they_belong(images):
    cells = images(*[(64, 64)] * 6)
    rows = [Row(cells=tuple(cells[:3]), label="a cat"), Row(cells=tuple(cells[3:]), label="a dog", note="seed 2")]
    sheet = draw_sheet(rows, title="z_image", note="steps: 8", headings=["one", "two", "three"])
    places = [centre(sheet, colour) for colour in COLOURS]
    assert places[0][0] == places[3][0] < places[1][0] == places[4][0] < places[2][0] == places[5][0]
    assert places[0][1] == places[1][1] == places[2][1] < places[3][1] == places[4][1] == places[5][1]
    assert len({place[2:] for place in places}) == 1


def test_shapes_stay_as_they_are(images):
    wide, tall = images((256, 128), (128, 256))
    sheet = draw_sheet([Row(cells=(wide, tall))], title="", note="")
    assert centre(sheet, COLOURS[0])[2:] == (256, 128)
    assert centre(sheet, COLOURS[1])[2:] == (128, 256)


def test_many_columns_are_made_smaller(images):
    cells = images((1024, 1024))
    sheet = draw_sheet([Row(cells=tuple(cells * 12))], title="", note="", headings=["x"] * 12)
    assert sheet.width <= 4096


@pytest.mark.parametrize("text", ["word " * 400, "w" * 3000, ""])
def test_long_texts_are_broken_and_cut(images, text):
    cells = images((64, 64))
    row = Row(cells=(Cell(file=cells[0].file, caption=text),), label=text, note=text)
    sheet = draw_sheet([row], title=text, note=text, headings=[text])
    assert sheet.width < 600
    assert sheet.height < 1200
    assert centre(sheet, COLOURS[0])[2:] == (192, 192)
