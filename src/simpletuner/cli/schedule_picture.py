"""The noise levels of training as a picture: curves of density, the sampler's levels below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.cli.schedule_curves import Curve, Schedule
from simpletuner.events.formats import decimal
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.i18n import text

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

_SIZE = (1000, 600)
_FINER = 3  # drawn that much larger, then reduced: smooth lines without a plotting library
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 32, 112, 118  # margins, px
_NUM_POINTS = 600
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by colour-blind eyes too
_INK, _FAINT, _GRID = "#222222", "#666666", "#e3e3e3"
_TITLE_PX, _TEXT_PX, _TICK_PX, _ROW_PX = 25, 19, 17, 26
_LARGEST = 1.12  # of the axis, times the highest point
_EDGE = 0.02  # a density may be infinite closer to 0 and 1 than this


def draw_schedule(schedule: Schedule, path: Path, language: str) -> None:
    """Write a PNG.

    Raises:
        FileSystemError: it cannot be written there.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (_SIZE[0] * _FINER, _SIZE[1] * _FINER), "white")
    picture = _Picture(ImageDraw.Draw(canvas), highest=_highest_between(schedule, 0, 1) * _LARGEST, language=language)
    picture.make_room(schedule)
    picture.axes(schedule)
    picture.curves(schedule)
    picture.sampling(schedule)
    picture.legend(schedule)
    small = canvas.resize(_SIZE, Image.Resampling.LANCZOS).quantize(96, dither=Image.Dither.NONE)
    with os_errors_as_problems(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path, format="PNG", optimize=True)


def _highest_between(schedule: Schedule, low: float, high: float) -> float:
    """The highest share or density from sigma `low` to `high`."""
    if schedule.levels:
        return max((schedule.share(level) for level in schedule.levels if low <= level <= high), default=0.0)
    low, high = max(low, _EDGE), min(high, 1 - _EDGE)
    grid = [low + (high - low) * i / 500 for i in range(501)]
    return max(curve.density(sigma) for curve in schedule.curves for sigma in grid)


def _visible(curve: Curve, highest: float) -> Iterator[list[tuple[float, float]]]:
    """The pieces of a curve, as (sigma, density), that are no higher than the picture."""
    points = ((sigma, curve.density(sigma)) for sigma in ((i + 0.5) / _NUM_POINTS for i in range(_NUM_POINTS)))
    for is_visible, run in groupby(points, lambda point: point[1] <= highest):
        if is_visible:
            yield list(run)


@dataclass(frozen=True, kw_only=True)
class _Box:
    """In px of the small picture."""

    left: float
    top: float
    right: float
    bottom: float


