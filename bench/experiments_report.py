"""Put the tables and curves of bench/results/experiments.json into docs/experiments.md, between its markers.

python bench/experiments_report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import BANDS, RESULT
from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "experiments.md"
BEGIN, END = "<!-- results: written by bench/experiments_report.py -->", "<!-- end of results -->"
TITLES = {
    "adapters": "Adapters, with and without regularisation",
    "laws": "Laws of the noise level",
}
_SIZE, _FINER = (960, 460), 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 250, 44, 58
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#8b4513")
_SMOOTH = 20  # steps in a mean of the curves

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    body = "\n\n".join(part for question in TITLES for part in _section(question, rows))
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def _section(question: str, rows: Rows) -> Iterator[str]:
    asked = [row for row in rows if row["question"] == question]
    if not asked:
        return
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in asked:
        groups.setdefault(row["name"], []).append(row)
    seeds = sorted({row["seed"] for row in asked})
    yield f"### {TITLES[question]}"
    yield f"{asked[0]['steps']} updates, seeds {', '.join(map(str, seeds))}: means, in brackets the range."
    yield _table(
        ("run", "trained", "subject shown", "scenes right", "scenes taken for it", "scenes, dB to base"),
        [
            (
                name,
                _millions(group[0]["num_params"]),
                _percent(group, "subject_shown"),
                _percent(group, "scenes_right"),
                _percent(group, "scenes_taken_for_the_subject"),
                _mean(group, "scenes_psnr_to_base", 1),
            )
            for name, group in groups.items()
        ],
    )
    bands = tuple(f"{low:.1f}-{high:.1f}" for low, high in BANDS)
    for what in ("subject", "scenes"):
        yield f"Held-out loss of the {what}, by sigma:"
        yield _table(
            ("run", *bands, "all"),
            [
                (name, *(f"{value:.3f}" for value in values), f"**{statistics.mean(values):.3f}**")
                for name, values in ((name, _bands(group, what)) for name, group in groups.items())
            ],
        )
    loss, held_out = f"images/experiments-{question}-loss.png", f"images/experiments-{question}-sigma.png"
    curves = {name: _smoothed([row["losses"] for row in group]) for name, group in groups.items()}
    _draw(DOCS / loss, "training loss", "update", curves)
    middles = [(low + high) / 2 for low, high in BANDS]
    by_band = {name: list(zip(middles, _bands(group, "subject"), strict=True)) for name, group in groups.items()}
    _draw(DOCS / held_out, "held-out loss of the subject", "sigma", by_band)
    yield f"![Training loss by update]({loss})"
    yield f"![Held-out loss of the subject by sigma]({held_out})"


def _bands(group: Rows, what: str) -> list[float]:
    return [statistics.mean(values) for values in zip(*(row["held_out"][what] for row in group), strict=True)]


def _smoothed(runs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    means = [statistics.mean(values) for values in zip(*runs, strict=False)]
    return [(end, statistics.mean(means[end - _SMOOTH : end])) for end in range(_SMOOTH, len(means) + 1, _SMOOTH // 4)]


def _mean(group: Rows, key: str, digits: int) -> str:
    values = [row[key] for row in group]
    told = f"{statistics.mean(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _percent(group: Rows, key: str) -> str:
    values = [100 * row[key] for row in group]
    told = f"{statistics.mean(values):.0f} %"
    return told if len(values) == 1 else f"{told} ({min(values):.0f}-{max(values):.0f})"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _draw(path: Path, title: str, axis: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines over a common axis, named at the right."""
    canvas = Image.new("RGB", (_SIZE[0] * _FINER, _SIZE[1] * _FINER), "white")
    pen = ImageDraw.Draw(canvas)
    xs, ys = ([point[i] for curve in curves.values() for point in curve] for i in range(2))
    low_x, high_x, high_y = min(xs), max(xs), max(ys) * 1.05

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) * (_SIZE[0] - _LEFT - _RIGHT)
        up = y / high_y * (_SIZE[1] - _TOP - _BOTTOM)
        return (_LEFT + across) * _FINER, (_SIZE[1] - _BOTTOM - up) * _FINER

    def write(x: float, y: float, words: str, anchor: str, fill: str = "#222222") -> None:
        pen.text((x, y), words, fill=fill, font=ImageFont.load_default(15 * _FINER), anchor=anchor)

    write(_LEFT * _FINER, 14 * _FINER, title, "la")
    for i in range(6):
        value = high_y * i / 5
        _, y = place(low_x, value)
        pen.line([place(low_x, value), place(high_x, value)], fill="#e3e3e3" if i else "#222222", width=_FINER)
        write((_LEFT - 10) * _FINER, y, f"{value:.2f}", "rm")
        x, y = place(low_x + (high_x - low_x) * i / 5, 0)
        write(x, y + 8 * _FINER, f"{low_x + (high_x - low_x) * i / 5:.3g}", "ma")
    write(place((low_x + high_x) / 2, 0)[0], (_SIZE[1] - 10) * _FINER, axis, "ms")
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        pen.line([place(x, y) for x, y in curve], fill=colour, width=round(2.4 * _FINER), joint="curve")
        x, y = (_SIZE[0] - _RIGHT + 16) * _FINER, (_TOP + 12 + 24 * index) * _FINER
        pen.line([(x, y), (x + 22 * _FINER, y)], fill=colour, width=3 * _FINER)
        write(x + 30 * _FINER, y, name, "lm")
    small = canvas.resize(_SIZE, Image.Resampling.LANCZOS).quantize(255, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
