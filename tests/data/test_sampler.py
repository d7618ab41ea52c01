"""The laws of the sampler: pure, complete, fair, disjoint, fast."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.sampler import Pick, Sampler
from simpletuner.data.storage import FileInfo, LocalStorage


def dataset(
    name: str, bucket_sizes: list[int], *, repeats: int = 0, probability: float = 1.0, dropout: float = 0.0
) -> DatasetPlan:
    return DatasetPlan(
        id=name,
        buckets=tuple(
            Bucket(
                size=(64 * width, 64),
                samples=tuple(sample(name, f"{width}/{number}", (64 * width, 64)) for number in range(count)),
            )
            for width, count in enumerate(bucket_sizes, start=1)
        ),
        repeats=repeats,
        probability=probability,
        is_regularisation=False,
        caption_dropout_probability=dropout,
        dropped=(),
        storage=LocalStorage(folder=Path("images")),
    )


def sample(name: str, key: str, size: tuple[int, int]) -> Sample:
    record = ImageRecord(file=FileInfo(key=key, size_bytes=1, version="1"), size=size)
    geometry = Geometry(target=size, intermediary=size, crop=(0, 0))
    return Sample(dataset_id=name, record=record, geometry=geometry, captions=("one", "two", "three"))


def plan_of(*datasets: DatasetPlan) -> Plan:
    return Plan(datasets=datasets, fingerprint="")


def stream(sampler: Sampler, rank: int = 0) -> Iterator[tuple[Pick, ...]]:
    index = 0
    while True:
        yield sampler.picks(index, rank)
        index += 1


BATCH_SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 2**63)


@st.composite
def plans(draw: st.DrawFn, *, equal_probabilities: bool = False) -> Plan:
    """Up to three datasets whose buckets fill batches of 5, the largest of BATCH_SIZES."""
    datasets = []
    for number in range(draw(st.integers(1, 3))):
        repeats = draw(st.integers(0, 3))
        fewest = -(-5 // (repeats + 1))
        buckets = draw(st.lists(st.integers(fewest, 9), min_size=1, max_size=3))
        probability = 1.0 if equal_probabilities else draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))
        datasets.append(dataset(f"d{number}", buckets, repeats=repeats, probability=probability, dropout=0.3))
    return plan_of(*datasets)


@given(plans(), BATCH_SIZES, SEEDS, st.integers(1, 3), st.integers(0, 200))
def test_a_pick_is_a_pure_function_of_plan_seed_index_and_rank(
    plan: Plan, batch_size: int, seed: int, world_size: int, index: int
) -> None:
    walked = Sampler(plan, seed=seed, batch_size=batch_size, world_size=world_size)
    for earlier in range(0, index, 7):
        walked.picks(earlier, 0)
    straight = Sampler(plan, seed=seed, batch_size=batch_size, world_size=world_size)
    rank = index % world_size
    assert walked.picks(index, rank) == straight.picks(index, rank)
    walked.picks(index + 1000, rank)
    assert walked.picks(index, rank) == straight.picks(index, rank)


@given(plans(), BATCH_SIZES, SEEDS)
def test_a_batch_is_full_and_of_one_dataset_and_one_bucket(plan: Plan, batch_size: int, seed: int) -> None:
    sampler = Sampler(plan, seed=seed, batch_size=batch_size)
    counts = {(d.id, b.size): len(b.samples) for d in plan.datasets for b in d.buckets}
    for picks in islice(stream(sampler), 3 * sampler.batches_per_epoch):
        assert len(picks) == batch_size
        homes = {(pick.sample.dataset_id, pick.sample.geometry.target) for pick in picks}
        assert len(homes) == 1
        if counts[next(iter(homes))] >= batch_size:
            assert len({pick.sample.record.key for pick in picks}) == batch_size


@given(plans(equal_probabilities=True), BATCH_SIZES, SEEDS)
def test_an_epoch_shows_every_image_its_repeats_and_no_bucket_much_more(plan: Plan, batch_size: int, seed: int) -> None:
    sampler = Sampler(plan, seed=seed, batch_size=batch_size)
    assert sampler.samples_per_epoch == sampler.batches_per_epoch * batch_size
    batches = stream(sampler)
    for _ in range(2):
        seen: Counter[tuple[str, str]] = Counter()
        for picks in islice(batches, sampler.batches_per_epoch):
            seen.update((pick.sample.dataset_id, pick.sample.record.key) for pick in picks)
        for d in plan.datasets:
            for bucket in d.buckets:
                counts = [seen[d.id, s.record.key] for s in bucket.samples]
                assert d.repeats + 1 <= min(counts)
                assert max(counts) - min(counts) <= 1
                assert sum(counts) - len(counts) * (d.repeats + 1) < batch_size


@given(plans(equal_probabilities=True), SEEDS)
def test_no_image_comes_again_before_its_bucket_is_through(plan: Plan, seed: int) -> None:
    sampler = Sampler(plan, seed=seed, batch_size=1)
    lengths = {(d.id, bucket.size): len(bucket.samples) for d in plan.datasets for bucket in d.buckets}
    shown: dict[tuple[str, tuple[int, int]], list[str]] = {home: [] for home in lengths}
    for (pick,) in islice(stream(sampler), 2 * sampler.batches_per_epoch):
        shown[pick.sample.dataset_id, pick.sample.geometry.target].append(pick.sample.record.key)
    for home, keys in shown.items():
        passes = [keys[first : first + lengths[home]] for first in range(0, len(keys), lengths[home])]
        assert all(len(set(once)) == lengths[home] for once in passes)


@given(plans(), BATCH_SIZES, SEEDS, st.integers(2, 4))
def test_ranks_deal_out_what_one_rank_would_see(plan: Plan, batch_size: int, seed: int, world_size: int) -> None:
    alone = Sampler(plan, seed=seed, batch_size=batch_size)
    together = Sampler(plan, seed=seed, batch_size=batch_size, world_size=world_size)
    assert together.batches_per_epoch == -(-alone.batches_per_epoch // world_size)
    dealt = [together.picks(index, rank) for index in range(together.batches_per_epoch) for rank in range(world_size)]
    assert dealt == list(islice(stream(alone), len(dealt)))


def test_a_datasets_share_is_its_length_times_its_probability() -> None:
    plan = plan_of(
        dataset("half", [30, 10], probability=0.5), dataset("whole", [40]), dataset("tenth", [100], probability=0.1)
    )
    sampler = Sampler(plan, seed=3, batch_size=2)
    batches = stream(sampler)
    shown: Counter[str] = Counter()
    for _ in range(10):
        epoch = Counter(picks[0].sample.dataset_id for picks in islice(batches, sampler.batches_per_epoch))
        assert epoch == {"half": 10, "whole": 20, "tenth": 5}
    # A dataset that advances slowly still comes round evenly: ten epochs are five rounds of "half", one of "tenth".
    for index in range(10 * sampler.batches_per_epoch):
        shown.update(f"{p.sample.dataset_id}/{p.sample.record.key}" for p in sampler.picks(index))
    assert {count for key, count in shown.items() if key.startswith("half/")} == {5}
    assert {count for key, count in shown.items() if key.startswith("tenth/")} == {1}


def test_a_dataset_may_have_its_own_batch_size() -> None:
    large = replace(dataset("large", [40]), batch_size=4)
    sampler = Sampler(plan_of(large, dataset("small", [10])), seed=1, batch_size=2)
    assert (sampler.batches_per_epoch, sampler.samples_per_epoch) == (15, 50)
    seen = Counter((p.sample.dataset_id, p.sample.record.key) for i in range(15) for p in sampler.picks(i))
    assert set(seen.values()) == {1}
    sizes = {picks[0].sample.dataset_id: len(picks) for picks in islice(stream(sampler), 15)}
    assert sizes == {"large": 4, "small": 2}


def test_datasets_are_mixed_within_an_epoch() -> None:
    sampler = Sampler(plan_of(dataset("a", [500]), dataset("b", [500])), seed=1, batch_size=1)
    order = [sampler.picks(index)[0].sample.dataset_id for index in range(1000)]
    changes = sum(first != second for first, second in pairwise(order))
    assert 440 < changes < 560  # 500 expected, standard deviation 16


def test_a_dataset_of_probability_zero_is_never_drawn() -> None:
    sampler = Sampler(plan_of(dataset("a", [5]), dataset("never", [50], probability=0)), seed=1, batch_size=1)
    assert sampler.batches_per_epoch == 5
    assert {sampler.picks(index)[0].sample.dataset_id for index in range(50)} == {"a"}


def test_epochs_seeds_and_datasets_are_shuffled_differently() -> None:
    plan = plan_of(dataset("a", [20]))
    sampler = Sampler(plan, seed=1, batch_size=1)
    first, second = ([sampler.picks(20 * epoch + i)[0].sample.record.key for i in range(20)] for epoch in (0, 1))
    other = Sampler(plan, seed=2, batch_size=1)
    assert first != second
    assert first != [other.picks(i)[0].sample.record.key for i in range(20)]
    assert sorted(first) == sorted(second)


def test_captions_are_drawn_evenly_and_dropped_at_their_rate() -> None:
    sampler = Sampler(plan_of(dataset("a", [100], dropout=0.2)), seed=5, batch_size=4)
    prompts = Counter(pick.prompt for index in range(2500) for pick in sampler.picks(index))
    assert 1800 < prompts[""] < 2200  # 2000 expected of 10000, standard deviation 40
    for caption in ("one", "two", "three"):
        assert 2480 < prompts[caption] < 2850  # 2667 expected, standard deviation 44
    never = Sampler(plan_of(dataset("a", [100])), seed=5, batch_size=4)
    assert all(pick.prompt for index in range(500) for pick in never.picks(index))


def test_the_dropout_of_captions_does_not_change_the_order_of_images() -> None:
    kept = dataset("a", [30])
    dropped = replace(kept, caption_dropout_probability=0.5)
    orders = [
        [Sampler(plan_of(d), seed=1, batch_size=3).picks(index)[0].sample.record.key for index in range(30)]
        for d in (kept, dropped)
    ]
    assert orders[0] == orders[1]


def test_the_order_is_the_same_on_every_platform_and_version() -> None:
    sampler = Sampler(plan_of(dataset("a", [5, 3], repeats=1)), seed=42, batch_size=2)
    keys = [[pick.sample.record.key for pick in sampler.picks(index)] for index in range(4)]
    assert keys == [["2/1", "2/2"], ["2/0", "2/2"], ["1/0", "1/1"], ["1/2", "1/3"]]


def test_a_hundred_thousand_images_take_no_time() -> None:
    small = dataset("small", [30], repeats=1000)
    many = tuple(replace(bucket, samples=bucket.samples * 50_000) for bucket in dataset("large", [1, 1]).buckets)
    plan = plan_of(replace(small, id="large", buckets=many, repeats=0), small)
    sampler = Sampler(plan, seed=1, batch_size=4)
    before_s = time.process_time()
    sampler.picks(0)
    first_s = time.process_time() - before_s
    for index in range(1, 1001):
        sampler.picks(index)
    each_s = (time.process_time() - before_s - first_s) / 1000
    assert first_s < 1.0
    assert each_s < 0.001
