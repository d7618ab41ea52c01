"""From dataset specifications to a plan: which images, in which buckets, with which captions. No torch.

All problems of all datasets are found before any is reported.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from simpletuner.data.batching import TooFew, settle
from simpletuner.data.captions import BadCaption, CaptionFault, lacks_instance_prompt, needs_texts, read_captions
from simpletuner.data.discovery import Progress, Scan, read_texts, scan
from simpletuner.data.geometry import fit
from simpletuner.data.hashing import stable_hash
from simpletuner.data.image_index import ImageIndex, open_index
from simpletuner.data.listings import drop_listing, keep_listing, kept_listing
from simpletuner.data.records import (
    Bucket,
    BucketSize,
    DatasetPlan,
    Dropped,
    DropReason,
    Geometry,
    ImageRecord,
    Plan,
    PlanParts,
    Sample,
    Size,
)
from simpletuner.data.spec import DatasetSpec, Sampling
from simpletuner.data.storage import EXTENSIONS, Listing, LocalStorage, Storage, Unreadable
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.data.tables import TableRow
from simpletuner.problems import DatasetError, Fix, Problem, Severity

_NAMES_IN_A_MESSAGE = 100
_FAULT_CODES = {
    CaptionFault.MISSING: "E-CAPTION-MISSING",
    CaptionFault.EMPTY: "E-CAPTION-EMPTY",
    CaptionFault.ENCODING: "E-CAPTION-ENCODING",
    CaptionFault.FILTERED: "E-CAPTION-FILTERED",
    CaptionFault.NO_ROW: "E-CAPTION-ROW",
}


def build_plan(
    specs: Sequence[DatasetSpec],
    *,
    batch_size: int,
    seed: int,
    cache_dir: Path,
    on_progress: Progress,
    max_workers: int | None = None,
    sampling: Sampling = "auto-weighting",
) -> Plan:
    """Scan every dataset and return what a run will train on.

    Args:
        batch_size: samples of one micro-batch, of datasets that have no `train_batch_size` of their own. Every bucket
            must fill at least one per epoch.
        seed: for random crops and aspects.
        cache_dir: where the index of known images is kept.
        on_progress: called with (images looked at, images found), over all datasets.
        max_workers: processes that read images; None: as many as are useful.
        sampling: what a dataset's share of the batches follows.
    Raises: DatasetError with every problem of every dataset.
    """
    found = find_images(specs, cache_dir=cache_dir, on_progress=on_progress, max_workers=max_workers)
    datasets, problems = plan_datasets(specs, found, seed=seed, batch_size=batch_size)
    if problems:
        raise DatasetError([*problems, *_skipped_warnings(specs, found.scans)])
    return make_plan(datasets, sampling)


def make_plan(datasets: Sequence[DatasetPlan], sampling: Sampling) -> Plan:
    """The plan of a run that uses these datasets."""
    return Plan(datasets=tuple(datasets), fingerprint=_fingerprint(datasets, sampling), sampling=sampling)


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


@dataclass(frozen=True, kw_only=True)
class SortedImages:
    """The images of one dataset: in buckets, left out by its options, or without a caption."""

    buckets: tuple[Bucket, ...]
    dropped: tuple[Dropped, ...]
    bad_captions: tuple[BadCaption, ...]


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


def plan_datasets(
    specs: Sequence[DatasetSpec], found: FoundImages, *, seed: int, batch_size: int
) -> tuple[tuple[DatasetPlan, ...], list[Problem]]:
    """The datasets that a run can use, and everything that keeps it from starting. See `build_plan`."""
    problems = [*found.problems, *_unreadable_problems(specs, found.scans)]
    datasets: list[DatasetPlan] = []
    for spec in filter(found.has, specs):
        planned = _plan_dataset(spec, found, seed=seed, batch_size=batch_size)
        if isinstance(planned, DatasetPlan):
            datasets.append(planned)
        else:
            problems += planned
    if not problems and not any(dataset.probability > 0 for dataset in datasets):
        problems.append(Problem(code="E-DATASET-NONE", params={"count": len(specs)}))
    return tuple(datasets), problems


def sort_images(spec: DatasetSpec, found: FoundImages, *, seed: int) -> SortedImages:
    """Which images of a dataset that was found are used, at what size and with which captions."""
    place = spec.storage.id
    texts, rows = found.texts.get(place, {}), found.tables.get(spec.id, {})
    used, dropped = _select(spec, found.scans[place].records, seed=seed)
    by_size: dict[Size, list[Sample]] = defaultdict(list)
    bad_captions: list[BadCaption] = []
    for record, geometry in used:
        captions = read_captions(record.key, spec.captions, texts, rows)
        if isinstance(captions, BadCaption):
            bad_captions.append(captions)
            continue
        sample = Sample(dataset_id=spec.id, record=record, geometry=geometry, captions=captions)
        by_size[geometry.target].append(sample)
    return SortedImages(
        buckets=tuple(
            Bucket(size=size, samples=tuple(sorted(samples, key=lambda s: s.record.key)))
            for size, samples in sorted(by_size.items())
        ),
        dropped=tuple(dropped),
        bad_captions=tuple(bad_captions),
    )


def has_kept_listing(spec: DatasetSpec, cache_dir: Path) -> bool:
    """Whether the storage of a dataset need not be listed again. Raises StorageError."""
    return spec.keeps_listing and kept_listing(spec.storage, cache_dir) is not None


def folder_problems(specs: Sequence[DatasetSpec]) -> list[Problem]:
    """What local listings and tables tell without reading an image, and without a network: a folder that is missing,
    closed or without images, a table that is missing or lacks a column."""
    problems: list[Problem] = []
    listings = list_storages([spec for spec in specs if isinstance(spec.storage, LocalStorage)], problems)
    empty = {name: listing for name, listing in listings.items() if not listing.images}
    for spec in specs:
        listing = empty.pop(spec.storage.id, None)
        if listing is not None:
            problems.append(_empty_problem(spec, listing))
        try:
            if isinstance(spec.storage, UrlStorage):
                spec.storage.check()
            if spec.table is not None:
                spec.table.check()
        except StorageError as error:
            problems.append(error.problem(spec.id))
    return problems


def unreadable_warnings(plan: Plan) -> list[Problem]:
    """One warning for each storage with images that are left out because they cannot be read."""
    by_place = {dataset.storage.id: dataset for dataset in plan.datasets if dataset.unreadable}
    return [
        _unreadable_problem(dataset.storage, dataset.unreadable, code="W-IMAGE-UNREADABLE", severity=Severity.WARNING)
        for dataset in by_place.values()
    ]


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
        progress = partial(_report, on_progress, before, total)
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


def _report(on_progress: Progress, before: int, total: int, done: int, _total_of_storage: int) -> None:
    on_progress(before + done, total)


def _plan_dataset(spec: DatasetSpec, found: FoundImages, *, seed: int, batch_size: int) -> DatasetPlan | list[Problem]:
    scanned = found.scans[spec.storage.id]
    if lacks_instance_prompt(spec.captions):
        return [Problem(code="E-CAPTION-NO-INSTANCE-PROMPT", params={"id": spec.id})]
    if not scanned.listing.images:
        return [_empty_problem(spec, scanned.listing)]
    in_order = sort_images(spec, found, seed=seed)
    if in_order.bad_captions:
        return _caption_problems(spec, in_order.bad_captions)
    buckets, dropped = in_order.buckets, list(in_order.dropped)
    if not buckets:
        return [_all_dropped_problem(spec, scanned, dropped)] if scanned.records else []
    batch_size = spec.train_batch_size or batch_size
    settled = settle(buckets, spec, batch_size)
    if isinstance(settled, TooFew):
        return [_no_batch_problem(spec, buckets, settled, batch_size)]
    dropped += [
        Dropped(key=sample.record.key, reason=DropReason.SHORT_BUCKET)
        for bucket in settled.pruned
        for sample in bucket.samples
    ]
    return DatasetPlan(
        id=spec.id,
        storage=spec.storage,
        buckets=settled.buckets,
        repeats=spec.repeats,
        probability=spec.probability,
        is_regularisation=spec.is_regularisation_data,
        caption_dropout_probability=spec.caption_dropout_probability,
        dropped=tuple(dropped),
        unreadable=scanned.unreadable,
        batch_size=spec.train_batch_size,
        batch_mixing=spec.batch_mixing,
        takes_fresh_crops=spec.takes_fresh_crops,
        schedule=spec.schedule,
        filled=settled.filled,
        pruned=tuple(BucketSize(size=bucket.size, num_images=len(bucket.samples)) for bucket in settled.pruned),
    )


def _select(
    spec: DatasetSpec, records: Iterable[ImageRecord], *, seed: int
) -> tuple[list[tuple[ImageRecord, Geometry]], list[Dropped]]:
    used: list[tuple[ImageRecord, Geometry]] = []
    dropped: list[Dropped] = []
    for record in records:
        result = fit(record.size, spec.resize, seed=seed, key=record.key)
        if isinstance(result, DropReason):
            dropped.append(Dropped(key=record.key, reason=result))
        else:
            used.append((record, result))
    if spec.max_num_samples is not None and len(used) > spec.max_num_samples:
        # The subset is the dataset's own: neither the seed nor another image changes who is in it.
        used.sort(key=lambda pair: stable_hash(spec.id, pair[0].key))
        dropped += [Dropped(key=record.key, reason=DropReason.LIMIT) for record, _ in used[spec.max_num_samples :]]
        del used[spec.max_num_samples :]
    return used, dropped


def _settings(dataset: DatasetPlan) -> list[object]:
    """What decides how the images of a dataset are used."""
    return [
        dataset.id,
        dataset.repeats,
        dataset.probability,
        dataset.is_regularisation,
        dataset.caption_dropout_probability,
        dataset.batch_size,
        dataset.batch_mixing,
        dataset.takes_fresh_crops,
        asdict(dataset.schedule),
    ]


def _fingerprint(datasets: Sequence[DatasetPlan], sampling: Sampling) -> str:
    content = [
        [
            _settings(d),
            [
                [*_identity(s.record), s.geometry.target, s.geometry.intermediary, s.geometry.crop, s.captions]
                for bucket in d.buckets
                for s in bucket.samples
            ],
        ]
        for d in datasets
    ]
    return stable_hash("plan 3", sampling, json.dumps(content, separators=(",", ":")))


def _identity(record: ImageRecord) -> tuple[str, Size, int]:
    """What is known of an image's content without reading it: a copy of the folder elsewhere has the same."""
    return record.key, record.size, record.file.size_bytes


