"""The training loop: step, tell, save, validate, obey."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Protocol

from simpletuner.events.types import Event, StepFinished
from simpletuner.optim.schedules import ScheduleSettings, learning_rate_at
from simpletuner.train.step import MicroBatch, StepResult


class Ending(Enum):
    """How the loop came to its end."""

    COMPLETE = "complete"
    STOPPED = "stopped"  # asked to stop, checkpoint saved
    ABANDONED = "abandoned"  # asked to leave without saving


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """`start_step` updates are done already; the loop goes on to `total_steps`. An interval of 0 means never.

    epoch_of: number of a micro-batch -> its epoch, both from 0.
    """

    start_step: int
    total_steps: int
    accumulation_steps: int
    epoch_of: Callable[[int], int]
    schedule: ScheduleSettings
    checkpoint_interval: int
    validation_interval: int
    evaluation_interval: int = 0


class Steering(Protocol):
    """What people ask of a running loop: Ctrl-C, or `simpletuner runs stop|checkpoint|validate`."""

    def stop_level(self) -> int:
        """0: go on; 1: save and stop; 2: stop without saving."""

    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""

    def wants_validation(self) -> bool:
        """Whether images were asked for since the last call."""


def run_loop(
    batches: Iterator[MicroBatch],
    *,
    settings: LoopSettings,
    update: Callable[[Iterator[MicroBatch], float], StepResult],
    save: Callable[[int], None],
    validate: Callable[[int], None],
    evaluate: Callable[[int], None] = lambda step: None,
    steering: Steering,
    emit: Callable[[Event], None],
) -> tuple[Ending, int]:
    """Train from `start_step` to `total_steps`; return how it ended and how many updates are done.

    `update(micro_batches, learning_rate)` does one optimizer update; `save(step)`, `evaluate(step)` and
    `validate(step)` act on the state after `step` updates. The last step is none of that here: the caller finishes
    the run.
    """
    batches = iter(batches)
    clock = _DataClock(batches)
    step = settings.start_step
    stop_level = steering.stop_level()
    while step < settings.total_steps and stop_level == 0:
        begun = time.perf_counter()
        clock.waited_s = 0.0
        learning_rate = learning_rate_at(step, settings=settings.schedule, total_steps=settings.total_steps)
        result = update(islice(clock, settings.accumulation_steps), learning_rate)
        step += 1
        emit(_step_event(step, result, learning_rate, settings, time.perf_counter() - begun, clock.waited_s))
        stop_level = steering.stop_level()
        if step == settings.total_steps or stop_level:
            break
        if _is_due(step, settings.checkpoint_interval) or steering.wants_checkpoint():
            save(step)
        if _is_due(step, settings.evaluation_interval):
            evaluate(step)
        if _is_due(step, settings.validation_interval) or steering.wants_validation():
            validate(step)
        stop_level = steering.stop_level()
    if step >= settings.total_steps:
        return Ending.COMPLETE, step
    if stop_level > 1:
        return Ending.ABANDONED, step
    save(step)
    return Ending.STOPPED, step


class _DataClock:
    """Iterates `batches`, adding up the time spent waiting for them."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        begun = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - begun


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _step_event(
    step: int, result: StepResult, learning_rate: float, settings: LoopSettings, seconds: float, data_seconds: float
) -> StepFinished:
    first_micro_batch = (step - 1) * settings.accumulation_steps
    return StepFinished(
        step=step,
        total=settings.total_steps,
        epoch=settings.epoch_of(first_micro_batch) + 1,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate,
        step_seconds=seconds,
        samples=result.num_samples,
        data_seconds=data_seconds,
        sigma_mean=result.mean_sigma,
        rollout_forwards=result.rollout_forwards or None,
        regularisation_loss=None if math.isnan(result.regularisation_loss) else result.regularisation_loss,
    )
