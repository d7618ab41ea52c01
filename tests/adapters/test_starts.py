"""DoRA, and adapters that begin elsewhere than at random: as in peft, on bases of any form."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.files import LORA_FILE_NAME, LoraFile, LoraInfo, load_lora, save_lora
from simpletuner.adapters.layer import LoraLinear
from simpletuner.adapters.lora import (
    LoraSettings,
    adapter_state,
    apply_lora,
    disabled,
    load_adapter_state,
    set_scale,
    start_from_,
    trainable_parameters,
)
from simpletuner.adapters.targets import linear_names
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS
from simpletuner.problems import ModelError
from simpletuner.quant.build import FORMATS
from simpletuner.quant.linear import FrozenLinear

from .conftest import MAIN_BLOCKS, randomise_, tiny_transformer

RANK, ALPHA = 4, 6.0


def base_layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 20, bias=bias).requires_grad_(False)


def ours(base: nn.Module, **options: object) -> nn.Sequential:
    model = nn.Sequential(base)
    apply_lora(model, LoraSettings(rank=RANK, alpha=ALPHA, targets=("0",), seed=1, **options))
    return model


def pefts(*, start: bool | str = True, dora: bool = False, bias: bool = True) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=start, use_dora=dora)
    return inject_adapter_in_model(config, nn.Sequential(base_layer(bias)))


def run(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 12, generator=generator).requires_grad_()
    out = model(x)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: list[Tensor], second: list[Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=atol) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_of_a_dora_are_pefts(bias):
    mine, theirs = ours(base_layer(bias), dora=True), pefts(dora=True, bias=bias)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    randomise_(mine)
    with torch.no_grad():
        mine[0].lora_magnitude_vector["default"].weight.abs_().add_(0.3)
    theirs.load_state_dict(mine.state_dict())
    assert len(trainable_parameters(mine)) == 3
    assert close(run(mine), run(theirs))


def test_a_doras_lengths_begin_as_pefts():
    mine, theirs = ours(base_layer(), dora=True), pefts(dora=True)
    key = "0.lora_magnitude_vector.default.weight"
    assert torch.allclose(mine.state_dict()[key], theirs.state_dict()[key])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weight_is_pefts(start):
    mine, theirs = ours(base_layer(), start=start), pefts(start=start)
    down, up = mine[0].pair("default")
    their_down, their_up = (part["default"].weight for part in (theirs[0].lora_A, theirs[0].lora_B))
    assert torch.allclose(up @ down, their_up @ their_down, atol=1e-5)
    assert torch.allclose(down.abs(), their_down.abs(), atol=1e-5)
    assert close(run(mine), run(theirs))
    assert torch.allclose(run(mine)[0], run(nn.Sequential(base_layer()).requires_grad_(True))[0], atol=1e-5)


def test_a_gaussian_start_has_pefts_deviation():
    model = nn.Sequential(nn.Linear(4000, 4).requires_grad_(False))
    apply_lora(model, LoraSettings(rank=RANK, alpha=ALPHA, targets=("0",), start="gaussian"))
    down, up = model[0].pair("default")
    assert down.std().item() == pytest.approx(1 / RANK, rel=0.03) and not up.any()


STARTS = {"dora": {"dora": True}, "pissa": {"start": "pissa"}, "olora": {"start": "olora"}}


@pytest.mark.parametrize("form", ["int8-torchao", "fp8wo-torchao"])
@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_on_a_quantised_base_it_is_that_of_the_dequantised_weight(options, form):
    frozen = FrozenLinear.from_weight(base_layer().weight, None, form=FORMATS[form])
    plain = base_layer(bias=False)
    plain.weight = nn.Parameter(frozen.unpacked(), requires_grad=False)
    models = [ours(frozen, **options), ours(plain, **options)]
    for model in models:
        with torch.no_grad():
            for p in trainable_parameters(model):
                p.mul_(1.1).add_(0.02)
    assert close(*map(run, models), atol=1e-4)


def adapted(**options: object) -> nn.Module:
    model = tiny_transformer()
    apply_lora(model, LoraSettings(rank=RANK, alpha=ALPHA, targets=MAIN_BLOCKS, seed=7, **options))
    return model


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_it_begins_as_the_base_learns_resumes_and_goes_away(tmp_path, options, predict):
    before = predict(tiny_transformer())
    model, again = adapted(**options), adapted(**options)
    assert close(predict(model), before, atol=1e-4)
    wanted = [torch.randn(out.shape, generator=torch.Generator().manual_seed(3)) for out in before]
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.02)
    losses = []
    for _ in range(8):
        loss = sum((a - b).square().mean() for a, b in zip(predict(model), wanted, strict=True))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    path = tmp_path / LORA_FILE_NAME
    times = 2 if "start" in options else 1
    save_lora(path, adapter_state(model), LoraInfo(rank=times * RANK, alpha=times * ALPHA))
    load_adapter_state(again, load_lora(path).tensors)
    assert equal(predict(again), predict(model))
    if times == 2:  # on the untouched base, as a LoRA of twice the rank
        plain = tiny_transformer()
        settings = LoraSettings(rank=2 * RANK, alpha=2 * ALPHA, targets=MAIN_BLOCKS)
        apply_lora(plain, settings)
        start_from_(plain, load_lora(path), settings)
        assert close(predict(plain), predict(model), atol=1e-4)
    with disabled(model):
        assert equal(predict(model), before)
    set_scale(model, 0.0)
    assert close(predict(model), before, atol=1e-4)


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(options, predict):
    found = []
    for recomputes in (False, True):
        model = adapted(**options)
        if recomputes:
            apply_checkpointing(model.layers, every=1, products=KEPT_PRODUCTS)
        sum(out.square().mean() for out in predict(model)).backward()
        found.append([p.grad for p in trainable_parameters(model)])
    assert equal(*found)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_doras_file_has_the_names_that_others_read(tmp_path, layout):
    model = adapted(dora=True)
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(model), LoraInfo(rank=RANK, alpha=ALPHA), layout=layout)
    from safetensors.torch import load_file

    contents = load_file(path)
    name = "layers.0.attention.to_q"
    if layout == "comfyui":
        assert contents[f"diffusion_model.{name}.dora_scale"].shape == (48, 1)
    else:
        assert contents[f"transformer.{name}.lora_magnitude_vector"].shape == (48,)
    file = load_lora(path)
    assert all(torch.equal(tensor, file.tensors[key]) for key, tensor in adapter_state(model).items())


def test_a_dora_goes_on_from_a_lora_and_a_lora_not_from_a_dora(tmp_path, predict):
    lora, dora = adapted(), adapted(dora=True)
    randomise_(lora)
    settings = LoraSettings(rank=RANK, alpha=ALPHA, targets=MAIN_BLOCKS, dora=True)
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(lora), LoraInfo(rank=RANK, alpha=ALPHA))
    start_from_(dora, load_lora(path), settings)
    assert close(predict(dora), predict(lora), atol=1e-3)
    save_lora(path, adapter_state(dora), LoraInfo(rank=RANK, alpha=ALPHA))
    another = adapted(dora=True)
    start_from_(another, load_lora(path), settings)
    assert equal(predict(another), predict(dora))
    with pytest.raises(ModelError) as error:
        start_from_(adapted(), load_lora(path), LoraSettings(rank=RANK, alpha=ALPHA, targets=MAIN_BLOCKS))
    (problem,) = error.value.problems
    assert problem.code == "E-LORA-DORA" and problem.fixes[0].key == "use_dora"
    assert all("DoRA" in render_problem(problem, language)[0] for language in LANGUAGES)
    assert isinstance(file := load_lora(path), LoraFile) and len(file.scales) == 14


def test_a_file_of_another_model_is_told_as_that(tmp_path):
    other = nn.ModuleDict({"down_blocks": nn.ModuleDict({"to_query": nn.Linear(8, 8)})})
    apply_lora(other, LoraSettings(rank=RANK, alpha=ALPHA, targets=("to_query",)))
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(other), LoraInfo(rank=RANK, alpha=ALPHA))
    with pytest.raises(ModelError) as error:
        load_lora(path, linear_names(adapted()))
    (problem,) = error.value.problems
    assert problem.code == "E-LORA-OTHER-MODEL"
    assert all("down_blocks.to_query" in render_problem(problem, language)[0] for language in LANGUAGES)


def test_dropout_is_pefts_in_a_dora():
    model = ours(base_layer(), dora=True, dropout=0.5)
    randomise_(model)
    assert isinstance(model[0], LoraLinear)
    x = torch.randn(64, 12)
    model.eval()
    still = model(x)
    model.train()
    torch.manual_seed(0)
    assert torch.allclose(torch.stack([model(x) for _ in range(800)]).mean(0), still, atol=0.35)
    assert not torch.equal(model(x), model(x))
