"""What there is in the places of several datasets: listings, tables, headers, caption files. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.captions import needs_texts
from simpletuner.data.discovery import Progress, Scan, part_of, read_texts, scan
from simpletuner.data.image_index import ImageIndex, open_index
from simpletuner.data.listings import drop_listing, keep_listing, kept_listing
from simpletuner.data.records import (
    Size,
)
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import Listing
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.tables import TableRow
from simpletuner.problems import Problem


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """What there is in the places of several datasets. `problems`: what cannot be listed or read."""

    scans: Mapping[str, Scan]
    """By storage id."""
    texts: Mapping[str, Mapping[str, bytes]]
    """Caption files by key, by storage id, where they are wanted."""
    tables: Mapping[str, Mapping[str, TableRow]]
    """Rows by key, by dataset id."""
    problems: tuple[Problem, ...]

    def has(self, spec: DatasetSpec) -> bool:
        """Whether everything that a dataset needs was found."""
        place = spec.storage.id
        has_table = spec.table is None or spec.id in self.tables
        has_texts = not needs_texts(spec.captions) or place in self.texts
        return place in self.scans and has_table and has_texts


def find_images(
    specs: Sequence[DatasetSpec], *, cache_dir: Path, on_progress: Progress, max_workers: int | None = None
) -> FoundImages:
    """List every place, and read the tables, headers and caption files that are not known yet. See `build_plan`."""
    problems: list[Problem] = []
    listings = list_storages(specs, problems, cache_dir)
    tables = _read_tables(specs, listings, problems)
    with open_index(cache_dir) as index:
        scans = _scan_storages(specs, listings, tables, index, problems, on_progress, max_workers)
        texts = _read_texts(specs, scans, index, problems, max_workers)
    return FoundImages(scans=scans, texts=texts, tables=tables, problems=tuple(problems))


def has_kept_listing(spec: DatasetSpec, cache_dir: Path) -> bool:
    """Whether the storage of a dataset need not be listed again. Raises StorageError."""
    return spec.keeps_listing and kept_listing(spec.storage, cache_dir) is not None


def list_storages(
    specs: Sequence[DatasetSpec], problems: list[Problem], cache_dir: Path | None = None
) -> dict[str, Listing]:
    """List each storage once, though several datasets may use it. Kept listings are in `cache_dir`; they are used if
    that is what all datasets of the storage ask for."""
    listings: dict[str, Listing] = {}
    failed: set[str] = set()
    for spec in specs:
        name = spec.storage.id
        if name in listings or name in failed:
            continue
        keeps = cache_dir is not None and all(other.keeps_listing for other in specs if other.storage.id == name)
        try:
            kept = kept_listing(spec.storage, cache_dir) if cache_dir is not None and keeps else None
            listings[name] = spec.storage.list_files() if kept is None else kept
            if cache_dir is not None and not keeps:
                drop_listing(spec.storage, cache_dir)
            elif cache_dir is not None and kept is None:
                keep_listing(spec.storage, listings[name], cache_dir)
        except OSError as error:
            failed.add(name)
            problems.append(_listing_problem(spec, error))
    return listings


def _listing_problem(spec: DatasetSpec, error: OSError) -> Problem:
    name = spec.storage.id
    if isinstance(error, StorageError):
        return error.problem(spec.id)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Problem(code="E-DATASET-FOLDER-MISSING", params={"id": spec.id, "folder": name})
    params = {"id": spec.id, "folder": str(error.filename or name), "reason": error.strerror or str(error)}
    return Problem(code="E-DATASET-FOLDER-UNREADABLE", params=params)


def _read_tables(
    specs: Sequence[DatasetSpec], listings: Mapping[str, Listing], problems: list[Problem]
) -> dict[str, Mapping[str, TableRow]]:
    """What the tables say of the listed images, by dataset."""
    found: dict[str, Mapping[str, TableRow]] = {}
    for spec in specs:
        listing = listings.get(spec.storage.id)
        if spec.table is None or listing is None:
            continue
        try:
            found[spec.id] = spec.table.rows([file.key for file in listing.images])
        except StorageError as error:
            problems.append(error.problem(spec.id))
    return found


def _scan_storages(
    specs: Sequence[DatasetSpec],
    listings: Mapping[str, Listing],
    tables: Mapping[str, Mapping[str, TableRow]],
    index: ImageIndex,
    problems: list[Problem],
    on_progress: Progress,
    max_workers: int | None,
) -> dict[str, Scan]:
    total = sum(len(listing.images) for listing in listings.values())
    scans: dict[str, Scan] = {}
    before = 0
    for place, listing in listings.items():
        users = [spec for spec in specs if spec.storage.id == place]
        storage = users[0].storage
        progress = part_of(on_progress, before=before, total=total)
        told = _told_sizes(users, tables)
        try:
            scans[place] = scan(storage, listing, index, on_progress=progress, max_workers=max_workers, told=told)
        except StorageError as error:
            problems.append(error.problem(users[0].id))
        before += len(listing.images)
    return scans


def _told_sizes(users: Sequence[DatasetSpec], tables: Mapping[str, Mapping[str, TableRow]]) -> dict[str, Size]:
    """The sizes of a storage's images that a table tells to one of the datasets which use it, if all believe it."""
    if not all(spec.takes_sizes and spec.id in tables for spec in users):
        return {}
    return {key: row.size for spec in users for key, row in tables[spec.id].items() if row.size is not None}


def _read_texts(
    specs: Sequence[DatasetSpec],
    scans: Mapping[str, Scan],
    index: ImageIndex,
    problems: list[Problem],
    max_workers: int | None,
) -> dict[str, Mapping[str, bytes]]:
    """The caption files by storage, where they are wanted."""
    texts: dict[str, Mapping[str, bytes]] = {}
    wanted = {spec.storage.id: spec for spec in reversed(specs) if needs_texts(spec.captions)}
    for place in (place for place in scans if place in wanted):
        try:
            texts[place] = read_texts(scans[place], index, max_workers=max_workers)
        except StorageError as error:
            problems.append(error.problem(wanted[place].id))
    return texts
