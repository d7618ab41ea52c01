"""Problems on the terminal: code and place, what is wrong, what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

from simpletuner.i18n import render_problem, text
from simpletuner.problems import Fix, Problem, Severity

_MARKS = {Severity.ERROR: "✗", Severity.WARNING: "⚠", Severity.INFO: "·"}
_COLORS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.INFO: "36"}

_MIN_WIDTH = 40


def print_problems(problems: Iterable[Problem], language: str, *, out: TextIO | None = None) -> None:
    """Print problems to `out` (standard error by default), a blank line between them."""
    out = sys.stderr if out is None else out
    colored = has_color(out, os.environ)
    width = shutil.get_terminal_size().columns if out.isatty() else None
    blocks = ["\n".join(problem_block(problem, language, colored=colored, width=width)) for problem in problems]
    if blocks:
        print("\n\n".join(blocks), file=out)


def problems_as_data(problems: Iterable[Problem], language: str) -> list[dict[str, object]]:
    """The problems for programs, with their texts in the reader's language."""
    found: list[dict[str, object]] = []
    for problem in problems:
        title, hint = render_problem(problem, language)
        found.append(
            {
                "code": problem.code,
                "severity": problem.severity.value,
                "origin": problem.origin,
                "path": problem.path,
                "params": dict(problem.params),
                "title": title,
                "hint": hint,
                "fixes": [{"key": fix.key, "value": fix.value} for fix in problem.fixes],
            }
        )
    return found


def problem_block(problem: Problem, language: str, *, colored: bool = False, width: int | None = None) -> Iterator[str]:
    """The lines of one problem; its sentences broken between words at `width`, where there is one."""
    mark = _MARKS[problem.severity]
    if colored:
        mark = f"\033[{_COLORS[problem.severity]}m{mark}\033[0m"
    yield "  ".join(part for part in (f"{mark} {problem.code}", problem.origin) if part)
    title, hint = render_problem(problem, language)
    for line in f"{title}\n{hint}".split("\n") if hint else title.split("\n"):
        yield from _broken(line, width)
    labels = [text("report.fix", language), *[text("report.or", language)] * len(problem.fixes)]
    width = max(map(len, labels))
    for label, fix in zip(labels, problem.fixes, strict=False):
        yield f"  {label:{width}}  {_fix_text(fix)}"


def _broken(line: str, width: int | None) -> list[str]:
    """A sentence as lines of at most `width` cells; a longer word, such as a path, has a line of its own."""
    text = line.lstrip(" ")
    indent = "  " + " " * (len(line) - len(text))
    if width is None or len(indent) + len(text) <= width:
        return [indent + text]
    return textwrap.wrap(
        text,
        max(width, _MIN_WIDTH),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def has_color(out: TextIO, environ: Mapping[str, str]) -> bool:
    """Colour for people at a terminal, unless they said otherwise (NO_COLOR, FORCE_COLOR)."""
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or (out.isatty() and environ.get("TERM") != "dumb")


def _fix_text(fix: Fix) -> str:
    if fix.key.startswith(("--", "simpletuner")):
        return f"{fix.key} {fix.value}"
    from simpletuner.config.effective import value_text

    value = fix.value if isinstance(fix.value, str) else value_text(fix.value)
    return f"{fix.key}={value}"
