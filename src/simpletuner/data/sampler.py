"""Which samples make up which micro-batch: a pure function of (plan, seed, index, rank). numpy, no torch, no state.

A *group* is a bucket, or a whole dataset where sizes may mix in a batch. A *pass* is each image of a group once,
shuffled. A dataset's *round* is repeats + 1 passes of every group, one after the other, cut into full batches; a last
batch that is short is filled from further passes. The batches of its groups are interleaved at random. An *epoch* takes
from every dataset its share of batches, interleaved at random; the dataset goes on from there in the next epoch, so
that its images are seen equally often. `schedule` says which share it is, and in which epochs and steps.

What is cached here (the current epoch's order) is recomputed at will; dropping it changes nothing but time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from simpletuner.data.batching import groups, num_batches
from simpletuner.data.geometry import recrop
from simpletuner.data.hashing import draw, draw_unit
from simpletuner.data.records import DatasetPlan, Plan, Sample
from simpletuner.data.schedule import Member, Part, Timeline

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

    def __init__(
        self, plan: Plan, *, seed: int, batch_size: int, world_size: int = 1, accumulation_steps: int = 1
    ) -> None:
        """Args: batch_size: samples of one rank's micro-batch, of datasets that say nothing else; world_size: ranks;
        accumulation_steps: micro-batches of one rank per optimizer update, by which schedules count."""
        assert batch_size > 0
        assert world_size > 0
        assert accumulation_steps > 0
        self.plan = plan
        self._seed = seed
        self._world_size = world_size
        self._datasets = tuple(dataset for dataset in plan.datasets if dataset.probability > 0)
        assert self._datasets, "build_plan refuses a plan without a dataset to draw from"
        self._batch_sizes = [dataset.batch_size or batch_size for dataset in self._datasets]
        self._groups = [groups(dataset.buckets, dataset.batch_mixing) for dataset in self._datasets]
        self._round_batches = [
            sum(num_batches(len(group), dataset.repeats, size) for group in of_dataset)
            for dataset, of_dataset, size in zip(self._datasets, self._groups, self._batch_sizes, strict=True)
        ]
        members = [
            Member(schedule=dataset.schedule, num_batches=count, probability=dataset.probability)
            for dataset, count in zip(self._datasets, self._round_batches, strict=True)
        ]
        self._timeline = Timeline(members, batches_per_update=accumulation_steps * world_size, sampling=plan.sampling)
        self._orders: _Recent[tuple[int, int], _Ints] = _Recent(2)
        self._rounds: _Recent[tuple[int, int], _Round] = _Recent(2 * len(self._datasets) + 2)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches that one rank needs for the first epoch; with several ranks rounded up. 0: it has none."""
        return -(-sum(self._first_counts()) // self._world_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the first epoch over all ranks, repeats and filled-up batches included."""
        return sum(count * size for count, size in zip(self._first_counts(), self._batch_sizes, strict=True))

    @property
    def num_batches(self) -> int | None:
        """Micro-batches of one rank until no dataset takes part any more; None: there always is one."""
        return None if self._timeline.end is None else self._timeline.end // self._world_size

    def batches_before(self, epoch: int) -> int | None:
        """Micro-batches of one rank before `epoch`, from 0; None: one before it is not whole for want of datasets."""
        begin = self._timeline.begin_of(epoch)
        return None if begin is None else -(-begin // self._world_size)

    def epoch_of(self, index: int) -> int:
        """The epoch, from 0, of one rank's micro-batch `index`, which is below `num_batches`."""
        return self._timeline.epoch_of(index * self._world_size)

    def idle_datasets(self, num_batches: int) -> tuple[str, ...]:
        """Datasets with a probability above 0 of which the first `num_batches` of every rank have nothing."""
        before = num_batches * self._world_size
        return tuple(
            dataset.id
            for which, dataset in enumerate(self._datasets)
            if not self._timeline.takes_part(which, before=before)
        )

    def picks(self, index: int, rank: int = 0) -> tuple[Pick, ...]:
        """Return the micro-batch `index` of `rank`: full, of one dataset, and of one bucket unless that packs.

        Raises: IndexError: `index` is not below `num_batches`.
        """
        assert index >= 0
        assert 0 <= rank < self._world_size
        global_index = index * self._world_size + rank
        place = self._timeline.place(global_index)
        order = self._orders.get((place.epoch, place.number), lambda key: self._shuffle(key, place.part))
        slot = int(order[place.position])
        which = bisect_right(place.part.starts, slot) - 1
        cursor = place.drawn[which] + slot - place.part.starts[which]
        number, batch = divmod(cursor, self._round_batches[which])
        dataset = self._datasets[which]
        samples = self._rounds.get((which, number), self._deal_round).batch(batch)
        if dataset.takes_fresh_crops:
            samples = [self._recropped(sample, number) for sample in samples]
        return tuple(
            Pick(sample=sample, prompt=self._prompt(sample, dataset, global_index, number_in_batch))
            for number_in_batch, sample in enumerate(samples)
        )

    def _recropped(self, sample: Sample, number: int) -> Sample:
        geometry = recrop(sample.geometry, seed=self._seed, key=sample.record.key, pass_number=number)
        return replace(sample, geometry=geometry)

    def _first_counts(self) -> tuple[int, ...]:
        return self._timeline.counts_of(0) if self._timeline.end != 0 else (0,) * len(self._datasets)

    def _prompt(self, sample: Sample, dataset: DatasetPlan, global_index: int, place: int) -> str:
        dropout = dataset.caption_dropout_probability
        if dropout > 0 and draw_unit(self._seed, "caption dropout", global_index, place) < dropout:
            return ""
        if len(sample.captions) == 1:
            return sample.captions[0]
        return sample.captions[draw(self._seed, "caption", global_index, place) % len(sample.captions)]

    def _shuffle(self, key: tuple[int, int], part: Part) -> _Ints:
        epoch, number = key
        return _interleave(np.asarray(part.starts), draw(self._seed, "epoch", epoch, *([number] if number else [])))

    def _deal_round(self, key: tuple[int, int]) -> _Round:
        which, number = key
        return _Round(
            self._datasets[which], self._groups[which], number, seed=self._seed, batch_size=self._batch_sizes[which]
        )


class _Round:
    """repeats + 1 passes of a dataset, cut into batches. Holds one integer per picture shown."""

    def __init__(
        self,
        dataset: DatasetPlan,
        of_dataset: tuple[tuple[Sample, ...], ...],
        number: int,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        self._groups = of_dataset
        self._batch_size = batch_size
        self._streams: list[_Ints] = []
        for place, group in enumerate(of_dataset):
            num_picks = num_batches(len(group), dataset.repeats, batch_size) * batch_size
            stream_seed = draw(seed, "bucket", dataset.id, number, place)
            self._streams.append(_deal_passes(len(group), num_picks, batch_size, stream_seed))
        counts = [len(stream) // batch_size for stream in self._streams]
        self._starts = np.cumsum([0, *counts])
        self._order = _interleave(self._starts, draw(seed, "round", dataset.id, number))

    def batch(self, index: int) -> list[Sample]:
        slot = int(self._order[index])
        which = int(np.searchsorted(self._starts, slot, side="right")) - 1
        first = (slot - int(self._starts[which])) * self._batch_size
        samples = self._groups[which]
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


def _deal_passes(num_images: int, num_picks: int, batch_size: int, seed: int) -> _Ints:
    """Return `num_picks` image numbers: pass after pass, each shuffled, the last one cut off.

    Where a batch takes from the end of one pass and the start of the next, images of that end wait in the next pass
    until the batch is full, so that no batch holds an image twice (if the group has a batch's worth of images).
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
