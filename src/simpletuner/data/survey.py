"""What is in the places of datasets and what becomes of it, for a report: also where a run would refuse. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner.data.captions import BadCaption, lacks_instance_prompt
from simpletuner.data.discovery import Progress, Scan, learn_contents
from simpletuner.data.image_index import open_index
from simpletuner.data.plan import FoundImages, SortedImages, minimum_repeats, sort_images
from simpletuner.data.records import Bucket, Dropped, Size
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import FileInfo, OtherFiles, Storage, Unreadable

_MEGAPIXEL_STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class SizeClass:
    """How many images have `least` megapixels or more, and fewer than `below` (None: without end)."""

    least: float
    below: float | None
    num_images: int


@dataclass(frozen=True, kw_only=True)
class BucketSurvey:
    """One bucket of a dataset."""

    size: Size
    num_images: int
    num_samples: int
    """With repeats, per round of the dataset."""
    num_batches: int
    minimum_repeats: int
    """The smallest `repeats` with which it fills a batch."""
    is_short: bool
    """It cannot fill a batch with the repeats that it has."""


@dataclass(frozen=True, kw_only=True)
class DatasetSurvey:
    """One dataset: what is in its place, what is used of it, and what is wrong with the rest."""

    id: str
    place: str
    num_files: int
    """Files that are named like images."""
    num_readable: int
    num_bytes: int
    """Of the readable images."""
    smallest: Size | None
    largest: Size | None
    """By area."""
    sizes: tuple[SizeClass, ...]
    traits: Mapping[str, int]
    """How many images have each of `records.Trait`."""
    others: tuple[OtherFiles, ...]
    unreadable: tuple[Unreadable, ...]
    dropped: tuple[Dropped, ...]
    bad_captions: tuple[BadCaption, ...]
    lacks_instance_prompt: bool
    repeats: int
    batch_size: int
    buckets: tuple[BucketSurvey, ...]

    @property
    def num_used(self) -> int:
        """Images in buckets, each counted once."""
        return sum(bucket.num_images for bucket in self.buckets)


@dataclass(frozen=True, kw_only=True)
class SameContent:
    """Files with the same bytes: paths or URLs."""

    files: tuple[str, ...]


def survey_datasets(
    specs: Sequence[DatasetSpec], found: FoundImages, *, seed: int, batch_size: int
) -> tuple[DatasetSurvey, ...]:
    """Look at every dataset whose place can be listed. Arguments as those of `plan.build_plan`."""
    return tuple(
        _survey(spec, found.scans[spec.storage.id], sort_images(spec, found, seed=seed), batch_size)
        for spec in specs
        if spec.storage.id in found.scans
    )


def find_duplicates(
    found: FoundImages, *, cache_dir: Path, on_progress: Progress, max_workers: int | None = None
) -> tuple[SameContent, ...]:
    """Images of all places that are the same file again. Only files of equal length are read, and only once.

    `on_progress` is called with (contents known, contents wanted).
    """
    by_length: dict[int, list[tuple[Storage, FileInfo]]] = defaultdict(list)
    for scan in found.scans.values():
        for record in scan.records:
            by_length[record.file.size_bytes].append((scan.storage, record.file))
    wanted: dict[str, list[FileInfo]] = defaultdict(list)
    for files in by_length.values():
        if len(files) > 1:
            for storage, file in files:
                wanted[storage.id].append(file)
    total = sum(map(len, wanted.values()))
    by_content: dict[str, list[str]] = defaultdict(list)
    done = 0
    on_progress(done, total)
    with open_index(cache_dir) as index:
        for name, of_storage in wanted.items():
            storage = found.scans[name].storage
            contents, _ = learn_contents(
                storage,
                sorted(of_storage, key=lambda file: file.key),
                index,
                on_progress=partial(_report, on_progress, done, total),
                max_workers=max_workers,
            )
            done += len(of_storage)
            for key, content in contents.items():
                by_content[content].append(storage.shown(key))
    groups = (SameContent(files=tuple(sorted(files))) for files in by_content.values() if len(files) > 1)
    return tuple(sorted(groups, key=lambda group: group.files))


def _report(on_progress: Progress, before: int, total: int, done: int, _total_of_place: int) -> None:
    on_progress(before + done, total)


def _survey(spec: DatasetSpec, scan: Scan, in_order: SortedImages, batch_size: int) -> DatasetSurvey:
    sizes = sorted((record.size for record in scan.records), key=_area)
    batch_size = spec.train_batch_size or batch_size
    return DatasetSurvey(
        id=spec.id,
        place=scan.storage.id,
        num_files=len(scan.records) + len(scan.unreadable),
        num_readable=len(scan.records),
        num_bytes=sum(record.file.size_bytes for record in scan.records),
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        sizes=_size_classes(sizes),
        traits=dict(sorted(Counter(trait for record in scan.records for trait in record.traits.split()).items())),
        others=scan.listing.others,
        unreadable=scan.unreadable,
        dropped=in_order.dropped,
        bad_captions=in_order.bad_captions,
        lacks_instance_prompt=lacks_instance_prompt(spec.captions),
        repeats=spec.repeats,
        batch_size=batch_size,
        buckets=tuple(_survey_bucket(bucket, spec.repeats, batch_size) for bucket in in_order.buckets),
    )


def _survey_bucket(bucket: Bucket, repeats: int, batch_size: int) -> BucketSurvey:
    num_images = len(bucket.samples)
    num_samples = num_images * (repeats + 1)
    return BucketSurvey(
        size=bucket.size,
        num_images=num_images,
        num_samples=num_samples,
        num_batches=-(-num_samples // batch_size),
        minimum_repeats=max(minimum_repeats(num_images, batch_size), 0),
        is_short=num_samples < batch_size,
    )


def _size_classes(sizes: Iterable[Size]) -> tuple[SizeClass, ...]:
    counts: Counter[int] = Counter()
    for size in sizes:
        megapixels = _area(size) / 1_000_000
        counts[max(i for i, least in enumerate(_MEGAPIXEL_STEPS) if least <= megapixels)] += 1
    ends: list[float | None] = [*_MEGAPIXEL_STEPS[1:], None]
    return tuple(
        SizeClass(least=least, below=below, num_images=counts[i])
        for i, (least, below) in enumerate(zip(_MEGAPIXEL_STEPS, ends, strict=True))
    )


def _area(size: Size) -> int:
    return size[0] * size[1]
