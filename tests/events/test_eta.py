"""Remaining time: the median pace, the pauses that are due, no early guesses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.events.eta import MIN_STEPS, WINDOW_STEPS, Pause, num_due, remaining_s, round_remaining


def test_nothing_is_said_before_ten_steps():
    assert remaining_s([1.0] * (MIN_STEPS - 1), 100) is None
    assert remaining_s([1.0] * MIN_STEPS, 100) == 100.0


def test_one_slow_step_changes_nothing():
    assert remaining_s([1.0] * 20 + [500.0], 10) == 10.0


def test_only_the_newest_steps_count():
    assert remaining_s([9.0] * 1000 + [1.0] * WINDOW_STEPS, 10) == 10.0


def test_pauses_are_added_at_their_mean_and_unknown_ones_not_at_all():
    pauses = [Pause(num_left=3, seconds=[10.0, 20.0]), Pause(num_left=5, seconds=[])]
    assert remaining_s([2.0] * 10, 100, pauses) == 200.0 + 45.0


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
