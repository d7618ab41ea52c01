"""From dataset specifications to a plan: which images, in which buckets, with which captions. No torch.

All problems of all datasets are found before any is reported.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from simpletuner.data.batching import TooFew, settle
from simpletuner.data.captions import BadCaption, CaptionFault, lacks_instance_prompt, read_captions
from simpletuner.data.discovery import Listing, Progress, Scan, list_images, scan
from simpletuner.data.geometry import fit
from simpletuner.data.hashing import stable_hash
from simpletuner.data.image_index import open_index
from simpletuner.data.images import EXTENSIONS
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
from simpletuner.problems import DatasetError, Fix, Problem

_NAMES_IN_A_MESSAGE = 100
_FAULT_CODES = {
    CaptionFault.MISSING: "E-CAPTION-MISSING",
    CaptionFault.EMPTY: "E-CAPTION-EMPTY",
    CaptionFault.ENCODING: "E-CAPTION-ENCODING",
    CaptionFault.FILTERED: "E-CAPTION-FILTERED",
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
        max_workers: threads that read images; None: up to 8.
        sampling: what a dataset's share of the batches follows.
    Raises: DatasetError with every problem of every dataset.
    """
    problems: list[Problem] = []
    scans = _scan_folders(_list_folders(specs, problems), cache_dir, on_progress, max_workers)
    problems += [_unreadable_problem(done) for done in scans.values() if done.unreadable]
    datasets: list[DatasetPlan] = []
    for spec in specs:
        folder = _absolute(spec.instance_data_dir)
        if folder in scans:
            found = _plan_dataset(spec, scans[folder], seed=seed, batch_size=batch_size)
            if isinstance(found, DatasetPlan):
                datasets.append(found)
            else:
                problems += found
    if not problems and not any(dataset.probability > 0 for dataset in datasets):
        problems.append(Problem(code="E-DATASET-NONE", params={"count": len(specs)}))
    if problems:
        raise DatasetError(problems)
    return Plan(datasets=tuple(datasets), fingerprint=_fingerprint(datasets, sampling), sampling=sampling)


def folder_problems(specs: Sequence[DatasetSpec]) -> list[Problem]:
    """What a listing of the folders tells without reading a file: one that is missing, closed or without images."""
    problems: list[Problem] = []
    listings = _list_folders(specs, problems)
    empty = {folder: listing for folder, listing in listings.items() if not listing.files}
    for spec in specs:
        listing = empty.pop(_absolute(spec.instance_data_dir), None)
        if listing is not None:
            problems.append(_empty_problem(spec, listing))
    return problems


def _list_folders(specs: Sequence[DatasetSpec], problems: list[Problem]) -> dict[Path, Listing]:
    """List each folder once, though several datasets may use it."""
    listings: dict[Path, Listing] = {}
    for spec in specs:
        folder = _absolute(spec.instance_data_dir)
        if folder in listings:
            continue
        params: dict[str, object] = {"id": spec.id, "folder": str(folder)}
        if not folder.is_dir():
            problems.append(Problem(code="E-DATASET-FOLDER-MISSING", params=params))
            continue
        try:
            listings[folder] = list_images(folder)
        except OSError as error:
            params |= {"folder": str(error.filename or folder), "reason": error.strerror or str(error)}
            problems.append(Problem(code="E-DATASET-FOLDER-UNREADABLE", params=params))
    return listings


def _scan_folders(
    listings: dict[Path, Listing], cache_dir: Path, on_progress: Progress, max_workers: int | None
) -> dict[Path, Scan]:
    total = sum(len(listing.files) for listing in listings.values())
    scans: dict[Path, Scan] = {}
    with open_index(cache_dir) as index:
        for folder, listing in listings.items():
            before = sum(len(done.listing.files) for done in scans.values())
            progress = partial(_report, on_progress, before, total)
            scans[folder] = scan(listing, index, on_progress=progress, max_workers=max_workers)
    return scans


def _report(on_progress: Progress, before: int, total: int, done: int, _total_of_folder: int) -> None:
    on_progress(before + done, total)


def _absolute(folder: Path) -> Path:
    return Path(os.path.abspath(folder))  # noqa: PTH100 (Path.absolute keeps "..", Path.resolve follows links)


