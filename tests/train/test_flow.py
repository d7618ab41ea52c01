"""Laws of the flow: interpolation, target, noise-level density."""

from __future__ import annotations

import math

import pytest
import torch

from simpletuner.train.flow import (
    FlowSettings,
    add_noise,
    auto_shift,
    draw_noise,
    draw_sigma,
    flow_loss,
    flow_targets,
)
from simpletuner.train.seeds import derive_seed, generator

COUNT = 20_000


def sigmas(settings: FlowSettings, tokens: int = 256) -> torch.Tensor:
    return draw_sigma(settings, [tokens] * COUNT, generator(0, "test"))


def kolmogorov_smirnov(samples: torch.Tensor, cdf) -> float:
    ordered = samples.double().sort().values
    expected = cdf(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return max((steps - expected).max().item(), (expected - steps + 1 / len(ordered)).max().item())


def logit_normal_cdf(scale: float, shift: float):
    """Shifting multiplies the odds of sigma by `shift`, so its logit moves by log(shift)."""

    def cdf(sigma: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.erf((torch.logit(sigma) - math.log(shift)) / (scale * math.sqrt(2))))

    return cdf


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1.0), (1.0, 3.0), (0.5, 6.0)])
def test_sigma_is_logit_normal_and_shifted(scale, shift):
    drawn = sigmas(FlowSettings(sigmoid_scale=scale, shift=shift))
    assert kolmogorov_smirnov(drawn, logit_normal_cdf(scale, shift)) < 1.63 / math.sqrt(COUNT)  # 1 % level
    assert drawn.min() > 0 and drawn.max() < 1


def test_uniform_sigma_is_uniform():
    assert kolmogorov_smirnov(sigmas(FlowSettings(uniform=True)), lambda s: s) < 1.63 / math.sqrt(COUNT)


def test_auto_shift_depends_on_the_tokens_and_replaces_the_static_one():
    for tokens in (256, 1024, 4096):
        automatic = sigmas(FlowSettings(auto_shift=True, shift=99.0), tokens)
        static = sigmas(FlowSettings(shift=auto_shift(tokens)), tokens)
        assert torch.equal(automatic, static)
    assert [round(auto_shift(edge**2 // 256), 2) for edge in (512, 768, 1024)] == [1.88, 2.33, 3.16]


def test_noise_goes_from_clean_to_noise_with_constant_velocity():
    latents = [torch.randn(16, 8, 4), torch.randn(16, 2, 6)]
    noise = draw_noise(latents, generator(0, "noise"))
    at = {s: add_noise(latents, noise, torch.tensor([s, s])) for s in (0.0, 0.25, 0.75, 1.0)}
    for x, e, start, end, low, high, v in zip(
        latents, noise, at[0.0], at[1.0], at[0.25], at[0.75], flow_targets(latents, noise), strict=True
    ):
        assert torch.equal(start, x) and torch.equal(end, e)
        assert torch.allclose(high - low, 0.5 * v, atol=1e-6)


def test_loss_is_zero_for_the_true_velocity_and_counts_every_sample_alone():
    target = [torch.randn(16, 8, 4), torch.randn(16, 2, 2)]
    assert torch.equal(flow_loss(target, target), torch.zeros(2))
    off_by_two = [target[0] + 2, target[1]]
    assert torch.allclose(flow_loss(off_by_two, target), torch.tensor([4.0, 0.0]))


def test_half_precision_predictions_are_compared_in_float32():
    target = [torch.full((1, 2, 2), 1.0)]
    predicted = [torch.full((1, 2, 2), 1.0078125, dtype=torch.bfloat16)]
    assert flow_loss(predicted, target).item() == pytest.approx(0.0078125**2)


def test_seeds_depend_on_every_part_of_their_path_and_nothing_else():
    paths = [(1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a", 2, 0), (1, "a2"), (1, "a", "2")]
    assert len({derive_seed(*path) for path in paths}) == len(paths)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "a")))
    assert torch.equal(before, torch.get_rng_state())
