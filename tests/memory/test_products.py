"""A block that keeps a product is recomputed without it, and its numbers are bit for bit those of the whole block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.layer import LoraLinear
from simpletuner.adapters.lora import LoraSettings, apply_lora
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.streaming import place_module_
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, ZImageTransformer, ZImageTransformerConfig
from simpletuner.quant.build import quantiser

NUM_BLOCKS = 4
PATTERNS = {"with the layers": ("to_q", "to_out.0", "w1", "w2"), "without them": ("to_q", "to_v")}


def transformer(targets: str, precision: str, *, dropout: float = 0.0, dtype: torch.dtype) -> ZImageTransformer:
    """Z-Image in small with an adapter whose B is not zero."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": NUM_BLOCKS, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32}
    model = ZImageTransformer(ZImageTransformerConfig(**sizes, axes_dims=(8, 12, 12)))
    model.to(dtype)
    make = quantiser(precision, dtype)
    if make is not None:
        for name in (f"layers.{block}.{layer}" for block in range(NUM_BLOCKS) for layer in KEPT_PRODUCTS):
            place_module_(model, name, make(model.get_submodule(name).weight.detach()))
    apply_lora(model, LoraSettings(rank=4, alpha=4, dropout=dropout, targets=PATTERNS[targets], seed=1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


def step(model: ZImageTransformer, autocast: bool = False) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    dtype = model.layers[0].attention_norm1.weight.dtype
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(16, 16, side, generator=generator).to(dtype) for side in (16, 24)]
    context = [torch.randn(32, 64, generator=generator).to(dtype) for _ in latents]
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(latents, torch.tensor([0.3, 0.6]), context)
    loss = torch.stack([x.float().square().mean() for x in out]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def products(model: ZImageTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each of the blocks' layers multiplies forward in a step."""
    from simpletuner.quant.linear import FrozenLinear

    layers = [block.get_submodule(name) for block in model.layers for name in KEPT_PRODUCTS]
    bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
    counts = [0] * len(bases)
    forward, frozen = nn.functional.linear, FrozenLinear.multiply

    def note(base: object) -> None:
        for index, known in enumerate(bases):
            counts[index] += known is base

    def counted_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for index, known in enumerate(bases):
            counts[index] += type(known) is nn.Linear and known.weight is weight
        return forward(x, weight, bias)

    def counted_frozen(self: FrozenLinear, x: Tensor) -> Tensor:
        note(self)
        return frozen(self, x)

    monkeypatch.setattr(nn.functional, "linear", counted_linear)
    monkeypatch.setattr(FrozenLinear, "multiply", counted_frozen)
    step(model)
    return counts


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
@pytest.mark.parametrize("targets", PATTERNS)
def test_loss_and_gradients_are_bit_for_bit_those_without(targets, precision, dtype, offload, every):
    autocast = dtype == "autocast"
    kind = torch.float32 if autocast else dtype
    plain, keeping = (transformer(targets, precision, dtype=kind) for _ in range(2))
    apply_checkpointing(keeping.layers, every=every, products=KEPT_PRODUCTS, offload=offload)
    for _ in range(2):
        ours, expected = step(keeping, autocast), step(plain, autocast)
        assert len(ours) == len(expected) > NUM_BLOCKS
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
@pytest.mark.parametrize("targets", PATTERNS)
def test_the_product_is_made_once(targets, precision, monkeypatch):
    model = transformer(targets, precision, dtype=torch.float32)
    apply_checkpointing(model.layers, every=1, products=KEPT_PRODUCTS)
    assert products(model, monkeypatch) == [1] * NUM_BLOCKS * 2


def test_without_a_product_it_is_made_again(monkeypatch):
    model = transformer("with the layers", "no_change", dtype=torch.float32)
    apply_checkpointing(model.layers, every=1)
    assert products(model, monkeypatch) == [2] * (NUM_BLOCKS - 1) * 2 + [1, 1]


@pytest.mark.parametrize("case", ["dropout", "adapter off", "trained base"])
def test_what_is_left_to_autograd_is_recomputed_whole(case):
    results = []
    for kept in ((), KEPT_PRODUCTS):
        model = transformer("with the layers", "no_change", dropout=0.3 * (case == "dropout"), dtype=torch.float32)
        for block in model.layers:
            layer = block.get_submodule(KEPT_PRODUCTS[-1])
            if case == "adapter off":
                layer.active = ()
            if case == "trained base":
                layer.base_layer.requires_grad_(True)
        apply_checkpointing(model.layers, every=1, products=kept, preserve_rng_state=True)
        results.append(step(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_that_is_trained_itself_gets_its_gradient(trained):
    results = []
    for kept in ((), KEPT_PRODUCTS):
        model = transformer("without them", "no_change", dtype=torch.float32)
        for block in model.layers:
            block.feed_forward.w2.requires_grad_(trained)
        apply_checkpointing(model.layers, every=1, products=kept)
        results.append(step(model))
        assert all((block.feed_forward.w2.weight.grad is not None) == trained for block in model.layers)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_model_that_keeps_products_can_be_copied_and_asked_twice():
    model = transformer("with the layers", "no_change", dtype=torch.float32)
    expected = step(transformer("with the layers", "no_change", dtype=torch.float32))
    apply_checkpointing(model.layers, every=1, products=KEPT_PRODUCTS)
    twin = copy.deepcopy(model)
    for one in (twin, model, twin):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(one), expected, strict=True))


def test_backward_through_a_graph_that_was_kept_gives_the_same_again():
    model = transformer("with the layers", "no_change", dtype=torch.float32)
    apply_checkpointing(model.layers, every=1, products=KEPT_PRODUCTS)
    generator = torch.Generator().manual_seed(2)
    latents, context = torch.randn(16, 16, 16, generator=generator), torch.randn(32, 64, generator=generator)
    loss = model([latents], torch.tensor([0.3]), [context])[0].square().mean()
    params = [p for p in model.layers.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(loss, params, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
