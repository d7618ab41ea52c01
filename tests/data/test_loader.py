"""Batches arrive in order, with or without reading ahead, and the reader never outlives its user."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.data.loader import Batch, iterate_batches
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import Schedule
from simpletuner.data.storage import FileInfo, LocalStorage


def sample(dataset_id: str, number: int) -> Sample:
    record = ImageRecord(file=FileInfo(key=str(number), size_bytes=1, version="1"), size=(64, 64))
    geometry = Geometry(target=(64, 64), intermediary=(64, 64), crop=(0, 0))
    return Sample(dataset_id=dataset_id, record=record, geometry=geometry, captions=(f"caption {number}",))


def dataset(dataset_id: str, *, is_regularisation: bool) -> DatasetPlan:
    return DatasetPlan(
        id=dataset_id,
        buckets=(Bucket(size=(64, 64), samples=tuple(sample(dataset_id, number) for number in range(6))),),
        repeats=0,
        probability=1.0,
        is_regularisation=is_regularisation,
        caption_dropout_probability=0.3,
        dropped=(),
        storage=LocalStorage(folder=Path(dataset_id)),
    )


PLAN = Plan(
    datasets=(dataset("subject", is_regularisation=False), dataset("prior", is_regularisation=True)), fingerprint=""
)


class Latents:
    """Tensors that tell which sample they belong to. Fails at the `fail_at`-th read; each read takes `seconds`."""

    def __init__(self, *, fail_at: int | None = None, seconds: float = 0.0) -> None:
        self.reads = 0
        self._fail_at = fail_at
        self._seconds = seconds

    def get(self, sample: Sample) -> Tensor:
        self.reads += 1
        if self.reads == self._fail_at:
            raise OSError("the disk is gone")
        time.sleep(self._seconds)
        return torch.full((2, 8, 8), float(sample.record.key))


def sampler(world_size: int = 1) -> Sampler:
    return Sampler(PLAN, seed=1, batch_size=2, world_size=world_size)


def summary(batch: Batch) -> tuple[object, ...]:
    return batch.samples, batch.prompts, batch.dataset_id, [float(latent.mean()) for latent in batch.latents]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 5, 1000])
def test_batches_are_the_samplers_from_any_start(prefetch: int, start: int) -> None:
    batches = iterate_batches(sampler(), Latents(), start=start, prefetch=prefetch)
    for index, batch in enumerate(islice(batches, 20), start=start):
        picks = sampler().picks(index)
        assert batch.samples == tuple(pick.sample for pick in picks)
        assert batch.prompts == tuple(pick.prompt for pick in picks)
        assert batch.dataset_id == picks[0].sample.dataset_id
        assert batch.is_regularisation == (batch.dataset_id == "prior")
        for latent, pick in zip(batch.latents, picks, strict=True):
            assert torch.equal(latent, torch.full((2, 8, 8), float(pick.sample.record.key)))


def test_reading_ahead_changes_nothing() -> None:
    straight = [summary(b) for b in islice(iterate_batches(sampler(), Latents(), start=3, prefetch=0), 15)]
    ahead = [summary(b) for b in islice(iterate_batches(sampler(), Latents(), start=3, prefetch=5), 15)]
    assert straight == ahead


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_end_where_no_dataset_takes_part_any_more(prefetch: int) -> None:
    ending = tuple(replace(one, schedule=Schedule(end_epoch=1)) for one in PLAN.datasets)
    short = Sampler(replace(PLAN, datasets=ending), seed=1, batch_size=2)
    found = [summary(batch) for batch in iterate_batches(short, Latents(), start=1, prefetch=prefetch)]
    assert found == [summary(b) for b in islice(iterate_batches(sampler(), Latents(), start=1, prefetch=0), 5)]


def test_each_rank_gets_its_own() -> None:
    ranks = [iterate_batches(sampler(2), Latents(), start=0, rank=rank) for rank in (0, 1)]
    together = [summary(next(ranks[index % 2])) for index in range(12)]
    alone = [summary(batch) for batch in islice(iterate_batches(sampler(), Latents(), start=0), 12)]
    assert together == alone


def test_it_reads_ahead_and_no_further() -> None:
    latents = Latents()
    batches = iterate_batches(sampler(), latents, start=0, prefetch=3)
    next(batches)
    deadline_s = time.monotonic() + 5
    while latents.reads < 8 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    time.sleep(0.02)
    assert latents.reads == 8  # the batch in hand and three more, two samples each


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_arrives_at_the_batch_it_belongs_to(prefetch: int) -> None:
    batches = iterate_batches(sampler(), Latents(fail_at=7), start=0, prefetch=prefetch)
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_the_reading_thread_ends_with_its_user(end: str) -> None:
    before = threading.active_count()
    batches = iterate_batches(sampler(), Latents(seconds=0.01, fail_at=3 if end == "error" else None), start=0)
    next(batches)
    assert threading.active_count() == before + 1
    if end == "close":
        batches.close()  # type: ignore[attr-defined]
    elif end == "drop":
        del batches
    else:
        with pytest.raises(OSError, match="gone"):
            next(batches)
    assert threading.active_count() == before


class Masks:
    """Weights that tell which sample they belong to, where `index` is even."""

    def weights(self, samples: Sequence[Sample], index: int, rank: int) -> tuple[Tensor | None, ...] | None:
        return tuple(torch.full((1, 8, 8), float(s.record.key)) for s in samples) if index % 2 == rank else None


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_come_with_their_samples(prefetch: int, rank: int) -> None:
    batches = iterate_batches(sampler(2), Latents(), start=3, rank=rank, prefetch=prefetch, masks=Masks())
    for index, batch in enumerate(islice(batches, 6), start=3):
        if index % 2 != rank:
            assert batch.weights is None
            continue
        assert batch.weights is not None
        for weights, one in zip(batch.weights, batch.samples, strict=True):
            assert weights is not None and float(weights.mean()) == float(one.record.key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_latents_for_an_accelerator_come_in_page_locked_memory() -> None:
    batch = next(iter(iterate_batches(sampler(), Latents(), start=0, pins=True)))
    assert all(latent.is_pinned() for latent in batch.latents)
