"""Each law of the noise levels against its own distribution function, drawn one by one and stratified, before and
after a shift."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.sections.flow import FlowSection
from simpletuner.train.flow import FlowSettings, Window, draw_sigma, even_draws
from simpletuner.train.sigma_law import (
    Beta,
    Cubic,
    Listed,
    LogitNormal,
    SigmaLaw,
    Uniform,
    auto_shift,
    law_of,
    shifted,
    shifted_density,
)

NUM_WINDOWS = 1000
BATCH, PARTS = 4, 2
COUNT = NUM_WINDOWS * BATCH * PARTS
ONE_PERCENT = 1.63  # of Kolmogorov's distribution

# name -> (law, its distribution function in closed form)
LAWS: dict[str, tuple[SigmaLaw, object]] = {
    "sigmoid": (LogitNormal(), lambda s: normal_cdf(logit(s))),
    "sigmoid scale 0.5": (LogitNormal(scale=0.5), lambda s: normal_cdf(logit(s) / 0.5)),
    "uniform": (Uniform(), lambda s: s),
    "beta 2 2": (Beta(), lambda s: s * s * (3 - 2 * s)),
    "beta 0.5 0.5": (Beta(alpha=0.5, beta=0.5), lambda s: 2 / math.pi * math.asin(math.sqrt(s))),
    "beta 4 1": (Beta(alpha=4, beta=1), lambda s: s**4),
    "beta 1 3": (Beta(alpha=1, beta=3), lambda s: 1 - (1 - s) ** 3),
    "cubic line": (Cubic(weights=(0, 1)), lambda s: s * s),
    "cubic plain": (Cubic(weights=(5, 5, 5, 5)), lambda s: s),
    "cubic hill": (Cubic(weights=(0, 1, 0)), lambda s: hill_cdf(s)),
}


def hill_cdf(s: float) -> float:
    """Knots 0, 1, 0 with slopes 1, 0, -1: y(t) = t + t^2 - t^3 on the first half, mirrored on the second."""

    def half(t: float) -> float:
        return (t**2 / 2 + t**3 / 3 - t**4 / 4) / (7 / 12) / 2

    return half(2 * s) if s <= 0.5 else 1 - half(2 - 2 * s)


def logit(s: float) -> float:
    return math.log(s / (1 - s))


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def kolmogorov_smirnov(samples: list[float], cdf) -> float:
    count = len(samples)
    return max(max(abs(cdf(s) - i / count), abs(cdf(s) - (i + 1) / count)) for i, s in enumerate(sorted(samples)))


def draws(settings: FlowSettings, tokens: int = 256, *, places: range = range(BATCH)) -> list[float]:
    found: list[float] = []
    for index in range(NUM_WINDOWS * PARTS):
        window = Window.of(index, num_parts=PARTS, seed=1, rank=0)
        sigma_B = draw_sigma(settings, [tokens] * BATCH, window)
        found += [sigma_B[place].item() for place in places]
    return found


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_each_law_follows_its_density(name, stratified, shift):
    law, cdf = LAWS[name]
    drawn = draws(FlowSettings(law=law, shift=shift, stratified=stratified))
    off = kolmogorov_smirnov(drawn, lambda s: cdf(min(max(shifted(s, 1 / shift), 1e-12), 1 - 1e-12)))
    assert off < ONE_PERCENT / math.sqrt(len(drawn))
    if stratified:  # and better than chance: eight bridges, each of an eighth of the draws
        assert off < 0.8 / math.sqrt(len(drawn))


@pytest.mark.parametrize("place", [0, BATCH - 1])
def test_stratified_samples_are_each_drawn_by_the_whole_law(place):
    """No place of a batch sees only a part of the levels."""
    drawn = draws(FlowSettings(law=Uniform()), places=range(place, place + 1))
    assert kolmogorov_smirnov(drawn, lambda s: s) < ONE_PERCENT / math.sqrt(len(drawn))


@pytest.mark.parametrize("name", LAWS)
def test_the_quantile_inverts_the_distribution_and_the_density_is_its_slope(name):
    law, cdf = LAWS[name]
    for u in (0.001, 0.02, 0.25, 0.5, 0.77, 0.999):
        sigma = law.quantile(u)
        assert cdf(sigma) == pytest.approx(u, abs=1e-5)
        h = 1e-4 * sigma * (1 - sigma)
        assert law.density(sigma) == pytest.approx((cdf(sigma + h) - cdf(sigma - h)) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("name", LAWS)
def test_a_shifted_density_integrates_to_the_distribution(name):
    law, cdf = LAWS[name]
    grid = [0.1 + 0.8 * i / 2000 for i in range(2001)]
    whole = sum(shifted_density(law, 2.5, (a + b) / 2) * (b - a) for a, b in pairwise(grid))
    assert whole == pytest.approx(cdf(shifted(0.9, 1 / 2.5)) - cdf(shifted(0.1, 1 / 2.5)), rel=1e-4)


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=9).filter(lambda weights: max(weights) > 1e-3),
    st.floats(0.001, 0.999),
)
def test_any_weights_make_a_density_through_them(weights, u):
    law = Cubic(weights=tuple(weights))
    assert 0 <= law.quantile(u) <= 1
    knots = [i / (len(weights) - 1) for i in range(len(weights))]
    scale = [law.density(knot) / weight for knot, weight in zip(knots, weights, strict=True) if weight > 1e-6]
    assert max(scale) == pytest.approx(min(scale), rel=1e-6)
    assert all(law.density(i / 200) <= max(weights) * max(scale) * (1 + 1e-6) for i in range(201)), "no overshoot"


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6), st.integers(0, 2**31))
def test_an_update_covers_the_law_cell_by_cell(count, num_parts, number, seed):
    windows = [Window(seed=seed, rank=0, number=number, part=part, num_parts=num_parts) for part in range(num_parts)]
    parts = [even_draws(count, window) for window in windows]
    total = count * num_parts
    assert sorted(int(u * total) for part in parts for u in part) == list(range(total))
    for part in parts:  # and each micro-batch by itself
        assert sorted(int(u * count) for u in part) == list(range(count))


def test_parts_of_different_size_cover_the_law_each_by_itself():
    for part, count in enumerate((3, 5)):
        drawn = even_draws(count, Window(seed=0, rank=0, number=4, part=part, num_parts=2))
        assert sorted(int(u * count) for u in drawn) == list(range(count))


def test_draws_are_a_function_of_seed_rank_and_step():
    def at(**changes) -> torch.Tensor:
        place = {"seed": 1, "rank": 0, "number": 7, "part": 1, "num_parts": 2}
        return draw_sigma(FlowSettings(), [256] * 3, Window(**{**place, **changes}))

    assert torch.equal(at(), at())
    for changes in ({"seed": 2}, {"rank": 1}, {"number": 8}, {"part": 0}):
        assert not torch.equal(at(), at(**changes))


def test_auto_shift_depends_on_the_tokens_and_replaces_the_static_one():
    window = Window(seed=0, rank=0, number=0, part=0, num_parts=1)
    for tokens in (256, 1024, 4096):
        automatic = draw_sigma(FlowSettings(auto_shift=True, shift=99.0), [tokens] * 8, window)
        static = draw_sigma(FlowSettings(shift=auto_shift(tokens)), [tokens] * 8, window)
        assert torch.equal(automatic, static)
    assert [round(auto_shift(edge**2 // 256), 2) for edge in (512, 768, 1024)] == [1.88, 2.33, 3.16]


def test_an_offset_moves_the_logit_before_the_shift():
    window = Window(seed=0, rank=0, number=0, part=0, num_parts=1)
    plain = draw_sigma(FlowSettings(), [256] * 8, window)
    moved = draw_sigma(FlowSettings(shift=2.0), [256] * 8, window, offset=0.7)
    assert torch.allclose(torch.logit(moved) - torch.logit(plain), torch.tensor(0.7 + math.log(2)), atol=1e-4)


def test_listed_levels_are_drawn_alike_and_never_shifted():
    drawn = draws(FlowSettings(law=Listed(values=(0.25, 1.0, 0.5, 0.25)), shift=3.0))
    assert {level: count / len(drawn) for level, count in Counter(drawn).items()} == {0.25: 0.5, 0.5: 0.25, 1.0: 0.25}


def test_listed_levels_in_turn_go_round_without_a_memory():
    settings = FlowSettings(law=Listed(values=(0.75, 0.25, 0.5)), in_turn=True)
    seen = [draw_sigma(settings, [256] * 2, Window.of(i, num_parts=2, seed=5, rank=0)).tolist() for i in range(6)]
    assert [level for batch in seen for level in batch] == [0.75, 0.25, 0.5] * 4
    assert draw_sigma(settings, [256] * 2, Window.of(4, num_parts=2, seed=9, rank=0)).tolist() == seen[4]


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"flow_sigmoid_scale": 0.7}, LogitNormal(scale=0.7)),
        ({"flow_use_uniform_schedule": True}, Uniform()),
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_beta": 3}, Beta(alpha=2, beta=3)),
        ({"flow_cubic_schedule_weights": "1, 2, 1"}, Cubic(weights=(1, 2, 1))),
        ({"flow_custom_timesteps": "[0.5, 1]"}, Listed(values=(0.5, 1))),
        ({"flow_custom_timesteps": "1, 250"}, Listed(values=(0.001, 0.25))),
    ],
)
def test_options_choose_the_law(options, law):
    assert law_of(FlowSection(**options)) == law
