"""Laws of the noise level sigma in [0, 1]: how often training sees each. No torch.

A law is its quantile function: sigma = quantile(u) with u even in (0, 1) follows it. So one even draw, or a stratified
one, serves every law, and a plot needs no samples.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

from simpletuner.config.number_list import parse_numbers
from simpletuner.config.sections.flow import FlowSection

# Resolution-dependent shift of FLUX.1: exp(mu), mu linear in the number of image tokens through these two points.
_AUTO_SHIFT_TOKENS = (256, 4096)
_AUTO_SHIFT_MU = (0.5, 1.15)

_EDGE = 2.0**-53  # an even draw stays this far from 0 and 1, where quantiles are infinite before the sigmoid
_NUM_POINTS = 4096  # of a tabulated law; the error of its distribution function is below 1e-5
_LEAST_LOG_DENSITY = -40.0  # a beta law's table ends where its density in logit space is this far below its peak


class SigmaLaw(Protocol):
    """A law before any shift."""

    def quantile(self, u: float) -> float:
        """The noise level that a share `u`, in (0, 1), of all draws stays below."""

    def density(self, sigma: float) -> float:
        """Probability per unit of sigma, for 0 < sigma < 1."""


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigma = sigmoid(scale * n), n standard normal (Esser et al. 2024, https://arxiv.org/abs/2403.03206, 3.1)."""

    scale: float = 1.0

    def quantile(self, u: float) -> float:
        return _sigmoid(self.scale * NormalDist().inv_cdf(u))

    def density(self, sigma: float) -> float:
        return NormalDist(0.0, self.scale).pdf(_logit(sigma)) / (sigma * (1 - sigma))


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every level as often as any other."""

    def quantile(self, u: float) -> float:
        return u

    def density(self, sigma: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Beta:
    """sigma ~ Beta(alpha, beta): alpha above beta prefers noise, both above 1 the middle, both below 1 the ends."""

    alpha: float = 2.0
    beta: float = 2.0

    def quantile(self, u: float) -> float:
        return self._table.quantile(u)

    def density(self, sigma: float) -> float:
        return self._logit_density(_logit(sigma)) / (sigma * (1 - sigma))

    def _logit_density(self, x: float) -> float:
        """Of logit(sigma): smooth and falling at both ends, whatever alpha and beta."""
        log_norm = math.lgamma(self.alpha) + math.lgamma(self.beta) - math.lgamma(self.alpha + self.beta)
        return math.exp(-self.alpha * _softplus(-x) - self.beta * _softplus(x) - log_norm)

    @cached_property
    def _table(self) -> _Table:
        peak = math.log(self.alpha / self.beta)
        low, high = peak + _LEAST_LOG_DENSITY / self.alpha - 8, peak - _LEAST_LOG_DENSITY / self.beta + 8
        return _tabulate(self._logit_density, low, high, place=_sigmoid)


@dataclass(frozen=True, kw_only=True)
class Cubic:
    """A density through `weights`, evenly spaced from sigma 0 to 1, by monotone cubic pieces.

    The slopes are those of Fritsch & Butland 1984 (no overshoot, so never below zero); the scale of the weights does
    not matter. At least two, none negative, one positive.
    """

    weights: tuple[float, ...]

    def quantile(self, u: float) -> float:
        return self._table.quantile(u)

    def density(self, sigma: float) -> float:
        return self._curve(sigma) / self._table.total

    @cached_property
    def _slopes(self) -> tuple[float, ...]:
        """Per knot, in weight per knot distance."""
        rises = [b - a for a, b in pairwise(self.weights)]
        inner = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(rises)]
        return (rises[0], *inner, rises[-1]) if len(rises) > 1 else (rises[0], rises[0])

    def _curve(self, sigma: float) -> float:
        place = min(max(sigma, 0.0), 1.0) * (len(self.weights) - 1)
        left = min(int(place), len(self.weights) - 2)
        t = place - left
        (y0, y1), (m0, m1) = self.weights[left : left + 2], self._slopes[left : left + 2]
        value = (
            (1 + 2 * t) * (1 - t) ** 2 * y0 + t * (1 - t) ** 2 * m0 + t * t * (3 - 2 * t) * y1 + t * t * (t - 1) * m1
        )
        return max(value, 0.0)

    @cached_property
    def _table(self) -> _Table:
        return _tabulate(self._curve, 0.0, 1.0, place=lambda x: x)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Each of `values` as often as it is in the list. Never shifted: these are the levels that are wanted."""

    values: tuple[float, ...]

    def quantile(self, u: float) -> float:
        return sorted(self.values)[min(int(u * len(self.values)), len(self.values) - 1)]

    def density(self, sigma: float) -> float:
        return math.inf if sigma in self.values else 0.0


