"""Laws of the weight formats: how near they are, that forward and backward are adjoint, that LoRA sits on them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simpletuner.adapters.layer import LoraLinear
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.quant.build import FORMATS, quantiser
from simpletuner.quant.formats import Int4Format, Int8Format, rows_per_piece
from simpletuner.quant.linear import FrozenLinear

ROWS, COLUMNS = 192, 256
# precision -> largest relative error of a product, least cosine of the input's gradient, against the unquantised layer
BOUNDS = {
    "plain": (1e-6, 0.999999),
    "int8-torchao": (0.01, 0.9999),
    "fp8wo-torchao": (0.035, 0.999),
    "fp8-torchao": (0.05, 0.999),
    "int4-torchao": (0.11, 0.99),
    "nf4-bnb": (0.105, 0.99),
}
QUANTO = {"int8-quanto": (0.01, 0.9999), "fp8-quanto": (0.035, 0.999)}


def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def activations(width: int = COLUMNS) -> Tensor:
    return torch.randn(3, 7, width, generator=torch.Generator().manual_seed(1))


def test_every_offered_precision_is_built():
    offered = {name for name, row in PRECISIONS.items() if row.refused is None and row.is_quantised}
    assert {name for name in offered if quantiser(name, torch.float32) is not None} == offered
    assert quantiser("no_change", torch.float32) is None
    assert {name for name in offered if PRECISIONS[name].offloadable} == FORMATS.keys() - {"plain"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BOUNDS, *QUANTO])
def test_products_and_gradients_are_near_the_unquantised_ones(name, dtype, record_property):
    make = quantiser(name, dtype)
    assert make is not None
    layer, w, g = make(weight()), weight(), activations(ROWS)
    x = activations().to(dtype).requires_grad_()
    out = layer(x)
    out.backward(g.to(dtype))
    assert out.dtype == dtype
    expected = activations() @ w.t()
    error = ((out.detach().float() - expected).norm() / expected.norm()).item()
    cosine = F.cosine_similarity(x.grad.float().flatten(), (g @ w).flatten(), dim=0).item()
    record_property("error", error)
    record_property("cosine", cosine)
    largest, least = {**BOUNDS, **QUANTO}[name]
    rounding = 0.006 if dtype == torch.bfloat16 else 0.0
    assert error <= largest + rounding and cosine >= least - rounding / 10


@pytest.mark.parametrize("name", BOUNDS)
def test_backward_is_the_adjoint_of_the_stored_weight(name):
    layer = FrozenLinear.from_weight(weight(), None, form=FORMATS[name])
    g = activations(ROWS).view(-1, ROWS)
    torch.testing.assert_close(layer.multiply_transposed(g), g @ layer.unpacked(), rtol=1e-5, atol=1e-5)
    if name != "fp8-torchao":  # rounds the activations of forward too
        x = activations().view(-1, COLUMNS)
        torch.testing.assert_close(layer.multiply(x), x @ layer.unpacked().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(BOUNDS.keys() - {"fp8-torchao"}))
def test_a_bias_is_added(name):
    bias = torch.arange(ROWS).float()
    layer = FrozenLinear.from_weight(weight(), bias, form=FORMATS[name])
    without = FrozenLinear.from_weight(weight(), None, form=FORMATS[name])
    torch.testing.assert_close(layer(activations()), without(activations()) + bias)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_rows_of_one_value_are_kept(name, value):
    layer = FrozenLinear.from_weight(torch.full((ROWS, COLUMNS), value), None, form=FORMATS[name])
    torch.testing.assert_close(layer.unpacked(), torch.full((ROWS, COLUMNS), value), rtol=0.02, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "config"), [("int8-torchao", "Int8WeightOnly"), ("fp8wo-torchao", "Float8WeightOnly")]
)
@pytest.mark.filterwarnings("ignore")
def test_the_codes_are_torchaos(name, config):
    import torchao.quantization as torchao

    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
    model[0].weight.data = weight()
    torchao.quantize_(model, getattr(torchao, f"{config}Config")())
    theirs, ours = model[0].weight, FORMATS[name].pack(weight())
    assert torch.equal(theirs.scale.flatten(), ours["scale"])
    assert torch.equal(theirs.qdata.float(), ours["codes"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 3, 60])
def test_nf4_is_bitsandbytes(blocks, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(64 * blocks, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    w[0, :64] = 0
    codes, state = quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = FrozenLinear.from_weight(w, None, form=FORMATS["nf4-bnb"])
    assert torch.equal(layer.parts()["codes"], codes)
    assert torch.equal(layer.unpacked(dtype), dequantize_4bit(codes, state))


@pytest.mark.parametrize("name", ["int8-torchao", "fp8wo-torchao", "int4-torchao"])
def test_packing_in_pieces_is_packing_at_once(name):
    w = torch.randn(300, 4096, generator=torch.Generator().manual_seed(5))
    assert 1 < rows_per_piece(w) < len(w) and len(w) % rows_per_piece(w)
    form = FORMATS[name]
    for part, whole in form.pack_rows(w).items():
        assert torch.equal(form.pack(w)[part].view(torch.uint8), whole.view(torch.uint8))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_numbers_on_the_grid_are_kept(rows, groups, seed):
    """Packing what unpacking gave changes nothing."""
    for form in (Int8Format(), Int4Format()):
        w = torch.randn(rows, 16 * groups, generator=torch.Generator().manual_seed(seed))
        once = form.unpack(form.pack(w), (rows, 16 * groups), torch.float32)
        twice = form.unpack(form.pack(once), (rows, 16 * groups), torch.float32)
        torch.testing.assert_close(twice, once, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("columns", [2730, 48])
def test_rows_of_any_length_can_be_packed(name, columns):
    w = torch.randn(32, columns, generator=torch.Generator().manual_seed(4))
    layer = FrozenLinear.from_weight(w, None, form=FORMATS[name])
    assert layer.unpacked().shape == w.shape
    assert (layer.unpacked() - w).norm() <= 0.15 * w.norm()


@pytest.mark.parametrize("name", ["plain", "int8-torchao", "fp8wo-torchao", "int4-torchao", "nf4-bnb"])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_on_a_quantised_base_equals_lora_on_its_numbers(name, autocast):
    frozen = FrozenLinear.from_weight(weight(), None, form=FORMATS[name])
    plain = nn.Linear(COLUMNS, ROWS, bias=False).requires_grad_(False)
    plain.weight.data = frozen.unpacked()
    results = []
    for base in (frozen, plain):
        layer = LoraLinear(base)
        generator = torch.Generator().manual_seed(3)
        down, up = torch.randn(4, COLUMNS, generator=generator) / 16, torch.randn(ROWS, 4, generator=generator) / 16
        layer.add_adapter("a", down=down, up=up, scale=0.5)
        x = activations().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.backward(activations(ROWS).to(out.dtype))
        results.append((out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
    tolerance = {"rtol": 0.03, "atol": 0.03} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)


def test_autograd_keeps_the_layer_and_not_its_weight():
    """The parts may lie elsewhere between forward and backward: `before_use` brings them back."""
    layer = FrozenLinear.from_weight(weight(), None, form=FORMATS["int8-torchao"])
    away, uses = copy.deepcopy(layer.parts()), []

    def bring_back() -> None:
        uses.append(1)
        for part, tensor in away.items():
            layer._buffers[part] = tensor

    layer.before_use = bring_back
    x = activations().requires_grad_()
    out = layer(x)
    for part in layer.parts():
        layer._buffers[part] = torch.empty(0)
    out.sum().backward()
    assert len(uses) == 2 and x.grad is not None
