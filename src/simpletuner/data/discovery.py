"""Finds the images of a folder: a recursive listing, then header and hash of what is not known yet. No torch.

Nothing is ever written into the folder.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from simpletuner.data.hashing import content_hash
from simpletuner.data.image_index import ImageIndex, Known
from simpletuner.data.images import EXTENSIONS, UnreadableImageError, read_header, without_decoder_warnings
from simpletuner.data.records import ImageRecord

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_READ_SERIALLY_UP_TO = 64
_FILES_PER_TASK = 32
_FILES_PER_COMMIT = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """A file that is named like an image and cannot be used as one."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherFiles:
    """How many files of a kind that is not an image the folder holds. `extension` is lower case, "" for none."""

    extension: str
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """A file that is named like an image, before it is read."""

    key: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names in a folder. `files` are sorted by key."""

    folder: Path
    files: tuple[ImageFile, ...]
    broken_links: tuple[str, ...]
    others: tuple[OtherFiles, ...]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The images of a folder, sorted by key, and what is wrong with the rest."""

    listing: Listing
    records: tuple[ImageRecord, ...]
    unreadable: tuple[Unreadable, ...]


def list_images(folder: Path) -> Listing:
    """List `folder` and everything below it. Links are followed, no directory is entered twice.

    Names that start with a dot (".git", "._photo.jpg" of macOS) are passed over.

    Raises: OSError: a directory cannot be listed.
    """
    files: list[ImageFile] = []
    broken: list[str] = []
    others: Counter[str] = Counter()
    for entry, key in _walk(folder):
        extension = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (a Path per file costs more than the rest)
        if extension not in EXTENSIONS:
            others[extension] += 1
            continue
        try:
            status = entry.stat()
        except OSError:
            broken.append(key)
            continue
        if stat.S_ISREG(status.st_mode):
            files.append(ImageFile(key=key, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns))
    return Listing(
        folder=folder,
        files=tuple(sorted(files, key=lambda file: file.key)),
        broken_links=tuple(sorted(broken)),
        others=tuple(OtherFiles(extension=name, count=count) for name, count in others.most_common()),
    )


def scan(listing: Listing, index: ImageIndex, *, on_progress: Progress, max_workers: int | None = None) -> Scan:
    """Read header and hash of the listed files that `index` does not know, and remember them there.

    `on_progress` counts files. Reading is threaded once there are many.
    """
    known = dict(index.known(listing.folder))
    fresh = [file for file in listing.files if not _is_current(known.get(file.key), file)]
    num_known = len(listing.files) - len(fresh)
    on_progress(num_known, len(listing.files))
    unreadable = [Unreadable(key=key, reason="broken link") for key in listing.broken_links]
    for first in range(0, len(fresh), _FILES_PER_COMMIT):
        group = fresh[first : first + _FILES_PER_COMMIT]
        read_at_ns = time.time_ns()
        learned: dict[str, Known] = {}
        with without_decoder_warnings():
            for number, (file, result) in enumerate(_read_all(listing.folder, group, max_workers), start=1):
                if isinstance(result, Unreadable):
                    unreadable.append(result)
                else:
                    learned[file.key] = result
                on_progress(num_known + first + number, len(listing.files))
        index.save(listing.folder, learned, read_at_ns=read_at_ns)
        known.update(learned)
    gone = known.keys() - {file.key for file in listing.files}
    if gone:
        index.forget(listing.folder, gone)
    bad = {item.key for item in unreadable}
    return Scan(
        listing=listing,
        records=tuple(
            _record(listing.folder, known[file.key], file.key) for file in listing.files if file.key not in bad
        ),
        unreadable=tuple(sorted(unreadable, key=lambda item: item.key)),
    )


def _walk(folder: Path) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield every visible non-directory below `folder` with its key."""
    entered: set[tuple[int, int]] = set()
    waiting = [(str(folder), "")]
    while waiting:
        directory, prefix = waiting.pop()
        status = os.stat(directory)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        links: list[tuple[str, str]] = []
        directories: list[tuple[str, str]] = []
        for entry in visible:
            if _is_directory(entry):
                (links if entry.is_symlink() else directories).append((entry.path, f"{prefix}{entry.name}/"))
            else:
                yield entry, prefix + entry.name
        # Last in, first out: real directories before links, so that a link never takes a directory's place.
        waiting[:0] = reversed(links)
        waiting.extend(reversed(directories))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_current(known: Known | None, file: ImageFile) -> bool:
    return known is not None and known.size_bytes == file.size_bytes and known.mtime_ns == file.mtime_ns


def _read_all(
    folder: Path, files: list[ImageFile], max_workers: int | None
) -> Iterator[tuple[ImageFile, Known | Unreadable]]:
    if len(files) <= _READ_SERIALLY_UP_TO or max_workers == 1:
        yield from ((file, _read(folder, file)) for file in files)
        return
    tasks = [files[first : first + _FILES_PER_TASK] for first in range(0, len(files), _FILES_PER_TASK)]
    with ThreadPoolExecutor(max_workers or min(os.cpu_count() or 1, 8)) as pool:
        for task, results in zip(tasks, pool.map(lambda t: [_read(folder, f) for f in t], tasks), strict=True):
            yield from zip(task, results, strict=True)


def _read(folder: Path, file: ImageFile) -> Known | Unreadable:
    try:
        with open(f"{folder}{os.sep}{file.key}", "rb") as stream:  # noqa: PTH123
            data = stream.read()
        size = read_header(BytesIO(data)).size
    except UnreadableImageError as error:
        return Unreadable(key=file.key, reason=str(error) if data else "empty file")
    except OSError as error:
        return Unreadable(key=file.key, reason=error.strerror or str(error))
    return Known(size_bytes=file.size_bytes, mtime_ns=file.mtime_ns, size=size, content_id=content_hash(data))


def _record(folder: Path, known: Known, key: str) -> ImageRecord:
    return ImageRecord(
        path=folder / key,
        key=key,
        size=known.size,
        size_bytes=known.size_bytes,
        mtime_ns=known.mtime_ns,
        content_id=known.content_id,
    )
