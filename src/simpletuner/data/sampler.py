"""Which samples make up which micro-batch: a pure function of (plan, seed, index, rank). numpy, no torch, no state.

A bucket's *pass* is each of its images once, shuffled. A dataset's *round* is repeats + 1 passes of every bucket, one
after the other, cut into full batches; a last batch that is short is filled from further passes. The batches of its
buckets are interleaved at random. An *epoch* takes from every dataset its share of batches, interleaved at random: a
whole round from the datasets with the highest probability, less from the others, which go on from there in the next
epoch. So the share of a dataset is proportional to its length times its probability, in every epoch, and each
dataset's images are seen equally often.

What is cached here (the current epoch's order) is recomputed at will; dropping it changes nothing but time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from simpletuner.data.hashing import draw, draw_unit
from simpletuner.data.records import Bucket, DatasetPlan, Plan, Sample

_Ints = npt.NDArray[np.int64]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """One place of a micro-batch."""

    sample: Sample
    prompt: str
    """One of the sample's captions, or "" where the caption was dropped."""


class Sampler:
    """Micro-batches of a run. `index` counts one rank's micro-batches from 0 and never ends: epochs follow each other.

    Rank r of W takes the batches r, r + W, r + 2W, ... of one global sequence, so ranks never share a batch.
    """

    def __init__(self, plan: Plan, *, seed: int, batch_size: int, world_size: int = 1) -> None:
        """Args: batch_size: samples of one rank's micro-batch, of datasets that say nothing else; world_size: ranks."""
        assert batch_size > 0
        assert world_size > 0
        self.plan = plan
        self._seed = seed
        self._world_size = world_size
        self._datasets = tuple(dataset for dataset in plan.datasets if dataset.probability > 0)
        assert self._datasets, "build_plan refuses a plan without a dataset to draw from"
        self._batch_sizes = [dataset.batch_size or batch_size for dataset in self._datasets]
        self._round_batches = [
            _num_round_batches(*pair) for pair in zip(self._datasets, self._batch_sizes, strict=True)
        ]
        highest = max(dataset.probability for dataset in self._datasets)
        self._epoch_batches = [
            max(round(count * dataset.probability / highest), 1)
            for dataset, count in zip(self._datasets, self._round_batches, strict=True)
        ]
        self._epoch_starts = np.cumsum([0, *self._epoch_batches])
        self._global_epoch_batches = sum(self._epoch_batches)
        self._epoch_orders: _Recent[int, _Ints] = _Recent(2)
        self._rounds: _Recent[tuple[int, int], _Round] = _Recent(2 * len(self._datasets) + 2)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches that one rank needs for an epoch; with several ranks rounded up."""
        return -(-self._global_epoch_batches // self._world_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch over all ranks, repeats and filled-up batches included."""
        return sum(count * size for count, size in zip(self._epoch_batches, self._batch_sizes, strict=True))

    def picks(self, index: int, rank: int = 0) -> tuple[Pick, ...]:
        """Return the micro-batch `index` of `rank`: full, and of one dataset and one bucket."""
        assert index >= 0
        assert 0 <= rank < self._world_size
        global_index = index * self._world_size + rank
        epoch, position = divmod(global_index, self._global_epoch_batches)
        slot = int(self._epoch_orders.get(epoch, self._shuffle_epoch)[position])
        which = int(np.searchsorted(self._epoch_starts, slot, side="right")) - 1
        cursor = epoch * self._epoch_batches[which] + slot - int(self._epoch_starts[which])
        number, batch = divmod(cursor, self._round_batches[which])
        dataset = self._datasets[which]
        samples = self._rounds.get((which, number), self._deal_round).batch(batch)
        return tuple(
            Pick(sample=sample, prompt=self._prompt(sample, dataset, global_index, place))
            for place, sample in enumerate(samples)
        )

    def _prompt(self, sample: Sample, dataset: DatasetPlan, global_index: int, place: int) -> str:
        dropout = dataset.caption_dropout_probability
        if dropout > 0 and draw_unit(self._seed, "caption dropout", global_index, place) < dropout:
            return ""
        if len(sample.captions) == 1:
            return sample.captions[0]
        return sample.captions[draw(self._seed, "caption", global_index, place) % len(sample.captions)]

    def _shuffle_epoch(self, epoch: int) -> _Ints:
        return _interleave(self._epoch_starts, draw(self._seed, "epoch", epoch))

    def _deal_round(self, key: tuple[int, int]) -> _Round:
        which, number = key
        return _Round(self._datasets[which], number, seed=self._seed, batch_size=self._batch_sizes[which])


