"""Telling what a program is at: phases with their progress, to whoever listens.

A run's recorder tells it this way, and so does a command that leaves no run directory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from simpletuner.events import types as t
from simpletuner.events.journal import Record, utc_now

PROGRESS_INTERVAL_S = 0.5


class Sink(Protocol):
    """Something that shows or forwards events. Called with one record at a time, from several threads in turn."""

    def write(self, record: Record) -> None:
        """Take one event."""

    def tick(self) -> None:
        """Called about every two seconds, also while nothing happens."""

    def close(self) -> None:
        """Called once, after the last event."""


class Reporter(Protocol):
    """What code that works for a run or for a single command needs to tell of it."""

    def emit(self, event: t.Event) -> None:
        """Tell of one event."""

    def phase(
        self, key: str, total: int | None = None, *, unit: str | None = None
    ) -> contextlib.AbstractContextManager[PhaseProgress]:
        """Show the block as one phase. `key` names the text `phase.<key>`; `total` what `advance` counts up to."""


class SinkReporter:
    """Tells its sinks, and leaves nothing behind."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._count = 0

    def emit(self, event: t.Event) -> None:
        """Tell every sink."""
        self._count += 1
        record = Record(seq=self._count, time=utc_now(), event=event)
        for sink in self._sinks:
            sink.write(record)

    def phase(
        self, key: str, total: int | None = None, *, unit: str | None = None
    ) -> contextlib.AbstractContextManager[PhaseProgress]:
        """See `Reporter`."""
        return in_phase(self.emit, t.RunPhase(key=key, total=total, unit=unit))


class PhaseProgress:
    """The open end of a phase: count what is done."""

    def __init__(self, emit: Callable[[t.Event], None], event: t.RunPhase) -> None:
        self._emit = emit
        self._event = event
        self._is_begun = False
        self._begin = self._last_sent = time.monotonic()
        emit(event)

    @property
    def done(self) -> int:
        """How many are done."""
        return self._event.done

    @property
    def made(self) -> int:
        """How many of them were not done when the phase began."""
        return self._event.done - self._event.before

    def advance(self, amount: int = 1, *, detail: str | None = None) -> None:
        """`amount` more are done."""
        self._is_begun = True
        self.update(self._event.done + amount, detail=detail)

    def update(self, done: int, *, total: int | None = None, detail: str | None = None) -> None:
        """`done` in all are done; what the first call says was done before. At most two per second are passed on."""
        total = self._event.total if total is None else total
        is_first = not self._is_begun
        before = done if is_first else self._event.before
        self._is_begun = True
        self._event = replace(self._event, done=done, before=before, total=total, detail=detail)
        now = time.monotonic()
        if is_first or now - self._last_sent >= PROGRESS_INTERVAL_S:
            self._last_sent = now
            self._emit(replace(self._event, elapsed_s=now - self._begin))

    def finish(self) -> None:
        """All is done."""
        elapsed_s = time.monotonic() - self._begin
        self._emit(replace(self._event, elapsed_s=elapsed_s, detail=None, finished=True))


@contextlib.contextmanager
def in_phase(emit: Callable[[t.Event], None], event: t.RunPhase) -> Iterator[PhaseProgress]:
    """The block is the phase of `event`; one that fails is never told to be finished."""
    progress = PhaseProgress(emit, event)
    yield progress
    progress.finish()
