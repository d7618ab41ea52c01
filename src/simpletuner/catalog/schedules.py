"""Learning-rate schedules by name. Every one warms up first and then runs to the end. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which options a schedule reads: `warms_up` lr_warmup_steps, `ends` lr_end, `cycles` lr_num_cycles, `power`
    lr_power."""

    name: str
    warms_up: bool = True
    ends: bool = False
    cycles: bool = False
    power: bool = False


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        schedule.name: schedule
        for schedule in (
            Schedule(name="constant", warms_up=False),
            Schedule(name="constant_with_warmup"),
            Schedule(name="linear", ends=True),
            Schedule(name="cosine", ends=True),
            Schedule(name="cosine_with_restarts", ends=True, cycles=True),
            Schedule(name="polynomial", ends=True, power=True),
            Schedule(name="sine", warms_up=False, ends=True, cycles=True),
        )
    }
)

SCHEDULE_SPELLINGS = (("cosine_with_warmup", "cosine"), ("linear_with_warmup", "linear"))
