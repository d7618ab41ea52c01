"""Keys of LoRA files: every layout in common use, in terms of the model's own module names.

| written by                      | a key looks like                                        |
|---------------------------------|---------------------------------------------------------|
| this program, ai-toolkit        | `diffusion_model.layers.0.attention.to_q.lora_A.weight` |
| diffusers                       | `transformer.layers.0.attention.to_q.lora_A.weight`     |
| peft                            | `base_model.model.layers.0.attention.to_q.lora_A.weight`|
| kohya, musubi-tuner, OneTrainer | `lora_unet_layers_0_attention_to_q.lora_down.weight`    |
| ComfyUI's own module names      | `diffusion_model.layers.0.attention.qkv.lora_A.weight`  |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Role(Enum):
    """What a tensor of a LoRA file is."""

    DOWN = "lora_A.weight"
    UP = "lora_B.weight"
    ALPHA = "alpha"
    MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One module's adapter: `down` [rank, in], `up` [out, rank], scaled by `alpha / rank`; None: by 1.

    `magnitude` [out]: of a DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float | None
    magnitude: Tensor | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]


_SUFFIXES = (
    (".lora_A.weight", Role.DOWN),
    (".lora_A.default.weight", Role.DOWN),
    (".lora_down.weight", Role.DOWN),
    (".lora.down.weight", Role.DOWN),
    (".lora_B.weight", Role.UP),
    (".lora_B.default.weight", Role.UP),
    (".lora_up.weight", Role.UP),
    (".lora.up.weight", Role.UP),
    (".alpha", Role.ALPHA),
    (".dora_scale", Role.MAGNITUDE),
    (".lora_magnitude_vector", Role.MAGNITUDE),
    (".lora_magnitude_vector.weight", Role.MAGNITUDE),
    (".lora_magnitude_vector.default.weight", Role.MAGNITUDE),
)
_DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")


def parse_pairs(tensors: Mapping[str, Tensor], module_names: Sequence[str]) -> tuple[dict[str, Pair], list[str]]:
    """Return (module name -> pair, keys that are no part of a LoRA pair).

    `module_names` are the model's linear layers; they tell which underscores of a flat key are dots, and whether fused
    projections have to be split. Without them, dotted keys are taken as they are.
    """
    found: dict[str, dict[Role, tuple[str, Tensor]]] = {}
    rest = []
    flat_names = {name.replace(".", "_"): name for name in module_names}
    for key, tensor in tensors.items():
        parsed = _parse_key(key, flat_names)
        if parsed is None:
            rest.append(key)
        else:
            module, role = parsed
            found.setdefault(module, {})[role] = (key, tensor)
    pairs = {}
    for module, parts in found.items():
        if Role.DOWN not in parts or Role.UP not in parts or not _is_pair(parts[Role.DOWN][1], parts[Role.UP][1]):
            rest.extend(key for key, _ in parts.values())
            continue
        alpha = parts[Role.ALPHA][1].item() if Role.ALPHA in parts else None
        pair = Pair(
            down=parts[Role.DOWN][1],
            up=parts[Role.UP][1],
            alpha=None if alpha is None else float(alpha),
            magnitude=parts[Role.MAGNITUDE][1].flatten() if Role.MAGNITUDE in parts else None,
        )
        pairs.update(_split(module, pair, frozenset(module_names)))
    return pairs, rest


def _parse_key(key: str, flat_names: Mapping[str, str]) -> tuple[str, Role] | None:
    for suffix, role in _SUFFIXES:
        if not key.endswith(suffix):
            continue
        module = key.removesuffix(suffix)
        for prefix in _DOTTED_PREFIXES:
            module = module.removeprefix(prefix)
        for prefix in _FLAT_PREFIXES:
            if module.startswith(prefix):
                flat = module.removeprefix(prefix)
                module = flat_names.get(flat) or _dotted_fused(flat, flat_names) or flat
        return module, role
    return None


def _dotted_fused(flat: str, flat_names: Mapping[str, str]) -> str | None:
    """ "layers_0_attention_qkv" -> "layers.0.attention.qkv", if the model has the parts it stands for."""
    for fused, part in (("_qkv", "_to_q"), ("_out", "_to_out_0")):
        if flat.endswith(fused):
            name = flat_names.get(flat.removesuffix(fused) + part)
            if name is not None:
                return name.removesuffix(part[1:].replace("_0", ".0")) + fused[1:]
    return None


def _is_pair(down: Tensor, up: Tensor) -> bool:
    return down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1]


def _split(module: str, pair: Pair, module_names: frozenset[str]) -> dict[str, Pair]:
    """Name the pair by the model's modules. A pair on fused q, k and v is three that share the down matrix; exact."""
    parent, _, last = module.rpartition(".")
    if module not in module_names and last == "qkv" and f"{parent}.to_q" in module_names:
        ups = torch.tensor_split(pair.up, 3, dim=0)
        lengths = (None,) * 3 if pair.magnitude is None else torch.tensor_split(pair.magnitude, 3)
        names = ("to_q", "to_k", "to_v")
        return {
            f"{parent}.{name}": Pair(down=pair.down, up=up, alpha=pair.alpha, magnitude=length)
            for name, up, length in zip(names, ups, lengths, strict=True)
        }
    if module not in module_names and last == "out" and f"{parent}.to_out.0" in module_names:
        return {f"{parent}.to_out.0": pair}
    return {module: pair}
