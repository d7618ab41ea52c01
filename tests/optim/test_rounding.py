from __future__ import annotations

import pytest
import torch

from simpletuner.optim.rounding import RoundingNoise, stochastic_round_


def noise(**changes: int) -> RoundingNoise:
    return RoundingNoise(device=torch.device("cpu"), **{"seed": 3, "step": 5, "index": 0, **changes})


def test_the_noise_is_a_function_of_seed_step_and_index():
    first = noise().draw(1001)
    assert torch.equal(first, noise().draw(1001))
    for change in ("seed", "step", "index"):
        assert not torch.equal(first, noise(**{change: 9}).draw(1001))


def test_the_noise_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    noise().draw(64)
    assert torch.equal(before, torch.get_rng_state())


def test_the_noise_covers_its_range_evenly():
    drawn = noise().draw(1 << 20)
    assert drawn.min() == 0
    assert drawn.max() == 0xFFFF
    counts = torch.bincount(drawn >> 12, minlength=16).double()
    expected = drawn.numel() / 16
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 44  # 15 degrees of freedom: exceeded once in 10,000 good generators


@pytest.mark.parametrize("value", [1.0, -1.0, 3.14159e-3, -2.71828e5, 1e-38])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.9])
def test_rounding_is_unbiased(value, fraction):
    low = torch.tensor(value).bfloat16().float()
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)  # the next bfloat16 away from 0
    exact = low + (high - low) * fraction
    count = 1 << 18
    rounded = stochastic_round_(exact.repeat(count), noise())
    assert set(rounded.tolist()) <= {low.item(), high.item()}
    mean_up = (rounded == high).double().mean().item()
    true_up = ((exact.double() - low.double()) / (high.double() - low.double())).item()
    assert mean_up == pytest.approx(true_up, abs=5 * (0.25 / count) ** 0.5 + 2**-16)


def test_what_bfloat16_holds_stays():
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([torch.randn(4096).bfloat16().float(), special])
    rounded = stochastic_round_(values.clone(), noise())
    assert torch.equal(rounded.nan_to_num(7.0), values.nan_to_num(7.0))