def _plan_dataset(spec: DatasetSpec, found: Scan, *, seed: int, batch_size: int) -> DatasetPlan | list[Problem]:
    if lacks_instance_prompt(spec.captions):
        return [Problem(code="E-CAPTION-NO-INSTANCE-PROMPT", params={"id": spec.id})]
    if not found.listing.files:
        return [_empty_problem(spec, found.listing)]
    used, dropped = _select(spec, found.records, seed=seed)
    if not used:
        return [_all_dropped_problem(spec, found, dropped)] if found.records else []
    by_size: dict[Size, list[Sample]] = defaultdict(list)
    bad_captions: list[BadCaption] = []
    for record, geometry in used:
        captions = read_captions(record.path, spec.captions)
        if isinstance(captions, BadCaption):
            bad_captions.append(captions)
            continue
        sample = Sample(dataset_id=spec.id, record=record, geometry=geometry, captions=captions)
        by_size[geometry.target].append(sample)
    if bad_captions:
        return _caption_problems(spec, bad_captions)
    buckets = tuple(
        # By content, so that renaming files does not change the order of training.
        Bucket(size=size, samples=tuple(sorted(samples, key=lambda s: (s.record.content_id, s.record.key))))
        for size, samples in sorted(by_size.items())
    )
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
        buckets=settled.buckets,
        repeats=spec.repeats,
        probability=spec.probability,
        is_regularisation=spec.is_regularisation_data,
        caption_dropout_probability=spec.caption_dropout_probability,
        dropped=tuple(dropped),
        batch_size=spec.train_batch_size,
        batch_mixing=spec.batch_mixing,
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
        result = fit(record.size, spec.resize, seed=seed, content_id=record.content_id)
        if isinstance(result, DropReason):
            dropped.append(Dropped(key=record.key, reason=result))
        else:
            used.append((record, result))
    if spec.max_num_samples is not None and len(used) > spec.max_num_samples:
        # The subset is the dataset's own: neither the seed nor another image's name changes who is in it.
        used.sort(key=lambda pair: stable_hash(spec.id, pair[0].content_id, pair[0].key))
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
        asdict(dataset.schedule),
    ]


def _fingerprint(datasets: Sequence[DatasetPlan], sampling: Sampling) -> str:
    content = [
        [
            _settings(d),
            [
                [s.record.content_id, s.geometry.target, s.geometry.intermediary, s.geometry.crop, s.captions]
                for bucket in d.buckets
                for s in bucket.samples
            ],
        ]
        for d in datasets
    ]
    return stable_hash("plan 2", sampling, json.dumps(content, separators=(",", ":")))


def plan_parts(plan: Plan) -> PlanParts:
    """What the fingerprint of a plan is made of, each thing for itself: to say what has changed between two plans."""
    samples = [[s for bucket in d.buckets for s in bucket.samples] for d in plan.datasets]
    settings = [plan.sampling, *map(_settings, plan.datasets)]

    def fingerprint(*content: object) -> str:
        return stable_hash("plan part 1", json.dumps(content, separators=(",", ":")))

    def of_samples(what: Callable[[Sample], object]) -> str:
        return fingerprint(*(sorted((s.record.content_id, what(s)) for s in dataset) for dataset in samples))

    return PlanParts(
        num_images=sum(dataset.num_images for dataset in plan.datasets),
        images=of_samples(lambda s: 0),
        captions=of_samples(lambda s: s.captions),
        crops=of_samples(lambda s: (s.geometry.target, s.geometry.intermediary, s.geometry.crop)),
        datasets=fingerprint(settings),
    )


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" (+{more})" if more > 0 else "")


def _unreadable_problem(found: Scan) -> Problem:
    names = [f"{item.key} ({item.reason})" for item in found.unreadable]
    params = {"count": len(names), "folder": str(found.listing.folder), "files": _names(names)}
    return Problem(code="E-IMAGE-UNREADABLE", params=params)


def _empty_problem(spec: DatasetSpec, listing: Listing) -> Problem:
    others = ", ".join(f"{other.count} {other.extension or '?'}" for other in listing.others)
    return Problem(
        code="E-DATASET-EMPTY",
        params={
            "id": spec.id,
            "folder": str(listing.folder),
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
            "folder": str(found.listing.folder),
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
        paths = [str(item.path) for item in bad if item.fault is fault]
        if paths:
            params = {"id": spec.id, "count": len(paths), "files": _names(paths)}
            problems.append(Problem(code=code, params=params))
    return problems


def _no_batch_problem(spec: DatasetSpec, buckets: Sequence[Bucket], few: TooFew, batch_size: int) -> Problem:
    params: dict[str, object] = {
        "id": spec.id,
        "samples": sum(len(bucket.samples) for bucket in buckets),
        "buckets": len(buckets),
        "short": _names([f"{b.size[0]}x{b.size[1]}: {b.num_images}" for b in few.short]),
        "repeats": spec.repeats,
        "batch_size": batch_size,
        "minimum_repeats": few.minimum_repeats,
    }
    fixes = (Fix(key="repeats", value=few.minimum_repeats),)
    if spec.batch_mixing == "packed":
        return Problem(code="E-DATASET-NO-BATCH-PACKED", params=params, fixes=fixes)
    return Problem(code="E-DATASET-NO-BATCH", params=params, fixes=(*fixes, Fix(key="batch_mixing", value="packed")))
