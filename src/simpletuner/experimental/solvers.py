"""Samplers of the flow dx/dsigma = v(x, sigma) between any two noise levels: Euler, DPM-Solver++ and UniPC.

With the model's clean picture D = x - sigma v and lambda = log((1 - sigma) / sigma), the flow from level s to t is

    x_t = sigma_t / sigma_s x_s + alpha_t * integral_0^h e^(tau - h) D(lambda_s + tau) dtau,   alpha = 1 - sigma,
    h = lambda_t - lambda_s

(Lu et al. 2022, "DPM-Solver++", https://arxiv.org/abs/2211.01095). A multistep method puts a polynomial through known D
in place of D and integrates exactly. Through the last p of them it is DPM-Solver++ of order p; order 1 is Euler. UniPC
(Zhao et al. 2023, https://arxiv.org/abs/2302.04867) corrects a state, once the model has looked at it, through that D
and the p before, without a further look. The papers shorten some coefficients by terms of higher order; here they are
exact. At sigma = 1 lambda is infinite: that D serves for its own step only.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

SamplerName = Literal["euler", "dpm", "unipc"]
Trajectory = Generator[tuple[Tensor, float], Tensor, Tensor]
"""Yields (state, sigma), is sent the velocity there, returns the final state."""


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What the model made of a state: its clean picture, at log signal-to-noise ratio `lam`."""

    lam: float
    clean: Tensor


def trajectory(start: Tensor, levels: Sequence[float], *, sampler: SamplerName, order: int) -> Trajectory:
    """Go from levels[0] to levels[-1], which fall and end above 0, in one step per pair; one look at the model each.

    `order` counts the looks that a step uses, as far as there are any yet.
    """
    state = start
    looks: list[_Look] = []
    before: tuple[Tensor, float] | None = None
    for level, following in pairwise(levels):
        velocity = yield state, level
        look = _Look(lam=_lam(level), clean=state - level * velocity)
        if sampler == "unipc" and before is not None and looks:
            state = _step(*before, level, [look, *looks[:order]])
        looks = [look, *looks][: 1 if sampler == "euler" else order]
        before = (state, level)
        state = _step(state, level, following, looks)
        if math.isinf(look.lam):
            looks, before = [], None
    return state


def _step(state: Tensor, level: float, target: float, looks: Sequence[_Look]) -> Tensor:
    """From `level` to `target` with the polynomial through `looks`."""
    if math.isinf(_lam(level)):
        looks = looks[:1]
    weights = integral_weights([look.lam for look in looks], _lam(level), _lam(target))
    moved = state * (target / level)
    for weight, look in zip(weights, looks, strict=True):
        moved = moved + (1 - target) * weight * look.clean
    return moved


def integral_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weights of the values at `nodes` in integral_0^h e^(tau - h) p(start + tau) dtau, h = end - start, where p is the
    polynomial through them. All are values of lambda."""
    h = end - start
    if len(nodes) == 1:
        return [-math.expm1(-h)]
    moments = [-math.expm1(-h)]  # of 1, tau, tau^2, ...: by parts, h^m - m * the one before
    for m in range(1, len(nodes)):
        moments.append(h**m - m * moments[-1])
    powers = np.vander(np.asarray(nodes, dtype=np.float64) - start, increasing=True).T
    weights: list[float] = np.linalg.solve(powers, np.asarray(moments)).tolist()
    return weights


def _lam(level: float) -> float:
    return math.log((1 - level) / level) if level < 1 else -math.inf