def plan_parts(plan: Plan) -> PlanParts:
    """What the fingerprint of a plan is made of, each thing for itself: to say what has changed between two plans."""
    samples = [[s for bucket in d.buckets for s in bucket.samples] for d in plan.datasets]
    settings = [plan.sampling, *map(_settings, plan.datasets)]

    def fingerprint(*content: object) -> str:
        return stable_hash("plan part 2", json.dumps(content, separators=(",", ":")))

    def of_samples(what: Callable[[Sample], object]) -> str:
        return fingerprint(*(sorted((*_identity(s.record), what(s)) for s in dataset) for dataset in samples))

    return PlanParts(
        num_images=sum(dataset.num_images for dataset in plan.datasets),
        images=of_samples(lambda s: 0),
        captions=of_samples(lambda s: s.captions),
        crops=of_samples(lambda s: (s.geometry.target, s.geometry.intermediary, s.geometry.crop)),
        datasets=fingerprint(settings),
    )


def shown_names(names: Sequence[str]) -> str:
    """The names as a message tells them, not too many."""
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" (+{more})" if more > 0 else "")


def _unreadable_problems(specs: Sequence[DatasetSpec], scans: Mapping[str, Scan]) -> list[Problem]:
    """Errors for images that cannot be read: where a dataset does not skip them, or where they are all there is."""
    return [
        _unreadable_problem(found.storage, found.unreadable, code="E-IMAGE-UNREADABLE", severity=Severity.ERROR)
        for found in scans.values()
        if found.unreadable and not _skips(specs, found)
    ]


