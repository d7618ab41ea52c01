"""The values that flow through the data layer, from a file on disk to a planned run. No torch.

`size` is (width, height) in px, always of the upright image: EXIF orientation is already applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from simpletuner.data.spec import BatchMixing, Sampling, Schedule
from simpletuner.data.storage import FileInfo, Storage, Unreadable

Size = tuple[int, int]
Trait = Literal["alpha", "animated", "cmyk", "deep", "grey", "palette", "profile", "rotated"]
"""What a header says about an image's kind.

alpha: it has transparency. animated: several frames or pages, of which the first is used. deep: 16 bits and more per
channel. profile: a colour profile other than sRGB. rotated: its pixels are stored turned or mirrored (EXIF).
"""
TOLD = "told"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What the start of an image file tells, without its pixels."""

    size: Size
    traits: frozenset[Trait]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image file, known from its header or from a table."""

    file: FileInfo
    size: Size
    traits: str = ""
    """The `Trait`s of its header, sorted, with spaces between them; `TOLD` if a table told its size instead."""

    @property
    def key(self) -> str:
        """Path inside the dataset with forward slashes: `cats/tom.jpg`."""
        return self.file.key


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How an image becomes a training picture: resize to `intermediary`, then cut `target` out of it at `crop`."""

    target: Size
    intermediary: Size
    """Both edges are at least the target's; the aspect is the image's own, to the nearest pixel."""
    crop: tuple[int, int]
    """(left, top) of the cut inside the intermediary, px."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image as one dataset uses it. A file used by two datasets is two samples."""

    dataset_id: str
    record: ImageRecord
    geometry: Geometry
    captions: tuple[str, ...]
    """At least one, none empty. The sampler picks one per visit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The samples of a dataset that share a target size, and so a latent shape."""

    size: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketSize:
    """How many images one bucket holds."""

    size: Size
    num_images: int


class DropReason(str, Enum):
    """Why a readable image is not used. Each follows from an option of the dataset."""

    TOO_SMALL = "too_small"
    ASPECT = "aspect"
    UPSCALE = "upscale"
    LIMIT = "limit"
    SHORT_BUCKET = "short_bucket"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """One image that the dataset's options leave out."""

    key: str
    reason: DropReason


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """What one dataset contributes to the run."""

    id: str
    buckets: tuple[Bucket, ...]
    repeats: int
    """Extra passes per epoch: n images are seen n * (repeats + 1) times."""
    probability: float
    is_regularisation: bool
    caption_dropout_probability: float
    dropped: tuple[Dropped, ...]
    storage: Storage
    unreadable: tuple[Unreadable, ...] = ()
    """Files that are named like images and cannot be used."""
    batch_size: int | None = None
    """Samples of one micro-batch of this dataset; None: the run's."""
    batch_mixing: BatchMixing = "bucket"
    takes_fresh_crops: bool = False
    """Its random crops are others in every pass through it."""
    schedule: Schedule = field(default_factory=Schedule)
    filled: tuple[BucketSize, ...] = ()
    """Buckets that are shown more often than `repeats` says, because they cannot fill a batch."""
    pruned: tuple[BucketSize, ...] = ()
    """Buckets that were left out because they cannot; their images are among `dropped`."""

    @property
    def num_images(self) -> int:
        """Images in use, each counted once."""
        return sum(len(bucket.samples) for bucket in self.buckets)

    def count_dropped(self, reason: DropReason) -> int:
        """How many images were left out for `reason`."""
        return sum(dropped.reason is reason for dropped in self.dropped)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every sample of a run, in an order that depends only on the names of the images."""

    datasets: tuple[DatasetPlan, ...]
    fingerprint: str
    """Changes when something changes that training can see. Of the images it knows names and headers."""
    sampling: Sampling = "auto-weighting"
    """What a dataset's share of the batches follows."""

    def samples(self) -> tuple[Sample, ...]:
        """All samples of all datasets, in plan order."""
        return tuple(s for dataset in self.datasets for bucket in dataset.buckets for s in bucket.samples)

    def prompts(self) -> tuple[str, ...]:
        """Every prompt that the sampler can hand out, sorted, each once; "" if captions may be dropped."""
        captions = {caption for sample in self.samples() for caption in sample.captions}
        if any(dataset.caption_dropout_probability > 0 for dataset in self.datasets):
            captions.add("")
        return tuple(sorted(captions))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanParts:
    """Fingerprints of what a plan is made of: two plans that differ differ in at least one of them."""

    num_images: int
    images: str
    captions: str
    crops: str
    """Target sizes, resizing, crops."""
    datasets: str
    """All else: names, repeats, shares, schedules, batches, dropped captions, regularisation."""
