"""Finds the images of a storage: a listing, then the header of what is not known yet. No torch.

Nothing is ever written where the images are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from simpletuner.data.hashing import content_hash
from simpletuner.data.image_index import ImageIndex, Known, KnownText
from simpletuner.data.images import UnreadableImageError, read_header, without_decoder_warnings
from simpletuner.data.records import TOLD, ImageRecord, Size
from simpletuner.data.storage import FileInfo, Listing, Storage, Unreadable
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.workers import ThreadPool, in_order, process_pool, until_done

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_PROCESSES_FROM_FILES = 4096
_FILES_PER_TASK = 64
_FILES_PER_COMMIT = 4096
_MAX_PROCESSES = 8
_THREADS_PER_REMOTE = 32

_Learned = TypeVar("_Learned")


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The images of a storage, sorted by key, and what is wrong with the rest."""

    storage: Storage
    listing: Listing
    records: tuple[ImageRecord, ...]
    unreadable: tuple[Unreadable, ...]


def scan(
    storage: Storage,
    listing: Listing,
    index: ImageIndex,
    *,
    on_progress: Progress,
    max_workers: int | None = None,
    told: Mapping[str, Size] = MappingProxyType({}),
) -> Scan:
    """Read the headers of the listed images that `index` does not know, and remember them there.

    Args:
        on_progress: called with (images known, images listed).
        max_workers: processes that read local files; None: as many as are useful. Remote ones are waited for in
            threads, whose number is not that of processors.
        told: upright sizes that a table tells, by key; these headers are not read.
    Raises: StorageError: the storage as a whole fails; what was read until then is remembered.
    """
    known = index.images(storage.id)
    index.save_images(storage.id, _take_told(storage, listing, known, told))
    fresh = [file for file in listing.images if not _is_current(known.get(file.key), file)]
    num_known = len(listing.images) - len(fresh)
    on_progress(num_known, len(listing.images))
    unreadable = list(listing.unreadable)
    saved: dict[str, Known] = {}
    try:
        for number, (file, result, is_settled) in enumerate(read_each(storage, fresh, _header, max_workers), start=1):
            if isinstance(result, Known):
                known[file.key] = result
                if is_settled:
                    saved[file.key] = result
            else:
                known.pop(file.key, None)
                reason = reason_of(result) if file.size_bytes else "empty file"
                unreadable.append(Unreadable(key=file.key, reason=reason))
            if len(saved) >= _FILES_PER_COMMIT:
                index.save_images(storage.id, saved)
                saved = {}
            on_progress(num_known + number, len(listing.images))
    finally:
        index.save_images(storage.id, saved)
    gone = known.keys() - {file.key for file in listing.images}
    index.forget(storage.id, images=gone)
    records: list[ImageRecord] = []
    for file in listing.images:
        found = known.get(file.key)
        if found is None:
            continue
        if found.reason is not None:
            unreadable.append(Unreadable(key=file.key, reason=found.reason))
        else:
            records.append(ImageRecord(file=file, size=found.size, traits=found.traits))
    return Scan(
        storage=storage,
        listing=listing,
        records=tuple(records),
        unreadable=tuple(sorted(unreadable, key=lambda item: item.key)),
    )


def part_of(on_progress: Progress, *, before: int, total: int) -> Progress:
    """The progress of one part of several, told as one of them all."""
    return lambda done, _total_of_part: on_progress(before + done, total)


def read_texts(found: Scan, index: ImageIndex, *, max_workers: int | None = None) -> dict[str, bytes]:
    """The caption files of a storage by key, read where `index` does not know them. Those that cannot be read are
    left out."""
    storage, texts = found.storage, found.listing.texts
    known = index.texts(storage.id)
    fresh = [file for key, file in texts.items() if not _is_current(known.get(key), file)]
    saved: dict[str, KnownText] = {}
    try:
        for file, result, is_settled in read_each(storage, fresh, _text, max_workers, is_light=True):
            if not isinstance(result, KnownText):
                known.pop(file.key, None)
                continue
            known[file.key] = result
            if is_settled:
                saved[file.key] = result
    finally:
        index.save_texts(storage.id, saved)
    gone = known.keys() - texts.keys()
    index.forget(storage.id, texts=gone)
    return {key: text.content for key, text in known.items() if key not in gone}


def learn_contents(
    storage: Storage,
    files: Sequence[FileInfo],
    index: ImageIndex,
    *,
    on_progress: Progress,
    max_workers: int | None = None,
) -> tuple[dict[str, str], dict[str, OSError]]:
    """The content id of every file by key; those that `index` does not know are read in full and remembered there.

    Returns them, and why the others could not be read, by key.
    """
    known = index.images(storage.id)
    contents = _told_contents(storage, files, known)
    unknown = [file for file in files if file.key not in contents]
    failed: dict[str, OSError] = {}
    saved: dict[str, Known] = {}
    on_progress(len(contents), len(files))
    try:
        for file, result, is_settled in read_each(storage, unknown, _content, max_workers):
            if isinstance(result, Exception):
                assert isinstance(result, OSError)
                failed[file.key] = result
                continue
            contents[file.key] = result
            row = known.get(file.key)
            if is_settled and row is not None and _is_current(row, file):
                saved[file.key] = replace(row, content_id=result)
            if len(saved) >= _FILES_PER_COMMIT:
                index.save_images(storage.id, saved)
                saved = {}
            on_progress(len(contents), len(files))
    finally:
        index.save_images(storage.id, saved)
    return contents, failed


