"""The run directory: where everything of a run is, and the recorder that a trainer holds while it runs.

    with stop.installed(), RunRecorder.start(path, info=info, effective_config=config, sinks=[sink], stop=stop) as run:
        with run.phase("latents", total=24, unit="images") as progress:
            progress.advance()
        run.emit(StepFinished(...))

Everything that others read goes through `emit`: journal first, then run.json, log.txt and the sinks.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from simpletuner.events import control
from simpletuner.events import types as t
from simpletuner.events.begin import created, first_snapshot, refuse_if_live, started_event
from simpletuner.events.files import exclusive_lock, write_atomic
from simpletuner.events.journal import Journal, format_time, utc_now
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.events.paths import RunDirectory
from simpletuner.events.progress import PROGRESS_INTERVAL_S, PhaseProgress, Sink, in_phase
from simpletuner.events.run_status import (
    HEARTBEAT_INTERVAL_S,
    RunInfo,
    RunSnapshot,
    advance,
    snapshot_to_text,
)
from simpletuner.events.signals import KILL, LEAVE, SAVE, Source, StopRequest
from simpletuner.events.text import LogSink
from simpletuner.problems import ExitCode, Problem, SimpletunerError

_CONTROL_POLL_S = 0.25
_SNAPSHOT_INTERVAL_S = 1.0


class RunRecorder:
    """Writes the run directory. One per run, on rank 0; every method may be called from any thread."""

    def __init__(self, directory: RunDirectory, snapshot: RunSnapshot, journal: Journal, sinks: Sequence[Sink]) -> None:
        """Use `RunRecorder.start`."""
        self.directory = directory
        self._snapshot = snapshot
        self._journal = journal
        self._sinks = tuple(sinks)
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._snapshot_written = 0.0
        self._cache_sent: dict[tuple[str, str], float] = {}
        self._checkpoint: tuple[int, str] | None = None  # (step, path) of the newest one
        self._stop: StopRequest | None = None
        self._commands: list[control.Command] = []  # taken, not yet answered
        self._wanted: set[control.CommandKind] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)

    @classmethod
    def start(
        cls,
        output_dir: str | Path,
        *,
        info: RunInfo,
        effective_config: str,
        sinks: Sequence[Sink] = (),
        stop: StopRequest | None = None,
    ) -> RunRecorder:
        """Take possession of `output_dir`, creating it if needed, and begin a session in it.

        Args:
            effective_config: JSON text, written to config.json as it is.
            sinks: get every event after the journal has it; closed by the recorder.
            stop: learns of `stop` commands, and its requests become events.

        Raises:
            RunIsLiveError: a run works there.
            FileSystemError: the directory cannot be created or written; what this call created is gone again.
        """
        directory = RunDirectory(Path(output_dir).absolute())
        with (
            os_errors_as_problems(directory.path),
            created(directory.path, directory.control),
            exclusive_lock(directory.heartbeat) as alone,
        ):
            snapshot = first_snapshot(info, effective_config, refuse_if_live(directory, alone))
            with contextlib.ExitStack() as undo:
                journal = Journal(directory.events_jsonl)
                undo.callback(journal.close)
                log = LogSink(directory.log_txt)
                undo.callback(log.close)
                write_atomic(directory.config_json, effective_config)
                os.utime(directory.heartbeat)
                control.expire(directory.path)
                write_atomic(directory.run_json, snapshot_to_text(snapshot))
                undo.pop_all()
        recorder = cls(directory, snapshot, journal, (log, *sinks))
        if stop is not None:
            recorder._stop = stop
            stop.subscribe(recorder._stop_requested)
        recorder.emit(started_event(snapshot, directory))
        recorder._thread.start()
        return recorder

    @property
    def run_id(self) -> str:
        """The same over all sessions in this directory."""
        return self._snapshot.id

    def emit(self, event: t.Event) -> None:
        """Record one event. Frequent cache progress is thinned out; after the end of the run nothing is recorded.

        Raises:
            FileSystemError: the journal cannot be written (full disk): the run must end.
        """
        with self._lock:
            if self._snapshot.ending is not None or self._is_too_soon(event):
                return
            record = self._journal.append(event)
            changed = advance(event, replace(self._snapshot, updated=format_time(record.time)))
            urgent = changed.state != self._snapshot.state
            self._snapshot = changed
            self._to_sinks(lambda sink: sink.write(record))
            self._answer_by(event)
            now = time.monotonic()
            if urgent or now - self._snapshot_written >= _SNAPSHOT_INTERVAL_S:
                self._snapshot_written = now
                with os_errors_as_problems(self.directory.run_json):
                    write_atomic(self.directory.run_json, snapshot_to_text(changed), durable=urgent)

    def log(self, message: str, *, level: t.Level = "info", source: str = "simpletuner") -> None:
        """Record free text, for the log."""
        self.emit(t.LogLine(level=level, source=source, message=message))

    def phase(
        self, key: str, total: int | None = None, *, unit: str | None = None
    ) -> contextlib.AbstractContextManager[PhaseProgress]:
        """Show the block as one phase. `key` names the text `phase.<key>`; `total` what `advance` counts up to."""
        return in_phase(self.emit, t.RunPhase(key=key, total=total, unit=unit))

    def wants(self, kind: Literal["checkpoint", "validate"]) -> bool:
        """Whether a command asked for this since the last call. Costs nothing; for the loop, between steps.

        The sender gets its answer by itself, from the CheckpointSaved or ValidationFinished event that follows.
        """
        with self._lock:
            wanted = kind in self._wanted
            self._wanted.discard(kind)
            return wanted

    def finish(
        self,
        *,
        state: t.FinalState = "done",
        exit_code: ExitCode = ExitCode.OK,
        reason: str | None = None,
        output: str | None = None,
    ) -> None:
        """End the session: last event, run.json, open commands, sinks. Later calls and events change nothing.

        Works as far as a full disk lets it, and never raises because of the file system.
        """
        with self._lock:
            if self._snapshot.ending is not None:
                return
            ending = t.RunFinished(
                state=state,
                exit_code=int(exit_code),
                reason=reason,
                output=output,
                step=self._snapshot.progress.step,
                seconds=time.monotonic() - self._begin,
            )
            with contextlib.suppress(SimpletunerError):
                self.emit(ending)
            if self._snapshot.ending is None:
                self._end_without_space(ending)
            self._ended.set()
            self._answer(
                "stop", control.Answer(ok=True, message="stopped", step=ending.step, path=self._saved(ending.step))
            )
            for kind in control.COMMAND_KINDS:
                self._answer(kind, control.Answer(ok=False, message="run-ended", step=ending.step))
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CONTROL_POLL_S * 8)
        self._to_sinks(lambda sink: sink.close())
        self._journal.close()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish with what happened in the block. The exception goes on to the caller."""
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt):
            self.finish(state="stopped", exit_code=ExitCode.INTERRUPTED, reason="interrupted")
        else:
            self._finish_failed(error)

    def _finish_failed(self, error: BaseException) -> None:
        known = isinstance(error, SimpletunerError)
        problems = error.problems if isinstance(error, SimpletunerError) else (_crash(error),)
        exit_code = error.exit_code if isinstance(error, SimpletunerError) else ExitCode.FAILED
        with contextlib.suppress(SimpletunerError):
            level: t.Level = "debug" if known else "error"
            self.log("".join(traceback.format_exception(error)).rstrip(), level=level, source="traceback")
            for problem in problems:
                self.emit(t.ProblemReported(problem=problem))
        self.finish(state="failed", exit_code=exit_code, reason=problems[0].code)

    def _end_without_space(self, ending: t.RunFinished) -> None:
        """The disk is full: a new file has no room, but the old run.json can be overwritten where it lies."""
        self._snapshot = advance(ending, replace(self._snapshot, updated=format_time(utc_now())))
        with contextlib.suppress(OSError), self.directory.run_json.open("r+b") as stream:
            stream.write(snapshot_to_text(self._snapshot).encode())
            stream.truncate()

    def _is_too_soon(self, event: t.Event) -> bool:
        if not isinstance(event, t.CacheProgress):
            return False
        key, now = (event.dataset, event.cache), time.monotonic()
        last = self._cache_sent.get(key)
        if last is not None and event.done < event.total and now - last < PROGRESS_INTERVAL_S:
            return True
        self._cache_sent[key] = now
        return False

    def _stop_requested(self, level: int, source: Source) -> None:
        with contextlib.suppress(SimpletunerError):
            self.emit(t.RunStopping(level=level, source=source))
        if level >= KILL:
            self.finish(state="stopped", exit_code=ExitCode.INTERRUPTED, reason="killed")

    def _keep_alive(self) -> None:
        """The heartbeat thread: sign of life, commands, and a tick for the sinks while nothing happens."""
        beat = time.monotonic()
        while not self._ended.wait(_CONTROL_POLL_S):
            self._receive(control.take(self.directory.path))
            if time.monotonic() - beat >= HEARTBEAT_INTERVAL_S:
                beat = time.monotonic()
                with contextlib.suppress(OSError):
                    os.utime(self.directory.heartbeat)
                with self._lock:
                    self._to_sinks(lambda sink: sink.tick())

    def _receive(self, commands: Sequence[control.Command]) -> None:
        for command in commands:
            with self._lock:
                self._commands.append(command)
                self._wanted.add(command.kind)
            if command.kind == "stop" and self._stop is not None:
                self._stop.request(SAVE if command.save else LEAVE, "command")

    def _answer_by(self, event: t.Event) -> None:
        """Some events are what a sender waits for."""
        if isinstance(event, t.RunResumed) or (isinstance(event, t.CheckpointSaved) and not event.final):
            self._checkpoint = (event.step, event.path)
        if isinstance(event, t.CheckpointSaved):
            self._answer("checkpoint", control.Answer(ok=True, message="saved", step=event.step, path=event.path))
        elif isinstance(event, t.ValidationFinished):
            found = control.Answer(ok=True, message="validated", step=event.step, path=event.contact_sheet)
            self._answer("validate", found)

    def _saved(self, step: int) -> str | None:
        """The checkpoint that holds the run as it is after `step`, if there is one."""
        return self._checkpoint[1] if self._checkpoint is not None and self._checkpoint[0] == step else None

    def _answer(self, kind: control.CommandKind, answer: control.Answer) -> None:
        """Answer every open command of one kind."""
        self._wanted.discard(kind)
        for command in [command for command in self._commands if command.kind == kind]:
            self._commands.remove(command)
            with contextlib.suppress(OSError):  # the sender sees the end of the run instead
                control.answer(self.directory.path, command, answer)

    def _to_sinks(self, action: Callable[[Sink], None]) -> None:
        """A sink that fails is left out from then on: nothing that only shows the run may end it."""
        for sink in self._sinks:
            try:
                action(sink)
            except Exception as error:  # noqa: BLE001
                self._sinks = tuple(other for other in self._sinks if other is not sink)
                message = f"{type(sink).__name__} failed and is off now: {error!r}"
                self.log(message, level="warning", source="events")


def _crash(error: BaseException) -> Problem:
    return Problem(code="E-UNEXPECTED", params={"kind": type(error).__name__, "message": str(error).strip() or "-"})
