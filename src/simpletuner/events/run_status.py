"""What `run.json` holds, how events change it, and the state that follows from it and from the process.

A stored state can lie: the process may have been killed. So the stored one is only believed while the process lives
(number and start time agree) or, where that cannot be checked, while the heartbeat is young.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import Literal, TypeAlias

from simpletuner.events import types as t
from simpletuner.events.codec import DecodeError, decode, encode, parse_object, to_text
from simpletuner.events.files import read_text
from simpletuner.events.oserrors import FileSystemError, problem_from_oserror
from simpletuner.events.processes import is_alive, is_suspended
from simpletuner.problems import Problem, SimpletunerError

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_TIMEOUT_S = 30.0
_LOSS_SMOOTHING = 0.95

State: TypeAlias = Literal[
    "queued", "starting", "running", "stopping", "suspended", "stopped", "done", "failed", "lost"
]
LIVE_STATES: frozenset[State] = frozenset({"starting", "running", "stopping", "suspended"})


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Who runs: what is known before the first event."""

    version: str
    argv: tuple[str, ...]
    config_path: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that decide results
    host: str = field(default_factory=platform.node)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the run is. `phase` is the key of the current phase."""

    phase: str | None = None
    done: int = 0
    total: int | None = None
    unit: str | None = None
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    loss: float | None = None  # smoothed
    regularisation_loss: float | None = None  # smoothed
    held_out_loss: float | None = None  # the last one that was measured
    step_seconds: float | None = None  # smoothed


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a session ended."""

    state: t.FinalState
    exit_code: int
    reason: str | None = None
    output: str | None = None
    time: str


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """The content of `run.json`."""

    format: int = 1
    id: str
    session: int = 1
    state: State
    pid: int | None = None
    pid_start: str | None = None
    created: str
    started: str
    updated: str
    info: RunInfo
    config_hash: str
    progress: Progress = field(default_factory=Progress)
    ending: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as it is now. `heartbeat_age_s` is None if there never was a heartbeat."""

    path: Path
    state: State
    snapshot: RunSnapshot
    heartbeat_age_s: float | None = None

    @property
    def is_live(self) -> bool:
        """A process has it in hand: it works, or is suspended and will work on."""
        return self.state in LIVE_STATES


class RunNotFoundError(SimpletunerError):
    """There is no run in that directory, or its run.json cannot be understood."""


def read_run(output_dir: Path) -> RunStatus:
    """The state of the run in `output_dir`.

    Raises:
        RunNotFoundError: no run.json there, or not one of ours.
        FileSystemError: it cannot be read.
    """
    path = output_dir / "run.json"
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunNotFoundError(Problem(code="E-RUN-NOT-FOUND", params={"path": str(output_dir)})) from error
    except OSError as error:
        raise FileSystemError(problem_from_oserror(error, path)) from error
    try:
        snapshot = decode(RunSnapshot, parse_object(text))
    except DecodeError as error:
        raise RunNotFoundError(
            Problem(code="E-RUN-UNREADABLE", params={"path": str(path), "reason": str(error)})
        ) from error
    age_s = heartbeat_age_s(output_dir)
    return RunStatus(path=output_dir, state=derive_state(snapshot, age_s), snapshot=snapshot, heartbeat_age_s=age_s)


def snapshot_to_text(snapshot: RunSnapshot) -> str:
    """The content of run.json."""
    return to_text(encode(snapshot))


def heartbeat_age_s(output_dir: Path) -> float | None:
    """Seconds since the run last said that it lives; None if it never did."""
    try:
        return max(0.0, time.time() - (output_dir / "heartbeat").stat().st_mtime)
    except OSError:
        return None


def derive_state(snapshot: RunSnapshot, age_s: float | None) -> State:
    """The true state: an ending is final; otherwise the stored one, if its process still works."""
    if snapshot.ending is not None:
        return snapshot.ending.state
    if snapshot.pid is None:
        return snapshot.state  # queued: no process yet
    alive = None
    if snapshot.info.host == platform.node():
        alive = is_alive(snapshot.pid, snapshot.pid_start)
        if alive and is_suspended(snapshot.pid):
            return "suspended"
    if alive is None:
        alive = age_s is not None and age_s < HEARTBEAT_TIMEOUT_S
    return snapshot.state if alive else "lost"


def smooth(previous: float | None, value: float) -> float:
    """Exponential mean over about 20 values, started at the first one; a value that is not finite is shown as it is."""
    if previous is None or not abs(previous) < float("inf"):
        return value
    return _LOSS_SMOOTHING * previous + (1 - _LOSS_SMOOTHING) * value


def smooth_seen(previous: float | None, value: float | None) -> float | None:
    """As `smooth`, of a figure that not every step has."""
    return previous if value is None else smooth(previous, value)


@singledispatch
def advance(event: t.Event, snapshot: RunSnapshot) -> RunSnapshot:
    """What `snapshot` becomes by `event`. Most events change nothing."""
    del event
    return snapshot


@advance.register
def _(event: t.RunResumed, snapshot: RunSnapshot) -> RunSnapshot:
    return replace(snapshot, progress=replace(snapshot.progress, step=event.step))


@advance.register
def _(event: t.RunPlanned, snapshot: RunSnapshot) -> RunSnapshot:
    progress = replace(snapshot.progress, total_steps=event.total_steps, step=event.start_step)
    return replace(snapshot, progress=progress)


@advance.register
def _(event: t.RunPhase, snapshot: RunSnapshot) -> RunSnapshot:
    progress = replace(snapshot.progress, phase=event.key, done=event.done, total=event.total, unit=event.unit)
    if event.finished:
        progress = replace(progress, phase=None, done=0, total=None, unit=None)
    state = "running" if event.key == "train" and snapshot.state == "starting" else snapshot.state
    return replace(snapshot, progress=progress, state=state)


@advance.register
def _(event: t.StepFinished, snapshot: RunSnapshot) -> RunSnapshot:
    old = snapshot.progress
    progress = replace(
        old,
        phase="train",
        done=event.step,
        total=event.total,
        unit="steps",
        step=event.step,
        total_steps=event.total,
        epoch=event.epoch,
        loss=smooth(old.loss, event.loss),
        regularisation_loss=smooth_seen(old.regularisation_loss, event.regularisation_loss),
        step_seconds=smooth(old.step_seconds, event.step_seconds),
    )
    return replace(snapshot, progress=progress, state="running" if snapshot.state == "starting" else snapshot.state)


@advance.register
def _(event: t.EvaluationFinished, snapshot: RunSnapshot) -> RunSnapshot:
    return replace(snapshot, progress=replace(snapshot.progress, held_out_loss=event.loss))


@advance.register
def _(event: t.RunStopping, snapshot: RunSnapshot) -> RunSnapshot:
    del event
    return replace(snapshot, state="stopping")


@advance.register
def _(event: t.RunFinished, snapshot: RunSnapshot) -> RunSnapshot:
    ending = Ending(
        state=event.state, exit_code=event.exit_code, reason=event.reason, output=event.output, time=snapshot.updated
    )
    return replace(snapshot, state=event.state, ending=ending)
