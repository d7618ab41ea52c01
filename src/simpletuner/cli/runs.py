"""`simpletuner runs`: look at runs and steer them, from any terminal. Reads run directories, drops command files.

`run(argv, language)` is the whole interface; problems are raised as SimpletunerError, for the caller to print.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from simpletuner.events import control, formats
from simpletuner.events.codec import encode, to_line, to_text
from simpletuner.events.eta import round_remaining
from simpletuner.events.find import Place, choose_run, find_runs
from simpletuner.events.journal import Record, follow, parse_time, read, record_to_json, utc_now
from simpletuner.events.paths import RunDirectory
from simpletuner.events.processes import is_alive
from simpletuner.events.run_status import RunNotFoundError, RunStatus, State, read_run
from simpletuner.events.text import Narrator, format_line, phase_label
from simpletuner.events.types import CheckpointSaved
from simpletuner.events.view import RunView
from simpletuner.i18n import text
from simpletuner.problems import ConfigError, ExitCode, Problem, SimpletunerError

COMMANDS = ("list", "show", "logs", "stop", "checkpoint", "validate")
_GAP = "  "
_ICONS: dict[State, str] = {
    "queued": "○",
    "starting": "◌",
    "running": "●",
    "stopping": "◍",
    "suspended": "‖",
    "stopped": "■",
    "done": "✓",
    "failed": "✗",
    "lost": "?",
}


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the command: the parsed flags, where to look and in which language to speak."""

    args: argparse.Namespace
    places: tuple[Place, ...]
    language: str

    def say(self, key: str, /, **params: object) -> str:
        return text(key, self.language, **params)

    def choose(self, *, live: bool) -> RunStatus:
        return choose_run(self.args.run, self.places, live=live)


def run(argv: Sequence[str], language: str, *, output_dirs: Sequence[Path] = ()) -> int:
    """Carry out `simpletuner runs ARGV` and return the exit code.

    Args:
        output_dirs: further places to look for runs, such as the output_dir of the configuration in use.
    Raises:
        SimpletunerError: no such run, several, not at work, no answer.
        ConfigError: a wrong command line.
    """
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help", "help") or "-h" in rest or "--help" in rest:
        print(text("runs.help", language))
        return ExitCode.OK
    if command not in COMMANDS:
        close = ", ".join(get_close_matches(command, COMMANDS, n=1) or COMMANDS)
        raise ConfigError(Problem(code="E-RUNS-COMMAND", params={"command": command, "known": close}))
    args = _parse(command, rest)
    given = tuple(Path(root) for root in args.root or ())
    missing = [root for root in given if not root.is_dir()]
    if missing:
        raise ConfigError(Problem(code="E-RUNS-ROOT", params={"path": str(missing[0])}))
    usual = (
        Place(path=Path(), depth=1),
        Place(path=Path("output")),
        *(Place(path=path, depth=1) for path in output_dirs),
    )
    places = tuple(Place(path=root) for root in given) or usual
    return _ACTIONS[command](_Call(args=args, places=places, language=language))


def _list(call: _Call) -> int:
    if call.args.run is not None and not Path(call.args.run).is_dir():
        raise ConfigError(Problem(code="E-RUNS-ROOT", params={"path": call.args.run}))
    runs = find_runs([Place(path=Path(call.args.run))] if call.args.run is not None else call.places)
    if call.args.json:
        print(to_text([encode(status) for status in runs]), end="", flush=True)
    elif not runs:
        print(call.say("runs.none"), file=sys.stderr)
    else:
        header = [call.say(f"runs.column.{name}") for name in ("state", "run", "step", "loss", "age", "path")]
        _print_table([header, *(_row(status, call) for status in runs)])
    return ExitCode.OK


def _show(call: _Call) -> int:
    status = call.choose(live=False)
    if call.args.json:
        print(to_text(encode(status)), end="", flush=True)
        return ExitCode.OK
    view, checkpoint = RunView(), None
    for record in read(RunDirectory(status.path).events_jsonl):
        view.apply(record.event)
        if isinstance(record.event, CheckpointSaved) and not record.event.final:
            checkpoint = record.event.path
    rows = _facts(status, view, checkpoint, call)
    width = max(len(label) for label, _ in rows)
    print(_headline(status, view, call))
    print("".join(f"  {label:{width}}  {value}\n" for label, value in rows), end="", flush=True)
    return ExitCode.OK


