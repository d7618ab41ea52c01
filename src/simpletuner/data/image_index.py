"""What is already known of image files, by (path, size, mtime): one SQLite file in the cache directory.

It only saves time. A row counts if the file still has the size and the time of change it was read with, and if that
change was long enough before the reading for the file system's clock to tell a later one apart.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.records import Size
from simpletuner.data.storage_errors import storage_problems

_FILE_NAME = "images.sqlite"
_VERSION = 1
_LOCK_TIMEOUT_S = 30.0
_CLOCK_GRAIN_NS = 2_000_000_000  # FAT counts in steps of two seconds.
_SCHEMA = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS images;
CREATE TABLE images (
    folder BLOB NOT NULL, key BLOB NOT NULL, size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, content_id TEXT NOT NULL, PRIMARY KEY (folder, key)
) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What reading a file of this size and time of change gave."""

    size_bytes: int
    mtime_ns: int
    size: Size
    content_id: str


class ImageIndex:
    """The rows of one cache directory. Several runs may use it at once.

    Every method raises DatasetError if the directory cannot be written, SimpletunerError if the disk is full.
    """

    def __init__(self, cache_dir: Path, connection: sqlite3.Connection) -> None:
        self._cache_dir = cache_dir
        self._connection = connection

    def known(self, folder: Path) -> Mapping[str, Known]:
        """Everything known of the images of `folder`, by key."""
        query = "SELECT key, size_bytes, mtime_ns, width, height, content_id FROM images WHERE folder = ?"
        with _problems(self._cache_dir):
            rows = self._connection.execute(query, (os.fsencode(folder),)).fetchall()
        return {
            os.fsdecode(key): Known(size_bytes=size, mtime_ns=mtime_ns, size=(width, height), content_id=content_id)
            for key, size, mtime_ns, width, height, content_id in rows
        }

    def save(self, folder: Path, known: Mapping[str, Known], *, read_at_ns: int) -> None:
        """Remember what reading gave. A file that changed just before `read_at_ns` is left to be read again."""
        name = os.fsencode(folder)
        rows = [
            (name, os.fsencode(key), k.size_bytes, k.mtime_ns, *k.size, k.content_id)
            for key, k in known.items()
            if k.mtime_ns < read_at_ns - _CLOCK_GRAIN_NS
        ]
        with _problems(self._cache_dir), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def forget(self, folder: Path, keys: Iterable[str]) -> None:
        """Drop the rows of files that are gone."""
        rows = [(os.fsencode(folder), os.fsencode(key)) for key in keys]
        with _problems(self._cache_dir), self._connection:
            self._connection.executemany("DELETE FROM images WHERE folder = ? AND key = ?", rows)


@contextmanager
def open_index(cache_dir: Path) -> Iterator[ImageIndex]:
    """Open the index of `cache_dir`, which is created; a damaged one, or one of another version, is made anew.

    Raises: DatasetError: the directory cannot be written. SimpletunerError: the disk is full.
    """
    path = cache_dir / _FILE_NAME
    with _problems(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _is_sound(path):
            path.unlink()
        connection = _connect(path)
    with closing(connection):
        with _problems(cache_dir):
            if _version(connection) != _VERSION:
                connection.executescript(_SCHEMA)
        yield ImageIndex(cache_dir, connection)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_sound(path: Path) -> bool:
    try:
        with closing(_connect(path)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return False


@contextmanager
def _problems(cache_dir: Path) -> Iterator[None]:
    with storage_problems(cache_dir):
        try:
            yield
        except sqlite3.DatabaseError as error:
            # Python 3.10 has no error codes here, only SQLite's text.
            code = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(code, str(error)) from error