def _skipped_warnings(specs: Sequence[DatasetSpec], scans: Mapping[str, Scan]) -> list[Problem]:
    """What to say beside errors of those that would have been left out."""
    return [
        _unreadable_problem(found.storage, found.unreadable, code="W-IMAGE-UNREADABLE", severity=Severity.WARNING)
        for found in scans.values()
        if found.unreadable and _skips(specs, found)
    ]


def _skips(specs: Sequence[DatasetSpec], found: Scan) -> bool:
    """Whether all datasets of a storage leave out what cannot be read, and something is left."""
    users = (spec for spec in specs if spec.storage.id == found.storage.id)
    return bool(found.records) and all(spec.skips_unreadable for spec in users)


def _unreadable_problem(
    storage: Storage, unreadable: Sequence[Unreadable], *, code: str, severity: Severity
) -> Problem:
    names = [f"{item.key} ({item.reason})" for item in unreadable]
    params = {"count": len(names), "folder": storage.id, "files": shown_names(names)}
    return Problem(code=code, severity=severity, params=params)


def _empty_problem(spec: DatasetSpec, listing: Listing) -> Problem:
    others = ", ".join(f"{other.count} {other.extension or '?'}" for other in listing.others)
    return Problem(
        code="E-DATASET-EMPTY",
        params={
            "id": spec.id,
            "folder": spec.storage.id,
            "extensions": " ".join(EXTENSIONS),
            "count": sum(other.count for other in listing.others),
            "others": others or "-",
        },
    )


