"""The console at a terminal: messages scroll, the live area below them stays. The only user of rich here."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from simpletuner.events import layout
from simpletuner.events import types as t
from simpletuner.events.console import Results, is_for_console, print_text
from simpletuner.events.journal import Record
from simpletuner.events.text import SILENT_PHASES, Line, Narrator

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

_REFRESHES_PER_SECOND = 4
_STYLES: Mapping[layout.Style, str] = {
    "plain": "",
    "label": "bold",
    "bar": "cyan",
    "rest": "bright_black",
    "dim": "bright_black",
    "good": "green",
    "warning": "yellow",
    "error": "red",
    "accent": "cyan",
}
_ICON_STYLES: Mapping[str, layout.Style] = {
    "ok": "good",
    "warning": "warning",
    "error": "error",
    "saved": "accent",
    "images": "accent",
    "stop": "warning",
    "": "plain",
}


class LiveConsole:
    """Bars for phases, training and validation; above them what happened, once."""

    def __init__(self, *, language: str, out: TextIO, err: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._language, self._out = language, out
        self._narrator = Narrator(language)
        self._view = self._narrator.view
        self._results = Results(language)
        can_draw = (getattr(err, "encoding", None) or "").lower().startswith("utf")
        self._glyphs = layout.UNICODE if can_draw else layout.ASCII
        self._finished: list[t.RunPhase] = []
        self._phase_begin: dict[str, float] = {}
        self._validation_begin = 0.0
        self._console: Console = Console(file=err, force_terminal=True, highlight=False, soft_wrap=True)
        self._live: Live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=out is sys.stdout,
            redirect_stderr=err is sys.stderr,
        )

    def write(self, record: Record) -> None:
        """Show one event."""
        event = record.event
        if isinstance(event, t.RunStarted):
            self._live.start()
        if isinstance(event, t.RunPhase):
            self._note_phase(event)
        if isinstance(event, t.ValidationStarted):
            self._validation_begin = time.monotonic()
        lines = self._narrator.tell(record)
        if isinstance(event, (t.StepFinished, t.ValidationFinished, t.RunFinished)):
            self._print_finished_phases()
        if is_for_console(event):
            for line in lines:
                if line.level != "debug" and not line.progress:
                    self._print(line, record)
            if isinstance(event, t.RunPlanned):
                self._console.print()
        self._results.note(event)
        if isinstance(event, t.RunFinished):
            self._live.stop()
            print_text(self._out, "".join(f"  {line}\n" for line in self._results.lines()))

    def tick(self) -> None:
        """The live area refreshes itself."""

    def close(self) -> None:
        """Give the terminal back as it was."""
        self._live.stop()

    def _note_phase(self, event: t.RunPhase) -> None:
        if event.key in SILENT_PHASES:
            return
        if event.finished:
            self._phase_begin.pop(event.key, None)
            self._finished.append(event)
            if self._view.step is not None:
                self._print_finished_phases()
        elif event.key not in self._phase_begin:
            self._phase_begin[event.key] = time.monotonic()

    def _print_finished_phases(self) -> None:
        finished, self._finished = self._finished, []
        for row in layout.finished_rows(finished, self._console.width, self._language, self._glyphs):
            self._console.print(_text(row))

    def _print(self, line: Line, record: Record) -> None:
        style: layout.Style = "label" if isinstance(record.event, t.RunStarted) else "plain"
        head: layout.Row = [(line.label, "dim")]
        if line.icon:
            head = [(f"{self._glyphs.icons[line.icon]} ", _ICON_STYLES[line.icon])]
        if self._view.step is not None and line.icon and not isinstance(record.event, t.RunFinished):
            head = [(f"  {record.time.astimezone():%H:%M} ", "dim"), *head]
        for row in layout.wrapped(head, line.text, style, self._console.width):
            self._console.print(_text(row))

    def _render(self) -> RenderableType:
        from rich.console import Group

        width, language, glyphs = self._console.width - 1, self._language, self._glyphs
        rows = layout.finished_rows(tuple(self._finished), width, language, glyphs)
        phases = [phase for phase in list(self._view.phases.values()) if phase.key not in SILENT_PHASES]
        if phases:
            elapsed_s = time.monotonic() - self._phase_begin.get(phases[-1].key, time.monotonic())
            rows.append(layout.phase_row(phases[-1], elapsed_s, width, language, glyphs))
        if self._view.step is not None:
            rows += layout.training_rows(self._view, width, language, glyphs)
        elif self._view.validation is not None:
            elapsed_s = time.monotonic() - self._validation_begin
            rows.append(layout.validation_row(self._view, elapsed_s, width, language, glyphs))
        return Group(*(_text(row) for row in rows))


def _text(row: layout.Row) -> Text:
    from rich.text import Text

    return Text.assemble(*((part, _STYLES[style]) for part, style in row), no_wrap=False)
