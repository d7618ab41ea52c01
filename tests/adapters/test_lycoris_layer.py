"""Our LyCORIS layers against lycoris-lora's, with the same weights; and LoKr on bases of every kind."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.algorithms import file_entries, initial_tensors, tensor_name
from simpletuner.adapters.layer import LoraLinear
from simpletuner.adapters.lycoris_layer import LycorisLinear
from simpletuner.catalog.lycoris import Update, butterfly_size, factorised, shapes
from simpletuner.quant.build import FORMATS
from simpletuner.quant.linear import FrozenLinear

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
lycoris = pytest.importorskip("lycoris")

OUT, IN = 48, 32
UPDATES = {
    "lokr": Update(algo="lokr", dim=10000, factor=4),
    "lokr-root": Update(algo="lokr", dim=10000, factor=-1),
    "lokr-full": Update(algo="lokr", dim=2, factor=4, full_matrix=True),
    "lokr-low": Update(algo="lokr", dim=2, alpha=3.0, factor=4),
    "lokr-both": Update(algo="lokr", dim=1, alpha=0.5, factor=4, decompose_both=True),
    "lokr-unbalanced": Update(algo="lokr", dim=10000, factor=4, unbalanced=True),
    "loha": Update(algo="loha", dim=3, alpha=2.0),
    "lora": Update(algo="lora", dim=3, alpha=2.0),
    "glora": Update(algo="glora", dim=3, alpha=2.0),
    "ia3": Update(algo="ia3"),
    "ia3-input": Update(algo="ia3", on_input=True),
    "diag-oft": Update(algo="diag-oft", dim=4),
    "diag-oft-rescaled": Update(algo="diag-oft", dim=4, constraint=0.001, rescaled=True),
    "boft": Update(algo="boft", dim=6),
    "boft-rescaled": Update(algo="boft", dim=6, constraint=0.001, rescaled=True),
    "full": Update(algo="full"),
}


def base_layer(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def trained_tensors(update: Update, size: float = 0.2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = initial_tensors(update, OUT, IN, generator)
    return {name: t + torch.randn(t.shape, generator=generator) * size for name, t in found.items()}


def library_module(update: Update, base: nn.Linear) -> nn.Module:
    from lycoris.wrapper import network_module_dict

    module = network_module_dict[update.algo](
        "lycoris_x",
        base,
        lora_dim=update.dim,
        alpha=update.alpha,
        factor=update.factor,
        full_matrix=update.full_matrix,
        decompose_both=update.decompose_both,
        unbalanced_factorization=update.unbalanced,
        constraint=update.constraint,
        rescaled=update.rescaled,
        train_on_input=update.on_input,
    )
    module.apply_to()
    return module


def library_tensor(module: nn.Module, name: str) -> Tensor:
    if name == "diff":
        return module.weight
    owner = getattr(module, name)
    return owner.weight if isinstance(owner, nn.Module) else owner


def run(call, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    out = call(x)
    loss = (out * torch.randn(out.shape, generator=generator)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [x, *tensors])]


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", UPDATES)
def test_outputs_and_gradients_are_the_librarys(name, strength):
    update = UPDATES[name]
    base, other = base_layer(), base_layer()
    tensors = trained_tensors(update)
    ours = LycorisLinear(base, update, {key: t.clone() for key, t in tensors.items()}, name="default")
    ours.strengths["default"] = strength
    theirs = library_module(update, other)
    theirs.multiplier = strength
    with torch.no_grad():
        for key, tensor in tensors.items():
            own = library_tensor(theirs, key)
            assert own.shape == tensor.shape
            own.copy_(tensor + (base.weight if key == "diff" else 0))
    x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = run(ours, x, [ours.tensors[key] for key in tensors])
    expected = run(other, x, [library_tensor(theirs, key) for key in tensors])
    assert not torch.allclose(results[0], base(x), atol=1e-3)
    for a, b in zip(results, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", UPDATES)
def test_it_starts_as_the_librarys_and_changes_nothing(name):
    update = UPDATES[name]
    theirs = library_module(update, base_layer())
    torch.manual_seed(4)
    if update.algo in ("lokr", "loha"):
        theirs = library_module(update, base_layer())
        torch.manual_seed(4)
        base = base_layer()
        torch.manual_seed(4)
        theirs = library_module(update, base)
    ours = initial_tensors(update, OUT, IN, torch.Generator().manual_seed(4))
    for key, tensor in ours.items():
        own = library_tensor(theirs, key).detach()
        if update.algo in ("lokr", "loha"):
            assert torch.equal(tensor, own), key
        elif key != "diff":
            assert tensor.std().item() == pytest.approx(own.std().item(), rel=0.3), key
    base = base_layer(bias=True)
    layer = LycorisLinear(base, update, ours, name="default")
    x = torch.randn(3, IN)
    assert torch.allclose(layer(x), base(x), atol=1e-5)
    layer.active = ()
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("name", [name for name in UPDATES if name != "full"])
def test_file_entries_are_the_librarys(name):
    update = UPDATES[name]
    theirs = library_module(update, base_layer()).state_dict()
    ours = file_entries(update, trained_tensors(update))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].shape == theirs[key].shape for key in ours)
    for key in ("alpha", "on_input"):
        assert key not in ours or ours[key].item() == pytest.approx(theirs[key].item())
    assert {tensor_name(entry) for entry in ours} - {"alpha", "on_input"} == shapes(update, OUT, IN).keys()


@pytest.mark.parametrize("length", [1, 7, 36, 127, 128, 250, 360, 512, 3840, 10240])
def test_factors_are_the_librarys(length):
    from lycoris.functional import factorization, power2factorization

    for factor in (-1, 1, 2, 3, 4, 8, 16, 30, 64, 10000):
        assert factorised(length, factor) == factorization(length, factor)
        theirs, count = power2factorization(length, factor)
        if count:
            assert butterfly_size(length, factor) == theirs
        else:
            with pytest.raises(ValueError, match="power of two"):
                butterfly_size(length, factor)


LOKRS = [name for name in UPDATES if name.startswith("lokr")]


@pytest.mark.parametrize("name", LOKRS)
@pytest.mark.parametrize("bias", [False, True])
def test_lokr_has_the_gradients_of_its_formula(name, bias):
    update = UPDATES[name]
    base = base_layer(torch.float64, bias=bias)
    tensors = {key: tensor.double() for key, tensor in trained_tensors(update).items()}
    layer = LycorisLinear(base, update, tensors, name="default")
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    keys = list(tensors)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = {f"trained.{key}": value for key, value in zip(keys, values, strict=True)}
        return torch.func.functional_call(layer, named, x)

    assert torch.autograd.gradcheck(call, (x, *layer.tensors.values()))


@pytest.mark.parametrize("form", ["int8-torchao", "nf4-bnb"])
@pytest.mark.parametrize("name", ["lokr", "lokr-low", "loha", "glora", "diag-oft"])
def test_on_a_quantised_base_it_is_that_of_the_dequantised_weight(name, form):
    if form == "nf4-bnb":
        pytest.importorskip("bitsandbytes")
    update, tensors = UPDATES[name], trained_tensors(UPDATES[name])
    frozen = FrozenLinear.from_weight(base_layer().weight, None, form=FORMATS[form])
    plain = base_layer()
    plain.weight = nn.Parameter(frozen.unpacked(), requires_grad=False)
    x = torch.randn(4, IN, requires_grad=True)
    results = []
    for base in (frozen, plain):
        layer = LycorisLinear(base, update, {key: t.clone() for key, t in tensors.items()}, name="default")
        results.append(run(layer, x, list(layer.tensors.values())))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lokr", "lokr-both", "loha"])
def test_around_another_adapter_it_adds_to_it(name):
    update = UPDATES[name]
    inner = LoraLinear(base_layer())
    inner.add_adapter("assistant", down=torch.randn(2, IN), up=torch.randn(OUT, 2), scale=1.0)
    inner.requires_grad_(False)
    tensors = trained_tensors(update)
    x = torch.randn(4, IN, requires_grad=True)
    outer = LycorisLinear(inner, update, tensors, name="default")
    alone = LycorisLinear(base_layer(), update, {k: t.clone() for k, t in tensors.items()}, name="default")
    both, one = run(outer, x, list(outer.tensors.values())), run(alone, x, list(alone.tensors.values()))
    assert torch.allclose(both[0] - inner(x), one[0] - base_layer()(x), atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(both[2:], one[2:], strict=True))


def test_a_known_output_gives_the_same_gradients():
    layer = LycorisLinear(base_layer(), UPDATES["lokr"], trained_tensors(UPDATES["lokr"]), name="default")
    x = torch.randn(4, IN, requires_grad=True)
    out = layer(x).detach()
    first = run(layer, x, list(layer.tensors.values()))
    again = run(lambda x: layer.forward_given(x, out), x, list(layer.tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("option", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_keeps_the_mean_or_the_rest_and_rests_in_evaluation(option):
    from dataclasses import replace

    update = replace(UPDATES["lokr"], **{option: 0.25})
    layer = LycorisLinear(base_layer(), update, trained_tensors(update), name="default")
    x = torch.randn(1, IN)
    layer.eval()
    added = layer(x) - layer.base_layer(x)
    layer.train()
    torch.manual_seed(0)
    dropped = torch.stack([layer(x) - layer.base_layer(x) for _ in range(2000)]).mean(dim=0)
    share = 1.0 if option == "dropout" else 0.75
    assert torch.allclose(dropped, share * added, atol=0.15 * added.abs().max().item())
    assert not torch.allclose(layer(x), layer(x)) or option == "module_dropout"


def test_under_autocast_the_products_are_in_half_precision_and_gradients_in_the_weights_dtype():
    layer = LycorisLinear(base_layer(), UPDATES["lokr"], trained_tensors(UPDATES["lokr"]), name="default")
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    assert torch.allclose(out.float(), layer(x), atol=0.1, rtol=0.05)
