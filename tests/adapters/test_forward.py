"""The lean forward against peft's own, which each test reaches by deleting the replacement."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.forward import use_lean_forward_
from simpletuner.adapters.lora import LoraSettings, adapter_state, apply_lora
from simpletuner.memory.checkpointing import apply_checkpointing

from .conftest import MAIN_BLOCKS, randomise_, tiny_transformer


def layer(
    *, lean: bool, base: torch.dtype = torch.float32, alpha: float = 4.0, bias: bool = True, adapters: int = 1
) -> nn.Module:
    """A linear layer 12 -> 20 with float32 adapters of rank 4; all but the last adapter are frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=base))
    names = [f"a{i}" for i in range(adapters)]
    config = {name: LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"]) for name in names}
    inject_adapter_in_model(config[names[0]], model, adapter_name=names[0])
    for name in names[1:]:
        model[0].update_layer(name, 4, alpha, config=config[name])
    inner = model[0]
    inner.set_adapter(names)
    for name in names:
        for part in (inner.lora_A[name], inner.lora_B[name]):
            part.to(torch.float32)
            nn.init.normal_(part.weight, std=0.5)
            part.requires_grad_(name == names[-1])
    assert not lean or use_lean_forward_(inner)
    return inner


def run(module: nn.Module, dtype: torch.dtype, *, autocast: bool, input_grad: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 12, generator=generator).to(dtype).requires_grad_(input_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = module(x)
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    return [out.detach(), x.grad, *grads]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [4.0, 2.0, 1.3])
@pytest.mark.parametrize("input_grad", [False, True])
def test_in_float32_it_is_pefts(alpha, bias, adapters, input_grad):
    options = {"alpha": alpha, "bias": bias, "adapters": adapters}
    ours = run(layer(lean=True, **options), torch.float32, autocast=False, input_grad=input_grad)
    theirs = run(layer(lean=False, **options), torch.float32, autocast=False, input_grad=input_grad)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("base", "dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("adapters", [1, 2])
def test_under_autocast_it_is_at_least_as_exact_as_pefts(base, dtype, adapters):
    options = {"alpha": 2.0, "adapters": adapters}
    exact_layer = layer(lean=False, base=base, **options).double()
    exact = run(exact_layer, torch.float64, autocast=False)
    ours = run(layer(lean=True, base=base, **options), dtype, autocast=True)
    theirs = run(layer(lean=False, base=base, **options), dtype, autocast=True)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        error, their_error = ((x.double() - true).norm() / true.norm() for x in (a, b))
        assert error < 0.01
        assert error < 1.2 * their_error


def test_a_bfloat16_base_keeps_float32_gradients_of_float32_adapters():
    ours = run(layer(lean=True, base=torch.bfloat16), torch.bfloat16, autocast=False)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_a_base_that_is_trained_gets_its_gradient():
    module = layer(lean=True)
    module.get_base_layer().weight.requires_grad_(True)
    run(module, torch.float32, autocast=False)
    assert module.get_base_layer().weight.grad is not None


def test_a_merged_or_disabled_adapter_is_not_added_again():
    module = layer(lean=True)
    x = torch.randn(3, 12)
    adapted = module(x)
    module.merge()
    assert torch.allclose(module(x), adapted, atol=1e-5)
    module.unmerge()
    assert torch.allclose(module(x), adapted, atol=1e-5)
    module.enable_adapters(False)
    assert torch.equal(module(x), module.get_base_layer()(x))
    assert not torch.allclose(module(x), adapted)


def test_variants_and_other_layers_keep_pefts_forward():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["0"]), model)
    assert not use_lean_forward_(model[0])


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_training_of_the_transformer_is_bit_for_bit_the_same(predict, every):
    results = []
    for checkpointed in (False, True):
        model = tiny_transformer()
        apply_lora(model, LoraSettings(rank=4, alpha=6.5, targets=MAIN_BLOCKS, seed=1))
        randomise_(model)
        if checkpointed:
            names = list(model.state_dict())
            assert apply_checkpointing(model.layers, every=every) == 1
            assert list(model.state_dict()) == names
        loss = sum(x.square().mean() for x in predict(model))
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), grads, adapter_state(model)))
    (loss, grads, _), (other_loss, other_grads, _) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
