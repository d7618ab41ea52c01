"""LyCORIS adapters on a model: attach them, take their weights, put them back, save and read them.

`lora.activate_`, `lora.disabled` and `lora.set_scale` act on them as on LoRA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.algorithms import file_entries, initial_tensors, scale_of, tensor_name, update_of, weight_size
from simpletuner.adapters.files import read_safetensors, write_safetensors
from simpletuner.adapters.layer import base_weight
from simpletuner.adapters.lora import ADAPTER_NAME, LoraReport, activate_
from simpletuner.adapters.lycoris_layer import LycorisLinear
from simpletuner.adapters.targets import linear_names
from simpletuner.catalog.lycoris import CLASSES, LycorisSettings, Update, chosen_updates, unmatched
from simpletuner.problems import ConfigError, ModelError, Problem

LYCORIS_CONFIG_NAME = "lycoris_config.json"

_PREFIXES = ("diffusion_model.", "transformer.")
_FLAT_PREFIX = "lycoris_"
_ENTRIES = (
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "lora_up.weight", "lora_down.weight", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "weight",
    "on_input", "oft_blocks", "rescale", "diff", "alpha",
)  # fmt: skip
_OF_LORA = ("lora_up.weight", "lora_down.weight", "weight", "alpha")
_SETTINGS = ("alpha", "on_input")  # no trained tensors


@dataclass(frozen=True, kw_only=True)
class LycorisFile:
    """A LyCORIS file in the model's own names: module -> name of the tensor -> tensor, as stored."""

    modules: Mapping[str, Mapping[str, Tensor]]


def apply_lycoris(
    model: nn.Module,
    settings: LycorisSettings,
    *,
    seed: int,
    first_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoraReport:
    """Freeze `model` and give each chosen linear layer a trainable update of `dtype`, on its device.

    The model's output does not change, unless `first_norm` is given: a LoKr's second part then starts at random, so
    that the update's Frobenius norm is that share of the weight's. The start depends on `seed` and the module's name
    alone; the global random state is left as it was. Adapters that are there already are frozen, and no longer active.

    Raises:
        ConfigError: a class or name of the preset stands for no layer, or an algorithm does not fit a layer's size.
    """
    names = linear_names(model)
    missing = unmatched(settings, names)
    updates = chosen_updates(settings, names)
    if missing or not updates:
        raise ConfigError(no_layer(missing))
    model.requires_grad_(False)
    num_params = 0
    for name, update in updates.items():
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = _adapted(parent.get_submodule(last), name, update, seed=seed, first_norm=first_norm, dtype=dtype)
        setattr(parent, last, layer)
        num_params += sum(tensor.numel() for tensor in layer.tensors.values())
    activate_(model, (ADAPTER_NAME,))
    set_multiplier_(model, settings.multiplier)
    return LoraReport(modules=tuple(updates), num_params=num_params)


def set_multiplier_(model: nn.Module, multiplier: float) -> None:
    """Let the update count that many times."""
    for _, layer in lycoris_layers(model):
        layer.strengths[ADAPTER_NAME] = multiplier


def lycoris_layers(model: nn.Module) -> Iterator[tuple[str, LycorisLinear]]:
    """The adapted layers under their own names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LycorisLinear):
            yield name.replace(".base_layer", ""), module  # it may lie inside another adapter


def lycoris_state(model: nn.Module) -> dict[str, Tensor]:
    """ "<module>.<tensor>" -> the trained tensor itself, not a copy."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, layer in lycoris_layers(model)
        for key, tensor in layer.tensors.items()
    }


