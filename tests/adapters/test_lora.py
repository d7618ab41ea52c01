from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from simpletuner.adapters.files import LoraFile, LoraInfo
from simpletuner.adapters.lora import (
    LoraSettings,
    activate_,
    adapter_state,
    apply_lora,
    disabled,
    load_adapter_state,
    set_scale,
    start_from_,
    trainable_parameters,
)
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError, ModelError

from .conftest import MAIN_BLOCKS, randomise_, tiny_transformer


def settings(**changes: object) -> LoraSettings:
    return LoraSettings(**{"rank": 4, "alpha": 4.0, "targets": MAIN_BLOCKS, "seed": 7, **changes})


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_a_fresh_adapter_does_not_change_the_prediction(transformer, predict):
    before = predict(transformer)
    apply_lora(transformer, settings())
    assert equal(predict(transformer), before)


def test_only_the_adapter_is_trained_and_its_size_is_reported(transformer):
    report = apply_lora(transformer, settings())
    linears = 2 * 7
    widths = 2 * (4 * (48 + 48) + 3 * (48 + 128))
    assert report.num_modules == linears
    assert report.num_params == 4 * widths
    assert report.modules[0] == "layers.0.attention.to_q"
    trained = [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * linears
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trained)
    assert len(trainable_parameters(transformer)) == 2 * linears


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_on_any_base(transformer, predict, base):
    transformer.to(base)
    apply_lora(transformer, settings())
    randomise_(transformer)
    assert {p.dtype for p in trainable_parameters(transformer)} == {torch.float32}
    (loss, *_) = predict(transformer)
    assert loss.dtype == base
    loss.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(transformer))


def test_the_start_depends_on_the_seed_and_the_modules_name_alone():
    states = []
    for seed, targets, global_seed in ((7, MAIN_BLOCKS, 1), (7, ("to_q",), 2), (8, MAIN_BLOCKS, 1)):
        model = tiny_transformer()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        apply_lora(model, settings(seed=seed, targets=targets))
        assert torch.equal(before, torch.get_rng_state())
        states.append(adapter_state(model))
    key = "layers.1.attention.to_q.lora_A.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])
    assert not torch.equal(states[0][key], states[0][key.replace("layers.1", "layers.0")])
    bound = 48**-0.5  # Kaiming-uniform with a = sqrt(5), as nn.Linear
    assert states[0][key].abs().max() <= bound
    assert states[0][key].std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_names_and_state_are_pefts(transformer, predict):
    report = apply_lora(transformer, settings(alpha=6.5))
    randomise_(transformer)
    other = tiny_transformer()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6.5, target_modules=list(report.modules)), other)
    assert transformer.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(transformer.state_dict())
    assert close(predict(transformer), predict(other))
    theirs, ours = get_peft_model_state_dict(other), adapter_state(transformer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_state_loads_back_bit_for_bit(predict):
    first, second = tiny_transformer(), tiny_transformer()
    apply_lora(first, settings())
    apply_lora(second, settings(seed=8))
    randomise_(first)
    assert not equal(predict(first), predict(second))
    load_adapter_state(second, adapter_state(first))
    assert equal(predict(first), predict(second))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_without_the_adapter_the_base_predicts_and_training_goes_on(transformer, predict):
    before = predict(transformer)
    apply_lora(transformer, settings())
    randomise_(transformer)
    adapted = predict(transformer)
    with disabled(transformer):
        assert equal(predict(transformer), before)
    assert equal(predict(transformer), adapted)
    assert all(p.requires_grad for p in trainable_parameters(transformer)) and trainable_parameters(transformer)


def test_an_error_inside_disabled_switches_the_adapter_on_again(transformer, predict):
    apply_lora(transformer, settings())
    randomise_(transformer)
    adapted = predict(transformer)
    with pytest.raises(RuntimeError, match="stop"), disabled(transformer):
        raise RuntimeError("stop")
    assert equal(predict(transformer), adapted)


def test_scale_one_is_as_trained_and_zero_is_the_base(transformer, predict):
    before = predict(transformer)
    apply_lora(transformer, settings(alpha=2.0))
    randomise_(transformer)
    adapted = predict(transformer)
    set_scale(transformer, 0.0)
    assert close(predict(transformer), before)
    set_scale(transformer, 1.0)
    assert equal(predict(transformer), adapted)
    set_scale(transformer, -0.5)
    assert not close(predict(transformer), before)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 6.5])
def test_the_update_is_alpha_over_rank_times_b_a(transformer, predict, alpha):
    apply_lora(transformer, settings(alpha=alpha))
    randomise_(transformer)
    merged = tiny_transformer()
    state = adapter_state(transformer)
    for name, module in merged.named_modules():
        if f"{name}.lora_A.weight" in state:
            module.weight.data += alpha / 4 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    assert close(predict(transformer), predict(merged))


