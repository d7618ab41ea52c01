"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simpletuner.problems import Problem, Severity

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "sine",
)


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Shape of the learning rate over a run.

    `learning_rate` is the peak and `end` the rate at the run's end (ignored by the constant schedules).
    `warmup_steps` counts optimizer updates; every schedule but `sine`, which starts low by itself, honours it.
    `num_cycles` is the number of cosine restarts or of sine arches, `power` the exponent of `polynomial`.
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
    number `warmup_steps`: no update is spent at rate 0. The decaying schedules then go from the peak to `end`, which
    they reach exactly at `step == total_steps`, when the run is over.
    """
    assert 0 <= step <= total_steps, (step, total_steps)
    peak, end = settings.learning_rate, settings.end
    if settings.kind == "sine":
        return end + (peak - end) * abs(math.sin(math.pi * settings.num_cycles * (step + 1) / (total_steps + 1)))
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.kind in ("constant", "constant_with_warmup"):
        return peak
    decay_steps = total_steps - settings.warmup_steps
    progress = (step - settings.warmup_steps) / decay_steps if decay_steps > 0 else 1.0
    return end + (peak - end) * _remaining(settings, progress)


def schedule_problems(settings: ScheduleSettings, total_steps: int) -> tuple[Problem, ...]:
    """Warn about a warm-up that is as long as the run or longer: the peak would be reached late or never."""
    if settings.kind == "sine" or settings.warmup_steps < total_steps or settings.warmup_steps == 0:
        return ()
    params = {"warmup_steps": settings.warmup_steps, "total_steps": total_steps}
    return (
        Problem(code="W-OPTIM-WARMUP", severity=Severity.WARNING, params=params, path="/lr_warmup_steps"),
    )


def _remaining(settings: ScheduleSettings, progress: float) -> float:
    """Fraction of the way from `end` up to the peak; `progress` in [0, 1] counts from the end of the warm-up."""
    if settings.kind == "linear":
        return 1.0 - progress
    if settings.kind == "polynomial":
        return (1.0 - progress) ** settings.power
    if settings.kind == "cosine":
        return _half_cosine(progress)
    assert settings.kind == "cosine_with_restarts"
    if progress >= 1.0:
        return 0.0
    return _half_cosine((progress * settings.num_cycles) % 1.0)


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to exactly 0 at 1 (SGDR: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""
    return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * progress))
