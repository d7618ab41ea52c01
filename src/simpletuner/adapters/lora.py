"""LoRA on any model: attach it, take its weights, put them back, switch it off.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685):
W x becomes W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank] trained and W frozen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.adapters.files import LoraFile
from simpletuner.adapters.layer import AdaptedLinear, LoraLinear, base_weight
from simpletuner.adapters.targets import linear_names, match_targets
from simpletuner.problems import Fix, ModelError, Problem

ADAPTER_NAME = "default"
WEIGHT_STARTS = ("pissa", "olora")
"""Ways to start an adapter from the weight itself."""

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """One LoRA adapter.

    `targets` are module names: a full name, an ending ("to_q", "feed_forward.w1") or a pattern with `*`
    ("layers.*.attention.to_q"). The update is scaled by `alpha / rank`. `dropout` in [0, 1) zeroes a share of each
    adapter's input while training. `start` says how A and B begin:

    - default: A Kaiming-uniform, B zero;
    - gaussian: A normal with deviation 1 / rank, B zero;
    - pissa: the weight's largest singular values (Meng et al. 2024, https://arxiv.org/abs/2404.02948);
    - olora: the first columns of its QR decomposition (Buyukakyuz 2024, https://arxiv.org/abs/2406.01775).

    The last two take what they begin with away from the weight, so that the output does not change. Here it is
    subtracted beside the weight, which may be quantised then; see `layer.LoraLinear.starts`. `dora`: train a length for
    each row of W + B A as well.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...]
    seed: int = 0
    start: str = "default"
    dora: bool = False

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

    The model's output does not change. The start depends on `settings.seed`, the module's name and weight alone,
    whatever else is adapted; the global random state is left as it was.
    An adapter that is there already is frozen and no longer active: `activate_` both to use them together.

    Raises:
        ConfigError: a target matches no linear layer; `option` is the JSON pointer that the problem names.
    """
    names = match_targets(linear_names(model), settings.targets, path=option)
    model.requires_grad_(False)
    num_params = 0
    for name in names:
        layer = _with_adapters(model, name)
        down, up = _initial_pair(layer, name, settings, dtype)
        layer.add_adapter(adapter_name, down=down, up=up, scale=settings.scale, dropout=settings.dropout)
        num_params += down.numel() + up.numel()
        if settings.start in WEIGHT_STARTS:
            layer.subtract_start(adapter_name)
        if settings.dora:
            layer.add_magnitude(adapter_name)
            num_params += layer.out_features
    activate_(model, (adapter_name,))
    return LoraReport(modules=names, num_params=num_params)


def activate_(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Let exactly these adapters act, where they are. What is trained stays as it is."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.active = tuple(name for name in adapter_names if name in module.scales)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_state(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Return the adapter's tensors themselves, not copies, in the model's order; of what a start is subtracted from,
    one adapter of twice the rank that does both.

    Keys are "<module>.lora_A.weight" [rank, in], "<module>.lora_B.weight" [out, rank], and of a DoRA
    "<module>.lora_magnitude_vector" [out].
    """
    state = {}
    for name, layer in _lora_layers(model, adapter_name):
        down, up = (part.detach() for part in layer.pair(adapter_name))
        if adapter_name in layer.starts:
            first_down, first_up = layer.start(adapter_name)
            down, up = torch.cat((down, first_down)), torch.cat((up, -first_up), dim=1)
        state[f"{name}.lora_A.weight"] = down
        state[f"{name}.lora_B.weight"] = up
        if adapter_name in layer.lora_magnitude_vector:
            state[f"{name}.{MAGNITUDE}"] = layer.magnitude(adapter_name).detach()
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
    for name, layer in _lora_layers(model, adapter_name):
        down, up = layer.pair(adapter_name)
        wide_down, wide_up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        down.copy_(wide_down[: len(down)])
        up.copy_(wide_up[:, : len(down)])
        if adapter_name in layer.starts:
            first_down, first_up = layer.start(adapter_name)
            first_down.copy_(wide_down[len(down) :])
            first_up.copy_(-wide_up[:, len(down) :])
        if adapter_name in layer.lora_magnitude_vector:
            layer.magnitude(adapter_name).copy_(state[f"{name}.{MAGNITUDE}"])