@torch.no_grad()
def load_lycoris_(model: nn.Module, file: LycorisFile, *, path: str = "") -> None:
    """Let the adapter be what the file holds, exactly.

    Raises:
        ModelError: modules, tensors, sizes or scales differ. Nothing is changed then; `path` is the option to name.
    """
    layers = dict(lycoris_layers(model))
    own = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.tensors.items()}
    theirs = {
        f"{name}.{key}": tensor
        for name, entries in file.modules.items()
        for key, tensor in entries.items()
        if key not in _SETTINGS
    }
    missing, foreign = own.keys() - theirs.keys(), theirs.keys() - own.keys()
    if missing or foreign:
        params = {"missing": _some(missing), "foreign": _some(foreign)}
        raise ModelError(Problem(code="E-LYCORIS-MODULES", params=params, path=path or None))
    for key, tensor in own.items():
        if tensor.shape != theirs[key].shape:
            sizes = {"key": key, "expected": list(tensor.shape), "found": list(theirs[key].shape)}
            raise ModelError(Problem(code="E-LYCORIS-SHAPE", params=sizes, path=path or None))
    for name, layer in layers.items():
        _check_scale(name, layer, file.modules[name], path)
    for key, tensor in own.items():
        tensor.copy_(theirs[key])


def save_lycoris(path: Path, model: nn.Module, *, config: str, metadata: Mapping[str, str]) -> None:
    """Write the adapter, and beside it the settings that it was trained with, as JSON text.

    Names are `diffusion_model.<module>.<tensor>`, which ComfyUI reads, and for LoKr diffusers.

    Raises:
        FileSystemError: the files cannot be written.
    """
    contents = {
        f"{_PREFIXES[0]}{name}.{key}": tensor.detach().cpu().contiguous()
        for name, layer in lycoris_layers(model)
        for key, tensor in file_entries(layer.update, layer.tensors).items()
    }
    write_safetensors(path, contents, metadata)
    (path.parent / LYCORIS_CONFIG_NAME).write_text(config + "\n", encoding="utf-8")


def load_lycoris(path: Path, module_names: tuple[str, ...]) -> LycorisFile:
    """Read a LyCORIS file with names of ours or of the library (`lycoris_layers_0_attention_to_q.lokr_w1`).

    Raises:
        ModelError: the file is damaged, or holds something else.
        FileSystemError: the file is missing or cannot be read.
    """
    tensors, _ = read_safetensors(path)
    flat = {name.replace(".", "_"): name for name in module_names}
    modules: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in tensors.items():
        entry = next((e for e in sorted(_ENTRIES, key=len, reverse=True) if key.endswith("." + e)), None)
        if entry is None:
            rest.append(key)
            continue
        module = key.removesuffix("." + entry)
        for prefix in _PREFIXES:
            module = module.removeprefix(prefix)
        if module.startswith(_FLAT_PREFIX):
            module = flat.get(module.removeprefix(_FLAT_PREFIX), module)
        modules.setdefault(module, {})[tensor_name(entry)] = tensor
    rest += [f"{module}.weight" for module, found in modules.items() if "weight" in found and "on_input" not in found]
    if rest or not modules:
        params = {"path": str(path), "keys": ", ".join(rest[:3]) or "-"}
        raise ModelError(Problem(code="E-LYCORIS-KIND", params=params))
    return LycorisFile(modules=modules)


def is_lycoris(path: Path) -> bool:
    """Whether the file holds a LyCORIS adapter other than a LoRA.

    Raises:
        ModelError: the file is damaged.
        FileSystemError: the file is missing or cannot be read.
    """
    tensors, _ = read_safetensors(path)
    return any(key.endswith(f".{entry}") for key in tensors for entry in _ENTRIES if entry not in _OF_LORA)


def attach_lycoris(
    model: nn.Module, file: LycorisFile, *, dtype: torch.dtype, adapter_name: str, path: str
) -> tuple[str, ...]:
    """Add the file's adapter, frozen and active beside what is there; return the modules' names.

    Raises:
        ModelError: it is for other layers, or incomplete; `path` is the option to name.
    """
    names = linear_names(model)
    foreign = file.modules.keys() - set(names)
    if foreign:
        params = {"missing": "-", "foreign": _some(foreign)}
        raise ModelError(Problem(code="E-LYCORIS-MODULES", params=params, path=path))
    for name, entries in file.modules.items():
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer, update = parent.get_submodule(last), update_of(entries)
        if update is None:
            params = {"missing": name, "foreign": "-"}
            raise ModelError(Problem(code="E-LYCORIS-MODULES", params=params, path=path))
        device = LycorisLinear(layer, update, {}, name=adapter_name).device
        tensors = {key: entry.to(device, dtype) for key, entry in entries.items() if key not in _SETTINGS}
        adapted = LycorisLinear(layer, update, tensors, name=adapter_name)
        _check_sizes(name, adapted, path)
        setattr(parent, last, adapted.requires_grad_(False))
    return tuple(file.modules)


