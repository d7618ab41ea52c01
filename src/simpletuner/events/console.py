"""The console of a run: progress and messages on stderr, results on stdout.

Three looks: `rich` with live bars for people at a terminal, `plain` with one line per 10 steps or 30 seconds for logs
and CI, `json` with one event per line for programs. Errors are not printed here: the command that ends with one prints
it, so that every message appears once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TextIO, TypeAlias

from simpletuner.events import types as t
from simpletuner.events.codec import JsonValue, to_line
from simpletuner.events.journal import Record, record_to_json
from simpletuner.events.progress import Sink
from simpletuner.events.text import Line, Narrator, format_line
from simpletuner.i18n import text
from simpletuner.problems import Severity

LogFormat: TypeAlias = Literal["rich", "plain", "json"]
_LOG_FORMATS: Mapping[str, LogFormat] = {"rich": "rich", "plain": "plain", "json": "json"}


def choose_format(requested: str, *, is_terminal: bool, environ: Mapping[str, str]) -> LogFormat:
    """Resolve "auto": bars only on a terminal, and not where CI, NO_COLOR or a dumb terminal ask for plain text."""
    if requested in _LOG_FORMATS:
        return _LOG_FORMATS[requested]
    if not is_terminal or environ.get("TERM") == "dumb":
        return "plain"
    if environ.get("FORCE_COLOR"):
        return "rich"
    return "plain" if environ.get("NO_COLOR") or environ.get("CI") else "rich"


def console_sink(log_format: LogFormat, *, language: str, out: TextIO, err: TextIO) -> Sink:
    """The sink for one look."""
    if log_format == "json":
        return JsonConsole(out=out, err=err)
    if log_format == "plain":
        return PlainConsole(language=language, out=out, err=err)
    from simpletuner.events.live import LiveConsole

    return LiveConsole(language=language, out=out, err=err)


class PlainConsole:
    """One dated line per message."""

    def __init__(self, *, language: str, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._narrator = Narrator(language)
        self._results = Results(language)

    def write(self, record: Record) -> None:
        """Print the lines of one event."""
        lines = self._narrator.tell(record)
        self._print(lines if is_for_console(record.event) else [], record.time.timestamp())
        self._results.note(record.event)
        if isinstance(record.event, t.RunFinished):
            print_text(self._out, "".join(f"{line}\n" for line in self._results.lines()))

    def tick(self) -> None:
        """Say what is going on if nothing was said for a while."""
        now_s = time.time()
        self._print(self._narrator.still_working(now_s), now_s)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, lines: list[Line], time_s: float) -> None:
        shown = [format_line(line, time_s) for line in lines if line.level != "debug"]
        print_text(self._err, "".join(f"{line}\n" for line in shown))


class JsonConsole:
    """One event per line, exactly as in the journal; the results as one object."""

    def __init__(self, *, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._results = Results("en")

    def write(self, record: Record) -> None:
        """Print one event."""
        print_text(self._err, to_line(record_to_json(record)).decode() + "\n")
        self._results.note(record.event)
        if isinstance(record.event, t.RunFinished):
            paths: dict[str, JsonValue] = {key: str(path) for key, path in self._results.paths().items()}
            print_text(self._out, to_line({"state": record.event.state, **paths}).decode() + "\n")

    def tick(self) -> None:
        """Nothing: a program has the heartbeat."""

    def close(self) -> None:
        """Nothing is open."""


class Results:
    """What a run leaves behind, as a small table."""

    def __init__(self, language: str) -> None:
        self._language = language
        self._output_dir = Path()
        self._sheet: str | None = None
        self._weights: str | None = None

    def note(self, event: t.Event) -> None:
        """Remember the paths that an event names."""
        if isinstance(event, t.RunStarted):
            self._output_dir = Path(event.output_dir)
        elif isinstance(event, t.ValidationFinished):
            self._sheet = event.contact_sheet or self._sheet
        elif isinstance(event, t.RunFinished) and event.state == "done":
            self._weights = event.output

    def paths(self) -> dict[str, Path]:
        """Absolute paths by the word of their kind; empty unless the run is done and has a result."""
        if self._weights is None:
            return {}
        found = {"weights": self._weights, "images": self._sheet, "log": "log.txt"}
        return {kind: self._output_dir / path for kind, path in found.items() if path is not None}

    def lines(self) -> list[str]:
        """The table."""
        rows = {text(f"console.result.{kind}", self._language): path for kind, path in self.paths().items()}
        width = max(map(len, rows), default=0)
        return [f"{label:{width}}  {path}" for label, path in rows.items()]


def is_for_console(event: t.Event) -> bool:
    """Errors and tracebacks are the business of the command that ends with them."""
    if isinstance(event, t.ProblemReported):
        return event.problem.severity is not Severity.ERROR
    return not (isinstance(event, t.LogLine) and event.source == "traceback")


def print_text(stream: TextIO, content: str) -> None:
    """Write text at once; a sign that the stream cannot encode becomes "?", and a closed terminal is no error."""
    if not content:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # a closed pipe; a closed file
        stream.write(content.encode(encoding, "replace").decode(encoding))
        stream.flush()
