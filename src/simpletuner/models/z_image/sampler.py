"""Draw images: Euler steps along the flow from noise to clean, with classifier-free guidance in Z-Image's scale.

The schedule and the arithmetic are those of diffusers' ZImagePipeline, so the same noise gives the same image. What
differs is what may share a call: images of different sizes and prompts take each step together.

No global random state is read or moved. Shape letters: N steps, B images, C channels, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.models.files import read_json
from simpletuner.problems import ModelError, Problem

VelocityFn = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], Sequence[Tensor]]
"""(B latents [C, h, w], sigma [B], B refined contexts) -> B velocities noise - clean [C, h, w]."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): v + scale * (v - v_negative), so 0 is none and 1 the double.

    Others count from 1: their scale is this one plus 1.

    normalization: the guided velocity is no longer than this many times the unguided one; 0: no limit.
    truncation: no guidance at sigma < 1 - truncation, that is where little noise is left.
    """

    scale: float = 0.0
    normalization: float = 0.0
    truncation: float = 1.0

    def scale_at(self, sigma: float) -> float:
        return 0.0 if self.truncation <= 1 and 1 - sigma > self.truncation else self.scale


def usual_scale(scale: float) -> float:
    """A guidance scale as other programs count it, where 1 is off."""
    return 1 + scale


@dataclass(frozen=True, kw_only=True)
class SamplerStep:
    """State after a step; `clean` is where the flow of this step points to, for previews."""

    step: int  # counted from 1
    num_steps: int
    sigma: float  # noise level reached
    latents: Sequence[Tensor]
    clean: Sequence[Tensor]


def sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels of a run: float32 [N + 1] from 1 down to 0.

    Evenly spaced from 1 to 1 / N, then shifted: s * sigma / (1 + (s - 1) * sigma); 0 is the end, not a step.
    """
    even_N = torch.linspace(1.0, 1 / num_steps, num_steps)
    shifted_N = shift * even_N / (1 + (shift - 1) * even_N)
    return torch.cat([shifted_N, torch.zeros(1)])


def draw_noise(size: tuple[int, int], seed: int, *, channels: int = 16, factor: int = 8) -> Tensor:
    """Noise for one image of `size` (width, height) px: float32 [C, h, w] on the CPU, the same on every machine."""
    width_px, height_px = size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, height_px // factor, width_px // factor, generator=generator)


@torch.no_grad()
def sample(
    velocity: VelocityFn,
    noise: Sequence[Tensor],
    context: Sequence[Tensor],
    negative_context: Sequence[Tensor] | None = None,
    *,
    sigmas_N: Tensor,
    guidance: Guidance | None = None,
    on_step: Callable[[SamplerStep], None] | None = None,
) -> list[Tensor]:
    """Follow the flow from noise to clean latents.

    Args:
        velocity: the model; with guidance it is asked for 2B images at once, the negative ones last.
        noise: B tensors [C, h_i, w_i], sizes may differ.
        context: B refined prompts, and the B of the negative prompts where guidance is used.
        sigmas_N: [N + 1], from `sigmas`.
        on_step: called after every step; may raise to stop.
    Returns:
        B clean latents, float32 [C, h_i, w_i].
    """
    guidance = guidance or Guidance()
    assert guidance.scale == 0 or negative_context is not None, "guidance needs a negative context"
    latents = [x.float() for x in noise]
    levels = sigmas_N.tolist()
    for index, sigma in enumerate(levels[:-1]):
        velocities = _guided(velocity, latents, sigma, context, negative_context or (), guidance)
        clean = [x - sigma * v for x, v in zip(latents, velocities, strict=True)] if on_step else ()
        stride = (sigmas_N[index + 1] - sigmas_N[index]).item()
        latents = [x + stride * v for x, v in zip(latents, velocities, strict=True)]
        if on_step is not None:
            reached = levels[index + 1]
            on_step(SamplerStep(step=index + 1, num_steps=len(levels) - 1, sigma=reached, latents=latents, clean=clean))
    return latents


def scheduler_shift(scheduler_config: Path) -> float:
    """The static shift that a pipeline's scheduler_config.json asks for.

    Raises:
        ModelError: E-MODEL-SCHEDULER, it asks for a schedule that depends on the image size.
    """
    config = read_json(scheduler_config)
    if config.get("use_dynamic_shifting"):
        raise ModelError(Problem(code="E-MODEL-SCHEDULER", params={"path": scheduler_config}))
    return float(config.get("shift", 1.0))


def _guided(
    velocity: VelocityFn,
    latents: Sequence[Tensor],
    sigma: float,
    context: Sequence[Tensor],
    negative_context: Sequence[Tensor],
    guidance: Guidance,
) -> list[Tensor]:
    """Velocities in float32, guided where guidance applies at this noise level."""
    count, device = len(latents), latents[0].device
    scale = guidance.scale_at(sigma)
    if scale <= 0:
        return [v.float() for v in velocity(latents, torch.full((count,), sigma, device=device), context)]
    sigma_B = torch.full((2 * count,), sigma, device=device)
    both = velocity([*latents, *latents], sigma_B, [*context, *negative_context])
    pairs = zip(both[:count], both[count:], strict=True)
    return [_combine(positive.float(), negative.float(), scale, guidance.normalization) for positive, negative in pairs]


def _combine(positive: Tensor, negative: Tensor, scale: float, normalization: float) -> Tensor:
    guided = positive + scale * (positive - negative)
    if normalization > 0:
        limit = torch.linalg.vector_norm(positive) * normalization
        guided = guided * (limit / torch.linalg.vector_norm(guided).clamp_min(1e-12)).clamp_max(1.0)
    return guided
