"""A LoRA out of two models: what was added is found again, and what is said of the rest is so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpletuner.adapters.formats.convert import Weighted, measure
from simpletuner.adapters.formats.lowrank import reduce_matrix
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ModelError
from simpletuner.tools.extract import extract
from simpletuner.tools.merge_into import merge_into

from .conftest import adapter_of, save_file


@pytest.mark.parametrize(("base_comfy", "tuned_comfy"), [(False, False), (False, True), (True, False)])
def test_a_known_adapter_is_recovered(tmp_path, state, base_comfy, tuned_comfy):
    plain = save_file(tmp_path / "plain.safetensors", state, comfy=tuned_comfy)
    base = save_file(tmp_path / "base.safetensors", state, comfy=base_comfy)
    adapter = adapter_of("LoRA")
    merge_into([plain], [Weighted(name="a", adapter=adapter, strength=1.0)], tmp_path / "tuned.safetensors")
    found = extract([base], [tmp_path / "tuned.safetensors"], rank=2, dtype=torch.float32)
    assert found.adapter.modules.keys() == adapter.modules.keys()
    assert found.energy > 1 - 1e-9 and found.smallest > 1 - 1e-9
    assert measure(adapter.modules, found.adapter).largest < 1e-4
    assert not found.left_out


def test_the_energy_that_is_told_is_what_the_best_lora_holds(tmp_path, state):
    generator = torch.Generator().manual_seed(5)
    names = ("layers.0.attention.to_v", "layers.1.feed_forward.w2")
    tuned = {name: tensor.clone() for name, tensor in state.items()}
    for name in names:
        tuned[f"{name}.weight"] += torch.randn(state[f"{name}.weight"].shape, generator=generator)
    tuned["layers.0.attention.norm_q.weight"] += 1
    paths = [[save_file(tmp_path / f"{n}.safetensors", s)] for n, s in (("base", state), ("tuned", tuned))]
    found = extract(*paths, rank=5, dtype=torch.float32)
    squares = {
        name: torch.linalg.svdvals((tuned[f"{name}.weight"] - state[f"{name}.weight"]).double()) ** 2 for name in names
    }
    kept = {name: float(values[:5].sum() / values.sum()) for name, values in squares.items()}
    total = sum(float(values[:5].sum()) for values in squares.values()) / sum(float(v.sum()) for v in squares.values())
    assert found.energy == pytest.approx(total, abs=1e-5)
    assert found.worst == min(kept, key=lambda name: kept[name])
    assert found.smallest == pytest.approx(min(kept.values()), abs=1e-5)
    assert found.left_out == ("layers.0.attention.norm_q.weight",)
    assert {weights.rank for weights in found.adapter.modules.values()} == {5}


def test_a_large_matrix_is_decomposed_almost_as_well_as_possible_and_always_alike():
    generator = torch.Generator().manual_seed(2)
    falling = torch.logspace(0, -2, 800)
    left, right = (torch.linalg.qr(torch.randn(side, 800, generator=generator)).Q for side in (900, 800))
    matrix = (left * falling) @ right.mT
    lora = reduce_matrix(matrix, 24, dtype=torch.float32)
    error = float((matrix - lora.delta()).norm())
    best = float(falling[24:].norm())
    assert best * (1 - 1e-4) <= error <= best * 1.005
    again = reduce_matrix(matrix, 24, dtype=torch.float32)
    assert torch.equal(lora.up, again.up) and torch.equal(lora.down, again.down)


def refused(base: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path) -> str:
    paths = [[save_file(tmp_path / f"{n}.safetensors", s)] for n, s in (("base", base), ("tuned", tuned))]
    with pytest.raises(ModelError) as error:
        extract(*paths, rank=4, dtype=torch.float32)
    (problem,) = error.value.problems
    assert len({render_problem(problem, language)[0] for language in LANGUAGES}) == len(LANGUAGES)
    return str(render_problem(problem, "en")[0])


def test_models_that_are_equal_or_unlike_are_refused(tmp_path, state):
    told = refused(state, state, tmp_path)
    assert told == "No linear layer differs between base.safetensors and tuned.safetensors."
    fewer = {name: tensor for name, tensor in state.items() if not name.startswith("layers.1.")}
    told = refused(state, fewer, tmp_path)
    assert told.startswith("The two models are not alike:") and "layers.1." in told
