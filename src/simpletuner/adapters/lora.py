"""LoRA on any model: peft owns the layers and the parameters' names, this file what surrounds them.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685):
W x becomes W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank] trained and W frozen.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from simpletuner.adapters.files import LoraFile
from simpletuner.adapters.forward import use_lean_forward_
from simpletuner.adapters.targets import linear_names, match_targets
from simpletuner.problems import Fix, ModelError, Problem

ADAPTER_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """One LoRA adapter.

    `targets` are module names: a full name, an ending ("to_q", "feed_forward.w1") or a pattern with `*`
    ("layers.*.attention.to_q"). The update is scaled by `alpha / rank`. `dropout` in [0, 1) zeroes a share of each
    adapter's input while training.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...]
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What `apply_lora` did. `modules` are the adapted modules' names in the model's order."""

    modules: tuple[str, ...]
    num_params: int

    @property
    def num_modules(self) -> int:
        return len(self.modules)


def apply_lora(
    model: nn.Module,
    settings: LoraSettings,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_name: str = ADAPTER_NAME,
    option: str = "/peft_lora_target_modules",
) -> LoraReport:
    """Freeze `model` and give each targeted linear layer a trainable low-rank pair of `dtype`, on its device.

    A starts Kaiming-uniform and B at zero, so the model's output does not change. The start depends on
    `settings.seed` and the module's name alone, whatever else is adapted; the global random state is left as it was.
    An adapter that is there already is frozen and no longer active: `activate_` both to use them together.

    Raises:
        ConfigError: a target matches no linear layer; `option` is the JSON pointer that the problem names.
    """
    assert not hasattr(nn.Module, adapter_name), "peft keeps adapters in a ModuleDict, which refuses such a name"
    names = match_targets(linear_names(model), settings.targets, path=option)
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # annotated int, but only ever divided by r
        lora_dropout=settings.dropout,
        target_modules=list(names),
    )
    # On the meta device no time and no random numbers go into weights that are about to be set.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
        inject_adapter_in_model(config, model, adapter_name=adapter_name, low_cpu_mem_usage=True)
    for name, layer in _lora_layers(model, adapter_name):
        _initialise_(layer, adapter_name, dtype=dtype, seed=settings.seed, name=name)
        use_lean_forward_(layer)
    _freeze_all_but_(model, adapter_name)
    num_params = sum(p.numel() for p in trainable_parameters(model))
    return LoraReport(modules=tuple(name for name, _ in _lora_layers(model, adapter_name)), num_params=num_params)


def activate_(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Let exactly these adapters act. What is trained stays as it is: peft's own call would train them all."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [name for name in adapter_names if name in module.lora_A]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_state(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Return the adapter's tensors themselves, not copies, in the model's order.

    Keys are "<module>.lora_A.weight" [rank, in] and "<module>.lora_B.weight" [out, rank].
    """
    state = {}
    for name, layer in _lora_layers(model, adapter_name):
        state[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name].weight.detach()
        state[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name].weight.detach()
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = ADAPTER_NAME) -> None:
    """Copy into the adapter what `adapter_state` returned, exactly.

    Raises:
        ModelError: modules or shapes differ. Nothing is changed then.
    """
    own = adapter_state(model, adapter_name)
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or foreign:
        params = {"missing": _some(missing), "foreign": _some(foreign)}
        raise ModelError(Problem(code="E-LORA-MODULES", params=params))
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ModelError(_shape_problem(key, expected=tensor, found=state[key]))
    for key, tensor in own.items():
        tensor.copy_(state[key])


@torch.no_grad()
def start_from_(model: nn.Module, file: LoraFile, settings: LoraSettings, adapter_name: str = ADAPTER_NAME) -> None:
    """Continue training from a LoRA file: the model then predicts what it predicts with that file.

    The file's alpha may be another one, its rank smaller, and it may cover a part of the adapted modules; what it does
    not have stays as `apply_lora` left it.

    Raises:
        ModelError: it has modules that are not adapted, a larger rank, or other sizes. Nothing is changed then.
    """
    own = adapter_state(model, adapter_name)
    foreign = file.tensors.keys() - own.keys()
    if foreign:
        raise ModelError(Problem(code="E-LORA-MODULES", params={"missing": "-", "foreign": _some(foreign)}))
    for key, tensor in file.tensors.items():
        is_down = key.endswith("lora_A.weight")
        rank, width = tensor.shape if is_down else reversed(tensor.shape)
        if rank > settings.rank:
            fix = Fix(key="lora_rank", value=rank)
            params = {"found": rank, "rank": settings.rank}
            raise ModelError(Problem(code="E-LORA-RANK", params=params, path="/lora_rank", fixes=(fix,)))
        if width != own[key].shape[1 if is_down else 0]:
            raise ModelError(_shape_problem(key, expected=own[key], found=tensor))
    for key, tensor in file.tensors.items():
        if key.endswith("lora_A.weight"):
            own[key][: tensor.shape[0]] = tensor
        else:
            scale = file.scales[key.removesuffix(".lora_B.weight")] / settings.scale
            own[key][:, : tensor.shape[1]] = tensor.float() * scale


@contextmanager
def disabled(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> Iterator[None]:
    """Within it the model predicts as without this adapter; other adapters stay as they are."""
    layers = [layer for _, layer in _lora_layers(model, adapter_name)]
    before = [layer.active_adapters for layer in layers]
    try:
        # peft's own switches also turn gradients on and off, for every adapter.
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = [name for name in active if name != adapter_name]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def set_scale(model: nn.Module, scale: float, adapter_name: str = ADAPTER_NAME) -> None:
    """Set the adapter's strength: 1 as trained, 0 off."""
    for _, layer in _lora_layers(model, adapter_name):
        layer.set_scale(adapter_name, scale)


def _lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name, module


def _initialise_(layer: LoraLayer, adapter_name: str, *, dtype: torch.dtype, seed: int, name: str) -> None:
    """Put real weights in the place of the meta ones. A is drawn on the CPU: the same on every device."""
    device = layer.get_base_layer().weight.device
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    weight = torch.empty(down.weight.shape)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    down.weight = nn.Parameter(weight.to(device, dtype))
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device, dtype=dtype))


def _freeze_all_but_(model: nn.Module, adapter_name: str) -> None:
    """peft makes every active adapter trainable when one is added; only this one is."""
    model.requires_grad_(False)
    for _, layer in _lora_layers(model, adapter_name):
        layer.lora_A[adapter_name].requires_grad_(True)
        layer.lora_B[adapter_name].requires_grad_(True)


def _shape_problem(key: str, *, expected: Tensor, found: Tensor) -> Problem:
    params = {"key": key, "expected": list(expected.shape), "found": list(found.shape)}
    return Problem(code="E-LORA-SHAPE", params=params)


def _some(keys: set[str], count: int = 3) -> str:
    shown: Sequence[str] = sorted(keys)[:count]
    rest = len(keys) - len(shown)
    return ", ".join(shown) + (f" (+{rest})" if rest else "") if keys else "-"
