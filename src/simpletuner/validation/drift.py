"""Turbo drift: how much a model needs many steps.

A distilled model reaches in few steps what it reaches in many; one that loses this draws something else in few steps.
The figure is the distance |x_few - x_many| / |x_many| of the clean latents that one noise leads to, mean over some
prompts and seeds. It compares a model with itself, so what the model has learned to draw does not count, and 0 is a
model that draws straight lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from simpletuner.validation.generate import ImageEngine, SamplingSettings, grouped, sample_latents
from simpletuner.validation.requests import ImageRequest

FEW_STEPS, MANY_STEPS = 8, 30
_LARGEST_PX = 512**2


def drift_requests(requests: Sequence[ImageRequest], count: int, *, alignment_px: int) -> tuple[ImageRequest, ...]:
    """`count` images of a validation's prompts in turn, with seeds that stay the same, none above 512 x 512 px."""
    firsts = list({request.prompt.text: request for request in reversed(requests)}.values())[::-1]
    return tuple(
        replace(first, seed=first.seed + index // len(firsts), size=_smaller(first.size, alignment_px), index=index)
        for index, first in ((index, firsts[index % len(firsts)]) for index in range(count if firsts else 0))
    )


@torch.no_grad()
def measure_drift(
    requests: Sequence[ImageRequest],
    *,
    engine: ImageEngine,
    settings: SamplingSettings,
    on_progress: Callable[[int], None] = lambda _: None,
) -> float:
    """The mean distance over `requests`; call it within `engine.strength`. Of `settings` the number of steps is unread.

    `on_progress` is told after each sampling step how many images it moved.
    """
    distances: list[float] = []
    for group in grouped(requests, engine.px_per_token):
        few, many = (
            sample_latents(group, engine=engine, settings=replace(settings, num_steps=steps), on_progress=on_progress)
            for steps in (FEW_STEPS, MANY_STEPS)
        )
        for a, b in zip(few, many, strict=True):
            distances.append((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item())
    return math.fsum(distances) / len(distances)


def _smaller(size: tuple[int, int], alignment_px: int) -> tuple[int, int]:
    """The same shape within the limit, as near as the alignment allows."""
    factor = min(1.0, math.sqrt(_LARGEST_PX / (size[0] * size[1])))
    width, height = (max(alignment_px, math.floor(side * factor / alignment_px) * alignment_px) for side in size)
    return width, height