def _all_dropped_problem(spec: DatasetSpec, found: Scan, dropped: Sequence[Dropped]) -> Problem:
    counts = Counter(item.reason for item in dropped)
    largest = max((record.size for record in found.records), key=lambda size: size[0] * size[1])
    return Problem(
        code="E-DATASET-ALL-DROPPED",
        params={
            "id": spec.id,
            "folder": found.storage.id,
            "count": len(dropped),
            "largest": f"{largest[0]}x{largest[1]}",
            "minimum_image_size": spec.resize.minimum_image_size or "-",
            "resolution_type": spec.resize.resolution_type,
            **{reason.value: counts[reason] for reason in DropReason},
        },
    )


def _caption_problems(spec: DatasetSpec, bad: Sequence[BadCaption]) -> list[Problem]:
    problems: list[Problem] = []
    for fault, code in _FAULT_CODES.items():
        paths = [spec.storage.shown(item.key) for item in bad if item.fault is fault]
        if paths:
            table = spec.table.shown if spec.table is not None else "-"
            params = {"id": spec.id, "count": len(paths), "files": shown_names(paths), "table": table}
            problems.append(Problem(code=code, params=params))
    return problems


def _no_batch_problem(spec: DatasetSpec, buckets: Sequence[Bucket], few: TooFew, batch_size: int) -> Problem:
    params: dict[str, object] = {
        "id": spec.id,
        "samples": sum(len(bucket.samples) for bucket in buckets),
        "buckets": len(buckets),
        "short": shown_names([f"{b.size[0]}x{b.size[1]}: {b.num_images}" for b in few.short]),
        "repeats": spec.repeats,
        "batch_size": batch_size,
        "minimum_repeats": few.minimum_repeats,
    }
    fixes = (Fix(key="repeats", value=few.minimum_repeats),)
    if spec.batch_mixing == "packed":
        return Problem(code="E-DATASET-NO-BATCH-PACKED", params=params, fixes=fixes)
    return Problem(code="E-DATASET-NO-BATCH", params=params, fixes=(*fixes, Fix(key="batch_mixing", value="packed")))
