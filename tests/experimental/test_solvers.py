"""Samplers of the flow: order of convergence on a flow with a known solution, and plain references."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.experimental.solvers import integral_weights, trajectory

SPREAD = 0.6  # pictures are normal numbers of this standard deviation, so the best model is linear and known


def clean_of(x, sigma: float):
    alpha = 1 - sigma
    return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x


def velocity(x, sigma: float):
    return (x - clean_of(x, sigma)) / sigma


def size_at(sigma: float) -> float:
    """Along this flow states grow and shrink as the standard deviation does."""
    return math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def run(levels, sampler: str, order: int, start: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """(final state, looks at the model)."""
    steps = trajectory(
        torch.ones(1, dtype=torch.float64) if start is None else start, levels, sampler=sampler, order=order
    )
    state, sigma = next(steps)
    looks = 1
    while True:
        try:
            state, sigma = steps.send(velocity(state, sigma))
            looks += 1
        except StopIteration as stop:
            return stop.value, looks


def error(num_steps: int, sampler: str, order: int) -> float:
    levels = np.linspace(0.9, 0.1, num_steps + 1).tolist()
    return abs(run(levels, sampler, order)[0].item() - size_at(0.1) / size_at(0.9))


# The first step has no earlier looks, so order 3 promises no more than this; it may do better.
@pytest.mark.parametrize(
    ("sampler", "order", "expected"),
    [("euler", 1, 1), ("dpm", 1, 1), ("dpm", 2, 2), ("dpm", 3, 2), ("unipc", 1, 2), ("unipc", 2, 3), ("unipc", 3, 3)],
)
def test_halving_the_steps_raises_the_error_by_the_order(sampler, order, expected):
    coarse, fine = error(64, sampler, order), error(128, sampler, order)
    measured = math.log2(coarse / fine)
    assert measured > expected - 0.3 if order == 3 else measured == pytest.approx(expected, abs=0.3)
    assert fine < error(128, "euler", 1) or sampler == "euler" or order == 1


@pytest.mark.parametrize("sampler", ["euler", "dpm", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_each_step_looks_once_at_the_model(sampler, num_steps):
    levels = np.linspace(1.0, 0.3, num_steps + 1).tolist()
    assert run(levels, sampler, 3)[1] == num_steps


@pytest.mark.parametrize("sampler", ["dpm", "unipc"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_step_is_eulers_with_any_sampler(sampler, order):
    for levels in ([1.0, 0.7], [0.6, 0.2]):
        one, another = run(levels, sampler, order)[0], run(levels, "euler", 1)[0]
        assert torch.allclose(one, another, atol=1e-12)


def test_euler_is_euler():
    levels = [1.0, 0.83, 0.5, 0.2]
    x = 1.0
    for s, t in pairwise(levels):
        x += (t - s) * velocity(x, s)
    assert run(levels, "euler", 1)[0].item() == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "dpm", "unipc"])
def test_a_model_that_knows_the_picture_leads_straight_to_it(sampler):
    """With constant clean and noise every sampler is exact, from pure noise too."""
    clean, noise = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    steps = trajectory(noise, [1.0, 0.9, 0.6, 0.55, 0.1], sampler=sampler, order=3)
    state, sigma = next(steps)
    for _ in range(3):
        assert torch.allclose(state, (1 - sigma) * clean + sigma * noise)
        state, sigma = steps.send((state - clean) / sigma)
    with pytest.raises(StopIteration) as stop:
        steps.send((state - clean) / sigma)
    assert torch.allclose(stop.value.value, 0.9 * clean + 0.1 * noise)


def weights_by_quadrature(nodes, start, end):
    taus, weights = np.polynomial.legendre.leggauss(40)
    h = end - start
    taus, weights = (taus + 1) * h / 2, weights * h / 2
    found = []
    for node in nodes:
        others = [other for other in nodes if other is not node]
        values = np.prod([(start + taus - other) / (node - other) for other in others], axis=0) if others else 1.0
        found.append(float(np.sum(weights * np.exp(taus - h) * values)))
    return found


@given(
    st.lists(st.floats(0.2, 1.5), min_size=1, max_size=3),
    st.floats(0.05, 2.0),
    st.booleans(),
)
def test_weights_equal_those_of_a_quadrature(distances, h, corrects):
    nodes = [0.3 - sum(distances[:i]) for i in range(len(distances))]
    if corrects:
        nodes = [0.3 + h, *nodes]
    assert integral_weights(nodes, 0.3, 0.3 + h) == pytest.approx(weights_by_quadrature(nodes, 0.3, 0.3 + h), abs=1e-9)


@pytest.mark.slow
def test_long_runs_end_at_the_same_state_as_diffusers():
    """Another implementation with coefficients of its own: both come to the exact solution."""
    from diffusers import DPMSolverMultistepScheduler

    levels = np.linspace(0.9, 0.1, 400).tolist()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(levels) - 1)
    x = torch.ones(1, dtype=torch.float64)
    for index, level in enumerate(levels[:-1]):
        x = scheduler.step(velocity(x, level), scheduler.timesteps[index], x).prev_sample
    ours = run(levels, "dpm", 2)[0]
    assert ours.item() == pytest.approx(size_at(0.1) / size_at(0.9), abs=1e-5)
    assert x.item() == pytest.approx(ours.item(), abs=1e-4)
