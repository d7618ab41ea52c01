"""The listing of a storage, kept beside the caches for datasets that are not to be listed again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from simpletuner.data.hashing import stable_hash
from simpletuner.data.storage import FileInfo, Listing, OtherFiles, Storage, Unreadable
from simpletuner.data.storage_errors import storage_problems
from simpletuner.events.files import replacing

_FOLDER = "listings"
_VERSION = 1


def kept_listing(storage: Storage, cache_dir: Path) -> Listing | None:
    """The listing that was kept; None if there is none, or none that can be read.

    Raises: StorageError: what names the images cannot be read.
    """
    path = _path(storage, cache_dir)
    try:
        written = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(written, dict) or written.get("version") != _VERSION:
        return None
    return Listing(
        images=tuple(_file(row) for row in written["images"]),
        texts={row[0]: _file(row) for row in written["texts"]},
        unreadable=tuple(Unreadable(key=key, reason=reason) for key, reason in written["unreadable"]),
        others=tuple(OtherFiles(extension=extension, count=count) for extension, count in written["others"]),
    )


def keep_listing(storage: Storage, listing: Listing, cache_dir: Path) -> None:
    """Keep `listing` for later starts.

    Raises: DatasetError: the cache directory cannot be written. SimpletunerError: the disk is full.
    """
    written = {
        "version": _VERSION,
        "storage": storage.id,
        "images": [_row(file) for file in listing.images],
        "texts": [_row(file) for file in listing.texts.values()],
        "unreadable": [[item.key, item.reason] for item in listing.unreadable],
        "others": [[other.extension, other.count] for other in listing.others],
    }
    path = _path(storage, cache_dir)
    with storage_problems(cache_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(gzip.compress(json.dumps(written).encode(), mtime=0))


def drop_listing(storage: Storage, cache_dir: Path) -> None:
    """Keep no listing any more.

    Raises: DatasetError: the cache directory cannot be written.
    """
    with storage_problems(cache_dir):
        _path(storage, cache_dir).unlink(missing_ok=True)


def _path(storage: Storage, cache_dir: Path) -> Path:
    return cache_dir / _FOLDER / f"{stable_hash('listing 1', storage.listed_as)}.json.gz"


def _row(file: FileInfo) -> list[object]:
    return [file.key, file.size_bytes, file.version]


def _file(row: list[object]) -> FileInfo:
    key, size_bytes, version = row
    assert isinstance(key, str) and isinstance(size_bytes, int) and isinstance(version, str)
    return FileInfo(key=key, size_bytes=size_bytes, version=version)
