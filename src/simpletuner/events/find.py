"""Which runs are there, and which one does somebody mean."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from simpletuner.events.oserrors import FileSystemError
from simpletuner.events.run_status import RunNotFoundError, RunStatus, read_run
from simpletuner.problems import ExitCode, Problem, SimpletunerError

_NOT_RUNS = frozenset({"validation_images", "preview", "control", "cache", "node_modules", "__pycache__"})


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder to search for runs, and how many levels below it."""

    path: Path
    depth: int = 3


class RunChoiceError(SimpletunerError):
    """No run, or more than one, fits what was asked for."""


def find_runs(places: Sequence[Place]) -> list[RunStatus]:
    """The runs in and below the folders: live ones first, then the newest first."""
    found: dict[Path, RunStatus] = {}
    for place in places:
        for folder in _run_folders(place.path, place.depth):
            key = folder.resolve()
            if key not in found:
                try:
                    found[key] = read_run(folder)
                except (RunNotFoundError, FileSystemError):  # another program's run.json, or not ours to read
                    continue
    newest_first = sorted(found.values(), key=lambda status: status.snapshot.updated, reverse=True)
    return sorted(newest_first, key=lambda status: not status.is_live)


def choose_run(reference: str | None, places: Sequence[Place], *, live: bool) -> RunStatus:
    """The run that `reference` means: a folder, an id or a folder's name; None: the only live one, else the newest.

    Args:
        live: the run must be at work.
    Raises:
        RunChoiceError: none fits, or several do.
    """
    if reference is not None and Path(reference).is_dir():
        candidates = find_runs([Place(path=Path(reference))])
        if not candidates:
            raise RunNotFoundError(Problem(code="E-RUN-NOT-FOUND", params={"path": reference}), ExitCode.USAGE)
    else:
        candidates = find_runs(places)
        if reference is not None:
            candidates = _named(reference, candidates)
    at_work = [status for status in candidates if status.is_live]
    if len(at_work) > 1 or (reference is not None and len(candidates) > 1 and not at_work):
        paths = "\n".join(f"  {status.path}" for status in at_work or candidates)
        raise RunChoiceError(Problem(code="E-RUN-AMBIGUOUS", params={"paths": paths}), ExitCode.USAGE)
    if at_work:
        return at_work[0]
    if not candidates:
        looked = ", ".join(str(place.path.absolute()) for place in places)
        raise RunChoiceError(Problem(code="E-RUN-NONE", params={"folders": looked}), ExitCode.USAGE)
    if live:
        raise RunChoiceError(Problem(code="E-RUN-NOT-LIVE", params={"path": str(candidates[0].path)}))
    return candidates[0]


def _named(reference: str, runs: Sequence[RunStatus]) -> list[RunStatus]:
    fitting = [status for status in runs if reference in (status.path.resolve().name, status.snapshot.id)]
    if not fitting:
        names = [status.path.resolve().name for status in runs]
        params = {
            "name": reference,
            "known": ", ".join(get_close_matches(reference, names, cutoff=0.4) or names) or "-",
        }
        raise RunChoiceError(Problem(code="E-RUN-UNKNOWN", params=params), ExitCode.USAGE)
    return fitting


def _run_folders(root: Path, depth: int) -> Iterator[Path]:
    if (root / "run.json").is_file():
        yield root
        return
    if depth == 0:
        return
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in names:
        if not name.startswith((".", "checkpoint-")) and name not in _NOT_RUNS:
            yield from _run_folders(root / name, depth - 1)
