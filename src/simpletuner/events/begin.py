"""Taking possession of a run directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from simpletuner.events import types as t
from simpletuner.events.journal import format_time, utc_now
from simpletuner.events.paths import RunDirectory
from simpletuner.events.processes import process_start
from simpletuner.events.run_status import RunInfo, RunNotFoundError, RunSnapshot, read_run
from simpletuner.problems import Problem, SimpletunerError


class RunIsLiveError(SimpletunerError):
    """Another process trains in this directory."""


def started_event(snapshot: RunSnapshot, directory: RunDirectory) -> t.RunStarted:
    """The first event of a session."""
    return t.RunStarted(
        run_id=snapshot.id,
        session=snapshot.session,
        version=snapshot.info.version,
        pid=snapshot.pid or 0,
        host=snapshot.info.host,
        argv=snapshot.info.argv,
        output_dir=str(directory.path),
        config_path=snapshot.info.config_path,
    )


def first_snapshot(info: RunInfo, effective_config: str, earlier: RunSnapshot | None) -> RunSnapshot:
    """What run.json holds when a session of this process begins, after the `earlier` one of the same directory."""
    now = utc_now()
    started = format_time(now)
    return RunSnapshot(
        id=earlier.id if earlier else f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        session=earlier.session + 1 if earlier else 1,
        state="starting",
        pid=os.getpid(),
        pid_start=process_start(os.getpid()),
        created=earlier.created if earlier else started,
        started=started,
        updated=started,
        info=info,
        config_hash=hashlib.sha256(effective_config.encode("utf-8", "surrogatepass")).hexdigest()[:16],
    )


def refuse_if_live(directory: RunDirectory, alone: bool) -> RunSnapshot | None:
    """Return what an earlier session left. Raises RunIsLiveError if a process works there or is just starting."""
    try:
        status = read_run(directory.path)
    except RunNotFoundError:
        if alone:
            return None
        raise RunIsLiveError(Problem(code="E-RUN-STARTING", params={"path": str(directory.path)})) from None
    if status.is_live or not alone:
        params = {"path": str(directory.path), "pid": status.snapshot.pid, "host": status.snapshot.info.host}
        raise RunIsLiveError(Problem(code="E-RUN-LIVE", params=params))
    return status.snapshot


@contextlib.contextmanager
def created(*folders: Path) -> Iterator[None]:
    """Create the folders and their parents; if the block fails, remove again those that were created."""
    new: list[Path] = []
    try:
        for folder in folders:
            missing = [folder, *folder.parents]
            missing = missing[: next((i for i, path in enumerate(missing) if path.exists()), len(missing))]
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                new.append(path)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        yield
    except BaseException:
        for path in reversed(new):
            with contextlib.suppress(OSError):
                for child in (path / "heartbeat", path / "events.jsonl", path / "log.txt", path / "config.json"):
                    child.unlink(missing_ok=True)
                path.rmdir()
        raise
