"""What is in the places of datasets and what becomes of it, for a report: also where a run would refuse. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from simpletuner.data.batching import TooFew, groups, minimum_repeats, num_batches, settle
from simpletuner.data.captions import BadCaption, lacks_instance_prompt
from simpletuner.data.discovery import Progress, Scan, learn_contents, part_of, read_each
from simpletuner.data.finding import FoundImages
from simpletuner.data.hashing import content_hash
from simpletuner.data.image_index import open_index
from simpletuner.data.plan import SortedImages, sort_images
from simpletuner.data.records import Bucket, Dropped, DropReason, Size
from simpletuner.data.spec import BatchMixing, DatasetSpec
from simpletuner.data.storage import FileInfo, OtherFiles, Storage, Unreadable

_PIECE_BYTES = 4096
_MEGAPIXEL_STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class SizeClass:
    """How many images have `least` megapixels or more, and fewer than `below` (None: without end)."""

    least: float
    below: float | None
    num_images: int


class BucketState(str, Enum):
    """Whether a bucket fills a batch, and what becomes of it if it cannot."""

    OK = "ok"
    SHORT = "short"
    """It keeps a run from starting."""
    FILLED = "filled"
    """Its images are shown more often than `repeats` says."""
    PRUNED = "pruned"
    """Its images are left out."""


@dataclass(frozen=True, kw_only=True)
class BucketSurvey:
    """One bucket of a dataset."""

    size: Size
    num_images: int
    num_samples: int
    """With repeats, per round of the dataset."""
    state: BucketState
    minimum_repeats: int
    """The smallest `repeats` with which its images (of a packed dataset: all its images) fill a batch."""


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
    batch_mixing: BatchMixing
    num_batches: int
    """Per round of the dataset."""
    buckets: tuple[BucketSurvey, ...]

    @property
    def num_used(self) -> int:
        """Images in buckets that are in use, each counted once."""
        return sum(bucket.num_images for bucket in self.buckets if bucket.state is not BucketState.PRUNED)


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
        if found.has(spec)
    )


def find_duplicates(
    found: FoundImages, *, cache_dir: Path, on_progress: Progress, max_workers: int | None = None
) -> tuple[SameContent, ...]:
    """Images on this machine that are the same file again; remote places are left alone, for it would mean reading.

    Files are compared by length, then by a piece from their middle; only those that agree in both are read in full.

    `on_progress` is called with (contents known, contents wanted).
    """
    local = [scan for scan in found.scans.values() if not scan.storage.is_remote]
    wanted = _alike([(scan.storage, [record.file for record in scan.records]) for scan in local], max_workers)
    total = sum(len(files) for _, files in wanted)
    by_content: dict[str, list[str]] = defaultdict(list)
    done = 0
    with open_index(cache_dir) as index:
        for storage, files in wanted:
            contents, _ = learn_contents(
                storage,
                files,
                index,
                on_progress=part_of(on_progress, before=done, total=total),
                max_workers=max_workers,
            )
            done += len(files)
            for key, content in contents.items():
                by_content[content].append(storage.shown(key))
    groups = (SameContent(files=tuple(sorted(files))) for files in by_content.values() if len(files) > 1)
    return tuple(sorted(groups, key=lambda group: group.files))


_Places = list[tuple[Storage, list[FileInfo]]]


def _alike(places: _Places, max_workers: int | None) -> _Places:
    """The files that have their length and a piece in common with another one."""
    lengths = Counter(file.size_bytes for _, files in places for file in files)
    pieces: dict[tuple[str, str], tuple[int, str]] = {}
    for storage, files in places:
        candidates = [file for file in files if lengths[file.size_bytes] > 1]
        for file, piece, _ in read_each(storage, candidates, _middle, max_workers, is_light=True):
            if isinstance(piece, bytes):
                pieces[storage.id, file.key] = file.size_bytes, content_hash(piece)
    counts = Counter(pieces.values())
    twins = {place for place, piece in pieces.items() if counts[piece] > 1}
    return [(storage, [file for file in files if (storage.id, file.key) in twins]) for storage, files in places]


def _middle(storage: Storage, file: FileInfo) -> bytes:
    with storage.open(file) as stream:
        stream.seek(file.size_bytes // 2)
        return stream.read(_PIECE_BYTES)


def _survey(spec: DatasetSpec, scan: Scan, in_order: SortedImages, batch_size: int) -> DatasetSurvey:
    sizes = sorted((record.size for record in scan.records), key=_area)
    batch_size = spec.train_batch_size or batch_size
    buckets = _survey_buckets(in_order.buckets, spec, batch_size)
    pruned = {bucket.size for bucket in buckets if bucket.state is BucketState.PRUNED}
    used = [bucket for bucket in in_order.buckets if bucket.size not in pruned]
    too_few = [
        Dropped(key=sample.record.key, reason=DropReason.SHORT_BUCKET)
        for bucket in in_order.buckets
        if bucket.size in pruned
        for sample in bucket.samples
    ]
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
        dropped=(*in_order.dropped, *too_few),
        bad_captions=in_order.bad_captions,
        lacks_instance_prompt=lacks_instance_prompt(spec.captions),
        repeats=spec.repeats,
        batch_size=batch_size,
        batch_mixing=spec.batch_mixing,
        num_batches=sum(num_batches(len(g), spec.repeats, batch_size) for g in groups(used, spec.batch_mixing)),
        buckets=buckets,
    )


def _survey_buckets(buckets: Sequence[Bucket], spec: DatasetSpec, batch_size: int) -> tuple[BucketSurvey, ...]:
    if not buckets:
        return ()
    settled = settle(buckets, spec, batch_size)
    if isinstance(settled, TooFew):
        states = {bucket.size: BucketState.SHORT for bucket in settled.short}
    else:
        states = {bucket.size: BucketState.FILLED for bucket in settled.filled}
        states |= {bucket.size: BucketState.PRUNED for bucket in settled.pruned}
    num_all = sum(len(bucket.samples) for bucket in buckets)
    return tuple(
        BucketSurvey(
            size=bucket.size,
            num_images=len(bucket.samples),
            num_samples=len(bucket.samples) * (spec.repeats + 1),
            state=states.get(bucket.size, BucketState.OK),
            minimum_repeats=max(
                minimum_repeats(num_all if spec.batch_mixing == "packed" else len(bucket.samples), batch_size), 0
            ),
        )
        for bucket in buckets
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
