"""Laws of the flow: interpolation, target, noise, loss. `test_sigma_law` has the noise levels."""

from __future__ import annotations

import pytest
import torch

from simpletuner.train.flow import (
    LossSettings,
    NoiseSettings,
    add_noise,
    draw_noise,
    flow_loss,
    flow_targets,
    perturbed,
)
from simpletuner.train.seeds import derive_seed, generator

SIGMA_B = torch.tensor([0.2, 0.7])


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
    for kind in ("l2", "huber", "smooth_l1"):
        assert torch.equal(flow_loss(target, target, SIGMA_B, LossSettings(kind=kind)), torch.zeros(2))
    off_by_two = [target[0] + 2, target[1]]
    assert torch.allclose(flow_loss(off_by_two, target, SIGMA_B), torch.tensor([4.0, 0.0]))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_is_square_near_zero_and_straight_far_away(kind, schedule):
    settings = LossSettings(kind=kind, schedule=schedule, huber_c=0.1)
    c_B = settings.c_at(SIGMA_B)
    small, large = 1e-4, 1e4
    zero = [torch.zeros(4, 2, 2)] * 2
    scale_B = c_B if kind == "huber" else torch.ones(2)
    near_B = flow_loss([torch.full((4, 2, 2), small)] * 2, zero, SIGMA_B, settings)
    far_B = flow_loss([torch.full((4, 2, 2), large)] * 2, zero, SIGMA_B, settings)
    assert torch.allclose(near_B, scale_B / c_B * small**2, rtol=1e-3)
    assert torch.allclose(far_B, 2 * scale_B * large, rtol=1e-3)


def test_c_goes_from_one_without_noise_to_huber_c_in_noise():
    ends = torch.tensor([0.0, 1.0])
    for schedule in ("exponential", "snr"):
        settings = LossSettings(schedule=schedule, huber_c=0.1)
        assert torch.allclose(settings.c_at(ends), torch.tensor([1.0, 0.1]))
        inner = settings.c_at(torch.linspace(0, 1, 50))
        assert (inner.diff() < 0).all()
    assert torch.equal(LossSettings(schedule="constant", huber_c=0.3).c_at(ends), torch.tensor([0.3, 0.3]))


def test_the_gradient_of_huber_is_finite_where_there_is_no_error():
    predicted = torch.zeros(1, 2, 2, requires_grad=True)
    flow_loss([predicted], [torch.zeros(1, 2, 2)], SIGMA_B[:1], LossSettings(kind="huber")).sum().backward()
    assert torch.equal(predicted.grad, torch.zeros(1, 2, 2))


def test_offset_noise_moves_whole_channels_and_as_often_as_asked():
    latents = [torch.zeros(3, 8, 8)] * 200
    plain = draw_noise(latents, generator(0, "noise"))
    moved = draw_noise(latents, generator(0, "noise"), NoiseSettings(offset=0.5, offset_probability=0.25))
    moves = [b - a for a, b in zip(plain, moved, strict=True)]
    assert all(move.std(dim=(1, 2)).max() < 1e-6 for move in moves)
    touched = sum(move.abs().max() > 0 for move in moves)
    assert 30 <= touched <= 70
    means = torch.stack([move[:, 0, 0] for move in moves if move.abs().max() > 0])
    assert means.std().item() == pytest.approx(0.5, rel=0.2)


def test_perturbation_adds_its_share_of_noise_and_fades():
    noise = draw_noise([torch.zeros(16, 32, 32)], generator(0, "noise"))
    extra = perturbed(noise, 0.3, generator(0, "more"))[0] - noise[0]
    assert extra.std().item() == pytest.approx(0.3, rel=0.02)
    settings = NoiseSettings(perturbation=0.2, perturbation_steps=10)
    assert [settings.perturbation_at(step) for step in (0, 5, 10, 11)] == pytest.approx([0.2, 0.1, 0.0, 0.0])
    assert NoiseSettings(perturbation=0.2).perturbation_at(10**6) == 0.2


def test_half_precision_predictions_are_compared_in_float32():
    target = [torch.full((1, 2, 2), 1.0)]
    predicted = [torch.full((1, 2, 2), 1.0078125, dtype=torch.bfloat16)]
    assert flow_loss(predicted, target, SIGMA_B[:1]).item() == pytest.approx(0.0078125**2)


def test_seeds_depend_on_every_part_of_their_path_and_nothing_else():
    paths = [(1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a", 2, 0), (1, "a2"), (1, "a", "2")]
    assert len({derive_seed(*path) for path in paths}) == len(paths)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "a")))
    assert torch.equal(before, torch.get_rng_state())
