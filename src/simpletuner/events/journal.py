"""The append-only journal `events.jsonl`: one JSON object per line, one writer, any number of readers.

Every line carries `seq` (1, 2, 3, ... over all sessions of the directory) and `time` (UTC, ISO 8601). A line is in the
operating system's hands when `append` returns, so a killed process loses nothing that it told. Readers work on bytes
and only on complete lines: a line that is being written, or that a power cut tore, is not seen.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from simpletuner.events.codec import DecodeError, JsonValue, parse_object, to_line
from simpletuner.events.oserrors import FileSystemError, problem_from_oserror
from simpletuner.events.types import Event, from_json, to_json

_BLOCK_BYTES = 1 << 16
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the journal."""

    seq: int
    time: datetime  # UTC, milliseconds
    event: Event


def utc_now() -> datetime:
    """The time of day in UTC, cut to the milliseconds that a record keeps."""
    now = datetime.now(timezone.utc)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def format_time(moment: datetime) -> str:
    """ "2026-03-12T10:58:03.120Z"."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def parse_time(text: str) -> datetime:
    """The inverse of `format_time`. Raises ValueError."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)


def record_to_json(record: Record) -> dict[str, JsonValue]:
    """The record as one flat JSON object, as it stands in the journal and on `--log-format json`."""
    return {"seq": record.seq, "time": format_time(record.time), **to_json(record.event)}


def record_from_json(value: dict[str, JsonValue]) -> Record:
    """The inverse of `record_to_json`. Raises DecodeError if it is not a record."""
    seq, moment = value.get("seq"), value.get("time")
    if not isinstance(seq, int) or not isinstance(moment, str) or "event" not in value:
        raise DecodeError("not a journal record")
    try:
        parsed = parse_time(moment)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    return Record(seq=seq, time=parsed, event=from_json({k: v for k, v in value.items() if k not in ("seq", "time")}))


class Journal:
    """The one writer of a journal file. Opening it repairs the tail that a crash may have left."""

    def __init__(self, path: Path) -> None:
        """Raises FileSystemError if the file cannot be opened for writing."""
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o644)
            self._seq = _repair(self._handle)
        except OSError as error:
            raise FileSystemError(problem_from_oserror(error, path)) from error

    def append(self, event: Event) -> Record:
        """Write one event and return it with its number and time.

        Raises:
            FileSystemError: the disk is full or gone; the journal is as it was before.
        """
        record = Record(seq=self._seq + 1, time=utc_now(), event=event)
        line = to_line(record_to_json(record)) + b"\n"
        self._seq += 1  # before the write: an interrupt in between may leave a gap, never a number twice
        size_bytes = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, line)
            while written < len(line):  # a disk that fills up takes a part first, then refuses
                written += os.write(self._handle, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):  # what stays torn is cut off by the next opening
                os.ftruncate(self._handle, size_bytes)
            raise FileSystemError(problem_from_oserror(error, self._path)) from error
        return record

    def close(self) -> None:
        """Wait until everything is on the disk, and close the file."""
        try:
            os.fsync(self._handle)
        except OSError:  # a pipe or a full disk; what could be written is written
            pass
        finally:
            os.close(self._handle)


def read(path: Path, *, after: int = 0) -> Iterator[Record]:
    """Every complete record with a number above `after`; nothing if the file does not exist yet."""
    try:
        with path.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n") and (record := _parse(line)) is not None and record.seq > after:
                    yield record
    except FileNotFoundError:
        return


def follow(
    path: Path, *, after: int = 0, poll_s: float = 0.25, finished: Callable[[], bool] = lambda: False
) -> Iterator[Record]:
    """Every record above `after`, then new ones as they are written, until `finished()` and nothing is left.

    The file may appear later. Only whole lines are read, so the reader never sees half an event.
    """
    offset = 0
    while True:
        ending = finished()  # asked before reading: what was written until then is still delivered
        try:
            with path.open("rb") as stream:
                stream.seek(offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    if (record := _parse(line)) is not None and record.seq > after:
                        after = record.seq
                        yield record
        except FileNotFoundError:
            pass
        if ending:
            return
        time.sleep(poll_s)


def _parse(line: bytes) -> Record | None:
    try:
        return record_from_json(parse_object(line))
    except DecodeError:
        return None


def _repair(handle: int) -> int:
    """Close or cut off a last line without an end. Return the number of the last record, 0 if there is none."""
    size = os.lseek(handle, 0, os.SEEK_END)
    tail, start = b"", size
    while start > 0:  # read backwards until a whole record was seen
        begin = max(0, start - _BLOCK_BYTES)
        os.lseek(handle, begin, os.SEEK_SET)
        tail = os.read(handle, start - begin) + tail
        start = begin
        if any(_parse(line) for line in tail.split(b"\n")[1:-1]):
            break
    torn = tail[tail.rfind(b"\n") + 1 :]
    if torn and _parse(torn) is not None:  # complete but for its line end
        os.write(handle, b"\n")
    elif torn:
        os.ftruncate(handle, size - len(torn))
    records = (_parse(line) for line in reversed(tail.split(b"\n")))
    return next((record.seq for record in records if record is not None), 0)
