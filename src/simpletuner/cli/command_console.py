"""What a command that leaves no run directory tells while it works: one line on standard error that goes away."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from simpletuner.cli.report import print_problems
from simpletuner.events import layout
from simpletuner.events.journal import Record
from simpletuner.events.text import Narrator, is_trivial, phase_text
from simpletuner.events.types import ProblemReported, RunPhase, SettingOverridden


class CommandConsole:
    """Progress of a command on one line that goes away, and what is worth keeping above it."""

    def __init__(self, language: str, err: TextIO) -> None:
        self._language, self._err = language, err
        self._narrator = Narrator(language)
        self._is_terminal = err.isatty() and os.environ.get("TERM") != "dumb"
        can_draw = (getattr(err, "encoding", None) or "").lower().startswith("utf")
        self._glyphs = layout.UNICODE if can_draw else layout.ASCII
        self._drawn = 0

    def write(self, record: Record) -> None:
        """Tell of one event, if it is one for people who wait."""
        event = record.event
        if isinstance(event, RunPhase):
            self._phase(event)
        elif isinstance(event, SettingOverridden):
            for line in self._narrator.tell(record):
                self.line(line.text)
        elif isinstance(event, ProblemReported):
            self._clear()
            print_problems([event.problem], self._language, out=self._err)

    def tick(self) -> None:
        """Nothing: every phase tells by itself."""

    def close(self) -> None:
        """Nothing is open."""

    def line(self, words: str) -> None:
        """A line that stays."""
        self._clear()
        print(words, file=self._err, flush=True)

    def result(self, words: str) -> None:
        """A line of what was asked for, on standard output."""
        self._clear()
        print(words, flush=True)

    def _phase(self, event: RunPhase) -> None:
        if event.finished:
            if not is_trivial(event):
                self.line(f"{self._glyphs.icons['ok']} {phase_text(event, self._language)}")
            else:
                self._clear()
        elif self._is_terminal:
            self._clear()
            width = shutil.get_terminal_size().columns - 1
            row = layout.phase_row(event, event.elapsed_s, width, self._language, self._glyphs)
            shown = "".join(part for part, _ in row)
            print(shown, end="", file=self._err, flush=True)
            self._drawn = len(shown)

    def _clear(self) -> None:
        if self._drawn:
            print(f"\r{' ' * self._drawn}\r", end="", file=self._err, flush=True)
            self._drawn = 0
