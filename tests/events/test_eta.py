"""Remaining time: the pace of the newest steps, the pauses that are due, no early guesses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.events import types as t
from simpletuner.events.eta import (
    HALF_LIFE_STEPS,
    MIN_STEPS,
    OUTLIER,
    WINDOW_STEPS,
    Pause,
    num_due,
    pace_s,
    remaining_s,
    round_remaining,
)
from simpletuner.events.view import RunView

SECONDS = st.floats(0.01, 1000)
STEPS = st.lists(SECONDS, min_size=1, max_size=80)


def test_nothing_is_said_before_ten_steps():
    assert remaining_s([1.0] * (MIN_STEPS - 1), 100) is None
    assert remaining_s([1.0] * MIN_STEPS, 100) == pytest.approx(100.0)


@given(STEPS)
def test_the_pace_lies_between_the_fastest_and_the_slowest_step(steps):
    assert min(steps) * (1 - 1e-9) <= pace_s(steps) <= max(steps) * (1 + 1e-9)


@given(STEPS, st.floats(0.01, 100))
def test_steps_that_take_twice_as_long_take_twice_as_long(steps, factor):
    assert pace_s([step * factor for step in steps]) == pytest.approx(pace_s(steps) * factor)


@given(STEPS, st.data())
def test_a_slower_step_never_shortens_the_estimate(steps, data):
    index = data.draw(st.integers(0, len(steps) - 1))
    slower = [*steps]
    slower[index] += data.draw(SECONDS)
    assert pace_s(slower) >= pace_s(steps) * (1 - 1e-9)


@given(SECONDS, SECONDS, st.integers(MIN_STEPS, 200))
def test_the_pace_follows_a_machine_that_becomes_slower_or_faster(before, now, num_before):
    """However long it ran at the old pace: soon the new one prevails, and then the old one is forgotten."""
    old = [before] * num_before
    soon, later = (pace_s([*old, *[now] * (HALF_LIFE_STEPS * n)]) for n in (2, 4))
    gap = abs(now - before) + 1e-9
    assert abs(soon - now) <= 0.26 * gap
    assert abs(later - now) <= 0.07 * gap
    assert pace_s([*old, *[now] * WINDOW_STEPS]) == pytest.approx(now)


@given(SECONDS, st.floats(1, 1e6), st.integers(MIN_STEPS, WINDOW_STEPS), st.data())
def test_a_single_pause_of_any_length_moves_the_estimate_a_little(usual, factor, num_steps, data):
    steps = [usual] * num_steps
    steps[data.draw(st.integers(0, num_steps - 1))] = usual * factor
    newest_counts = 1 / sum(0.5 ** (age / HALF_LIFE_STEPS) for age in range(num_steps))
    assert pace_s(steps) <= usual * (1 + (OUTLIER - 1) * newest_counts) * (1 + 1e-9)


@given(SECONDS, st.floats(1, OUTLIER), st.integers(WINDOW_STEPS, 2 * WINDOW_STEPS))
def test_buckets_of_two_sizes_in_turn_count_both(quick, factor, num_steps):
    steps = [quick * (factor if index % 2 else 1) for index in range(num_steps)]
    assert pace_s(steps) == pytest.approx(quick * (1 + factor) / 2, rel=0.05)


def test_only_the_newest_steps_count():
    assert remaining_s([9.0] * 1000 + [1.0] * WINDOW_STEPS, 10) == pytest.approx(10.0)


def test_pauses_are_added_at_their_mean_and_unknown_ones_not_at_all():
    pauses = [Pause(num_left=3, seconds=[10.0, 20.0]), Pause(num_left=5, seconds=[])]
    assert remaining_s([2.0] * 10, 100, pauses) == pytest.approx(200.0 + 45.0)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60))
def test_what_is_due_are_the_multiples_that_are_left(step, left, interval):
    total = step + left
    assert num_due(step, total, interval) == sum(1 for n in range(step + 1, total + 1) if n % interval == 0)


@pytest.mark.parametrize("interval", [None, 0])
def test_without_an_interval_nothing_is_due(interval):
    assert num_due(1, 100, interval) == 0


@given(st.floats(0.001, 1e7))
def test_rounding_is_small_positive_and_stable(seconds):
    rounded = round_remaining(seconds)
    assert rounded > 0
    assert abs(rounded - seconds) <= max(5.0, 0.13 * seconds)
    assert round_remaining(rounded) == rounded


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_rounding_keeps_the_order(a, b):
    if a <= b:
        assert round_remaining(a) <= round_remaining(b)


@pytest.mark.parametrize(("interval", "num_left"), [(None, 0), (0, 0), (5, 2)])
def test_evaluations_that_are_due_take_what_they_took(interval, num_left):
    """Of the weights and of their average: one pause of both."""
    view = RunView()
    counts = {"num_epochs": 1, "num_datasets": 1, "num_images": 1, "num_buckets": 1, "effective_batch_size": 1}
    names = {"model": "", "adapter": "", "precision": "", "device": "cpu", "device_name": ""}
    view.apply(t.RunPlanned(total_steps=20, evaluation_step_interval=interval, **counts, **names))
    for step in range(1, 11):
        figures = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "samples": 1}
        view.apply(t.StepFinished(step=step, total=20, epoch=1, step_seconds=1.0, **figures))
        for is_averaged in (False, True) if step % 5 == 0 else ():
            view.apply(
                t.EvaluationFinished(step=step, loss=1.0, losses=(), sigmas=(), seconds=30.0, is_averaged=is_averaged)
            )
    assert view.remaining_s() == pytest.approx(10 + num_left * 60)