def test_two_adapters_act_together_and_one_is_trained(predict):
    model = tiny_transformer()
    apply_lora(model, settings(seed=1), adapter_name="assistant")
    randomise_(model, seed=3)
    assistant_only = predict(model)
    assistant = {key: tensor.clone() for key, tensor in adapter_state(model, "assistant").items()}
    report = apply_lora(model, settings(targets=("to_q", "w2")))
    activate_(model, ("assistant", "default"))
    assert equal(predict(model), assistant_only)
    assert sum(p.numel() for p in trainable_parameters(model)) == report.num_params

    randomise_(model, seed=4)
    both = predict(model)
    with disabled(model):
        assert close(predict(model), assistant_only)
    with disabled(model, "assistant"):
        alone = predict(model)
    assert not close(alone, both)
    both[0].square().mean().backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
    assert all(torch.equal(assistant[key], tensor) for key, tensor in adapter_state(model, "assistant").items())


def lora_file(model: nn.Module, scale: float, rank: int = 4) -> LoraFile:
    tensors = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    modules = {key.rsplit(".lora_", 1)[0] for key in tensors}
    info = LoraInfo(rank=rank, alpha=rank * scale)
    return LoraFile(tensors=tensors, scales=dict.fromkeys(modules, scale), info=info)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (7, 14.0)])
def test_training_goes_on_from_a_file_of_another_alpha_and_a_smaller_rank(predict, rank, alpha):
    source = tiny_transformer()
    apply_lora(source, settings(alpha=2.0))
    randomise_(source)
    model = tiny_transformer()
    chosen = settings(rank=rank, alpha=alpha)
    apply_lora(model, chosen)
    start_from_(model, lora_file(source, scale=0.5), chosen)
    assert close(predict(model), predict(source))
    predict(model)[0].square().mean().backward()
    grown = [p for p in trainable_parameters(model) if p.shape[1] == rank]
    assert all((p.grad != 0).any(dim=0).all() for p in grown)  # every channel of the larger rank can learn


def test_a_file_may_cover_a_part_of_the_modules(predict):
    source, model = tiny_transformer(), tiny_transformer()
    apply_lora(source, settings(targets=("layers.*.to_v",)))
    randomise_(source)
    apply_lora(model, settings())
    start_from_(model, lora_file(source, scale=1.0), settings())
    assert close(predict(model), predict(source))


def problem_of(error: pytest.ExceptionInfo[ModelError] | pytest.ExceptionInfo[ConfigError]) -> str:
    for language in LANGUAGES:
        for problem in error.value.problems:
            assert all(render_problem(problem, language))
    (problem, *_) = error.value.problems
    return " | ".join(str(part) for part in (problem.code, *render_problem(problem, "en")))


def test_a_target_that_matches_nothing_is_named_with_what_is_near(transformer):
    with pytest.raises(ConfigError) as error:
        apply_lora(transformer, settings(targets=("to_q", "to_kv", "attn")))
    assert [p.params["target"] for p in error.value.problems] == ["to_kv", "attn"]
    assert "attention.to_k" in problem_of(error)
    assert not trainable_parameters(transformer)


@pytest.mark.parametrize("use", [load_adapter_state, lambda model, file: start_from_(model, file, settings())])
def test_weights_of_other_modules_are_refused(use):
    source, model = tiny_transformer(), tiny_transformer()
    apply_lora(source, settings(targets=("to_v", "adaLN_modulation.0")))
    apply_lora(model, settings(targets=("to_v", "to_q")))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError) as error:
        use(model, adapter_state(source) if use is load_adapter_state else lora_file(source, scale=1.0))
    assert "E-LORA-MODULES" in problem_of(error)
    assert "adaLN_modulation" in problem_of(error)
    assert equal(before, list(model.parameters()))


def test_a_larger_rank_is_refused_with_the_rank_that_fits():
    source, model = tiny_transformer(), tiny_transformer()
    apply_lora(source, settings(rank=8))
    apply_lora(model, settings())
    with pytest.raises(ModelError) as error:
        start_from_(model, lora_file(source, scale=1.0, rank=8), settings())
    assert "rank 8, more than lora_rank 4" in problem_of(error)
    (fix,) = error.value.problems[0].fixes
    assert (fix.key, fix.value) == ("lora_rank", 8)


@pytest.mark.parametrize("use", [load_adapter_state, lambda model, state: start_from_(model, state, settings())])
def test_weights_of_another_size_are_refused(use, transformer):
    apply_lora(transformer, settings())
    state = {key: tensor.clone() for key, tensor in adapter_state(transformer).items()}
    state["layers.1.attention.to_q.lora_A.weight"] = torch.zeros(4, 49)
    scales = dict.fromkeys((key.rsplit(".lora_", 1)[0] for key in state), 1.0)
    file = LoraFile(tensors=state, scales=scales, info=LoraInfo(rank=4, alpha=4))
    with pytest.raises(ModelError) as error:
        use(transformer, state if use is load_adapter_state else file)
    assert "layers.1.attention.to_q.lora_A.weight has shape [4, 49]" in problem_of(error)


def test_dropout_drops_while_training_only(transformer, predict):
    apply_lora(transformer, settings(dropout=0.5))
    randomise_(transformer)
    transformer.train()
    assert not equal(predict(transformer), predict(transformer))
    transformer.eval()
    assert equal(predict(transformer), predict(transformer))
