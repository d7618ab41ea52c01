"""Rectified-flow training: which noise level, which noise, what loss.

sigma in [0, 1] is the noise level: x_sigma = (1 - sigma) * clean + sigma * noise, velocity = noise - clean
(Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching for Generative Modeling").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from simpletuner.train.seeds import generator
from simpletuner.train.sigma_law import Listed, LogitNormal, SigmaLaw, auto_shift, inside, shifted

Weights: TypeAlias = Sequence[Tensor | None]
"""Of B samples: how much each place counts, [1, h, w] with a mean of 1, none negative; None: all places alike."""


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Law of the noise levels seen in training: `law`, shifted by `shift`, or with `auto_shift` by what the number of
    image tokens asks for. `Listed` levels are not shifted.

    stratified: the samples of one update share the law out among them, see `even_draws`. in_turn: the levels of a
    `Listed` law are taken one after the other instead of being drawn.
    """

    law: SigmaLaw = field(default_factory=LogitNormal)
    shift: float = 1.0
    auto_shift: bool = False
    stratified: bool = True
    in_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """What is done to the noise beside drawing it.

    offset: with `offset_probability`, each channel of a sample's noise is moved by `offset` times one normal number,
    so that the model learns to change the mean brightness and colour (Guttenberg 2023, "Diffusion with Offset
    Noise"). perturbation: the model's input has this much more noise, which the target does not know of (Ning et al.
    2023, https://arxiv.org/abs/2301.11706); it falls linearly to none over `perturbation_steps` updates, 0: it stays.
    """

    offset: float = 0.0
    offset_probability: float = 1.0
    perturbation: float = 0.0
    perturbation_steps: int = 0

    def perturbation_at(self, step: int) -> float:
        """Of the update after `step` finished ones."""
        left = 1 - step / self.perturbation_steps if self.perturbation_steps else 1.0
        return self.perturbation * max(left, 0.0)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Distance of a predicted from a true velocity, by element d, averaged.

    l2: d^2. huber: 2c (sqrt(d^2 + c^2) - c), which is d^2 for small d and 2c |d| for large. smooth_l1: that divided by
    c, 2 |d| for large d. Both are the pseudo-Huber loss of Charbonnier et al. 1997; Khrapov et al. 2024,
    https://arxiv.org/abs/2403.16728, make c a function of the noise level, as diffusers' training scripts do, here
    with ratio = sigma / (1 - sigma), noise against image:

    constant: c = huber_c. exponential: c = huber_c ^ sigma, from 1 without noise to huber_c in pure noise. snr:
    c = huber_c + (1 - huber_c) / (1 + ratio)^2 = huber_c + (1 - huber_c) (1 - sigma)^2.
    """

    kind: Literal["l2", "huber", "smooth_l1"] = "l2"
    schedule: Literal["constant", "exponential", "snr"] = "snr"
    huber_c: float = 0.1

    def c_at(self, sigma: Tensor) -> Tensor:
        """c at these noise levels."""
        if self.schedule == "constant":
            return torch.full_like(sigma, self.huber_c)
        if self.schedule == "exponential":
            return self.huber_c**sigma
        return self.huber_c + (1 - self.huber_c) * (1 - sigma) ** 2


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which part of an update a micro-batch is: `part` of `num_parts`, from 0, of this rank's update `number`.
    `seed` and `rank` of the run."""

    seed: int
    rank: int
    number: int
    part: int
    num_parts: int

    @property
    def index(self) -> int:
        """The micro-batch's number in the run."""
        return self.number * self.num_parts + self.part

    @classmethod
    def of(cls, index: int, *, num_parts: int, seed: int, rank: int) -> Window:
        """Of micro-batch `index` of the run, counted from 0."""
        number, part = divmod(index, num_parts)
        return cls(seed=seed, rank=rank, number=number, part=part, num_parts=num_parts)


def draw_sigma(settings: FlowSettings, num_tokens: Sequence[int], window: Window, *, offset: float = 0.0) -> Tensor:
    """Return noise levels, float32 [B] in [0, 1], for B samples of `num_tokens` image tokens each.

    `offset` is added to the logit of a level before the shift: above 0 towards noise.
    """
    count = len(num_tokens)
    if isinstance(settings.law, Listed) and settings.in_turn:
        first = window.index * count
        values = settings.law.values
        return torch.tensor([values[(first + place) % len(values)] for place in range(count)])
    even = even_draws(count, window) if settings.stratified else _even(count, window)
    levels = [settings.law.quantile(inside(u)) for u in even]
    if isinstance(settings.law, Listed):
        return torch.tensor(levels)
    factor = math.exp(offset)
    shifts = [factor * (auto_shift(n) if settings.auto_shift else settings.shift) for n in num_tokens]
    return torch.tensor([shifted(level, shift) for level, shift in zip(levels, shifts, strict=True)])


