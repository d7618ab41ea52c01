"""Commands to a run as files in its `control/` directory: they need no socket, and cross terminals and network mounts.

    000007-stop-9f3a.json      sent
    000007-stop-9f3a.taken     the run has seen it
    000007-stop-9f3a.done      answered

The number gives the order; the random end keeps two senders of one moment apart. A command that a run left unanswered
when it ended is answered by the next start (`expire`).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from simpletuner.events.codec import DecodeError, decode, encode, parse_object, to_text
from simpletuner.events.files import read_text, write_atomic
from simpletuner.events.journal import format_time, utc_now
from simpletuner.events.oserrors import os_errors_as_problems

CommandKind: TypeAlias = Literal["stop", "checkpoint", "validate"]
COMMAND_KINDS: tuple[CommandKind, ...] = ("stop", "checkpoint", "validate")
_LAST_BREATH_S = 2.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Command:
    """One wish. `save` belongs to stop: write a checkpoint before leaving."""

    id: str
    kind: CommandKind
    save: bool = True
    time: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a command. `message` is a word for machines: "saved", "run-ended", ..."""

    ok: bool
    message: str
    step: int | None = None
    path: str | None = None


def send(output_dir: Path, kind: CommandKind, *, save: bool = True) -> str:
    """Drop a command for the run in `output_dir` and return its id.

    Raises:
        FileSystemError: the control directory cannot be written.
    """
    folder = output_dir / "control"
    with os_errors_as_problems(folder):
        folder.mkdir(exist_ok=True)
        command_id = f"{_last_number(folder) + 1:06d}-{kind}-{secrets.token_hex(2)}"
        command = Command(id=command_id, kind=kind, save=save, time=format_time(utc_now()))
        write_atomic(folder / f"{command_id}.json", to_text(encode(command)), durable=False)
    return command_id


def take(output_dir: Path) -> list[Command]:
    """The commands that nobody has taken yet, in order; each is returned once."""
    folder = output_dir / "control"
    taken = []
    for path in _files(folder, ".json"):
        try:
            command = decode(Command, parse_object(read_text(path)))
            path.replace(path.with_suffix(".taken"))
        except (DecodeError, OSError):
            continue
        taken.append(command)
    return taken


def answer(output_dir: Path, command: Command, result: Answer) -> None:
    """Write the answer where the sender waits for it. Raises OSError."""
    folder = output_dir / "control"
    write_atomic(folder / f"{command.id}.done", to_text(encode(result)), durable=False)
    for suffix in (".taken", ".json"):
        with contextlib.suppress(OSError):
            (folder / f"{command.id}{suffix}").unlink()


def expire(output_dir: Path) -> None:
    """Answer what an earlier run left behind, so that an old stop does not stop a new run. Raises OSError."""
    folder = output_dir / "control"
    for path in (*_files(folder, ".json"), *_files(folder, ".taken")):
        command = Command(id=path.stem, kind="stop", time="")
        answer(output_dir, command, Answer(ok=False, message="run-ended"))


def read_answer(output_dir: Path, command_id: str) -> Answer | None:
    """The answer to a command; None while there is none."""
    try:
        return decode(Answer, parse_object(read_text(output_dir / "control" / f"{command_id}.done")))
    except (OSError, DecodeError):
        return None


def wait_for_answer(
    output_dir: Path, command_id: str, *, timeout_s: float, alive: Callable[[], bool] = lambda: True
) -> Answer | None:
    """Wait for the answer; None after `timeout_s`, or when the run is no longer `alive` and has not answered.

    A run answers with its last breath, a moment after it has told that it ends.
    """
    end = time.monotonic() + timeout_s
    while True:
        if not alive():
            end = min(end, time.monotonic() + _LAST_BREATH_S)
        found = read_answer(output_dir, command_id)
        if found is not None or time.monotonic() >= end:
            return found
        time.sleep(_POLL_S)


def _files(folder: Path, suffix: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == suffix and path.name[0].isdigit())
    except OSError:
        return []


def _last_number(folder: Path) -> int:
    prefixes = (path.name.split("-", 1)[0] for path in folder.iterdir())
    return max((int(prefix) for prefix in prefixes if prefix.isascii() and prefix.isdigit()), default=0)
