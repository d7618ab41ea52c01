"""What is already known of the files of datasets, by (storage, key, size, version): one SQLite file in the cache
directory.

It only saves time. A row counts if the file still has the size and the version it was read with. The time of change of
a local file counts only if it was long enough before the reading for the file system's clock to tell a later one apart.
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
_VERSION = 2
_LOCK_TIMEOUT_S = 30.0
_SCHEMA = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS images;
DROP TABLE IF EXISTS texts;
DROP TABLE IF EXISTS sources;
CREATE TABLE sources (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE images (
    source INTEGER NOT NULL, key BLOB NOT NULL, size_bytes INTEGER NOT NULL, version TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, traits TEXT NOT NULL, content_id TEXT, reason TEXT,
    PRIMARY KEY (source, key)
) WITHOUT ROWID;
CREATE TABLE texts (
    source INTEGER NOT NULL, key BLOB NOT NULL, size_bytes INTEGER NOT NULL, version TEXT NOT NULL,
    content BLOB NOT NULL, PRIMARY KEY (source, key)
) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What reading an image of this size and version gave."""

    size_bytes: int
    version: str
    size: Size
    """(0, 0) if it is unreadable."""
    traits: str = ""
    """The `records.Trait`s of its header, sorted, with spaces between them."""
    content_id: str | None = None
    """Hash of its bytes, once the whole file was read."""
    reason: str | None = None
    """Why it cannot be used; None if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownText:
    """What reading a caption file of this size and version gave."""

    size_bytes: int
    version: str
    content: bytes


class ImageIndex:
    """The rows of one cache directory. Several runs may use it at once.

    Every method raises DatasetError if the directory cannot be written, SimpletunerError if the disk is full.
    `source` is a storage's id.
    """

    def __init__(self, cache_dir: Path, connection: sqlite3.Connection) -> None:
        self._cache_dir = cache_dir
        self._connection = connection

    def images(self, source: str) -> dict[str, Known]:
        """Everything known of the images of `source`, by key."""
        query = """SELECT key, size_bytes, version, width, height, traits, content_id, reason
            FROM images JOIN sources ON source = id WHERE name = ?"""
        with _problems(self._cache_dir):
            rows = self._connection.execute(query, (os.fsencode(source),))
            return {
                os.fsdecode(key): Known(
                    size_bytes=size_bytes,
                    version=version,
                    size=(width, height),
                    traits=traits,
                    content_id=content_id,
                    reason=reason,
                )
                for key, size_bytes, version, width, height, traits, content_id, reason in rows
            }

    def texts(self, source: str) -> dict[str, KnownText]:
        """Everything known of the caption files of `source`, by key."""
        query = "SELECT key, size_bytes, version, content FROM texts JOIN sources ON source = id WHERE name = ?"
        with _problems(self._cache_dir):
            rows = self._connection.execute(query, (os.fsencode(source),))
            return {
                os.fsdecode(key): KnownText(size_bytes=size_bytes, version=version, content=content)
                for key, size_bytes, version, content in rows
            }

    def save_images(self, source: str, known: Mapping[str, Known]) -> None:
        """Remember what reading gave."""
        self._save(
            "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            source,
            [
                (os.fsencode(key), k.size_bytes, k.version, *k.size, k.traits, k.content_id, k.reason)
                for key, k in known.items()
            ],
        )

    def save_texts(self, source: str, known: Mapping[str, KnownText]) -> None:
        """Remember what reading gave."""
        self._save(
            "INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?)",
            source,
            [(os.fsencode(key), k.size_bytes, k.version, k.content) for key, k in known.items()],
        )

    def forget(self, source: str, *, images: Iterable[str] = (), texts: Iterable[str] = ()) -> None:
        """Drop the rows of files that are gone."""
        self._save("DELETE FROM images WHERE source = ? AND key = ?", source, [(os.fsencode(key),) for key in images])
        self._save("DELETE FROM texts WHERE source = ? AND key = ?", source, [(os.fsencode(key),) for key in texts])

    def _save(self, statement: str, source: str, rows: list[tuple[object, ...]]) -> None:
        """Run `statement` for every row, with the source's number before it."""
        if not rows:
            return
        name = (os.fsencode(source),)
        with _problems(self._cache_dir), self._connection:
            self._connection.execute("INSERT OR IGNORE INTO sources (name) VALUES (?)", name)
            (number,) = self._connection.execute("SELECT id FROM sources WHERE name = ?", name).fetchone()
            self._connection.executemany(statement, [(number, *row) for row in rows])


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
