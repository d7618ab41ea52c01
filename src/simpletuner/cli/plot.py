"""`simpletuner plot schedule`: which noise levels a configuration trains on. Loads no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.cli.report import print_problems
from simpletuner.cli.schedule_curves import PERCENTILES, Curve, Schedule, schedule_of
from simpletuner.config.load import load_run_config
from simpletuner.config.paths import shown_path
from simpletuner.events.formats import decimal
from simpletuner.i18n import text
from simpletuner.problems import ExitCode, Problem, SimpletunerError

ACTIONS = ("schedule",)
_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLUMNS, _ROWS = 60, 6
_JSON_POINTS = 100


def run(argv: Sequence[str], language: str) -> int:
    """Carry out `simpletuner plot ACTION ...`; return the exit status."""
    action, *words = argv or ("--help",)
    if action in ("-h", "--help", "help") or "-h" in words or "--help" in words:
        print(text("plot.help", language))
        return 0
    if action not in ACTIONS:
        params = {"word": action, "commands": ", ".join(ACTIONS)}
        raise SimpletunerError(Problem(code="E-COMMAND", params=params), ExitCode.USAGE)
    output, as_json, rest = own_words(words)
    loaded = load_run_config(
        rest, environ=os.environ, cwd=Path.cwd(), must_run=False, check_folders=False, needs_files=False
    )
    schedule = schedule_of(loaded, language)
    if output is not None:
        from simpletuner.cli.schedule_picture import draw_schedule

        draw_schedule(schedule, output, language)
    if as_json:
        print(json.dumps(_as_json(schedule), indent=2, ensure_ascii=False))
        return 0
    print_problems((p for p in loaded.warnings if p.code.startswith(("W-SIGMA-", "W-SHIFT-"))), language)
    sys.stderr.flush()
    print("\n".join(_lines(schedule, language)))
    if output is not None:
        print(text("plot.written", language, file=shown_path(output, Path.cwd())))
    return 0


def own_words(words: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """Take the command's own flags out: (the picture to write, whether as JSON, what is left)."""
    output: Path | None = None
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag in ("-o", "--output"):
            name = value if equals else next(remaining, "")
            if not name:
                raise SimpletunerError(Problem(code="E-FLAG-NO-VALUE", params={"flag": flag}), ExitCode.USAGE)
            output = Path(name) if Path(name).suffix.lower() == ".png" else Path(f"{name}.png")
        elif word != "--json":
            rest.append(word)
    return output, "--json" in words, rest


def _lines(schedule: Schedule, language: str) -> Iterator[str]:
    yield f"{text('plot.title', language)}: {schedule.name}"
    for curve in schedule.curves:
        yield ""
        yield f"  {curve.label}"
        yield from (f"  {row}" for row in _bars(_shares(curve, schedule)))
        yield f"  {_scale(language)}"
        shown = (f"{percent}: {decimal(curve.quantile(percent / 100), 2, language)}" for percent in PERCENTILES)
        yield f"  {text('plot.percentiles', language)}  {'   '.join(shown)}"
    yield ""
    levels = " ".join(decimal(level, 2, language) for level in schedule.sampling[:12])
    yield f"{schedule.caption}: {levels}{' ...' if len(schedule.sampling) > 12 else ''}"
    yield text("plot.stratified" if schedule.stratified else "plot.alone", language)


def _shares(curve: Curve, schedule: Schedule) -> list[float]:
    """Share of all draws in each column."""
    if schedule.levels:
        shares = [0.0] * _COLUMNS
        for level in schedule.levels:
            shares[min(int(level * _COLUMNS), _COLUMNS - 1)] += schedule.share(level)
        return shares
    parts = 4
    step = 1 / (_COLUMNS * parts)
    densities = [curve.density((i + 0.5) * step) for i in range(_COLUMNS * parts)]
    return [sum(densities[i : i + parts]) * step for i in range(0, len(densities), parts)]


def _bars(shares: Sequence[float]) -> Iterator[str]:
    """Columns of blocks, the highest as high as all rows."""
    eighths = [round(share / max(shares) * _ROWS * 8) for share in shares]
    for row in reversed(range(_ROWS)):
        yield "".join(_BLOCKS[min(max(height - 8 * row, 0), 8)] for height in eighths).rstrip()


def _scale(language: str) -> str:
    line = [" "] * (_COLUMNS + 3)
    for i in range(5):
        label = decimal(i / 4, 2 if i % 2 else (1 if i == 2 else 0), language)
        at = round(i / 4 * (_COLUMNS - 1)) - (len(label) // 2 if i else 0)
        line[at : at + len(label)] = label
    return "".join(line).rstrip()


def _as_json(schedule: Schedule) -> dict[str, object]:
    """Levels and densities as numbers; a density counts per unit of sigma."""
    grid = [(i + 0.5) / _JSON_POINTS for i in range(_JSON_POINTS)]
    return {
        "law": schedule.name,
        "stratified": schedule.stratified,
        "levels": [{"sigma": level, "share": schedule.share(level)} for level in schedule.levels],
        "curves": [
            {
                "label": curve.label,
                "shift": curve.factor,
                "percentiles": {str(percent): curve.quantile(percent / 100) for percent in PERCENTILES},
                "density": [] if schedule.levels else [[sigma, curve.density(sigma)] for sigma in grid],
            }
            for curve in schedule.curves
        ],
        "sampling": list(schedule.sampling),
    }
