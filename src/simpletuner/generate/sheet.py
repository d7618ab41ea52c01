"""One picture of many images: a table with headings, or a gallery with captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_MARGIN_PX = 12
_LABEL_PX = 190
_SMALLEST_CELL_PX, _LARGEST_CELL_PX = 192, 512
_WIDEST_PX = 4096
_TITLE_SIZE, _TEXT_SIZE = 18, 15
_LEADING_PX = 6
_INK, _GREY = "#111", "#666"
_MAX_LINES = 6  # of one label

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An image with what is written below it."""

    file: Path
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells side by side, and to the left of them `label` with the grey `note` below."""

    cells: tuple[Cell, ...]
    label: str = ""
    note: str = ""


def draw_sheet(rows: Sequence[Row], *, title: str, note: str, headings: Sequence[str] = ()) -> Image.Image:
    """The table. `headings` are above the columns, `title` and the grey `note` above everything."""
    title_font, font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_TEXT_SIZE)
    num_columns = max(len(row.cells) for row in rows)
    label_px = min(_LABEL_PX, max(math.ceil(font.getlength(text)) for row in rows for text in (row.label, row.note)))
    left_px = _MARGIN_PX + (label_px + _MARGIN_PX if label_px else 0)
    cell_px = _cell_side(rows, num_columns, left_px)
    width = left_px + num_columns * (cell_px + _MARGIN_PX)
    drawn = [_draw_row(row, cell_px, left_px, width, font) for row in rows]
    head = _draw_head(title, note, headings, cell_px=cell_px, left_px=left_px, width=width, fonts=(title_font, font))
    sheet = Image.new("RGB", (width, head.height + sum(part.height for part in drawn) + _MARGIN_PX), "white")
    top = 0
    for part in (head, *drawn):
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _cell_side(rows: Sequence[Row], num_columns: int, left_px: int) -> int:
    """The longer side of the largest image, within limits, so that the sheet is not too wide for a screen's viewer."""
    largest = 0
    for row in rows:
        for cell in row.cells:
            with Image.open(cell.file) as image:
                largest = max(largest, *image.size)
    room = (_WIDEST_PX - left_px) // num_columns - _MARGIN_PX
    return max(min(max(largest, _SMALLEST_CELL_PX), _LARGEST_CELL_PX, room), 64)


def _draw_head(
    title: str,
    note: str,
    headings: Sequence[str],
    *,
    cell_px: int,
    left_px: int,
    width: int,
    fonts: tuple[_Font, _Font],
) -> Image.Image:
    title_font, font = fonts
    room = width - 2 * _MARGIN_PX
    lines = [(line, title_font, _INK) for line in _wrapped(title, title_font, room)]
    lines += [(line, font, _GREY) for line in _wrapped(note, font, room)]
    columns = [_wrapped(heading, font, cell_px) for heading in headings]
    tallest = max(map(len, columns), default=0)
    height = _MARGIN_PX + sum(_line_px(used) for _, used, _ in lines) + _LEADING_PX + tallest * _line_px(font)
    picture = Image.new("RGB", (width, height + _LEADING_PX), "white")
    draw = ImageDraw.Draw(picture)
    top = _MARGIN_PX
    for line, used, ink in lines:
        draw.text((_MARGIN_PX, top), line, fill=ink, font=used)
        top += _line_px(used)
    top += _LEADING_PX
    for column, written in enumerate(columns):
        x = left_px + column * (cell_px + _MARGIN_PX)
        for index, line in enumerate(written):
            draw.text((x, top + index * _line_px(font)), line, fill=_INK, font=font)
    return picture


def _draw_row(row: Row, cell_px: int, left_px: int, width: int, font: _Font) -> Image.Image:
    images = [_scaled(cell.file, cell_px) for cell in row.cells]
    captions = [_wrapped(cell.caption, font, cell_px) for cell in row.cells]
    label = [(line, _INK) for line in _wrapped(row.label, font, _LABEL_PX)]
    label += [(line, _GREY) for line in _wrapped(row.note, font, _LABEL_PX)]
    below = max(map(len, captions)) * _line_px(font)
    height = max(max(image.height for image in images) + below, len(label) * _line_px(font)) + _MARGIN_PX
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for index, (line, ink) in enumerate(label):
        draw.text((_MARGIN_PX, index * _line_px(font)), line, fill=ink, font=font)
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = left_px + column * (cell_px + _MARGIN_PX)
        picture.paste(image, (x, 0))
        for index, line in enumerate(caption):
            draw.text((x, image.height + _LEADING_PX // 2 + index * _line_px(font)), line, fill=_GREY, font=font)
    return picture


def _scaled(file: Path, side_px: int) -> Image.Image:
    with Image.open(file) as image:
        picture = image.convert("RGB")
    factor = side_px / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _line_px(font: _Font) -> int:
    return round(getattr(font, "size", _TEXT_SIZE)) + _LEADING_PX


def _wrapped(text: str, font: _Font, width_px: int) -> list[str]:
    """Lines no wider than `width_px`, broken between words; the last of too many ends in "..."."""
    lines = list(islice(_broken(text, font, width_px), _MAX_LINES + 1))
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and font.getlength(f"{last}...") > width_px:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], f"{last}..."]


def _broken(text: str, font: _Font, width_px: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width_px:
            line = longer
            continue
        if line:
            yield line
        while len(word) > 1 and font.getlength(word) > width_px:
            end = _fitting(word, font, width_px)
            yield word[:end]
            word = word[end:]
        line = word
    if line:
        yield line


def _fitting(word: str, font: _Font, width_px: int) -> int:
    """How many of its first characters are no wider than `width_px`, at least one."""
    return 1 + sum(1 for _ in takewhile(lambda count: font.getlength(word[:count]) <= width_px, range(2, len(word))))
