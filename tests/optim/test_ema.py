"""The moving average of the weights against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from simpletuner.optim.ema import EmaSettings, WeightAverage

CPU = torch.device("cpu")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for shape in ((3, 4), (5,))]


def train(average: WeightAverage, params: list[nn.Parameter], steps: range) -> list[list[torch.Tensor]]:
    """Move the weights as a function of the step, average after each; return what they were."""
    history = []
    for step in steps:
        with torch.no_grad():
            for place, param in enumerate(params):
                draws = torch.Generator().manual_seed(100 * step + place)
                param.add_(torch.randn(param.shape, generator=draws).to(param.dtype))
        average.update_()
        history.append([param.detach().clone() for param in params])
    return history


def averages(average: WeightAverage) -> list[torch.Tensor]:
    return average.state()["average"]


@given(st.floats(0, 0.9999), st.integers(1, 4), st.integers(0, 7), st.integers(1, 20))
def test_it_equals_its_closed_form(decay, interval, warmup_steps, num_steps):
    """sum over averagings i of w_i (1 - d_i) prod_{j > i} d_j, and the beginning with prod d_j."""
    settings = EmaSettings(decay=decay, interval=interval, warmup_steps=warmup_steps)
    params = parameters()
    beginning = [param.detach().clone() for param in params]
    average = WeightAverage(params, settings, device=CPU)
    history = train(average, params, range(1, num_steps + 1))
    steps = [step for step in range(1, num_steps + 1) if step % interval == 0]
    kept = [
        0.0
        if step <= warmup_steps
        else min(decay, (1 + (step - warmup_steps - 1) // interval) / (10 + (step - warmup_steps - 1) // interval))
        for step in steps
    ]
    for place, found in enumerate(averages(average)):
        expected = beginning[place].double() * math.prod(kept)
        for i, step in enumerate(steps):
            expected += history[step - 1][place].double() * (1 - kept[i]) * math.prod(kept[i + 1 :])
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_little_is_kept_at_first_and_the_decay_is_reached():
    settings = EmaSettings(decay=0.99)
    assert [settings.decay_at(step) for step in (1, 2, 3)] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert settings.decay_at(10_000) == 0.99
    assert EmaSettings(decay=0.99, warmup_steps=5).decay_at(5) == 0.0


def test_all_at_once_and_one_by_one_are_the_same():
    found = []
    for foreach in (True, False):
        params = parameters()
        average = WeightAverage(params, EmaSettings(decay=0.9, foreach=foreach), device=CPU)
        train(average, params, range(1, 12))
        found.append(averages(average))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_parameters_are_the_average_and_afterwards_themselves(dtype):
    params = parameters(dtype)
    average = WeightAverage(params, EmaSettings(), device=CPU)
    train(average, params, range(1, 5))
    before = [param.detach().clone() for param in params]
    with average.within():
        for param, expected in zip(params, averages(average), strict=True):
            assert torch.equal(param, expected.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(tensor.dtype == torch.float32 for tensor in averages(average)), "small moves of bfloat16 are not lost"


def test_stopped_and_gone_on_equals_straight():
    straight_params, params = parameters(), parameters()
    settings = EmaSettings(decay=0.95, interval=2, warmup_steps=3)
    straight = WeightAverage(straight_params, settings, device=CPU)
    train(straight, straight_params, range(1, 12))
    first = WeightAverage(params, settings, device=CPU)
    train(first, params, range(1, 6))
    second = WeightAverage(params, settings, device=CPU)
    second.load_(first.state())
    train(second, params, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(averages(straight), averages(second), strict=True))


def test_a_late_beginning_is_a_copy_of_the_weights():
    params = parameters()
    average = WeightAverage(params, EmaSettings(), device=CPU)
    with torch.no_grad():
        params[0].add_(1)
    average.begin_(40)
    assert torch.equal(averages(average)[0], params[0])
    assert average.state()["num_steps"] == 40


def test_an_average_of_other_parameters_is_refused():
    average = WeightAverage(parameters(), EmaSettings(), device=CPU)
    state = {"num_steps": 1, "average": [torch.zeros(3, 4)]}
    with pytest.raises(ValueError, match="other parameters"):
        average.load_(state)
