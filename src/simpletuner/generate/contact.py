"""The sheet of a grid: which image goes where, under which heading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.generate.labels import Named, in_common, label, size_text
from simpletuner.generate.request import Axis
from simpletuner.generate.run import Made
from simpletuner.generate.sheet import Cell, Row, draw_sheet

_GALLERY_COLUMNS = 4


def write_sheet(
    made: Sequence[Made], axes: Sequence[Axis], adapters: Sequence[Named], *, model: str, language: str
) -> Path:
    """Draw all images beside the first of them, whole or not at all: the first axis from left to right, everything
    else from top to bottom; without an axis and with one image of each prompt, the prompts side by side.

    Raises:
        FileSystemError: it cannot be written.
    """
    shots = [item.shot for item in made]
    prompts = list(dict.fromkeys(shot.request.prompt.text for shot in shots))
    is_table = max(shot.column for shot in shots) > 0
    first = axes[0].name if axes else "seed"
    headings = [label(first, shot.values[0], language) for shot in shots if shot.row == 0] if is_table else []
    rows = _table(made, axes, language) if is_table else _gallery(made, language)
    common = in_common(shots, adapters, language)
    is_one = len(prompts) == 1
    sheet = draw_sheet(
        rows,
        title=prompts[0] if is_one else model,
        note=" · ".join([model, *common] if is_one else common),
        headings=headings,
    )
    path = made[0].path.with_name(f"{made[0].path.name.partition('_')[0]}_sheet.png")
    with os_errors_as_problems(path):
        building = path.with_name(f".{path.name}")
        sheet.save(building, format="PNG")
        building.replace(path)
    return path


def _table(made: Sequence[Made], axes: Sequence[Axis], language: str) -> list[Row]:
    """Every row says in what it differs from the others."""
    shots = [item.shot for item in made]
    has_prompts = len({shot.request.prompt.text for shot in shots}) > 1
    has_sizes = len({shot.request.size for shot in shots}) > 1
    has_seeds = bool(axes) and axes[0].name != "seed" and len({shot.request.seed for shot in shots}) > 1
    rows = []
    for number in range(max(shot.row for shot in shots) + 1):
        inside = [item for item in made if item.shot.row == number]
        shot = inside[0].shot
        others = zip(axes[1:], shot.values[1:], strict=True)
        notes = [label(axis.name, value, language) for axis, value in others if axis.name != "seed"]
        notes += [size_text(shot)] if has_sizes else []
        notes += [label("seed", shot.request.seed, language)] if has_seeds else []
        rows.append(
            Row(
                cells=tuple(Cell(file=item.path) for item in inside),
                label=shot.request.prompt.text if has_prompts else "",
                note=" · ".join(notes),
            )
        )
    return rows


def _gallery(made: Sequence[Made], language: str) -> list[Row]:
    has_prompts = len({item.shot.request.prompt.text for item in made}) > 1
    cells = [
        Cell(file=item.path, caption=item.shot.request.prompt.text if has_prompts else size_text(item.shot))
        for item in made
    ]
    starts = range(0, len(cells), _GALLERY_COLUMNS)
    return [Row(cells=tuple(cells[start : start + _GALLERY_COLUMNS])) for start in starts]
