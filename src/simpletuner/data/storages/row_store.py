"""The images and captions of a stream, kept in one SQLite file as they come. Standard library only."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.storage_errors import storage_problems

_VERSION = 1
_LOCK_TIMEOUT_S = 30.0
_SCHEMA = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS stream;
DROP TABLE IF EXISTS rows;
CREATE TABLE stream (identity TEXT NOT NULL, is_complete INTEGER NOT NULL);
CREATE TABLE rows (number INTEGER PRIMARY KEY, captions TEXT NOT NULL, image BLOB);
PRAGMA user_version = {_VERSION};
COMMIT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRow:
    """One row of a stream. `image` is None if the row has none."""

    image: bytes | None
    captions: tuple[str, ...]


@dataclass(frozen=True)
class RowStore:
    """The rows of one stream, numbered from 0, in the file `path`.

    Every method raises DatasetError if the file cannot be written, SimpletunerError if the disk is full.
    """

    path: Path

    def begin(self, identity: str) -> int:
        """How many rows of the stream `identity` are there; those of another one are dropped, and so is a damaged
        file."""
        with storage_problems(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_database():
                self.path.unlink()
        with self._connection() as rows:
            if rows.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                rows.executescript(_SCHEMA)
            if rows.execute("SELECT identity FROM stream").fetchall() != [(identity,)]:
                rows.execute("DELETE FROM stream")
                rows.execute("DELETE FROM rows")
                rows.execute("INSERT INTO stream VALUES (?, 0)", (identity,))
            return int(rows.execute("SELECT count(*) FROM rows").fetchone()[0])

    def add(self, first: int, new: Sequence[StreamRow]) -> None:
        """Append the rows from number `first` on, in one step."""
        values = [
            (number, json.dumps(row.captions, ensure_ascii=False), row.image)
            for number, row in enumerate(new, start=first)
        ]
        with self._connection() as rows:
            rows.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", values)

    def complete(self) -> None:
        """Note that the stream has no more rows."""
        with self._connection() as rows:
            rows.execute("UPDATE stream SET is_complete = 1")

    def is_complete(self) -> bool:
        """Whether all rows are there."""
        with self._connection() as rows:
            return rows.execute("SELECT is_complete FROM stream").fetchall() == [(1,)]

    def sizes(self) -> list[tuple[int, int | None]]:
        """(number, bytes of the image or None without one) of every row."""
        with self._connection() as rows:
            return rows.execute("SELECT number, length(image) FROM rows ORDER BY number").fetchall()

    def image(self, number: int) -> bytes:
        """The image of a row."""
        with self._connection() as rows:
            found = rows.execute("SELECT image FROM rows WHERE number = ?", (number,)).fetchone()
        if found is None or found[0] is None:
            raise FileNotFoundError(errno.ENOENT, "no such row", f"{self.path}#{number}")
        return bytes(found[0])

    def captions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(number, captions) of every row."""
        with self._connection() as rows:
            for number, captions in rows.execute("SELECT number, captions FROM rows ORDER BY number"):
                yield number, tuple(json.loads(captions))

    def _is_database(self) -> bool:
        """Whether the file is one, or not there yet."""
        try:
            with closing(sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT_S)) as rows:
                rows.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError as error:  # locked, or not to be opened
            raise OSError(errno.EIO, str(error)) from error
        except sqlite3.DatabaseError:
            return False
        return True

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with storage_problems(self.path.parent):
            try:
                with closing(sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT_S)) as rows, rows:
                    yield rows
            except sqlite3.DatabaseError as error:
                code = errno.ENOSPC if "full" in str(error) else errno.EIO
                raise OSError(code, str(error)) from error


def in_groups(rows: Iterable[StreamRow], *, num_rows: int, size_bytes: int) -> Iterator[list[StreamRow]]:
    """Yield `rows` in lists of up to `num_rows`, or of what first exceeds `size_bytes`."""
    group: list[StreamRow] = []
    held = 0
    for row in rows:
        group.append(row)
        held += len(row.image or b"")
        if len(group) >= num_rows or held >= size_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group
