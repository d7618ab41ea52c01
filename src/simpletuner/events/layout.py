"""The live area of the console as spans of text: pure functions of the view and the width.

No line is ever wider than the terminal: figures that do not fit are left out from the end, the bar takes what is left.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from simpletuner.events import formats
from simpletuner.events import types as t
from simpletuner.events.eta import round_remaining
from simpletuner.events.text import NOTABLE_S, is_trivial, phase_amount, phase_label, phase_news, phase_pace
from simpletuner.events.view import RunView
from simpletuner.i18n import text

Style: TypeAlias = Literal["plain", "label", "bar", "rest", "dim", "good", "warning", "error", "accent"]
Span: TypeAlias = tuple[str, Style]
Row: TypeAlias = list[Span]

MIN_BAR, MAX_BAR, MAX_WIDTH = 10, 40, 110
_INDENT = "  "
_GAP = "   "


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """The signs that a terminal can show."""

    full: str
    half: str
    rest: str
    spinner: str
    icons: dict[str, str]


UNICODE = Glyphs(
    full="━",
    half="╸",
    rest="─",
    spinner="⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏",
    icons={"ok": "✓", "warning": "⚠", "error": "✗", "saved": "◆", "images": "▲", "stop": "■", "": " "},
)
ASCII = Glyphs(
    full="#",
    half="#",
    rest="-",
    spinner="|/-\\",
    icons={"ok": "+", "warning": "!", "error": "x", "saved": "*", "images": "^", "stop": "=", "": " "},
)


def bar(fraction: float, width: int, glyphs: Glyphs) -> Row:
    """A bar of exactly `width` cells, `fraction` (0 to 1) of it done, to half a cell."""
    halves = round(min(1.0, max(0.0, fraction)) * width * 2)
    done = glyphs.full * (halves // 2) + (glyphs.half if halves % 2 else "")
    return [(done, "bar"), (glyphs.rest * (width - len(done)), "rest")]


def training_rows(view: RunView, width: int, language: str, glyphs: Glyphs) -> list[Row]:
    """Two rows: how far, and how it goes."""
    step = view.step
    assert step is not None
    label = text("console.stopping" if view.stopping else "console.training", language).capitalize()
    head: Row = [(f"{_INDENT}{label}", "warning" if view.stopping else "label")]
    fraction = step.step / step.total if step.total else 1.0
    figures = [f"{step.step:>{len(str(step.total))}}/{step.total}", percent(fraction, language)]
    if view.validation is not None:
        total = view.validation.num_images
        figures.append(text("console.validating", language, done=view.validation_done, total=total))
    elif not view.stopping and step.step < step.total and (remaining_s := view.remaining_s()) is not None:
        left = formats.rounded_duration(round_remaining(remaining_s))
        figures.append(text("console.left", language, duration=left))
    below: Row = [(" " * (len(_INDENT) + len(label)), "plain")]
    return [_with_bar(head, fraction, figures, width, glyphs), _fitting(below, _health(view, step, language), width)]


def phase_row(phase: t.RunPhase, elapsed_s: float, width: int, language: str, glyphs: Glyphs) -> Row:
    """One row for the phase that is under way: a bar if its size is known, a spinner otherwise."""
    label = phase_label(phase.key, language)
    pace = phase_pace(phase, elapsed_s, language)
    figures = [phase_amount(phase, language), *pace, formats.duration(elapsed_s, language), phase.detail or ""]
    figures = [figure for figure in figures if figure]
    if phase.total:
        head: Row = [(f"{_INDENT}{label}", "label")]
        return _with_bar(head, phase.done / phase.total, figures, width, glyphs)
    spinner = glyphs.spinner[int(elapsed_s * 4) % len(glyphs.spinner)]
    return _fitting([(f"{spinner} ", "accent"), (label, "label")], figures, width)


def validation_row(view: RunView, elapsed_s: float, width: int, language: str, glyphs: Glyphs) -> Row:
    """One row for images that are made while no training is under way."""
    assert view.validation is not None
    total = view.validation.num_images
    label = phase_label("validation", language)
    figures = [
        f"{view.validation_done}/{total} {text('console.unit.images', language)}",
        formats.duration(elapsed_s, language),
    ]
    return _with_bar([(f"{_INDENT}{label}", "label")], view.validation_fraction, figures, width, glyphs)


def finished_rows(phases: Sequence[t.RunPhase], width: int, language: str, glyphs: Glyphs) -> list[Row]:
    """The phases that are done, several to a row."""
    rows: list[Row] = []
    for phase in phases:
        if is_trivial(phase):
            continue
        amount = phase_amount(phase, language, with_unit=False)
        seconds = formats.duration(phase.elapsed_s, language) if phase.elapsed_s >= NOTABLE_S else ""
        figures = "".join(f" {figure}" for figure in (amount, *phase_news(phase, language), seconds) if figure)
        label = phase_label(phase.key, language)
        entry: Row = [(f"{glyphs.icons['ok']} ", "good"), (label, "plain"), (figures, "dim")]
        if rows and row_width(rows[-1]) + len(_GAP) + row_width(entry) <= min(width, MAX_WIDTH):
            rows[-1] += [(_GAP, "plain"), *entry]
        else:
            rows.append(cut(entry, width))
    return rows


def wrapped(head: Row, message: str, style: Style, width: int) -> list[Row]:
    """`message` after `head`, broken between words, the further rows indented; a path is never broken."""
    indent = row_width(head)
    room = max(20, width - indent)
    kept = len(message) - len(message.lstrip(" "))  # the indent of a problem's hint
    parts = textwrap.wrap(message.strip(), room - kept, break_long_words=False, break_on_hyphens=False) or [""]
    rows: list[Row] = [[*head, (" " * kept + parts[0], style)]]
    return rows + [[(" " * (indent + kept) + part, style)] for part in parts[1:]]


def percent(fraction: float, language: str) -> str:
    """ " 42%"; in Spanish " 42 %". Never 100 before the end."""
    return f"{int(fraction * 100):>3}{' ' if language == 'es' else ''}%"


def row_width(row: Row) -> int:
    """Cells of a row. All our signs are one cell wide."""
    return sum(len(part) for part, _ in row)


def cut(row: Row, width: int) -> Row:
    """The first `width` cells of a row."""
    kept: Row = []
    for part, style in row:
        room = width - row_width(kept)
        if room > 0:
            kept.append((part[:room], style))
    return kept


def _health(view: RunView, step: t.StepFinished, language: str) -> list[str]:
    """What shows whether the training is healthy, the most important first."""
    seconds = max(step.step_seconds, 1e-9)
    figures = [
        f"loss {formats.significant(step.loss if view.loss is None else view.loss, language)}",
        f"{formats.significant(seconds, language)} s/it",
        f"lr {formats.scientific(step.learning_rate, language)}",
        f"grad {formats.significant(step.grad_norm, language)}",
        f"{formats.significant(1 / seconds, language)} it/s",
        text("console.epoch", language, epoch=step.epoch),
    ]
    if view.regularisation_loss is not None:
        figures.insert(1, f"reg {formats.significant(view.regularisation_loss, language)}")
    if step.peak_memory_bytes is not None:
        figures.append(formats.size(step.peak_memory_bytes, language))
    return figures


def _with_bar(head: Row, fraction: float, figures: Sequence[str], width: int, glyphs: Glyphs) -> Row:
    width = min(width, MAX_WIDTH)
    fixed = row_width(head) + len(_GAP)
    kept = list(figures)
    while kept and fixed + MIN_BAR + sum(len(_GAP) + len(figure) for figure in kept) > width:
        kept.pop()
    room = width - fixed - sum(len(_GAP) + len(figure) for figure in kept)
    row = [*head, (_GAP, "plain"), *bar(fraction, max(0, min(MAX_BAR, room)), glyphs)] if room > 0 else [*head]
    return cut([*row, *((f"{_GAP}{figure}", "plain") for figure in kept)], width)


def _fitting(head: Row, figures: Sequence[str], width: int) -> Row:
    width, row = min(width, MAX_WIDTH), [*head]
    for figure in figures:
        if row_width(row) + len(_GAP) + len(figure) > width:
            break
        row.append((f"{_GAP}{figure}", "dim"))
    return cut(row, width)
