"""From dataset specifications to a plan: which images, in which buckets, with which captions. No torch.

All problems of all datasets are found before any is reported.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from simpletuner.data.captions import BadCaption, CaptionFault, lacks_instance_prompt, needs_texts, read_captions
from simpletuner.data.discovery import Progress, Scan, read_texts, scan
from simpletuner.data.geometry import fit
from simpletuner.data.hashing import stable_hash
from simpletuner.data.image_index import ImageIndex, open_index
from simpletuner.data.records import (
    Bucket,
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
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import EXTENSIONS, Listing, Storage, Unreadable
from simpletuner.problems import DatasetError, Fix, Problem, Severity

_NAMES_IN_A_MESSAGE = 100
_FAULT_CODES = {
    CaptionFault.MISSING: "E-CAPTION-MISSING",
    CaptionFault.EMPTY: "E-CAPTION-EMPTY",
    CaptionFault.ENCODING: "E-CAPTION-ENCODING",
}


def build_plan(
    specs: Sequence[DatasetSpec],
    *,
    batch_size: int,
    seed: int,
    cache_dir: Path,
    on_progress: Progress,
    max_workers: int | None = None,
) -> Plan:
    """Scan every dataset and return what a run will train on.

    Args:
        batch_size: samples of one micro-batch, of datasets that have no `train_batch_size` of their own. Every bucket
            must fill at least one per epoch.
        seed: for random crops and aspects.
        cache_dir: where the index of known images is kept.
        on_progress: called with (images looked at, images found), over all datasets.
        max_workers: processes that read images; None: as many as are useful.
    Raises: DatasetError with every problem of every dataset.
    """
    problems: list[Problem] = []
    listings = _list_storages(specs, problems)
    datasets: list[DatasetPlan] = []
    with open_index(cache_dir) as index:
        scans = _scan_storages(specs, listings, index, on_progress, max_workers)
        texts: dict[str, Mapping[str, bytes]] = {}
        for spec in specs:
            scan_of = scans.get(spec.storage.id)
            if scan_of is not None and needs_texts(spec.captions) and spec.storage.id not in texts:
                texts[spec.storage.id] = read_texts(scan_of, index, max_workers=max_workers)
    problems += _unreadable_problems(specs, scans)
    for spec in specs:
        if spec.storage.id in scans:
            found = _plan_dataset(
                spec, scans[spec.storage.id], texts.get(spec.storage.id, {}), seed=seed, batch_size=batch_size
            )
            if isinstance(found, DatasetPlan):
                datasets.append(found)
            else:
                problems += found
    if not problems and not any(dataset.probability > 0 for dataset in datasets):
        problems.append(Problem(code="E-DATASET-NONE", params={"count": len(specs)}))
    if problems:
        raise DatasetError(problems)
    return Plan(datasets=tuple(datasets), fingerprint=_fingerprint(datasets))


def folder_problems(specs: Sequence[DatasetSpec]) -> list[Problem]:
    """What a listing tells without reading a file: a place that is missing, closed or without images."""
    problems: list[Problem] = []
    listings = _list_storages(specs, problems)
    empty = {name: listing for name, listing in listings.items() if not listing.images}
    for spec in specs:
        listing = empty.pop(spec.storage.id, None)
        if listing is not None:
            problems.append(_empty_problem(spec, listing))
    return problems


def unreadable_warnings(plan: Plan) -> list[Problem]:
    """One warning for each storage with images that are left out because they cannot be read."""
    by_place = {dataset.storage.id: dataset for dataset in plan.datasets if dataset.unreadable}
    return [
        _unreadable_problem(dataset.storage, dataset.unreadable, code="W-IMAGE-UNREADABLE", severity=Severity.WARNING)
        for dataset in by_place.values()
    ]


def minimum_repeats(num_images: int, batch_size: int) -> int:
    """The smallest `repeats` with which `num_images` of one bucket fill a batch."""
    return -(-batch_size // num_images) - 1


def _list_storages(specs: Sequence[DatasetSpec], problems: list[Problem]) -> dict[str, Listing]:
    """List each storage once, though several datasets may use it."""
    listings: dict[str, Listing] = {}
    failed: set[str] = set()
    for spec in specs:
        name = spec.storage.id
        if name in listings or name in failed:
            continue
        try:
            listings[name] = spec.storage.list_files()
        except OSError as error:
            failed.add(name)
            problems.append(listing_problem(spec.id, spec.storage, error))
    return listings


def listing_problem(dataset_id: str, storage: Storage, error: OSError) -> Problem:
    """What to tell of a storage that cannot be listed."""
    name = storage.id
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Problem(code="E-DATASET-FOLDER-MISSING", params={"id": dataset_id, "folder": name})
    params = {"id": dataset_id, "folder": str(error.filename or name), "reason": error.strerror or str(error)}
    return Problem(code="E-DATASET-FOLDER-UNREADABLE", params=params)


def _scan_storages(
    specs: Sequence[DatasetSpec],
    listings: Mapping[str, Listing],
    index: ImageIndex,
    on_progress: Progress,
    max_workers: int | None,
) -> dict[str, Scan]:
    storages = {spec.storage.id: spec.storage for spec in specs}
    total = sum(len(listing.images) for listing in listings.values())
    scans: dict[str, Scan] = {}
    before = 0
    for name, listing in listings.items():
        progress = partial(_report, on_progress, before, total)
        scans[name] = scan(storages[name], listing, index, on_progress=progress, max_workers=max_workers)
        before += len(listing.images)
    return scans


def _report(on_progress: Progress, before: int, total: int, done: int, _total_of_storage: int) -> None:
    on_progress(before + done, total)


def _plan_dataset(
    spec: DatasetSpec, found: Scan, texts: Mapping[str, bytes], *, seed: int, batch_size: int
) -> DatasetPlan | list[Problem]:
    if lacks_instance_prompt(spec.captions):
        return [Problem(code="E-CAPTION-NO-INSTANCE-PROMPT", params={"id": spec.id})]
    if not found.listing.images:
        return [_empty_problem(spec, found.listing)]
    used, dropped = _select(spec, found.records, seed=seed)
    if not used:
        return [_all_dropped_problem(spec, found, dropped)] if found.records else []
    by_size: dict[Size, list[Sample]] = defaultdict(list)
    bad_captions: list[BadCaption] = []
    for record, geometry in used:
        captions = read_captions(record.key, spec.captions, texts)
        if isinstance(captions, BadCaption):
            bad_captions.append(captions)
            continue
        sample = Sample(dataset_id=spec.id, record=record, geometry=geometry, captions=captions)
        by_size[geometry.target].append(sample)
    if bad_captions:
        return _caption_problems(spec, bad_captions)
    buckets = tuple(
        Bucket(size=size, samples=tuple(sorted(samples, key=lambda s: s.record.key)))
        for size, samples in sorted(by_size.items())
    )
    batch_size = spec.train_batch_size or batch_size
    short = [bucket for bucket in buckets if len(bucket.samples) * (spec.repeats + 1) < batch_size]
    if short:
        return [_no_batch_problem(spec, buckets, short, batch_size)]
    return DatasetPlan(
        id=spec.id,
        storage=spec.storage,
        buckets=buckets,
        repeats=spec.repeats,
        probability=spec.probability,
        is_regularisation=spec.is_regularisation_data,
        caption_dropout_probability=spec.caption_dropout_probability,
        dropped=tuple(dropped),
        unreadable=found.unreadable,
        batch_size=spec.train_batch_size,
    )


def _select(
    spec: DatasetSpec, records: Iterable[ImageRecord], *, seed: int
) -> tuple[list[tuple[ImageRecord, Geometry]], list[Dropped]]:
    used: list[tuple[ImageRecord, Geometry]] = []
    dropped: list[Dropped] = []
    for record in records:
        result = fit(record.size, spec.resize, seed=seed, content_id=record.key)
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


def _fingerprint(datasets: Sequence[DatasetPlan]) -> str:
    content = [
        [
            [d.id, d.repeats, d.probability, d.is_regularisation, d.caption_dropout_probability, d.batch_size],
            [
                [*_identity(s.record), s.geometry.target, s.geometry.intermediary, s.geometry.crop, s.captions]
                for bucket in d.buckets
                for s in bucket.samples
            ],
        ]
        for d in datasets
    ]
    return stable_hash("plan 2", json.dumps(content, separators=(",", ":")))


def _identity(record: ImageRecord) -> tuple[str, Size, int]:
    """What is known of an image's content without reading it: a copy of the folder elsewhere has the same."""
    return record.key, record.size, record.file.size_bytes


