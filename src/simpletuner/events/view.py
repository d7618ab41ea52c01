"""What a display of one run needs to remember: a fold over its events."""

from __future__ import annotations

from collections import deque
from functools import singledispatchmethod

from simpletuner.events import types as t
from simpletuner.events.eta import WINDOW_STEPS, Pause, num_due, remaining_s
from simpletuner.events.run_status import smooth, smooth_seen


class RunView:
    """The present of a run. `apply` every event in order; the attributes may be read at any time."""

    def __init__(self) -> None:
        self.plan: t.RunPlanned | None = None
        self.resumed: t.RunResumed | None = None
        self.step: t.StepFinished | None = None
        self.loss: float | None = None  # smoothed
        self.regularisation_loss: float | None = None  # smoothed
        self.phases: dict[str, t.RunPhase] = {}  # the open ones, the innermost last
        self.cache: t.CacheProgress | None = None  # of the innermost phase
        self.validation: t.ValidationStarted | None = None
        self.validation_done = 0
        self.stopping = 0
        self._step_seconds: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._validation_seconds: list[float] = []
        self._save_seconds: list[float] = []
        self._evaluation_seconds: dict[int, float] = {}  # by step: of the weights and of their average

    @property
    def validation_fraction(self) -> float:
        """How much of the validation is done: by sampling steps where they are told, else by images."""
        phase = self.phases.get("validation")
        if phase is not None and phase.total:
            return phase.done / phase.total
        return self.validation_done / max(1, self.validation.num_images) if self.validation else 0.0

    def remaining_s(self) -> float | None:
        """Estimated seconds to the end; None while nothing can be said."""
        if self.step is None:
            return None
        step, total = self.step.step, self.step.total
        validation_interval = self.plan.validation_step_interval if self.plan else None
        evaluation_interval = self.plan.evaluation_step_interval if self.plan else None
        checkpoint_interval = self.plan.checkpoint_step_interval if self.plan else None
        pauses = (
            Pause(num_left=num_due(step, total, validation_interval), seconds=self._validation_seconds),
            Pause(num_left=num_due(step, total, checkpoint_interval), seconds=self._save_seconds),
            Pause(num_left=num_due(step, total, evaluation_interval), seconds=[*self._evaluation_seconds.values()]),
        )
        return remaining_s(tuple(self._step_seconds), total - step, pauses)

    @singledispatchmethod
    def apply(self, event: t.Event) -> None:
        """Take one event in."""

    @apply.register
    def _(self, event: t.RunStarted) -> None:
        """A new session: only the measured pauses of the earlier one still say something."""
        del event
        self.resumed, self.step, self.loss, self.validation, self.stopping = None, None, None, None, 0
        self.regularisation_loss = None
        self.phases.clear()
        self._step_seconds.clear()

    @apply.register
    def _(self, event: t.RunResumed) -> None:
        self.resumed = event

    @apply.register
    def _(self, event: t.RunPlanned) -> None:
        self.plan = event

    @apply.register
    def _(self, event: t.RunPhase) -> None:
        if event.key not in self.phases:
            self.cache = None
        if event.finished:
            self.phases.pop(event.key, None)
        else:
            self.phases[event.key] = event

    @apply.register
    def _(self, event: t.CacheProgress) -> None:
        self.cache = event

    @apply.register
    def _(self, event: t.StepFinished) -> None:
        self.step = event
        self.loss = smooth(self.loss, event.loss)
        self.regularisation_loss = smooth_seen(self.regularisation_loss, event.regularisation_loss)
        self._step_seconds.append(event.step_seconds)

    @apply.register
    def _(self, event: t.CheckpointSaved) -> None:
        if not event.final:
            self._save_seconds.append(event.seconds)

    @apply.register
    def _(self, event: t.EvaluationFinished) -> None:
        self._evaluation_seconds[event.step] = self._evaluation_seconds.get(event.step, 0.0) + event.seconds

    @apply.register
    def _(self, event: t.ValidationStarted) -> None:
        self.validation, self.validation_done = event, 0

    @apply.register
    def _(self, event: t.ValidationImage) -> None:
        del event
        self.validation_done += 1

    @apply.register
    def _(self, event: t.ValidationFinished) -> None:
        self.validation = None
        self._validation_seconds.append(event.seconds)

    @apply.register
    def _(self, event: t.RunStopping) -> None:
        self.stopping = event.level
