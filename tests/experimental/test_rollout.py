"""Rollouts against a slow reference: one sample after the other, every formula written out."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.catalog.rollouts import mean_offset, offset_shares
from simpletuner.experimental.reflexflow import ReflexFlow, coarse_part
from simpletuner.experimental.rollout import Ramp, Rollout, RolloutSettings
from simpletuner.models.z_image.sampler import sigmas

LEVELS = tuple(sigmas(8, 3.0)[:-1].double().tolist())
ALWAYS = Ramp(start=1.0, end=1.0)


def settings(**changes) -> RolloutSettings:
    return RolloutSettings(**{"levels": LEVELS, "max_offset": 3, "ramp": ALWAYS, **changes})


class Model:
    """A velocity that depends on state, level and prompt; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, latents, sigma_B, prompts):
        self.calls.append(len(latents))
        return [torch.tanh(x) * (0.5 + s) + 0.1 * len(p) for x, s, p in zip(latents, sigma_B, prompts, strict=True)]


def batch(count: int, seed: int = 0):
    draws = torch.Generator().manual_seed(seed)
    clean = [torch.randn(4, 6 + 2 * (i % 2), 6, generator=draws) for i in range(count)]
    noise = [torch.randn(x.shape, generator=draws) for x in clean]
    sigma_B = torch.rand(count, generator=draws)
    noisy = [torch.lerp(x, e, s) for x, e, s in zip(clean, noise, sigma_B, strict=True)]
    return clean, noise, noisy, sigma_B, ["a" * i for i in range(count)]


def roll(made, model, *, step=0, seed=7, **changes):
    clean, noise, noisy, sigma_B, prompts = made
    draws = torch.Generator().manual_seed(seed)
    rollout = Rollout(settings=settings(**changes), predict=model)
    return rollout.roll_out(clean, noise, noisy, sigma_B=sigma_B, prompts=prompts, step=step, draws=draws)


def reference_path(sigma: float, offset: int) -> list[float]:
    """Count back from the first level above sigma, by hand."""
    if sigma < min(LEVELS):
        return [sigma]
    path = [sigma]
    for level in reversed(LEVELS):
        if level > sigma and len(path) <= offset:
            path.insert(0, level)
    return path


def reference_state(clean, noise, path, prompt, *, sampler, order):
    """Float64; the integral of the polynomial by quadrature, with the first levels handled as the sampler says."""
    x = (1 - path[0]) * clean.double() + path[0] * noise.double()
    model = Model()

    def look(state, sigma):
        (v,) = model([state], torch.tensor([sigma], dtype=torch.float64), [prompt])
        return state - sigma * v

    def lam(sigma):
        return math.log((1 - sigma) / sigma)

    def move(x, s, t, known):  # known: (level, clean) pairs
        if s == 1:
            return t * x + (1 - t) * known[0][1]
        taus, weights = np.polynomial.legendre.leggauss(60)
        h = lam(t) - lam(s)
        taus, weights = (taus + 1) * h / 2, weights * h / 2
        result = t / s * x
        for level, clean_there in known:
            values = np.ones_like(taus)
            for other, _ in known:
                if other != level:
                    values = values * (lam(s) + taus - lam(other)) / (lam(level) - lam(other))
            result = result + (1 - t) * float((weights * np.exp(taus - h) * values).sum()) * clean_there
        return result

    history: list[tuple[float, torch.Tensor]] = []
    before = None
    for s, t in pairwise(path):
        if sampler == "euler":
            (v,) = model([x], torch.tensor([s], dtype=torch.float64), [prompt])
            x = x + (t - s) * v
            continue
        here = (s, look(x, s))
        if sampler == "unipc" and before is not None:
            x = move(before[0], before[1], s, [here, *history[:order]])
        history = [here, *history][:order]
        before = (x, s)
        x = move(x, s, t, history)
        if s == 1:
            history, before = [], None
    return x


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpm", 2), ("dpm", 3), ("unipc", 1), ("unipc", 2)])
def test_states_and_targets_equal_the_reference(sampler, order):
    made = batch(24)
    clean, noise, noisy, sigma_B, prompts = made
    model = Model()
    rolled = roll(made, model, sampler=sampler, order=order, max_offset=4)
    draws = torch.Generator().manual_seed(7)
    torch.rand(24, generator=draws, dtype=torch.float64)
    offsets = (torch.multinomial(torch.full((4,), 0.25), 24, replacement=True, generator=draws) + 1).tolist()
    num_forwards = 0
    for i, sigma in enumerate(sigma_B.tolist()):
        path = reference_path(sigma, offsets[i])
        num_forwards += len(path) - 1
        if len(path) == 1:
            assert rolled.noisy[i] is noisy[i]
            assert torch.equal(rolled.targets[i], noise[i] - clean[i]) and rolled.drifts[i] is None
            continue
        state = reference_state(clean[i], noise[i], path, prompts[i], sampler=sampler, order=order)
        assert torch.allclose(rolled.noisy[i].double(), state, atol=2e-5)
        assert torch.allclose(rolled.targets[i].double(), (state - clean[i]) / sigma, atol=1e-3)
        assert torch.allclose(rolled.drifts[i], rolled.noisy[i] - noisy[i], atol=1e-5)
    assert rolled.num_forwards == num_forwards == sum(model.calls)
    assert len(model.calls) <= 4, "samples share each look"


