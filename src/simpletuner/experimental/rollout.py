"""Scheduled sampling for flow matching: train on states that the model's own sampling leads to.

Training shows the model (1 - sigma) * clean + sigma * noise; sampling shows it where its own errors have led, which it
never saw ("exposure bias"; Bengio et al. 2015, https://arxiv.org/abs/1506.03099, for sequences; Ning et al. 2023,
https://arxiv.org/abs/2301.11706, and Li et al. 2023, https://arxiv.org/abs/2305.15583, for diffusion). A rollout begins
some steps earlier on the schedule of a real sampler, noises the picture there, and lets the model, without gradient,
step down to sigma. What is trained is the velocity that leads from where that ends to the clean picture,

    (state - clean) / sigma,

which is noise - clean exactly where the model made no error.

Noise levels below the schedule's last one are left alone: there a sampler never looks at the model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.catalog.rollouts import offset_shares
from simpletuner.experimental.reflexflow import ReflexFlow
from simpletuner.experimental.solvers import SamplerName, Trajectory, trajectory

Predict = Callable[[Sequence[Tensor], Tensor, Sequence[str]], Sequence[Tensor]]
"""(B noisy latents [C, h, w], sigma [B], B prompts) -> B velocities; without gradient and dropout."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Share of the pictures that are rolled out: `start` to `end` over `steps` updates from `first_step` on; none
    before."""

    start: float
    end: float
    steps: int = 0
    first_step: int = 0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int) -> float:
        """In the update after `step` finished ones."""
        if step < self.first_step:
            return 0.0
        part = min((step - self.first_step) / self.steps, 1.0) if self.steps else 1.0
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """`levels`: those of a sampler's schedule from 1 down, 0 left out. `max_offset`: steps on it, at most."""

    levels: tuple[float, ...]
    max_offset: int
    ramp: Ramp
    strategy: str = "uniform"
    sampler: SamplerName = "unipc"
    order: int = 2
    reflexflow: ReflexFlow | None = None

    def path(self, sigma: float, offset: int) -> tuple[float, ...]:
        """The levels from `offset` steps before `sigma` down to it, as far as the schedule reaches; only itself below
        the schedule's last level and at its first. The last step is cut short to end there."""
        if sigma < self.levels[-1]:
            return (sigma,)
        above = bisect_left([-level for level in self.levels], -sigma)  # so many levels are larger
        return (*self.levels[max(above - offset, 0) : above], sigma)


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """A micro-batch of which some samples are rolled out. `drifts`: state - noised picture, None for the others.
    `num_forwards`: looks at the model, of all samples together."""

    noisy: list[Tensor]
    targets: list[Tensor]
    drifts: list[Tensor | None]
    num_forwards: int
    reflexflow: ReflexFlow | None

    def losses(
        self, predicted: Sequence[Tensor], errors: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """Per sample, [] each, from the errors by element; `weights`: how much each place counts, with a mean of 1."""
        terms = zip(predicted, self.targets, errors, self.drifts, weights or [None] * len(errors), strict=True)
        return [
            (error if weight is None else error * weight).mean()
            if drift is None or self.reflexflow is None
            else self.reflexflow.loss(prediction, target, error, drift, weight)
            for prediction, target, error, drift, weight in terms
        ]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The hook of a training step."""

    settings: RolloutSettings
    predict: Predict

    def roll_out(
        self,
        clean: Sequence[Tensor],
        noise: Sequence[Tensor],
        noisy: Sequence[Tensor],
        *,
        sigma_B: Tensor,
        prompts: Sequence[str],
        step: int,
        draws: torch.Generator,
    ) -> Rolled | None:
        """Replace what some samples show the model; None if it is none of them.

        Args:
            clean, noise, noisy: B tensors [C, h, w] each, float32.
            sigma_B: their noise levels, on the CPU.
            step: finished updates.
            draws: decides which samples, and how far.
        """
        paths = self._paths(sigma_B.tolist(), step, draws)
        chosen = [index for index, path in enumerate(paths) if len(path) > 1]
        if not chosen:
            return None
        states, targets = list(noisy), [e - x for x, e in zip(clean, noise, strict=True)]
        drifts: list[Tensor | None] = [None] * len(states)
        ends = self._integrate({i: _begin(clean[i], noise[i], paths[i], self.settings) for i in chosen}, prompts)
        for index, state in ends.items():
            sigma = paths[index][-1]
            states[index] = state
            targets[index] = (state - clean[index]) / sigma
            drifts[index] = state - torch.lerp(clean[index], noise[index], sigma)
        return Rolled(
            noisy=states,
            targets=targets,
            drifts=drifts,
            num_forwards=sum(len(paths[index]) - 1 for index in chosen),
            reflexflow=self.settings.reflexflow,
        )

    def _paths(self, sigmas: Sequence[float], step: int, draws: torch.Generator) -> list[tuple[float, ...]]:
        """The levels of each sample; only its own if it is not rolled out."""
        settings = self.settings
        share = settings.ramp.at(step)
        shares = torch.tensor(offset_shares(settings.strategy, settings.max_offset))
        is_chosen = torch.rand(len(sigmas), generator=draws, dtype=torch.float64) < share
        offsets = torch.multinomial(shares, len(sigmas), replacement=True, generator=draws) + 1
        picks = zip(sigmas, is_chosen.tolist(), offsets.tolist(), strict=True)
        return [settings.path(sigma, offset) if chosen else (sigma,) for sigma, chosen, offset in picks]

    @torch.no_grad()
    def _integrate(self, running: dict[int, Trajectory], prompts: Sequence[str]) -> dict[int, Tensor]:
        """Run the trajectories to their ends; those that still run share each look at the model."""
        ends: dict[int, Tensor] = {}
        asked = {index: next(steps) for index, steps in running.items()}
        while asked:
            states = [state for state, _ in asked.values()]
            sigma_B = torch.tensor([sigma for _, sigma in asked.values()], device=states[0].device)
            velocities = self.predict(states, sigma_B, [prompts[index] for index in asked])
            answers = dict(zip(asked, velocities, strict=True))
            asked = {}
            for index, velocity in answers.items():
                try:
                    asked[index] = running[index].send(velocity.float())
                except StopIteration as stop:
                    ends[index] = stop.value
        return ends


def _begin(clean: Tensor, noise: Tensor, path: Sequence[float], settings: RolloutSettings) -> Trajectory:
    start = torch.lerp(clean, noise, path[0])
    return trajectory(start, path, sampler=settings.sampler, order=settings.order)
