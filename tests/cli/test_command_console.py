"""The line of a command that works: a bar with pace and time left, gone in the end."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from simpletuner.cli.command_console import CommandConsole
from simpletuner.events.journal import Record, utc_now
from simpletuner.events.types import Event, ProblemReported, RunPhase
from simpletuner.problems import Problem, Severity

PHASE = RunPhase(key="scan", done=400, before=100, total=1000, unit="images", elapsed_s=3.0)


class Terminal(io.TextIOWrapper):
    """Standard error of somebody who watches."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()

    def rows(self) -> list[str]:
        """What is on the screen: a carriage return goes back to the start of the line."""
        rows = []
        for line in self.text().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            rows.append(shown.rstrip())
        return rows


def show(console: CommandConsole, event: Event) -> None:
    console.write(Record(seq=1, time=utc_now(), event=event))


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


def test_a_phase_has_a_bar_that_goes_away() -> None:
    terminal = Terminal()
    console = CommandConsole("en", terminal)
    show(console, PHASE)
    (row,) = terminal.rows()
    assert re.search(r"━+.*400/1000 +100/s +5 s left", row)
    assert len(row) < 100
    show(console, replace(PHASE, done=1000, elapsed_s=9.0, finished=True))
    assert terminal.rows() == ["✓ images: 1000/1000, new: 900, 9.0 s", ""]


def test_what_matters_stays_above_the_bar() -> None:
    terminal = Terminal()
    console = CommandConsole("en", terminal)
    show(console, PHASE)
    params = {"count": 1, "folder": "pets", "files": "a.png (broken)"}
    show(console, ProblemReported(problem=Problem(code="W-IMAGE-UNREADABLE", severity=Severity.WARNING, params=params)))
    show(console, PHASE)
    rows = terminal.rows()
    assert rows[0].startswith("⚠ W-IMAGE-UNREADABLE")
    assert "400/1000" in rows[-1]
    assert all("400/1000" not in row for row in rows[:-1])


def test_a_log_gets_no_bar() -> None:
    stream = io.StringIO()
    console = CommandConsole("es", stream)
    show(console, PHASE)
    assert stream.getvalue() == ""
    show(console, replace(PHASE, finished=True))
    assert stream.getvalue().endswith("imágenes: 400/1000, nuevo: 300, 3,0 s\n")
