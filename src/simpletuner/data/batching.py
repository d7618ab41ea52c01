"""Which images may share a batch, and what becomes of too few for one. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.data.records import Bucket, BucketSize, Sample
from simpletuner.data.spec import BatchMixing, DatasetSpec


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What is left of a dataset's buckets once every group of images can fill a batch.

    filled: buckets that are shown more often than `repeats` says. pruned: those left out.
    """

    buckets: tuple[Bucket, ...]
    filled: tuple[BucketSize, ...] = ()
    pruned: tuple[Bucket, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TooFew:
    """Groups of images that cannot fill a batch, and the `repeats` with which all could."""

    short: tuple[BucketSize, ...]
    minimum_repeats: int


def groups(buckets: Sequence[Bucket], mixing: BatchMixing) -> tuple[tuple[Sample, ...], ...]:
    """The images that batches are made of: bucket by bucket, or packed all together."""
    if mixing == "bucket":
        return tuple(bucket.samples for bucket in buckets)
    return (tuple(sample for bucket in buckets for sample in bucket.samples),) if buckets else ()


def num_batches(num_images: int, repeats: int, batch_size: int) -> int:
    """Batches of one round of a group; the last one is filled up."""
    return -(-num_images * (repeats + 1) // batch_size)


def minimum_repeats(num_images: int, batch_size: int) -> int:
    """The smallest `repeats` with which `num_images` of one group fill a batch."""
    return -(-batch_size // num_images) - 1


def settle(buckets: Sequence[Bucket], spec: DatasetSpec, batch_size: int) -> Settled | TooFew:
    """Decide about groups of images that cannot fill a batch of `batch_size` with the repeats of `spec`.

    They are filled up by showing them more often if `fills_short_buckets`, left out if `prunes_short_buckets` and
    others remain, and otherwise the reason why nothing is trained.
    """
    if spec.batch_mixing == "packed":
        count = sum(len(bucket.samples) for bucket in buckets)
        short = tuple(buckets) if count * (spec.repeats + 1) < batch_size else ()
        needed = minimum_repeats(count, batch_size)
    else:
        short = tuple(b for b in buckets if len(b.samples) * (spec.repeats + 1) < batch_size)
        needed = minimum_repeats(min((len(b.samples) for b in short), default=batch_size), batch_size)
    sizes = tuple(BucketSize(size=bucket.size, num_images=len(bucket.samples)) for bucket in short)
    if not short or spec.fills_short_buckets:
        return Settled(buckets=tuple(buckets), filled=sizes)
    if spec.prunes_short_buckets and len(short) < len(buckets):
        left_out = {bucket.size for bucket in short}
        return Settled(buckets=tuple(bucket for bucket in buckets if bucket.size not in left_out), pruned=short)
    return TooFew(short=sizes, minimum_repeats=needed)