def even_draws(count: int, window: Window) -> list[float]:
    """Draw `count` numbers, each even in (0, 1), that together with the other parts of their update cover it evenly.

    Of an update of P parts with B samples each, exactly one number falls into each of the P * B equal cells (Latin
    hypercube sampling in one dimension, McKay et al. 1979). A part needs to know P, not the others: [0, 1) is cut into
    B coarse cells, one for each of its samples in random order, and each of these into P fine ones, which the parts
    share by a permutation that all of them derive alike. Parts of different size still cover [0, 1) each by itself.
    """
    order = _permutation(count, window, "cells", window.part)
    within = _even(count, window)
    fine = [_permutation(window.num_parts, window, "parts", cell)[window.part] for cell in order]
    cells = (cell * window.num_parts + part for cell, part in zip(order, fine, strict=True))
    return [(cell + u) / (count * window.num_parts) for cell, u in zip(cells, within, strict=True)]


def draw_noise(
    latents: Sequence[Tensor], generator: torch.Generator, settings: NoiseSettings | None = None
) -> list[Tensor]:
    """Standard normal noise, one float32 tensor [C, h, w] per latent, on the latents' device."""
    noise = [torch.randn(x.shape, generator=generator) for x in latents]
    if settings is not None and settings.offset:
        for e in noise:
            moves_C11 = torch.randn(e.shape[0], 1, 1, generator=generator)
            if torch.rand((), generator=generator).item() < settings.offset_probability:
                e += settings.offset * moves_C11
    return [e.to(x.device, non_blocking=True) for x, e in zip(latents, noise, strict=True)]


def add_noise(latents: Sequence[Tensor], noise: Sequence[Tensor], sigma_B: Tensor) -> list[Tensor]:
    """(1 - sigma) * clean + sigma * noise, per sample."""
    return [torch.lerp(x, e, s) for x, e, s in zip(latents, noise, sigma_B, strict=True)]


def perturbed(noise: Sequence[Tensor], strength: float, generator: torch.Generator) -> list[Tensor]:
    """Noise with `strength` times as much other noise in it."""
    return [e + strength * torch.randn(e.shape, generator=generator).to(e.device) for e in noise]


def flow_targets(latents: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
    """The velocity that carries clean to noise: noise - clean."""
    return [e - x for x, e in zip(latents, noise, strict=True)]


def flow_loss(
    predicted: Sequence[Tensor],
    target: Sequence[Tensor],
    sigma_B: Tensor,
    settings: LossSettings | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """Distance per sample in float32: [B]."""
    errors = flow_errors(predicted, target, sigma_B, settings)
    return torch.stack([error.mean() for error in weighed(errors, weights)])


def weighed(errors: Sequence[Tensor], weights: Weights | None) -> list[Tensor]:
    """Errors by element, each times what its place counts. The mean of one is then the mean over what counts, however
    little of the picture that is; where the weight is 0, nothing is learnt."""
    if weights is None:
        return list(errors)
    return [e if w is None else e * w for e, w in zip(errors, weights, strict=True)]


def flow_errors(
    predicted: Sequence[Tensor], target: Sequence[Tensor], sigma_B: Tensor, settings: LossSettings | None = None
) -> list[Tensor]:
    """Distance by element in float32, shaped like the samples."""
    differences = [p.float() - t.float() for p, t in zip(predicted, target, strict=True)]
    if settings is None or settings.kind == "l2":
        return [d.square() for d in differences]
    factors_B = torch.ones_like(sigma_B) if settings.kind == "smooth_l1" else settings.c_at(sigma_B)
    return [
        2 * factor * d.square() / (torch.sqrt(d.square() + c.square()) + c)  # does not cancel for small d
        for d, c, factor in zip(differences, settings.c_at(sigma_B), factors_B, strict=True)
    ]


def _even(count: int, window: Window) -> list[float]:
    draws = generator(window.seed, "sigma", window.rank, window.index)
    return torch.rand(count, generator=draws, dtype=torch.float64).tolist()


def _permutation(count: int, window: Window, *path: str | int) -> list[int]:
    draws = generator(window.seed, "sigma", window.rank, window.number, *path)
    return torch.randperm(count, generator=draws).tolist()
