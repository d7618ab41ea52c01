"""The laws of the sampler: pure, complete, fair, disjoint, fast."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.batching import groups
from simpletuner.data.geometry import recrop
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.sampler import Pick, Sampler
from simpletuner.data.spec import BatchMixing, Sampling, Schedule
from simpletuner.data.storage import FileInfo, LocalStorage


def dataset(
    name: str,
    bucket_sizes: list[int],
    *,
    repeats: int = 0,
    probability: float = 1.0,
    dropout: float = 0.0,
    mixing: BatchMixing = "bucket",
    schedule: Schedule | None = None,
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
        batch_mixing=mixing,
        schedule=schedule or Schedule(),
        storage=LocalStorage(folder=Path("images")),
    )


def sample(name: str, key: str, size: tuple[int, int]) -> Sample:
    record = ImageRecord(file=FileInfo(key=key, size_bytes=1, version="1"), size=size)
    geometry = Geometry(target=size, intermediary=size, crop=(0, 0))
    return Sample(dataset_id=name, record=record, geometry=geometry, captions=("one", "two", "three"))


def plan_of(*datasets: DatasetPlan, sampling: Sampling = "auto-weighting") -> Plan:
    return Plan(datasets=datasets, fingerprint="", sampling=sampling)


def home(pick: Pick, plan: Plan) -> tuple[str, tuple[int, int] | None]:
    """What the images of a batch have in common with this one."""
    packs = next(d.batch_mixing == "packed" for d in plan.datasets if d.id == pick.sample.dataset_id)
    return pick.sample.dataset_id, None if packs else pick.sample.geometry.target


def group_lengths(plan: Plan) -> dict[tuple[str, tuple[int, int] | None], int]:
    """How many images share batches."""
    lengths: Counter[tuple[str, tuple[int, int] | None]] = Counter()
    for d in plan.datasets:
        for bucket in d.buckets:
            lengths[d.id, None if d.batch_mixing == "packed" else bucket.size] += len(bucket.samples)
    return lengths


def stream(sampler: Sampler, rank: int = 0) -> Iterator[tuple[Pick, ...]]:
    index = 0
    while True:
        yield sampler.picks(index, rank)
        index += 1


BATCH_SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 2**63)
SCHEDULES = st.sampled_from(
    [
        Schedule(),
        Schedule(start_step=9, end_step=40),
        Schedule(start_epoch=2, end_epoch=3),
        Schedule(disable_after_epoch_step=3),
    ]
)


@st.composite
def plans(draw: st.DrawFn, *, equal_probabilities: bool = False) -> Plan:
    """Up to three datasets whose buckets fill batches of 5, the largest of BATCH_SIZES. The first is always there."""
    datasets = []
    for number in range(draw(st.integers(1, 3))):
        repeats = draw(st.integers(0, 3))
        fewest = -(-5 // (repeats + 1))
        buckets = draw(st.lists(st.integers(fewest, 9), min_size=1, max_size=3))
        probability = 1.0 if equal_probabilities else draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))
        mixing = draw(st.sampled_from(["bucket", "packed"]))
        schedule = draw(SCHEDULES) if number and not equal_probabilities else Schedule()
        datasets.append(
            dataset(
                f"d{number}",
                buckets,
                repeats=repeats,
                probability=probability,
                dropout=0.3,
                mixing=mixing,
                schedule=schedule,
            )
        )
    sampling = "auto-weighting" if equal_probabilities else draw(st.sampled_from(["auto-weighting", "uniform"]))
    return plan_of(*datasets, sampling=sampling)


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
def test_a_batch_is_full_and_of_one_dataset_and_one_bucket_unless_packed(
    plan: Plan, batch_size: int, seed: int
) -> None:
    sampler = Sampler(plan, seed=seed, batch_size=batch_size)
    lengths = group_lengths(plan)
    for picks in islice(stream(sampler), 3 * sampler.batches_per_epoch):
        assert len(picks) == batch_size
        homes = {home(pick, plan) for pick in picks}
        assert len(homes) == 1
        if lengths[next(iter(homes))] >= batch_size:
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
            for group in groups(d.buckets, d.batch_mixing):
                counts = [seen[d.id, s.record.key] for s in group]
                assert d.repeats + 1 <= min(counts)
                assert max(counts) - min(counts) <= 1
                assert sum(counts) - len(counts) * (d.repeats + 1) < batch_size


@given(plans(equal_probabilities=True), SEEDS)
def test_no_image_comes_again_before_its_bucket_is_through(plan: Plan, seed: int) -> None:
    sampler = Sampler(plan, seed=seed, batch_size=1)
    lengths = group_lengths(plan)
    shown: dict[tuple[str, tuple[int, int] | None], list[str]] = {where: [] for where in lengths}
    for (pick,) in islice(stream(sampler), 2 * sampler.batches_per_epoch):
        shown[home(pick, plan)].append(pick.sample.record.key)
    for where, keys in shown.items():
        passes = [keys[first : first + lengths[where]] for first in range(0, len(keys), lengths[where])]
        assert all(len(set(once)) == lengths[where] for once in passes)


@given(plans(), BATCH_SIZES, SEEDS, st.integers(2, 4))
def test_ranks_deal_out_what_one_rank_would_see(plan: Plan, batch_size: int, seed: int, world_size: int) -> None:
    alone = Sampler(plan, seed=seed, batch_size=batch_size, accumulation_steps=world_size)
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


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_a_dataset_that_comes_and_goes_goes_on_where_it_was(seed: int, world_size: int, accumulation: int) -> None:
    """Whatever its schedule, a dataset shows its own images in the order of one that is always there."""
    coming = dataset("coming", [7, 5], repeats=1, schedule=Schedule(start_step=3, end_step=30))
    alone = Sampler(plan_of(replace(coming, schedule=Schedule())), seed=seed, batch_size=2)
    plan = plan_of(dataset("there", [9]), coming)
    sampler = Sampler(plan, seed=seed, batch_size=2, world_size=world_size, accumulation_steps=accumulation)
    dealt = [sampler.picks(index, rank) for index in range(35 * accumulation) for rank in range(world_size)]
    shown = [picks for picks in dealt if picks[0].sample.dataset_id == "coming"]
    assert [[p.sample for p in picks] for picks in shown] == [
        [p.sample for p in picks] for picks in islice(stream(alone), len(shown))
    ]
    where = [index for index, picks in enumerate(dealt) if picks[0].sample.dataset_id == "coming"]
    per_update = world_size * accumulation
    assert 2 * per_update <= where[0]
    assert where[-1] < 30 * per_update
    assert sampler.epoch_of(0) == 0
    assert sampler.idle_datasets(2 * accumulation) == ("coming",)
    assert sampler.idle_datasets(35 * accumulation) == ()


def test_shares_may_ignore_lengths() -> None:
    plan = plan_of(
        dataset("long", [400]), dataset("short", [20]), dataset("half", [90], probability=0.5), sampling="uniform"
    )
    sampler = Sampler(plan, seed=1, batch_size=2)
    for epoch in range(2):
        first = epoch * sampler.batches_per_epoch
        batches = [sampler.picks(first + index) for index in range(sampler.batches_per_epoch)]
        assert Counter(picks[0].sample.dataset_id for picks in batches) == {"long": 200, "short": 200, "half": 100}


def test_a_packed_batch_mixes_sizes_evenly() -> None:
    plan = plan_of(dataset("a", [1, 3, 8, 28], mixing="packed"))
    sampler = Sampler(plan, seed=3, batch_size=4)
    assert sampler.batches_per_epoch == 10
    sizes = [len({p.sample.geometry.target for p in sampler.picks(index)}) for index in range(100)]
    assert max(sizes) >= 3
    assert 1.5 < sum(sizes) / len(sizes) < 2.5


def test_a_run_may_end_with_its_datasets() -> None:
    sampler = Sampler(
        plan_of(dataset("a", [10], schedule=Schedule(end_step=6))), seed=1, batch_size=1, accumulation_steps=2
    )
    assert (sampler.num_batches, sampler.batches_before(1), sampler.batches_before(2)) == (12, 10, None)
    sampler.picks(11)
    with pytest.raises(IndexError):
        sampler.picks(12)


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


def test_a_hundred_thousand_images_take_little_memory() -> None:
    """Beside the plan itself: an order of the epoch and of the dataset's round, and one list of a packed dataset."""
    (bucket,) = dataset("large", [1]).buckets
    large = replace(bucket, samples=bucket.samples * 100_000)
    plan = plan_of(replace(dataset("large", [1], mixing="packed", repeats=3), buckets=(large,)))
    tracemalloc.start()
    sampler = Sampler(plan, seed=1, batch_size=4)
    for index in (0, 1, sampler.batches_per_epoch + 1):
        sampler.picks(index)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20e6
    assert peak < 40e6


