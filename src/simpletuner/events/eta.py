"""How long it still takes. Pure functions.

The remaining time is the pace of the last training steps times the steps that are left, plus the validations and saves
that are still due at their mean of this session. Steps before a resume do not count, and nothing is said before ten
steps were measured: an early guess is a wrong one.

The pace is a mean in which a step counts half as much as one HALF_LIFE_STEPS later, so that it follows a machine that
becomes slower or faster. A step that takes several times the usual (a pause of the whole machine) counts as no more
than OUTLIER times the weighted median, so that a single one shows little. Buckets of different sizes have steps of
different lengths; a median alone would stick to one kind of them, a mean does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MIN_STEPS = 10
WINDOW_STEPS = 50
HALF_LIFE_STEPS = 8
OUTLIER = 3.0


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Work between steps: how often it is still due, and how long each of the past ones took."""

    num_left: int
    seconds: Sequence[float]


def remaining_s(step_seconds: Sequence[float], steps_left: int, pauses: Sequence[Pause] = ()) -> float | None:
    """Seconds until the last step, validation and save; None while fewer than MIN_STEPS steps were measured.

    Args:
        step_seconds: wall time of every step of this session, the newest last; WINDOW_STEPS of them are used.
        pauses: a kind that never happened yet counts nothing, because its length is unknown.
    """
    if len(step_seconds) < MIN_STEPS:
        return None
    training_s = pace_s(step_seconds) * steps_left
    return training_s + sum(fmean(pause.seconds) * pause.num_left for pause in pauses if pause.seconds)


def pace_s(step_seconds: Sequence[float]) -> float:
    """Seconds that a step takes at present; at least one must have been measured."""
    newest = step_seconds[-WINDOW_STEPS:]
    weights = [math.pow(0.5, age / HALF_LIFE_STEPS) for age in reversed(range(len(newest)))]
    limit = OUTLIER * _weighted_median(newest, weights)
    return sum(min(s, limit) * w for s, w in zip(newest, weights, strict=True)) / sum(weights)


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The smallest value such that it and all smaller ones have at least half of the weight."""
    half, reached = sum(weights) / 2, 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= half:
            return value
    return max(values)


def num_due(step: int, total: int, interval: int | None) -> int:
    """How many multiples of `interval` lie in (step, total]: what is still due after `step` is done."""
    return max(0, total // interval - step // interval) if interval else 0


def round_remaining(seconds: float) -> int:
    """Round to what is worth saying, never to zero: 5 s, 15 s, minutes, ten minutes, hours."""
    for limit, unit in ((60, 5), (300, 15), (3600, 60), (86400, 600)):
        if seconds < limit:
            return max(unit, round(seconds / unit) * unit) if unit == 5 else round(seconds / unit) * unit
    return round(seconds / 3600) * 3600
