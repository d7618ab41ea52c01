"""From dataset specifications to a plan: which images, in which buckets, with which captions. No torch.

All problems of all datasets are found before any is reported.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simpletuner.data.batching import TooFew, settle
from simpletuner.data.captions import BadCaption, lacks_instance_prompt, read_captions
from simpletuner.data.collector import collector_paused
from simpletuner.data.discovery import Progress
from simpletuner.data.finding import FoundImages, find_images, list_storages
from simpletuner.data.geometry import fit
from simpletuner.data.hashing import stable_hash
from simpletuner.data.plan_problems import (
    all_dropped_problem,
    caption_problems,
    empty_problem,
    no_batch_problem,
    skipped_warnings,
    unreadable_problem,
    unreadable_problems,
)
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
from simpletuner.data.storage import LocalStorage
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.problems import DatasetError, Problem, Severity


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
    with collector_paused():
        found = find_images(specs, cache_dir=cache_dir, on_progress=on_progress, max_workers=max_workers)
        datasets, problems = plan_datasets(specs, found, seed=seed, batch_size=batch_size)
        if problems:
            raise DatasetError([*problems, *skipped_warnings(specs, found.scans)])
        return make_plan(datasets, sampling)


def make_plan(datasets: Sequence[DatasetPlan], sampling: Sampling) -> Plan:
    """The plan of a run that uses these datasets."""
    return Plan(datasets=tuple(datasets), fingerprint=_fingerprint(datasets, sampling), sampling=sampling)


@dataclass(frozen=True, kw_only=True)
class SortedImages:
    """The images of one dataset: in buckets, left out by its options, or without a caption."""

    buckets: tuple[Bucket, ...]
    dropped: tuple[Dropped, ...]
    bad_captions: tuple[BadCaption, ...]


def plan_datasets(
    specs: Sequence[DatasetSpec], found: FoundImages, *, seed: int, batch_size: int
) -> tuple[tuple[DatasetPlan, ...], list[Problem]]:
    """The datasets that a run can use, and everything that keeps it from starting. See `build_plan`."""
    problems = [*found.problems, *unreadable_problems(specs, found.scans)]
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


def folder_problems(specs: Sequence[DatasetSpec]) -> list[Problem]:
    """What local listings and tables tell without reading an image, and without a network: a folder that is missing,
    closed or without images, a table that is missing or lacks a column."""
    problems: list[Problem] = []
    listings = list_storages([spec for spec in specs if isinstance(spec.storage, LocalStorage)], problems)
    empty = {name: listing for name, listing in listings.items() if not listing.images}
    for spec in specs:
        listing = empty.pop(spec.storage.id, None)
        if listing is not None:
            problems.append(empty_problem(spec, listing))
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
        unreadable_problem(dataset.storage, dataset.unreadable, code="W-IMAGE-UNREADABLE", severity=Severity.WARNING)
        for dataset in by_place.values()
    ]


def _plan_dataset(spec: DatasetSpec, found: FoundImages, *, seed: int, batch_size: int) -> DatasetPlan | list[Problem]:
    scanned = found.scans[spec.storage.id]
    if lacks_instance_prompt(spec.captions):
        return [Problem(code="E-CAPTION-NO-INSTANCE-PROMPT", params={"id": spec.id})]
    if not scanned.listing.images:
        return [empty_problem(spec, scanned.listing)]
    in_order = sort_images(spec, found, seed=seed)
    if in_order.bad_captions:
        return caption_problems(spec, in_order.bad_captions)
    buckets, dropped = in_order.buckets, list(in_order.dropped)
    if not buckets:
        return [all_dropped_problem(spec, scanned, dropped)] if scanned.records else []
    batch_size = spec.train_batch_size or batch_size
    settled = settle(buckets, spec, batch_size)
    if isinstance(settled, TooFew):
        return [no_batch_problem(spec, buckets, settled, batch_size)]
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
