"""An exponential moving average of the trained weights, which forgets the noise of single updates.

    average <- d * average + (1 - d) * weights,   d(k) = min(decay, (1 + k) / (10 + k)) for the k-th averaging, from 0

(Polyak & Juditsky 1992 for averaging at all; the warm-up of d is TensorFlow's: while little has been averaged, old
weights count less, so that a short run's average is not the adapter's beginning.) During the first `warmup_steps`
updates the average is a copy of the weights. The average is float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """`interval`: updates from one averaging to the next. `foreach`: all tensors in one call."""

    decay: float = 0.995
    interval: int = 1
    warmup_steps: int = 0
    foreach: bool = True

    def decay_at(self, step: int) -> float:
        """What the average keeps at the averaging after `step` updates; 0: it becomes a copy."""
        if step <= self.warmup_steps:
            return 0.0
        k = (step - self.warmup_steps - 1) // self.interval
        return min(self.decay, (1 + k) / (10 + k))


class WeightAverage:
    """The average of `params`, on a device of its own. Begins as a copy of them."""

    @torch.no_grad()
    def __init__(self, params: Sequence[nn.Parameter], settings: EmaSettings, *, device: torch.device) -> None:
        self._params = tuple(params)
        self._settings = settings
        self._device = device
        self._num_steps = 0
        self._average = self._copies()

    @torch.no_grad()
    def update_(self) -> None:
        """Call after each optimizer update."""
        self._num_steps += 1
        if self._num_steps % self._settings.interval:
            return
        share = 1 - self._settings.decay_at(self._num_steps)
        weights = [param.detach().to(self._device, torch.float32) for param in self._params]
        if self._settings.foreach:
            torch._foreach_lerp_(self._average, weights, share)
            return
        for average, weight in zip(self._average, weights, strict=True):
            average.lerp_(weight, share)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Within, the parameters hold the average; then again, bit for bit, what they held. No update may happen."""
        trained = [param.detach().clone() for param in self._params]
        _copy_(self._params, self._average)
        try:
            yield
        finally:
            _copy_(self._params, trained)

    def state(self) -> dict[str, Any]:
        """What `load_` needs to go on, bit for bit."""
        return {"num_steps": self._num_steps, "average": [tensor.clone() for tensor in self._average]}

    def load_(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is of other parameters.
        """
        shapes = [tensor.shape for tensor in state["average"]]
        if shapes != [param.shape for param in self._params]:
            raise ValueError("the saved average is of other parameters")
        _copy_(self._average, state["average"])
        self._num_steps = int(state["num_steps"])

    @torch.no_grad()
    def begin_(self, num_steps: int) -> None:
        """Begin as a copy of the weights as they are after `num_steps` updates."""
        self._average = self._copies()
        self._num_steps = num_steps

    def _copies(self) -> list[Tensor]:
        return [param.detach().to(self._device, torch.float32, copy=True) for param in self._params]


@torch.no_grad()
def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