class _Round:
    """repeats + 1 passes of a dataset, cut into batches. Holds one integer per picture shown."""

    def __init__(self, dataset: DatasetPlan, number: int, *, seed: int, batch_size: int) -> None:
        self._buckets = dataset.buckets
        self._batch_size = batch_size
        self._streams: list[_Ints] = []
        for place, bucket in enumerate(dataset.buckets):
            num_picks = _num_bucket_batches(bucket, dataset.repeats, batch_size) * batch_size
            stream_seed = draw(seed, "bucket", dataset.id, number, place)
            self._streams.append(_deal_passes(len(bucket.samples), num_picks, batch_size, stream_seed))
        counts = [len(stream) // batch_size for stream in self._streams]
        self._starts = np.cumsum([0, *counts])
        self._order = _interleave(self._starts, draw(seed, "round", dataset.id, number))

    def batch(self, index: int) -> list[Sample]:
        slot = int(self._order[index])
        which = int(np.searchsorted(self._starts, slot, side="right")) - 1
        first = (slot - int(self._starts[which])) * self._batch_size
        samples = self._buckets[which].samples
        return [samples[i] for i in self._streams[which][first : first + self._batch_size].tolist()]


_K = TypeVar("_K")


class _Recent(Generic[_K, _T]):
    """The values of a pure function that were asked for last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[_K, _T] = OrderedDict()

    def get(self, key: _K, compute: Callable[[_K], _T]) -> _T:
        value = self._values.pop(key, None)
        if value is None:
            value = compute(key)
        self._values[key] = value
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value


def _num_bucket_batches(bucket: Bucket, repeats: int, batch_size: int) -> int:
    return -(-len(bucket.samples) * (repeats + 1) // batch_size)


def _num_round_batches(dataset: DatasetPlan, batch_size: int) -> int:
    return sum(_num_bucket_batches(bucket, dataset.repeats, batch_size) for bucket in dataset.buckets)


def _deal_passes(num_images: int, num_picks: int, batch_size: int, seed: int) -> _Ints:
    """Return `num_picks` image numbers: pass after pass, each shuffled, the last one cut off.

    Where a batch takes from the end of one pass and the start of the next, images of that end wait in the next pass
    until the batch is full, so that no batch holds an image twice (if the bucket has a batch's worth of images).
    """
    num_passes = -(-num_picks // num_images)
    keys = _random_keys(num_passes * num_images, seed).reshape(num_passes, num_images)
    passes = np.argsort(keys, axis=1, kind="stable")
    if num_images >= batch_size and num_images % batch_size:
        for later in range(1, num_passes):
            num_open = later * num_images % batch_size
            if num_open:
                wanted = batch_size - num_open
                repeated = np.isin(passes[later], passes[later - 1][-num_open:])
                head = passes[later][~repeated][:wanted]
                tail = passes[later][~np.isin(passes[later], head)]
                passes[later] = np.concatenate([head, tail])
    return passes.reshape(-1)[:num_picks].astype(np.int64, copy=False)


def _interleave(starts: _Ints, seed: int) -> _Ints:
    """Return 0 .. starts[-1] - 1 shuffled, but in order within each range from one of `starts` to the next."""
    total = int(starts[-1])
    places = np.argsort(_random_keys(total, seed), kind="stable")
    for first, end in pairwise(starts.tolist()):
        places[first:end].sort()
    shuffled = np.empty(total, dtype=np.int64)
    shuffled[places] = np.arange(total)
    return shuffled


def _random_keys(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """Raw output of a bit generator: numpy promises this stream, and not that of `Generator.permutation`."""
    return np.asarray(np.random.PCG64(seed).random_raw(count), dtype=np.uint64)