@pytest.mark.parametrize("fresh", [True, False])
def test_fresh_crops_are_those_of_the_pass_and_change_nothing_else(fresh: bool) -> None:
    wide = Geometry(target=(64, 64), intermediary=(640, 64), crop=(0, 0))
    plain = dataset("a", [5])
    samples = tuple(replace(one, geometry=wide) for one in plain.buckets[0].samples)
    cropped = replace(plain, buckets=(Bucket(size=(64, 64), samples=samples),), takes_fresh_crops=fresh)
    rounds = [
        [pick.sample for index in range(first, first + 5) for pick in picks_of(cropped, index)] for first in (0, 5, 10)
    ]
    for number, of_round in enumerate(rounds):
        assert {one.record.key for one in of_round} == {one.record.key for one in samples}
        for one in of_round:
            expected = recrop(wide, seed=3, key=one.record.key, pass_number=number) if fresh else wide
            assert one.geometry == expected
    assert [one.record.key for one in rounds[1]] == [
        pick.sample.record.key
        for index in range(5, 10)
        for pick in picks_of(replace(cropped, takes_fresh_crops=not fresh), index)
    ]
    assert (len({one.geometry.crop for of_round in rounds for one in of_round}) > 10) == fresh


def picks_of(one: DatasetPlan, index: int) -> tuple[Pick, ...]:
    return Sampler(plan_of(one), seed=3, batch_size=1).picks(index)