class _Picture:
    """Draws in units of the small picture; y is a density."""

    def __init__(self, draw: ImageDraw.ImageDraw, *, highest: float, language: str) -> None:
        self._draw = draw
        self._highest = highest
        self._language = language

    def axes(self, schedule: Schedule) -> None:
        is_listed = bool(schedule.levels)
        self._text((_LEFT, 22), text("plot.title", self._language), size=_TITLE_PX)
        self._text((_LEFT, 58), schedule.name, size=_TEXT_PX, fill=_FAINT)
        step = _round_step(self._highest)
        for i in range(int(self._highest / step) + 1):
            y = self._y(i * step)
            self._line([(_LEFT, y), (_SIZE[0] - _RIGHT, y)], fill=_GRID if i else _INK)
            digits = 2 if step < 0.1 else 1 if step < 1 else 0
            self._text((_LEFT - 12, y), decimal(i * step, digits, self._language), size=_TICK_PX, anchor="rm")
        for i in range(11):
            x = self._x(i / 10)
            self._line([(x, self._y(0)), (x, self._y(0) + 6)], fill=_INK)
            if i % 2 == 0:
                self._text((x, self._y(0) + 12), decimal(i / 10, 1, self._language), size=_TICK_PX, anchor="ma")
        middle = (_LEFT + _SIZE[0] - _RIGHT) / 2
        self._text((middle, _SIZE[1] - 28), text("plot.axis", self._language), size=_TEXT_PX, anchor="ms")
        self._text((_LEFT, self._y(0) + 40), text("plot.clean", self._language), size=_TICK_PX, fill=_FAINT)
        self._text(
            (_SIZE[0] - _RIGHT, self._y(0) + 40),
            text("plot.noise", self._language),
            size=_TICK_PX,
            fill=_FAINT,
            anchor="ra",
        )
        name = "plot.axis.share" if is_listed else "plot.axis.density"
        self._text((_LEFT - 12, _TOP - 12), text(name, self._language), size=_TICK_PX, fill=_FAINT, anchor="rs")

    def curves(self, schedule: Schedule) -> None:
        for level in schedule.levels:
            x = self._x(level)
            self._line([(x, self._y(0)), (x, self._y(schedule.share(level)))], fill=_COLOURS[0], width=5)
        if schedule.levels:
            return
        for index, curve in enumerate(schedule.curves):
            for run in _visible(curve, self._highest):
                points = [(self._x(sigma), self._y(density)) for sigma, density in run]
                self._line(points, fill=_COLOURS[index % len(_COLOURS)], width=3.2)
            x = self._x(curve.quantile(0.5))
            top = self._y(min(curve.density(curve.quantile(0.5)), self._highest))
            self._dashes(x, top, self._y(0), fill=_COLOURS[index % len(_COLOURS)])

    def sampling(self, schedule: Schedule) -> None:
        for level in schedule.sampling:
            self._triangle((self._x(level), self._y(0) - 3))

    def legend(self, schedule: Schedule) -> None:
        box = self._legend_box(schedule)
        corners = [box.left * _FINER, box.top * _FINER, box.right * _FINER, box.bottom * _FINER]
        self._draw.rounded_rectangle(corners, radius=6 * _FINER, fill="white", outline=_GRID, width=_FINER)
        for place, label in enumerate(self._labels(schedule)):
            y = box.top + 20 + _ROW_PX * place
            if place < len(schedule.curves):
                colour = _COLOURS[place % len(_COLOURS)]
                self._line([(box.left + 10, y), (box.left + 36, y)], fill=colour, width=3.2)
            elif label == schedule.caption:
                self._triangle((box.left + 23, y - 8))
            else:
                self._dashes_across(box.left + 10, box.left + 36, y)
            self._text((box.left + 44, y), label, size=_TICK_PX, anchor="lm")

    def make_room(self, schedule: Schedule) -> None:
        """Lower the curves until the legend covers none of them."""
        box = self._legend_box(schedule)
        covered = _highest_between(schedule, self._sigma(box.left - 12), self._sigma(box.right + 12))
        room = (self._y(0) - box.bottom - 10) / (self._y(0) - _TOP)
        self._highest = max(self._highest, covered / room)

    def _labels(self, schedule: Schedule) -> list[str]:
        medians = [] if schedule.levels else [text("plot.median", self._language)]
        return [*(curve.label for curve in schedule.curves), *medians, schedule.caption]

    def _legend_box(self, schedule: Schedule) -> _Box:
        """At the top of the plot: left, in the middle or right, where the curves are lowest."""
        labels = self._labels(schedule)
        width = max(self._draw.textlength(label, _font(_TICK_PX)) for label in labels) / _FINER + 56
        first, last = _LEFT + 14.0, _SIZE[0] - _RIGHT - width - 6
        boxes = [
            _Box(left=left, top=_TOP - 4.0, right=left + width, bottom=_TOP + _ROW_PX * len(labels) + 10.0)
            for left in (last, first, (first + last) / 2)
        ]
        return min(boxes, key=lambda box: _highest_between(schedule, self._sigma(box.left), self._sigma(box.right)))

    def _sigma(self, x: float) -> float:
        return (x - _LEFT) / (_SIZE[0] - _LEFT - _RIGHT)

    def _x(self, sigma: float) -> float:
        return _LEFT + sigma * (_SIZE[0] - _LEFT - _RIGHT)

    def _y(self, density: float) -> float:
        return _SIZE[1] - _BOTTOM - density / self._highest * (_SIZE[1] - _TOP - _BOTTOM)

    def _line(self, points: Sequence[tuple[float, float]], *, fill: str, width: float = 1.2) -> None:
        scaled = [(x * _FINER, y * _FINER) for x, y in points]
        self._draw.line(scaled, fill=fill, width=round(width * _FINER), joint="curve")

    def _dashes(self, x: float, top: float, bottom: float, *, fill: str) -> None:
        y = top
        while y < bottom:
            self._line([(x, y), (x, min(y + 6, bottom))], fill=fill, width=1.4)
            y += 11

    def _dashes_across(self, left: float, right: float, y: float) -> None:
        for x in range(int(left), int(right), 9):
            self._line([(x, y), (min(x + 5, right), y)], fill=_FAINT, width=1.4)

    def _triangle(self, tip: tuple[float, float]) -> None:
        x, y = tip
        corners = [(x, y + 3), (x - 6, y + 14), (x + 6, y + 14)]
        self._draw.polygon([(a * _FINER, b * _FINER) for a, b in corners], fill=_INK)

    def _text(self, place: tuple[float, float], words: str, *, size: int, fill: str = _INK, anchor: str = "la") -> None:
        x, y = place
        self._draw.text((x * _FINER, y * _FINER), words, fill=fill, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same everywhere, but without accents, so the texts of pictures do without."""
    from PIL import ImageFont

    return ImageFont.load_default(size * _FINER)


def _round_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, for four to nine lines up to `highest`."""
    power = 1e-3
    while True:
        for factor in (1, 2, 5):
            if highest / (factor * power) <= 8:
                return factor * power
        power *= 10