@torch.no_grad()
def set_lycoris_(model: nn.Module, file: LycorisFile, adapter_name: str) -> None:
    """Give the adapter the values of another file of the same run."""
    for name, layer in lycoris_layers(model):
        if adapter_name in layer.scales:
            for key, tensor in layer.tensors.items():
                tensor.copy_(file.modules[name][key])


def no_layer(missing: tuple[str, ...]) -> Problem:
    """The problem of a preset that names nothing."""
    params = {"names": ", ".join(missing) or "-", "classes": ", ".join(CLASSES)}
    return Problem(code="E-LYCORIS-TARGET", params=params, path="/lycoris_config")


def _adapted(
    module: nn.Module, name: str, update: Update, *, seed: int, first_norm: float | None, dtype: torch.dtype
) -> LycorisLinear:
    layer = LycorisLinear(module, update, {}, name=ADAPTER_NAME)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    try:
        tensors = initial_tensors(update, layer.out_features, layer.in_features, generator)
    except ValueError as error:
        params = {"module": name, "algo": update.algo, "reason": str(error)}
        raise ConfigError(Problem(code="E-LYCORIS-SIZE", params=params, path="/lycoris_config")) from error
    if first_norm is not None and update.algo == "lokr":
        _randomise_(tensors, update, first_norm * base_weight(module).norm().item(), generator)
    placed = {key: tensor.to(layer.device, dtype) for key, tensor in tensors.items()}
    return LycorisLinear(module, update, placed, name=ADAPTER_NAME)


def _randomise_(tensors: dict[str, Tensor], update: Update, norm: float, generator: torch.Generator) -> None:
    """Draw the part that starts at zero so that the update has this Frobenius norm."""
    zero = "lokr_w2" if "lokr_w2" in tensors else "lokr_w2_b"
    tensors[zero].normal_(generator=generator)
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    second = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    tensors[zero] *= norm / (first.norm() * second.norm() * scale_of(update, tensors))


def _check_sizes(name: str, layer: LycorisLinear, path: str) -> None:
    """Raises ModelError if the update is not whole, or not one of a weight of this size."""
    expected = [layer.out_features, layer.in_features]
    try:
        found = weight_size(layer.update, layer.tensors)
    except KeyError as error:
        params: dict[str, object] = {"missing": f"{name}.{error.args[0]}", "foreign": "-"}
        raise ModelError(Problem(code="E-LYCORIS-MODULES", params=params, path=path)) from error
    if any(size is not None and size != wanted for size, wanted in zip(found, expected, strict=True)):
        params = {"key": name, "found": list(found), "expected": expected}
        raise ModelError(Problem(code="E-LYCORIS-SHAPE", params=params, path=path))


def _check_scale(name: str, layer: LycorisLinear, entries: Mapping[str, Tensor], path: str) -> None:
    """The file's alpha is ours: a file of another strength would start somewhere else without a word."""
    ours = file_entries(layer.update, layer.tensors)
    whole = layer.update.algo == "lokr" and {"lokr_w1", "lokr_w2"} <= entries.keys()
    for key in () if whole else _SETTINGS:
        if key in entries and key in ours and not torch.isclose(entries[key].float(), ours[key].float(), rtol=1e-3):
            params = {"key": f"{name}.{key}", "found": f"{entries[key].item():g}", "expected": f"{ours[key].item():g}"}
            raise ModelError(Problem(code="E-LYCORIS-SCALE", params=params, path=path or None))


def _some(keys: set[str], count: int = 3) -> str:
    shown = sorted(keys)[:count]
    rest = len(keys) - len(shown)
    return ", ".join(shown) + (f" (+{rest})" if rest else "") if keys else "-"