def _logs(call: _Call) -> int:
    status = call.choose(live=False)
    journal = RunDirectory(status.path).events_jsonl
    narrator = Narrator(call.language)

    def lines(record: Record) -> list[str]:
        if call.args.json:
            return [to_line(record_to_json(record)).decode() + "\n"]
        told = narrator.tell(record)
        return [format_line(line, record.time.timestamp()) + "\n" for line in told if line.level != "debug"]

    kept: deque[str] = deque(maxlen=call.args.lines)
    last = 0
    for record in read(journal):
        kept.extend(lines(record))
        last = record.seq
    print("".join(kept), end="", flush=True)
    if call.args.follow and status.is_live:
        for record in follow(journal, after=last, finished=lambda: not _is_live(status.path)):
            print("".join(lines(record)), end="", flush=True)
    return ExitCode.OK


def _stop(call: _Call) -> int:
    status = call.choose(live=True)
    if call.args.force:
        return _kill(status, call)
    key = "runs.stop.leave" if call.args.no_save else "runs.stop.save"
    return _ask(call, status, "stop", save=not call.args.no_save, asked=call.say(key, run=_name(status)))


def _checkpoint(call: _Call) -> int:
    status = call.choose(live=True)
    return _ask(call, status, "checkpoint", asked=call.say("runs.checkpoint", run=_name(status)))


def _validate(call: _Call) -> int:
    status = call.choose(live=True)
    return _ask(call, status, "validate", asked=call.say("runs.validate", run=_name(status)))


_ACTIONS: dict[str, Callable[[_Call], int]] = {
    "list": _list,
    "show": _show,
    "logs": _logs,
    "stop": _stop,
    "checkpoint": _checkpoint,
    "validate": _validate,
}


def _ask(call: _Call, status: RunStatus, kind: control.CommandKind, *, asked: str, save: bool = True) -> int:
    """Send a command and wait for what becomes of it."""
    command_id = control.send(status.path, kind, save=save)
    print(asked, file=sys.stderr)
    if status.state == "suspended":
        print(call.say("runs.suspended", run=_name(status), pid=status.snapshot.pid), file=sys.stderr)
    if call.args.no_wait:
        return ExitCode.OK
    timeout_s = call.args.timeout
    answer = control.wait_for_answer(
        status.path,
        command_id,
        timeout_s=math.inf if timeout_s is None else timeout_s,
        alive=lambda: _is_live(status.path),
    )
    if answer is None or not answer.ok:
        code = "E-RUN-NO-ANSWER" if answer is None and _is_live(status.path) else "E-RUN-ENDED"
        raise SimpletunerError(Problem(code=code, params={"path": str(status.path), "kind": kind}))
    path = str(status.path / answer.path) if answer.path else ""
    if call.args.json:
        print(to_text(encode(answer)), end="", flush=True)
    else:
        how = answer.message
        if how == "stopped":
            how = "stopped.saved" if path else "stopped.left" if answer.step else "stopped.early"
        print(call.say(f"runs.answer.{how}", step=answer.step, path=path))
    return ExitCode.OK


def _kill(status: RunStatus, call: _Call) -> int:
    """End the process without asking. Only where the process certainly is the one of the run."""
    pid = status.snapshot.pid
    if pid is None or is_alive(pid, status.snapshot.pid_start) is not True:
        params = {"path": str(status.path), "pid": pid, "host": status.snapshot.info.host}
        raise SimpletunerError(Problem(code="E-RUN-ELSEWHERE", params=params))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    while is_alive(pid, status.snapshot.pid_start):
        time.sleep(0.05)
    print(call.say("runs.answer.killed", run=_name(status), pid=pid))
    return ExitCode.OK


def _is_live(path: Path) -> bool:
    try:
        return read_run(path).is_live
    except RunNotFoundError:
        return False