def test_a_model_without_error_changes_nothing():
    clean, noise, noisy, sigma_B, prompts = batch(6)
    by_prompt = dict(zip(prompts, zip(clean, noise, strict=True), strict=True))

    def perfect(latents, sigma_B, prompts):
        return [by_prompt[prompt][1] - by_prompt[prompt][0] for prompt in prompts]

    rolled = roll((clean, noise, noisy, sigma_B, prompts), perfect)
    for i in range(6):
        assert torch.allclose(rolled.noisy[i], noisy[i], atol=1e-5)
        assert torch.allclose(rolled.targets[i], noise[i] - clean[i], atol=2e-3)


@given(st.floats(0.0001, 1.0), st.integers(1, 12))
def test_paths_are_pieces_of_the_schedule(sigma, offset):
    path = settings(max_offset=12).path(sigma, offset)
    assert list(path) == reference_path(sigma, offset)
    assert path[-1] == sigma and set(path[:-1]) <= set(LEVELS)
    assert all(a > b for a, b in pairwise(path))


def test_nothing_is_rolled_out_where_a_sampler_never_looks():
    rollout = settings()
    assert rollout.path(1.0, 3) == (1.0,)
    assert rollout.path(LEVELS[-1] * 0.99, 3) == (LEVELS[-1] * 0.99,)


def test_no_gradient_goes_through_a_rollout():
    weight = torch.nn.Parameter(torch.tensor(0.5))
    rolled = roll(batch(4), lambda latents, sigma_B, prompts: [weight * x for x in latents])
    assert not any(state.requires_grad for state in (*rolled.noisy, *rolled.targets))


def test_the_share_ramps_from_exactly_its_start():
    ramp = Ramp(start=0.0, end=0.5, steps=10, first_step=4)
    assert [ramp.at(step) for step in (0, 3, 4, 9, 14, 99)] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.5]
    cosine = Ramp(start=0.2, end=0.6, steps=8, shape="cosine")
    assert [cosine.at(step) for step in (0, 4, 8)] == pytest.approx([0.2, 0.4, 0.6])
    assert cosine.at(2) < 0.3
    assert Ramp(start=0.3, end=0.3, first_step=2).at(1) == 0.0
    assert Ramp(start=0.3, end=0.3).at(0) == 0.3
    made = batch(50)
    assert roll(made, Model(), ramp=ramp, step=4) is None, "a start of 0 is 0"


def test_as_many_samples_are_rolled_out_as_asked():
    made = batch(2000)
    rolled = roll(made, Model(), ramp=Ramp(start=0.25, end=0.25), max_offset=1)
    possible = sum(LEVELS[-1] <= s < 1 for s in made[3].tolist())
    assert sum(drift is not None for drift in rolled.drifts) / possible == pytest.approx(0.25, abs=0.03)


def test_strategies_prefer_what_they_say():
    assert offset_shares("uniform", 4) == (0.25,) * 4
    assert offset_shares("biased_early", 3) == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert offset_shares("biased_late", 3) == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert mean_offset("uniform", 5) == 3.0
    shorter, longer = (
        roll(batch(500), Model(), strategy=name).num_forwards for name in ("biased_late", "biased_early")
    )
    assert longer > 1.2 * shorter


def test_reflexflow_is_the_ordinary_loss_with_its_terms_off():
    made = batch(6)
    off = ReflexFlow(alpha=0.0, beta1=0.0, beta2=1.0)
    predicted = [torch.randn(x.shape) for x in made[0]]
    for reflexflow in (None, off):
        rolled = roll(made, Model(), reflexflow=reflexflow)
        errors = [(p - t).square() for p, t in zip(predicted, rolled.targets, strict=True)]
        for loss, error in zip(rolled.losses(predicted, errors), errors, strict=True):
            assert loss.item() == pytest.approx(error.mean().item(), rel=1e-5)


def test_reflexflow_weighs_by_drift_and_direction():
    reflexflow = ReflexFlow(alpha=2.0, beta1=3.0, beta2=0.5)
    target, drift = torch.randn(4, 8, 8), torch.zeros(4, 8, 8)
    drift[:, :4, :4] = 1.0
    weights = reflexflow.weights(drift)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights[0, 0, 0].item() == pytest.approx((1 + 2 * 4) / 3) and weights[0, 7, 7].item() == pytest.approx(1 / 3)
    errors = torch.ones(4, 8, 8)
    same = reflexflow.loss(2 * target, target, errors, drift)
    opposite = reflexflow.loss(-target, target, errors, drift)
    assert same.item() == pytest.approx(0.5, abs=1e-5) and opposite.item() == pytest.approx(0.5 + 6, abs=1e-5)
    assert torch.equal(reflexflow.weights(torch.zeros(4, 8, 8)), torch.ones(4, 8, 8))


def test_the_coarse_part_forgets_fine_detail_and_keeps_its_shape():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert coarse_part(board[None]).abs().max() == 0
    assert torch.equal(coarse_part(torch.full((2, 6, 10), 3.0)), torch.full((2, 6, 10), 3.0))
