from __future__ import annotations

import pytest
import torch

from simpletuner.optim.rounding import Dither, lattice_of, stochastic_round_

CPU = torch.device("cpu")


def dither(**changes: int) -> Dither:
    return Dither(lattice_of(1 << 20, CPU), **{"seed": 3, "step": 5, "index": 0, **changes})


def test_the_dither_is_a_function_of_seed_step_index_and_draw():
    stream = dither()
    first, second = stream.draw(1001), stream.draw(1001)
    assert torch.equal(first, dither().draw(1001))
    assert not torch.equal(first, second)
    for change in ("seed", "step", "index"):
        assert not torch.equal(first, dither(**{change: 9}).draw(1001))


def test_the_dither_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    dither().draw(64)
    assert torch.equal(before, torch.get_rng_state())


def test_across_elements_the_dither_takes_every_value_equally_often():
    drawn = dither().draw(1 << 20)
    assert torch.bincount(drawn, minlength=1 << 16).eq(16).all()
    for start in (0, 777, 50_000):  # any stretch is even too
        counts = torch.histc(drawn[start : start + 1000].float(), bins=10, min=0, max=1 << 16)
        assert (counts - 100).abs().max() <= 5


def test_of_one_element_the_dither_is_uniform_and_independent_from_step_to_step():
    drawn = torch.stack([dither(step=step).draw(3) for step in range(4096)])[:, 2]
    counts = torch.histc(drawn.float(), bins=16, min=0, max=1 << 16)
    assert ((counts - 256) ** 2 / 256).sum() < 44  # chi-square, 15 degrees of freedom: once in 10,000
    uniform = drawn.double() / (1 << 16) - 0.5
    correlation = (uniform[1:] * uniform[:-1]).mean() * 12
    assert abs(correlation) < 4 / 64


@pytest.mark.parametrize("value", [1.0, -1.0, 3.14159e-3, -2.71828e5, 1e-38])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.9])
def test_rounding_is_unbiased(value, fraction):
    low = torch.tensor(value).bfloat16().float()
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)  # the next bfloat16 away from 0
    exact = low + (high - low) * fraction
    count = 1 << 18
    rounded = stochastic_round_(exact.repeat(count), dither())
    assert set(rounded.tolist()) <= {low.item(), high.item()}
    mean_up = (rounded == high).double().mean().item()
    true_up = ((exact.double() - low.double()) / (high.double() - low.double())).item()
    assert mean_up == pytest.approx(true_up, abs=2**-15)


def test_one_elements_rounding_is_unbiased_over_steps():
    exact = torch.tensor([1.0, 1.0 + 0.3 * 2**-7, 1.0 + 0.9 * 2**-7])
    rounded = torch.stack([stochastic_round_(exact.clone(), dither(step=step)) for step in range(4096)])
    assert torch.allclose(rounded.mean(dim=0), exact, atol=2**-7 * 4 * 0.5 / 64)


def test_what_bfloat16_holds_stays():
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([torch.randn(4096).bfloat16().float(), special])
    rounded = stochastic_round_(values.clone(), dither())
    assert torch.equal(rounded.nan_to_num(7.0), values.nan_to_num(7.0))