def known_contents(storage: Storage, files: Sequence[FileInfo], index: ImageIndex) -> dict[str, str]:
    """The content ids that need no reading, by key."""
    return _told_contents(storage, files, index.images(storage.id))


def _told_contents(storage: Storage, files: Sequence[FileInfo], known: Mapping[str, Known]) -> dict[str, str]:
    contents: dict[str, str] = {}
    for file in files:
        row = known.get(file.key)
        content_id = storage.content_of(file)
        if content_id is None and row is not None and _is_current(row, file):
            content_id = row.content_id
        if content_id is not None:
            contents[file.key] = content_id
    return contents


def remember_unreadable(storage: Storage, reasons: dict[FileInfo, str], index: ImageIndex) -> None:
    """Keep in mind which images turned out not to be whole when they were decoded."""
    rows = {
        file.key: Known(size_bytes=file.size_bytes, version=file.version, size=(0, 0), reason=reason)
        for file, reason in reasons.items()
    }
    index.save_images(storage.id, rows)


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_each(
    storage: Storage,
    files: Sequence[FileInfo],
    read: Callable[[Storage, FileInfo], _Learned],
    max_workers: int | None,
    *,
    is_light: bool = False,
) -> Iterator[tuple[FileInfo, _Learned | UnreadableImageError | OSError, bool]]:
    """Yield (file, what `read` made of it or why it could not, whether its version was settled), in order.

    Many local files are read in processes, remote ones in threads; `is_light` work is not worth a process.
    Raises: StorageError: it is not one file that fails but the storage.
    """
    tasks = [tuple(files[first : first + _FILES_PER_TASK]) for first in range(0, len(files), _FILES_PER_TASK)]
    work = partial(_read_task, storage, read)
    with ExitStack() as stack:
        stack.enter_context(without_decoder_warnings())
        results: Iterator[tuple[tuple[FileInfo, ...], list[tuple[_Learned | UnreadableImageError | OSError, bool]]]]
        num_workers = _num_workers(storage, len(files), max_workers, is_light=is_light)
        if num_workers == 1:
            results = ((task, work(task)) for task in tasks)
        else:
            pool: Executor = ThreadPool(num_workers) if storage.is_remote else process_pool(num_workers)
            if storage.is_remote:
                tasks = [(file,) for file in files]
            stack.enter_context(until_done(pool))
            results = in_order(work, tasks, pool, num_ahead=4 * num_workers)
        for task, found in results:
            for file, (result, is_settled) in zip(task, found, strict=True):
                if isinstance(result, StorageError):
                    raise result
                yield file, result, is_settled


def _take_told(
    storage: Storage, listing: Listing, known: dict[str, Known], told: Mapping[str, Size]
) -> dict[str, Known]:
    """Make `known` say what a table tells, and no longer what one told before. Returns the rows to remember."""
    changed: dict[str, Known] = {}
    for file in listing.images:
        row, size = known.get(file.key), told.get(file.key)
        if row is not None and row.traits == TOLD and size is None:
            del known[file.key]
        if size is None or (_is_current(row, file) and row is not None and (row.reason or row.size == size)):
            continue
        kept = row.content_id if row is not None and _is_current(row, file) else None
        known[file.key] = Known(
            size_bytes=file.size_bytes, version=file.version, size=size, traits=TOLD, content_id=kept
        )
        if storage.is_settled(file):
            changed[file.key] = known[file.key]
    return changed


def _num_workers(storage: Storage, num_files: int, max_workers: int | None, *, is_light: bool) -> int:
    if storage.is_remote:
        return min(max(num_files, 1), _THREADS_PER_REMOTE)
    if is_light or num_files < _PROCESSES_FROM_FILES:
        return 1
    return min(max_workers or os.cpu_count() or 1, _MAX_PROCESSES)


def _read_task(
    storage: Storage, read: Callable[[Storage, FileInfo], _Learned], files: Sequence[FileInfo]
) -> list[tuple[_Learned | UnreadableImageError | OSError, bool]]:
    return [_read(storage, read, file) for file in files]


def _read(
    storage: Storage, read: Callable[[Storage, FileInfo], _Learned], file: FileInfo
) -> tuple[_Learned | UnreadableImageError | OSError, bool]:
    is_settled = storage.is_settled(file)
    try:
        return read(storage, file), is_settled
    except (UnreadableImageError, OSError) as error:
        return error, is_settled


def _header(storage: Storage, file: FileInfo) -> Known:
    with storage.open(file) as stream:
        header = read_header(stream)
    traits = " ".join(sorted(header.traits))
    return Known(size_bytes=file.size_bytes, version=file.version, size=header.size, traits=traits)


def _text(storage: Storage, file: FileInfo) -> KnownText:
    return KnownText(size_bytes=file.size_bytes, version=file.version, content=storage.read(file))


def _content(storage: Storage, file: FileInfo) -> str:
    return content_hash(storage.read(file))


def _is_current(known: Known | KnownText | None, file: FileInfo) -> bool:
    return known is not None and known.size_bytes == file.size_bytes and known.version == file.version
