"""Our layer against peft's, with the same weights under the same names."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.layer import LoraLinear
from simpletuner.adapters.lora import LoraSettings, adapter_state, apply_lora
from simpletuner.memory.checkpointing import apply_checkpointing

from .conftest import MAIN_BLOCKS, randomise_, tiny_transformer

RANK = 4


def base_layer(*, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 20, bias=bias, dtype=dtype).requires_grad_(False)


def our_layer(
    *, base: torch.dtype = torch.float32, alpha: float = 4.0, bias: bool = True, adapters: int = 1
) -> LoraLinear:
    """12 -> 20 with float32 adapters of rank 4; all but the last adapter are frozen."""
    layer = LoraLinear(base_layer(dtype=base, bias=bias))
    generator = torch.Generator().manual_seed(3)
    for index in range(adapters):
        down, up = torch.randn(RANK, 12, generator=generator) / 3, torch.randn(20, RANK, generator=generator) / 3
        layer.requires_grad_(False)
        layer.add_adapter(f"a{index}", down=down, up=up, scale=alpha / RANK)
    return layer


def peft_layer(
    *, base: torch.dtype = torch.float32, alpha: float = 4.0, bias: bool = True, adapters: int = 1
) -> nn.Module:
    model = nn.Sequential(base_layer(dtype=base, bias=bias))
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"])
    inject_adapter_in_model(config, model, adapter_name="a0")
    layer = model[0]
    names = [f"a{index}" for index in range(adapters)]
    for name in names[1:]:
        layer.update_layer(name, RANK, alpha, config=config)
    layer.set_adapter(names)
    for part in (layer.lora_A, layer.lora_B):
        part.float()
    ours = our_layer(base=base, alpha=alpha, bias=bias, adapters=adapters)
    layer.load_state_dict(ours.state_dict())
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    return layer


def run(module: nn.Module, dtype: torch.dtype, *, autocast: bool, input_grad: bool = True) -> list[Tensor | None]:
    """Output, gradient of the input and gradients of the trained parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 12, generator=generator).to(dtype).requires_grad_(input_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = module(x)
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [4.0, 2.0, 1.3])
@pytest.mark.parametrize("input_grad", [False, True])
def test_in_float32_it_is_pefts(alpha, bias, adapters, input_grad):
    options = {"alpha": alpha, "bias": bias, "adapters": adapters}
    ours = run(our_layer(**options), torch.float32, autocast=False, input_grad=input_grad)
    theirs = run(peft_layer(**options), torch.float32, autocast=False, input_grad=input_grad)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 2])
def test_under_autocast_it_is_at_least_as_exact_as_pefts(dtype, adapters):
    options = {"base": dtype, "alpha": 2.0, "adapters": adapters}
    exact = run(peft_layer(**options).double(), torch.float64, autocast=False)
    ours = run(our_layer(**options), dtype, autocast=True)
    theirs = run(peft_layer(**options), dtype, autocast=True)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        error, their_error = ((x.double() - true).norm() / true.norm() for x in (a, b))
        assert error < 0.01
        assert error < 1.2 * their_error


def test_a_bfloat16_base_keeps_float32_gradients_of_float32_adapters():
    ours = run(our_layer(base=torch.bfloat16), torch.bfloat16, autocast=False)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_the_gradients_are_those_of_the_formula():
    layer = our_layer(alpha=1.3, adapters=2).double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    down, up = layer.pair("a1")
    assert torch.autograd.gradcheck(lambda *pair: torch.func.functional_call(layer, _named(*pair), x), (down, up))


def _named(down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {"lora_A.a1.weight": down, "lora_B.a1.weight": up}


def test_a_base_that_is_trained_gets_its_gradient():
    layer = our_layer()
    exact = run(layer, torch.float32, autocast=False)
    layer.zero_grad()
    layer.base_layer.requires_grad_(True)
    run(layer, torch.float32, autocast=False)
    assert layer.base_layer.weight.grad is not None
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(layer.pair("a0"), exact[2:], strict=True))


class DoubledLinear(nn.Linear):
    """Stands for a quantised layer: its weight alone does not tell what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_base_of_another_kind_keeps_its_own_forward():
    layer = our_layer()
    x = torch.randn(3, 12)
    update = layer(x) - layer.base_layer(x)
    layer.base_layer.__class__ = DoubledLinear
    assert torch.allclose(layer(x), layer.base_layer(x) + update, atol=1e-5)
    assert not torch.allclose(layer(x), update, atol=0.1)


def test_dropout_scales_what_it_keeps_and_rests_in_evaluation():
    layer = our_layer()
    x = torch.randn(1, 12)
    update = layer(x) - layer.base_layer(x)
    layer.dropouts["a0"] = 0.25
    torch.manual_seed(0)
    dropped = torch.stack([layer(x) - layer.base_layer(x) for _ in range(3000)])
    assert torch.allclose(dropped.mean(dim=0), update, atol=0.1)
    assert dropped.std(dim=0).mean() > 0.1
    layer.eval()
    assert torch.allclose(layer(x) - layer.base_layer(x), update, atol=1e-6)


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
        assert grads.keys() and len(grads) == len(adapter_state(model))
        results.append((loss.detach(), grads))
    (loss, grads), (other_loss, other_grads) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