def plan_parts(plan: Plan) -> PlanParts:
    """What the fingerprint of a plan is made of, each thing for itself: to say what has changed between two plans."""
    samples = [[s for bucket in d.buckets for s in bucket.samples] for d in plan.datasets]
    settings = [
        [d.id, d.repeats, d.probability, d.is_regularisation, d.caption_dropout_probability, d.batch_size]
        for d in plan.datasets
    ]

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
    problems: dict[str, Problem] = {}
    for spec in specs:
        found = scans.get(spec.storage.id)
        if found is not None and found.unreadable and not (spec.skips_unreadable and found.records):
            problems[spec.storage.id] = _unreadable_problem(
                found.storage, found.unreadable, code="E-IMAGE-UNREADABLE", severity=Severity.ERROR
            )
    return list(problems.values())


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
            params = {"id": spec.id, "count": len(paths), "files": shown_names(paths)}
            problems.append(Problem(code=code, params=params))
    return problems


def _no_batch_problem(
    spec: DatasetSpec, buckets: Sequence[Bucket], short: Sequence[Bucket], batch_size: int
) -> Problem:
    needed = minimum_repeats(min(len(bucket.samples) for bucket in short), batch_size)
    return Problem(
        code="E-DATASET-NO-BATCH",
        params={
            "id": spec.id,
            "samples": sum(len(bucket.samples) for bucket in buckets),
            "buckets": len(buckets),
            "short": shown_names([f"{b.size[0]}x{b.size[1]}: {len(b.samples)}" for b in short]),
            "repeats": spec.repeats,
            "batch_size": batch_size,
            "minimum_repeats": needed,
        },
        fixes=[Fix(key="repeats", value=needed)],
    )
