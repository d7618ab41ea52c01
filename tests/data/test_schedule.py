"""The laws of schedules: who takes part where, with what share, and that every dataset goes on where it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.schedule import Member, Timeline
from simpletuner.data.spec import Sampling, Schedule

ALWAYS = Schedule()


def timeline(*members: tuple[int, Schedule], per_update: int = 1, sampling: Sampling = "auto-weighting") -> Timeline:
    return Timeline(
        [Member(schedule=schedule, num_batches=count, probability=1.0) for count, schedule in members],
        batches_per_update=per_update,
        sampling=sampling,
    )


def present(line: Timeline, index: int) -> set[int]:
    return {which for which, count in enumerate(line.place(index).part.counts) if count}


BOUNDS = st.none() | st.integers(1, 12)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    start_epoch, start_step = draw(st.integers(1, 4)), draw(st.integers(0, 12))
    length = st.none() | st.integers(0, 9)
    epochs, steps = draw(length), draw(length)
    return Schedule(
        start_epoch=start_epoch,
        start_step=start_step,
        end_epoch=None if epochs is None else start_epoch + epochs,
        end_step=None if steps is None else start_step + steps,
        disable_after_epoch_step=draw(BOUNDS),
    )


MEMBERS = st.lists(st.tuples(st.integers(1, 9), schedules()), max_size=3)


@given(MEMBERS, st.integers(1, 4), st.sampled_from(["auto-weighting", "uniform"]))
def test_a_timeline_keeps_to_every_schedule(
    others: list[tuple[int, Schedule]], per_update: int, sampling: Sampling
) -> None:
    """Walked batch by batch, with the schedules read literally."""
    members = [(5, ALWAYS), *others]
    line = timeline(*members, per_update=per_update, sampling=sampling)
    assert line.end is None, "one dataset is always there"
    given_so_far = [0] * len(members)
    epoch, epoch_begin = 0, 0
    place = line.place(0)
    for index in range(150):
        before, place = place, line.place(index)
        if place.epoch != epoch:
            assert place.epoch == epoch + 1
            epoch, epoch_begin = place.epoch, index
        assert line.begin_of(epoch) == epoch_begin
        assert line.epoch_of(index) == epoch
        if (place.epoch, place.number) != (before.epoch, before.number):  # a part begins where the last one ended
            given_so_far = [a + b for a, b in zip(given_so_far, before.part.counts, strict=True)]
        assert list(place.drawn) == given_so_far
        step, step_of_epoch = index // per_update + 1, (index - epoch_begin) // per_update + 1
        for which, (_, schedule) in enumerate(members):
            may = (
                schedule.start_epoch <= epoch + 1
                and (schedule.end_epoch is None or epoch + 1 <= schedule.end_epoch)
                and schedule.start_step <= step
                and (schedule.end_step is None or step <= schedule.end_step)
                and (schedule.disable_after_epoch_step is None or step_of_epoch <= schedule.disable_after_epoch_step)
            )
            if not may:
                assert place.part.counts[which] == 0
            elif place.part.num_batches >= len(members):
                assert place.part.counts[which] > 0


@given(MEMBERS, st.integers(1, 3))
def test_a_timeline_ends_where_nobody_is_left(members: list[tuple[int, Schedule]], per_update: int) -> None:
    line = timeline(*members, per_update=per_update)
    if line.end is None:
        assert present(line, 10_000)
        return
    for index in range(line.end):
        assert present(line, index)
    with pytest.raises(IndexError):
        line.place(line.end)


def test_a_timeline_without_schedules_repeats_one_epoch() -> None:
    line = timeline((6, ALWAYS), (3, ALWAYS))
    assert (line.end, line.counts_of(0), line.begin_of(7)) == (None, (6, 3), 63)
    assert line.place(10**12).drawn == (10**12 // 9 * 6, 10**12 // 9 * 3)


def test_far_ends_cost_nothing() -> None:
    line = timeline((7, Schedule(end_step=10**12)), (5, Schedule(disable_after_epoch_step=2)), (3, ALWAYS))
    place = line.place(10**12 - 1)
    assert place.part.counts[0] > 0
    assert line.place(10**12).part.counts[0] == 0
    assert sum(place.drawn) + place.position == 10**12 - 1


def test_a_dataset_that_joins_within_an_epoch_has_its_share_of_the_rest() -> None:
    line = timeline((100, ALWAYS), (300, Schedule(start_step=51)))
    assert present(line, 49) == {0}
    assert present(line, 50) == {0, 1}
    assert line.begin_of(1) == 50 + 200, "half the epoch alone, the other half of 400 batches together"
    assert line.place(50).part.counts == (50, 150)
    assert line.counts_of(1) == (100, 300)


def test_steps_are_updates_and_both_ends_belong_to_a_schedule() -> None:
    line = timeline((7, ALWAYS), (5, Schedule(start_step=3, end_step=4)), per_update=6)
    there = [index for index in range(60) if 1 in present(line, index)]
    assert there == list(range(2 * 6, 4 * 6))


def test_epochs_may_be_limited_at_both_ends() -> None:
    line = timeline((4, Schedule(end_epoch=2)), (6, Schedule(start_epoch=2)))
    assert [line.counts_of(epoch) for epoch in range(4)] == [(4, 0), (4, 6), (0, 6), (0, 6)]
    assert [line.begin_of(epoch) for epoch in range(5)] == [0, 4, 14, 20, 26]


def test_a_dataset_may_leave_each_epoch_early() -> None:
    line = timeline((90, ALWAYS), (10, Schedule(disable_after_epoch_step=5)), per_update=2)
    for epoch in range(3):
        begin = line.begin_of(epoch)
        assert begin is not None
        assert present(line, begin) == {0, 1}
        assert present(line, begin + 9) == {0, 1}
        assert present(line, begin + 10) == {0}
    only = timeline((90, Schedule(disable_after_epoch_step=5)))
    assert [only.begin_of(epoch) for epoch in range(3)] == [0, 5, 10], "an epoch that nobody goes on with is over"


def test_a_stretch_without_a_dataset_is_an_end() -> None:
    late = timeline((4, Schedule(start_step=2)))
    assert (late.end, late.begin_of(0)) == (0, None)
    gap = timeline((4, Schedule(end_step=6)), (4, Schedule(start_step=9)))
    assert (gap.end, gap.begin_of(1), gap.begin_of(2)) == (6, 4, None)
    assert (gap.takes_part(0, before=6), gap.takes_part(1, before=6)) == (True, False)
    whole = timeline((4, Schedule(end_epoch=2)))
    assert (whole.end, whole.begin_of(2), whole.begin_of(3)) == (8, 8, None)


def test_uniform_shares_do_not_depend_on_length() -> None:
    def counts(sampling: Sampling) -> tuple[int, ...]:
        members = [(100, 1.0), (10, 1.0), (40, 0.5), (2, 2.0)]
        return Timeline(
            [Member(schedule=ALWAYS, num_batches=n, probability=p) for n, p in members],
            batches_per_update=1,
            sampling=sampling,
        ).counts_of(0)

    assert counts("uniform") == (50, 50, 25, 100)
    assert counts("auto-weighting") == (50, 5, 10, 2)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(1, 200))
def test_a_cut_epoch_keeps_the_proportions(lengths: list[int], cut: int) -> None:
    total = sum(lengths)
    line = timeline(*((count, ALWAYS) for count in lengths[:-1]), (lengths[-1], Schedule(end_step=cut)))
    if cut >= total:
        assert line.counts_of(0) == tuple(lengths)
        return
    counts = line.place(0).part.counts
    assert sum(counts) == cut
    if cut >= len(lengths):
        assert min(counts) >= 1
    if cut * min(lengths) >= total:
        assert all(abs(count - cut * length / total) < 1 for count, length in zip(counts, lengths, strict=True))
