"""How long it still takes. Pure functions.

The remaining time is the median of the last training steps times the steps that are left, plus the validations and
saves that are still due at their mean of this session. Steps before a resume do not count, and nothing is said before
ten steps were measured: an early guess is a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

MIN_STEPS = 10
WINDOW_STEPS = 50


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
    training_s = median(step_seconds[-WINDOW_STEPS:]) * steps_left
    return training_s + sum(fmean(pause.seconds) * pause.num_left for pause in pauses if pause.seconds)


def num_due(step: int, total: int, interval: int | None) -> int:
    """How many multiples of `interval` lie in (step, total]: what is still due after `step` is done."""
    return max(0, total // interval - step // interval) if interval else 0


def round_remaining(seconds: float) -> int:
    """Round to what is worth saying, never to zero: 5 s, 15 s, minutes, ten minutes, hours."""
    for limit, unit in ((60, 5), (300, 15), (3600, 60), (86400, 600)):
        if seconds < limit:
            return max(unit, round(seconds / unit) * unit) if unit == 5 else round(seconds / unit) * unit
    return round(seconds / 3600) * 3600