def _row(status: RunStatus, call: _Call) -> list[str]:
    progress = status.snapshot.progress
    step = f"{progress.step}/{progress.total_steps}" if progress.total_steps else str(progress.step or "-")
    loss = "-" if progress.loss is None else formats.significant(progress.loss, call.language)
    state = f"{_ICONS[status.state]} {call.say(f'runs.state.{status.state}')}"
    return [state, _name(status), step, loss, _age(status.snapshot.updated), str(status.path)]


def _headline(status: RunStatus, view: RunView, call: _Call) -> str:
    progress = status.snapshot.progress
    parts = [f"{_ICONS[status.state]} {_name(status)}", call.say(f"runs.state.{status.state}")]
    if progress.total_steps:
        parts.append(call.say("runs.step", step=progress.step, total=progress.total_steps))
    elif progress.step:
        parts.append(call.say("runs.step.alone", step=progress.step))
    remaining_s = view.remaining_s() if status.state == "running" else None
    if remaining_s:
        parts.append(call.say("console.left", duration=formats.rounded_duration(round_remaining(remaining_s))))
    return " · ".join(parts)


def _facts(status: RunStatus, view: RunView, checkpoint: str | None, call: _Call) -> list[tuple[str, str]]:
    snapshot, progress, ending = status.snapshot, status.snapshot.progress, status.snapshot.ending
    facts: list[tuple[str, str | None]] = [("id", snapshot.id)]
    if view.plan is not None:
        facts += [("model", f"{view.plan.model} · {view.plan.adapter}"), ("device", view.plan.device_name)]
    if status.is_live:
        facts.append(("phase", phase_label(progress.phase, call.language) if progress.phase else None))
    losses = {
        "loss": progress.loss,
        "regularisation": progress.regularisation_loss,
        "held_out": progress.held_out_loss,
    }
    facts += [(label, formats.significant(loss, call.language)) for label, loss in losses.items() if loss is not None]
    facts += [
        (
            "speed",
            f"{formats.significant(progress.step_seconds, call.language)} s/it" if progress.step_seconds else None,
        ),
        ("started", f"{_local(snapshot.started)} ({call.say('console.session', session=snapshot.session)})"),
        ("process", f"{snapshot.pid} · {snapshot.info.host}" if snapshot.pid and ending is None else None),
        ("ended", _ending(status, call)),
        ("checkpoint", str(status.path / checkpoint) if checkpoint else None),
        ("weights", str(status.path / ending.output) if ending and ending.output else None),
        ("log", str(RunDirectory(status.path).log_txt)),
    ]
    return [(call.say(f"runs.fact.{label}"), value) for label, value in facts if value]


def _ending(status: RunStatus, call: _Call) -> str | None:
    ending = status.snapshot.ending
    if status.state == "lost":
        return call.say("runs.lost", time=_local(status.snapshot.updated))
    if ending is None:
        return None
    reason = f", {ending.reason}" if ending.reason else ""
    return call.say("runs.ended", time=_local(ending.time), code=ending.exit_code) + reason


def _name(status: RunStatus) -> str:
    return status.path.resolve().name


def _age(updated: str) -> str:
    with contextlib.suppress(ValueError):
        return formats.rounded_duration(max(0.0, (utc_now() - parse_time(updated)).total_seconds()))
    return "-"


def _local(moment: str) -> str:
    try:
        return f"{parse_time(moment).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return moment


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in (2, 3, 4) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(_GAP.join(cells).rstrip())


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing, so that every command line problem looks the same."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(code="E-RUNS-USAGE", params={"message": message}))


def _parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"simpletuner runs {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--root", action="append", metavar="DIR")
    parser.add_argument("--json", action="store_true")
    if command == "logs":
        parser.add_argument("-f", "--follow", action="store_true")
        parser.add_argument("-n", "--lines", type=int, metavar="N")
    if command in control.COMMAND_KINDS:
        parser.add_argument("--timeout", type=float, metavar="SECONDS")
        parser.add_argument("--no-wait", action="store_true")
    if command == "stop":
        how = parser.add_mutually_exclusive_group()
        how.add_argument("--no-save", action="store_true")
        how.add_argument("--force", action="store_true")
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(Problem(code="E-RUNS-OPTION", params={"command": command, "option": unknown[0]}))
    return args
