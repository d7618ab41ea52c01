"""Rectified-flow training: which noise level, which noise, what loss.

sigma in [0, 1] is the noise level: x_sigma = (1 - sigma) * clean + sigma * noise, velocity = noise - clean
(Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching for Generative Modeling").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Resolution-dependent shift of FLUX.1: exp(mu), mu linear in the number of image tokens through these two points.
_AUTO_SHIFT_TOKENS = (256, 4096)
_AUTO_SHIFT_MU = (0.5, 1.15)


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Law of the noise levels seen in training.

    Without `uniform`, sigma = sigmoid(sigmoid_scale * n), n standard normal ("logit-normal", Esser et al. 2024,
    section 3.1). Either is then shifted: s * sigma / (1 + (s - 1) * sigma), with s = `shift`, or with `auto_shift`
    s = exp(mu(number of image tokens)).
    """

    sigmoid_scale: float = 1.0
    uniform: bool = False
    shift: float = 1.0
    auto_shift: bool = False


def draw_sigma(settings: FlowSettings, num_tokens: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return noise levels, float32 [B] in (0, 1), for B samples of `num_tokens` image tokens each."""
    count = len(num_tokens)
    if settings.uniform:
        sigma_B = torch.rand(count, generator=generator)
    else:
        sigma_B = torch.sigmoid(settings.sigmoid_scale * torch.randn(count, generator=generator))
    shift_B = torch.tensor([auto_shift(n) if settings.auto_shift else settings.shift for n in num_tokens])
    return shift_B * sigma_B / (1 + (shift_B - 1) * sigma_B)


def auto_shift(num_tokens: int) -> float:
    """Shift for an image of this many tokens: 1.65 at 256 px^2 (256 tokens), 3.16 at 1024 px^2 (4096 tokens)."""
    (tokens_low, tokens_high), (mu_low, mu_high) = _AUTO_SHIFT_TOKENS, _AUTO_SHIFT_MU
    slope = (mu_high - mu_low) / (tokens_high - tokens_low)
    return math.exp(mu_low + slope * (num_tokens - tokens_low))


def draw_noise(latents: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Standard normal noise, one float32 tensor per latent, on the latents' device."""
    return [torch.randn(x.shape, generator=generator).to(x.device, non_blocking=True) for x in latents]


def add_noise(latents: Sequence[Tensor], noise: Sequence[Tensor], sigma_B: Tensor) -> list[Tensor]:
    """(1 - sigma) * clean + sigma * noise, per sample."""
    return [torch.lerp(x, e, s) for x, e, s in zip(latents, noise, sigma_B, strict=True)]


def flow_targets(latents: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
    """The velocity that carries clean to noise: noise - clean."""
    return [e - x for x, e in zip(latents, noise, strict=True)]


def flow_loss(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean squared error per sample in float32: [B]."""
    errors = [(p.float() - t.float()).square().mean() for p, t in zip(predicted, target, strict=True)]
    return torch.stack(errors)
