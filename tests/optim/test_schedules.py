from __future__ import annotations

import math

import pytest

from simpletuner.catalog.schedules import SCHEDULES
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.optim.schedules import ScheduleSettings, learning_rate_at, schedule_problems

DECAYING = [name for name, row in SCHEDULES.items() if row.ends]
PEAK, END, TOTAL = 1e-3, 1e-5, 57


def rates(kind: str, *, total: int = TOTAL, **options: float) -> list[float]:
    settings = ScheduleSettings(kind=kind, **{"learning_rate": PEAK, "end": END, **options})
    return [learning_rate_at(step, settings=settings, total_steps=total) for step in range(total + 1)]


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("kind", DECAYING)
def test_a_schedule_reaches_its_end_exactly_when_the_run_ends(kind, warmup_steps):
    assert rates(kind, warmup_steps=warmup_steps)[-1] == END


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", DECAYING)
def test_rates_stay_between_end_and_peak_and_no_update_is_wasted(kind, cycles):
    values = rates(kind, num_cycles=cycles, end=0.0)
    assert all(0 <= value <= PEAK for value in values)
    assert sum(value == 0 for value in values[:-1]) <= cycles - 1  # sine may touch 0 between arches


@pytest.mark.parametrize("kind", [name for name, row in SCHEDULES.items() if row.warms_up])
def test_warm_up_is_linear_from_its_first_share_to_the_peak(kind):
    values = rates(kind, warmup_steps=10)
    assert values[:10] == pytest.approx([PEAK * n / 10 for n in range(1, 11)])
    assert values[9] == values[10] == PEAK


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_after_the_warm_up_the_rate_never_rises(kind):
    values = rates(kind, warmup_steps=5, power=2.0)[5:]
    assert values == sorted(values, reverse=True)
    assert values[0] == PEAK


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
def test_constant_stays_at_the_peak(kind):
    assert set(rates(kind)) == {PEAK}


def test_linear_is_the_polynomial_of_power_one():
    assert rates("linear") == pytest.approx(rates("polynomial", power=1.0))


def test_one_cycle_with_restarts_is_cosine():
    assert rates("cosine_with_restarts") == pytest.approx(rates("cosine"))


def test_restarts_repeat_the_cosine():
    values = rates("cosine_with_restarts", total=60, num_cycles=3)
    assert values[:20] == pytest.approx(values[20:40])
    assert values[:20] == pytest.approx(rates("cosine", total=20)[:20])


def test_cosine_is_halfway_in_the_middle():
    assert rates("cosine", total=10)[5] == pytest.approx((PEAK + END) / 2)


def test_sine_has_one_top_per_cycle_and_is_symmetric():
    values = rates("sine", total=40, num_cycles=2)
    inner = values[:-1]
    tops = [n for n in range(1, len(inner) - 1) if inner[n - 1] < inner[n] >= inner[n + 1]]
    assert len(tops) == 2
    assert inner == pytest.approx(inner[::-1])


@pytest.mark.parametrize("kind", [name for name, row in SCHEDULES.items() if not row.warms_up])
def test_what_does_not_warm_up_ignores_the_steps_and_does_not_warn_of_them(kind):
    assert rates(kind, warmup_steps=8) == rates(kind)
    assert schedule_problems(ScheduleSettings(kind=kind, learning_rate=PEAK, warmup_steps=8), 5) == ()


def test_a_run_of_no_steps_and_a_warm_up_longer_than_the_run_are_defined():
    assert rates("cosine", total=0) == [END]
    values = rates("cosine", total=4, warmup_steps=10)
    assert values == pytest.approx([PEAK * n / 10 for n in range(1, 6)])
    assert all(math.isfinite(v) for v in values)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_warm_up_as_long_as_the_run_is_named(language):
    settings = ScheduleSettings(learning_rate=PEAK, warmup_steps=100)
    assert schedule_problems(settings, 101) == ()
    (problem,) = schedule_problems(settings, 100)
    title, hint = render_problem(problem, language)
    assert "100" in title
    assert hint is not None
    assert "lr_warmup_steps" in hint
