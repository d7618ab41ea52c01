"""The best LoRA of a rank: as good as the singular values allow, and never better or worse than is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpletuner.adapters.formats.convert import convert
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.lowrank import Reduction, as_lora, difference_norm, reduce, update_norm
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights

ROWS, COLUMNS = 24, 36


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def update(kind: str, seed: int, alpha: float | None) -> ModuleWeights:
    if kind == "LoRA":
        return LoraWeights(down=draw(seed, 8, COLUMNS), up=draw(seed + 1, ROWS, 8), alpha=alpha)
    if kind == "LoHa":
        first, second = ((draw(seed + n, ROWS, 3), draw(seed + n + 1, 3, COLUMNS)) for n in (0, 2))
        return LohaWeights(w1=first, w2=second, alpha=alpha)
    if kind == "LoHa, full rank":
        first, second = ((draw(seed + n, ROWS, 9), draw(seed + n + 1, 9, COLUMNS)) for n in (0, 2))
        return LohaWeights(w1=first, w2=second, alpha=alpha)
    if kind == "LoKr":
        return LokrWeights(w1=(draw(seed, 3, 4),), w2=(draw(seed + 1, 8, 2), draw(seed + 2, 2, 9)), alpha=alpha)
    assert kind == "LoKr, full"
    return LokrWeights(w1=(draw(seed, 4, 6),), w2=(draw(seed + 1, 6, 6),), alpha=alpha)


KINDS = ("LoRA", "LoHa", "LoHa, full rank", "LoKr", "LoKr, full")
updates = st.builds(update, st.sampled_from(KINDS), st.integers(0, 5), st.sampled_from([None, 1.0, 12.0, -2.0]))


@settings(max_examples=50, deadline=None)
@given(weights=updates, rank=st.integers(1, 40))
def test_no_lora_of_that_rank_is_better(weights, rank):
    delta = weights.delta(torch.float64)
    lora = reduce(weights, Reduction(rank=rank))
    error = float((lora.delta(torch.float64) - delta).norm())
    best = float(torch.linalg.svdvals(delta)[rank:].norm())
    assert error == pytest.approx(best, abs=2e-6 * float(delta.norm()))
    assert lora.rank <= max(rank, 1) and lora.shape == weights.shape
    assert difference_norm(weights, lora) == pytest.approx(error, rel=1e-6, abs=1e-6 * float(delta.norm()))
    assert update_norm(weights) == pytest.approx(float(delta.norm()), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(weights=updates, energy=st.floats(0.05, 1.0))
def test_as_many_directions_as_the_energy_needs_and_no_more(weights, energy):
    values = torch.linalg.svdvals(weights.delta(torch.float64)) ** 2
    lora = reduce(weights, Reduction(energy=energy))
    kept = values.cumsum(0) / values.sum()
    assert kept[lora.rank - 1] >= energy - 1e-6
    assert lora.rank == 1 or kept[lora.rank - 2] < energy + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stated_error_is_that_of_the_file(kind, dtype):
    """With the rounding of its number format in it."""
    names = ("layers.0.attention.to_q", "layers.0.feed_forward.w2")
    source = Adapter(modules={name: update(kind, n, 3.0) for n, name in enumerate(names)}, metadata={})
    made = convert(source, LAYOUTS["comfyui"], reduction=Reduction(rank=5), dtype=dtype)
    squares, total, relative = 0.0, 0.0, {}
    for name, weights in source.modules.items():
        stem = f"diffusion_model.{name}"
        down, up = (made.tensors[f"{stem}.lora_{n}.weight"] for n in "AB")
        assert down.dtype == up.dtype == dtype
        scale = float(made.tensors[f"{stem}.alpha"]) / down.shape[0]
        wanted = weights.delta(torch.float64)
        error, norm = float((up.double() @ down.double() * scale - wanted).norm()), float(wanted.norm())
        squares, total, relative[name] = squares + error**2, total + norm**2, error / norm
    assert made.loss.total == pytest.approx((squares / total) ** 0.5, rel=1e-5, abs=1e-6)
    assert made.loss.largest == pytest.approx(max(relative.values()), rel=1e-5, abs=1e-6)
    if made.loss.largest > 1e-6:
        assert made.loss.worst == max(relative, key=lambda name: relative[name])


def test_lora_that_is_small_enough_stays_as_it_is():
    weights = update("LoRA", 1, 3.0)
    assert reduce(weights, Reduction(rank=8)) is weights
    assert as_lora(weights) is weights


def test_loha_is_exactly_a_lora_of_its_squared_rank():
    weights = update("LoHa", 1, 6.0)
    lora = as_lora(weights)
    assert lora is not None and lora.rank == 9
    assert torch.allclose(lora.delta(torch.float64), weights.delta(torch.float64), rtol=1e-6, atol=1e-6)


def test_an_update_of_zero_has_one_direction():
    zero = LoraWeights(down=draw(1, 4, COLUMNS), up=torch.zeros(ROWS, 4))
    for reduction in (Reduction(rank=2), Reduction(energy=0.9)):
        lora = reduce(zero, reduction)
        assert not lora.delta().any()
    assert reduce(zero, Reduction(energy=0.9)).rank == 1