@torch.no_grad()
def start_from_(
    model: nn.Module,
    file: LoraFile,
    settings: LoraSettings,
    adapter_name: str = ADAPTER_NAME,
    *,
    path: str | None = None,
) -> None:
    """Continue training from a LoRA file: the model then predicts what it predicts with that file.

    The file's alpha may be another one, its rank smaller, and it may cover a part of the adapted modules; what it does
    not have stays as `apply_lora` left it. A DoRA may start from a LoRA.

    Raises:
        ModelError: it has modules that are not adapted, a larger rank, or other sizes. Nothing is changed then; `path`
            is the option to name.
    """
    own = adapter_state(model, adapter_name)
    layers = dict(_lora_layers(model, adapter_name))
    assert not any(layer.starts for layer in layers.values()), "a start of its own and one from a file"
    if not settings.dora and any(key.endswith(MAGNITUDE) for key in file.tensors):
        fixes = (Fix(key="use_dora", value=True),)
        raise ModelError(Problem(code="E-LORA-DORA", path="/use_dora", fixes=fixes))
    foreign = file.tensors.keys() - own.keys()
    if foreign:
        told = {"missing": "-", "foreign": _some(foreign)}
        raise ModelError(Problem(code="E-LORA-MODULES", params=told, path=path))
    for key, tensor in file.tensors.items():
        if key.endswith(MAGNITUDE):
            if tensor.shape != own[key].shape:
                raise ModelError(_shape_problem(key, expected=own[key], found=tensor))
            continue
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
        elif key.endswith("lora_B.weight"):
            scale = file.scales[key.removesuffix(".lora_B.weight")] / settings.scale
            own[key][:, : tensor.shape[1]] = tensor.float() * scale
    for name, layer in layers.items() if settings.dora else ():
        length = file.tensors.get(f"{name}.{MAGNITUDE}")
        layer.set_magnitude_(adapter_name, length)


@contextmanager
def disabled(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> Iterator[None]:
    """Within it the model predicts as without this adapter; other adapters stay as they are."""
    layers = list(_adapted_layers(model, adapter_name))
    before = [layer.active for layer in layers]
    for layer, active in zip(layers, before, strict=True):
        layer.active = tuple(name for name in active if name != adapter_name)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def set_scale(model: nn.Module, scale: float, adapter_name: str = ADAPTER_NAME) -> None:
    """Set the adapter's strength: 1 as trained, 0 off."""
    for layer in _adapted_layers(model, adapter_name):
        layer.strengths[adapter_name] = scale


def _adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[AdaptedLinear]:
    """Those that have the adapter, of whatever kind."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and adapter_name in module.scales:
            yield module


def move_adapter_(model: nn.Module, device: torch.device | str, adapter_name: str) -> None:
    """Put the adapter's weights on `device`, wherever the model is. Elsewhere than where the model computes it must not
    act: its strength has to be 0."""
    for _, layer in _lora_layers(model, adapter_name):
        layer.lora_A[adapter_name].to(device)
        layer.lora_B[adapter_name].to(device)


def _lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and adapter_name in module.scales:
            yield name.replace(".base_layer", ""), module  # it may lie inside another adapter


def _with_adapters(model: nn.Module, name: str) -> LoraLinear:
    """The layer `name` of `model`, put around the linear layer there if it is not yet."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = parent.get_submodule(last)
    if not isinstance(module, LoraLinear):
        assert isinstance(module, (nn.Linear, AdaptedLinear))
        module = LoraLinear(module)
        setattr(parent, last, module)
    return module


def _initial_pair(layer: LoraLinear, name: str, settings: LoraSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as `settings.start` says. What is random is drawn on the CPU: the same on every device."""
    device = layer.device
    if settings.start in WEIGHT_STARTS:
        down, up = _pair_of_weight(base_weight(layer), settings)
        return down.to(device, dtype).contiguous(), up.to(device, dtype).contiguous()
    digest = hashlib.blake2b(f"{settings.seed}/{name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    down = torch.empty(settings.rank, layer.in_features)
    if settings.start == "gaussian":
        nn.init.normal_(down, std=1 / settings.rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down.to(device, dtype), torch.zeros(layer.out_features, settings.rank, device=device, dtype=dtype)


def _pair_of_weight(weight_OI: Tensor, settings: LoraSettings) -> tuple[Tensor, Tensor]:
    rank = min(settings.rank, *weight_OI.shape)
    if settings.start == "olora":
        columns, rest = torch.linalg.qr(weight_OI)
        down, up = rest[:rank], columns[:, :rank]
    else:
        left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
        roots = (values[:rank] / settings.scale).sqrt()
        down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    missing = settings.rank - rank
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))


def _shape_problem(key: str, *, expected: Tensor, found: Tensor) -> Problem:
    params = {"key": key, "expected": list(expected.shape), "found": list(found.shape)}
    return Problem(code="E-LORA-SHAPE", params=params)


def _some(keys: set[str], count: int = 3) -> str:
    shown: Sequence[str] = sorted(keys)[:count]
    rest = len(keys) - len(shown)
    return ", ".join(shown) + (f" (+{rest})" if rest else "") if keys else "-"
