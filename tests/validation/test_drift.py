"""Turbo drift: nothing for straight flows, what a formula says for a curved one, and fixed images to measure it on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from simpletuner.models.z_image.sampler import sigmas
from simpletuner.validation.drift import FEW_STEPS, MANY_STEPS, drift_requests, measure_drift
from simpletuner.validation.generate import ImageEngine, SamplingSettings
from simpletuner.validation.requests import ImageRequest, Prompt

SETTINGS = SamplingSettings(num_steps=99, guidance=0.0, shift=3.0, negative_prompt="")


def engine(velocity):
    return ImageEngine(
        velocity=velocity,
        context_of=lambda prompts: [torch.zeros(1) for _ in prompts],
        decode=lambda latents: latents,
        strength=lambda _: nullcontext(),
        latent_channels=4,
        px_per_latent=8,
        px_per_token=16,
        device=torch.device("cpu"),
    )


def request(text="a cat", seed=1, size=(64, 32), index=0):
    return ImageRequest(prompt=Prompt(id=text, text=text), size=size, seed=seed, index=index)


def test_a_straight_flow_does_not_drift():
    target = torch.ones(4, 4, 8) * 3
    straight = engine(lambda xs, sigma_B, _: [(x - target) / s for x, s in zip(xs, sigma_B, strict=True)])
    assert measure_drift([request(), request(seed=2)], engine=straight, settings=SETTINGS) < 1e-5


def test_a_curved_flow_drifts_as_far_as_its_formula_says():
    """v = x: every step multiplies by 1 + stride."""
    end = {n: torch.prod(1 + sigmas(n, 3.0).double().diff()).item() for n in (FEW_STEPS, MANY_STEPS)}
    expected = abs(end[FEW_STEPS] - end[MANY_STEPS]) / end[MANY_STEPS]
    moved = []
    found = measure_drift(
        [request(), request("a dog", size=(32, 32))],
        engine=engine(lambda xs, sigma_B, _: list(xs)),
        settings=SETTINGS,
        on_progress=moved.append,
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert sum(moved) == 2 * (FEW_STEPS + MANY_STEPS)


def test_prompts_take_turns_and_seeds_stay():
    asked = [request("a", 5), request("a", 6, index=1), request("b", 5)]
    found = drift_requests(asked, 3, alignment_px=16)
    assert [(r.prompt.text, r.seed) for r in found] == [("a", 5), ("b", 5), ("a", 6)]
    assert drift_requests(asked, 3, alignment_px=16) == found
    assert drift_requests([], 3, alignment_px=16) == drift_requests(asked, 0, alignment_px=16) == ()


@pytest.mark.parametrize(
    ("size", "smaller"),
    [((128, 96), (128, 96)), ((1024, 1024), (512, 512)), ((2048, 512), (1024, 256))],
)
def test_large_images_are_measured_smaller(size, smaller):
    (found,) = drift_requests([request(size=size)], 1, alignment_px=16)
    assert found.size == smaller