def law_of(options: FlowSection) -> SigmaLaw:
    """The law that the options ask for, before any shift."""
    if options.flow_custom_timesteps is not None:
        values = parse_numbers(options.flow_custom_timesteps)
        return Listed(values=values if max(values) <= 1 else tuple(value / 1000 for value in values))
    if options.flow_cubic_schedule_weights is not None:
        return Cubic(weights=parse_numbers(options.flow_cubic_schedule_weights))
    if options.flow_use_beta_schedule:
        return Beta(alpha=options.flow_beta_schedule_alpha, beta=options.flow_beta_schedule_beta)
    return Uniform() if options.flow_use_uniform_schedule else LogitNormal(scale=options.flow_sigmoid_scale)


def shifted(sigma: float, shift: float) -> float:
    """shift * sigma / (1 + (shift - 1) * sigma): the odds of noise against image, times `shift`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shifted_density(law: SigmaLaw, shift: float, sigma: float) -> float:
    """Density, at `sigma` in (0, 1), of a law's levels after the shift."""
    width = shift - (shift - 1) * sigma
    return law.density(sigma / width) * shift / width**2


def auto_shift(num_tokens: int) -> float:
    """Shift for an image of this many tokens: 1.65 at 256 px^2 (256 tokens), 3.16 at 1024 px^2 (4096 tokens)."""
    (tokens_low, tokens_high), (mu_low, mu_high) = _AUTO_SHIFT_TOKENS, _AUTO_SHIFT_MU
    slope = (mu_high - mu_low) / (tokens_high - tokens_low)
    return math.exp(mu_low + slope * (num_tokens - tokens_low))


def inside(u: float) -> float:
    """`u` kept off 0 and 1, as quantiles want it."""
    return min(max(u, _EDGE), 1 - _EDGE)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A distribution function by points: share `shares[i]` of all draws lies below `sigmas[i]`."""

    sigmas: Sequence[float]
    shares: Sequence[float]
    total: float  # the integral of what was tabulated

    def quantile(self, u: float) -> float:
        right = min(max(bisect_right(self.shares, u), 1), len(self.shares) - 1)
        low, high = self.shares[right - 1], self.shares[right]
        part = (u - low) / (high - low) if high > low else 0.0
        return self.sigmas[right - 1] + part * (self.sigmas[right] - self.sigmas[right - 1])


def _tabulate(density: Callable[[float], float], low: float, high: float, *, place: Callable[[float], float]) -> _Table:
    """Integrate `density` from `low` to `high` by Simpson's rule; `place` turns its argument into a sigma."""
    step = (high - low) / _NUM_POINTS
    values = [density(low + step * i / 2) for i in range(2 * _NUM_POINTS + 1)]
    sums = [0.0]
    for i in range(0, 2 * _NUM_POINTS, 2):
        sums.append(sums[-1] + step / 6 * (values[i] + 4 * values[i + 1] + values[i + 2]))
    sigmas = [place(low + step * i) for i in range(_NUM_POINTS + 1)]
    return _Table(sigmas=sigmas, shares=[value / sums[-1] for value in sums], total=sums[-1])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _logit(sigma: float) -> float:
    return math.log(sigma) - math.log1p(-sigma)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
