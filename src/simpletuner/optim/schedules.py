"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simpletuner.catalog.schedules import SCHEDULES
from simpletuner.problems import Problem, Severity


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Shape of the learning rate over a run.

    `kind` is a row of `catalog.schedules`, which says what it reads of the rest: `learning_rate` is the peak,
    `warmup_steps` counts optimizer updates, `end` is the rate at the run's end, `num_cycles` the number of cosine
    restarts or sine arches, `power` the exponent of the polynomial.
    """

    kind: str = "constant_with_warmup"
    learning_rate: float
    warmup_steps: int = 0
    num_cycles: int = 1
    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        assert self.kind in SCHEDULES, self.kind
        assert self.warmup_steps >= 0
        assert self.num_cycles >= 1
        assert self.power > 0


def learning_rate_at(step: int, *, settings: ScheduleSettings, total_steps: int) -> float:
    """Return the rate of the update that follows `step` finished updates; `step` is in 0..total_steps.

    The warm-up rises linearly, from `learning_rate / warmup_steps` for the first update to the peak for update
    number `warmup_steps`: no update is spent at rate 0. From there the schedules run to `end`, which they reach
    exactly at `step == total_steps`, when the run is over; the constant ones stay at the peak.
    """
    assert 0 <= step <= total_steps, (step, total_steps)
    peak, end = settings.learning_rate, settings.end
    if settings.kind == "sine":
        return end + (peak - end) * _sine_arch(settings.num_cycles, (step + 1) / (total_steps + 1))
    row = SCHEDULES[settings.kind]
    if row.warms_up and step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if not row.ends:
        return peak
    decay_steps = total_steps - settings.warmup_steps
    progress = (step - settings.warmup_steps) / decay_steps if decay_steps > 0 else 1.0
    return end + (peak - end) * _remaining(settings, progress)


def schedule_problems(settings: ScheduleSettings, total_steps: int) -> tuple[Problem, ...]:
    """Warn about a warm-up that is as long as the run or longer: nothing of the schedule would follow it."""
    warms_up = SCHEDULES[settings.kind].warms_up and settings.warmup_steps > 0
    if not warms_up or settings.warmup_steps < total_steps:
        return ()
    params = {"warmup_steps": settings.warmup_steps, "total_steps": total_steps}
    return (Problem(code="W-OPTIM-WARMUP", severity=Severity.WARNING, params=params, path="/lr_warmup_steps"),)


def _remaining(settings: ScheduleSettings, progress: float) -> float:
    """Fraction of the way from `end` up to the peak; `progress` in [0, 1] counts from the end of the warm-up."""
    if progress >= 1.0:
        return 0.0
    if settings.kind == "linear":
        return 1.0 - progress
    if settings.kind == "polynomial":
        return math.pow(1.0 - progress, settings.power)
    cycles = settings.num_cycles if SCHEDULES[settings.kind].cycles else 1
    assert settings.kind in ("cosine", "cosine_with_restarts")
    # SGDR (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983), section 3.
    return 0.5 * (1.0 + math.cos(math.pi * ((progress * cycles) % 1.0)))


def _sine_arch(num_arches: int, progress: float) -> float:
    """0 at both ends of each arch, 1 in its middle; exactly 0 at progress 1."""
    return math.sin(math.pi * ((progress * num_arches) % 1.0))
