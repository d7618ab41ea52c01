"""Names of stored tensors: how the layouts in use call what our modules call otherwise.

Three layouts of the transformer: diffusers' (ours), ComfyUI's with fused q, k, v, and ComfyUI's all-in-one file with
a prefix and other models beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from simpletuner.catalog.modules import FUSED_QKV, SPLIT_QKV, from_native, to_native
from simpletuner.models.streaming import KeyMap

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FUSED = f".{FUSED_QKV}."
_SPLIT = tuple(f".{name}." for name in SPLIT_QKV)
# ComfyUI's files keep a norm that the architecture's predecessor had and that nothing uses.
_UNUSED = frozenset({"norm_final.weight"})

_TEXT_LAYER = re.compile(r"layers\.(\d+)\.")


def transformer_keys(names: Collection[str]) -> KeyMap:
    """How to read a transformer file that holds tensors of these names, whichever of the three layouts it has."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")

    def targets(name: str) -> tuple[str, ...]:
        if not name.startswith(prefix) or name.removeprefix(prefix) in _UNUSED:
            return ()
        ours = from_native(name.removeprefix(prefix))
        return tuple(ours.replace(_FUSED, split) for split in _SPLIT) if _FUSED in ours else (ours,)

    return targets


def to_comfy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our transformer's tensors under ComfyUI's names, q, k and v stacked into one."""
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _SPLIT[0] in name:
            parts = [tensors[name.replace(_SPLIT[0], split)] for split in _SPLIT]
            fused[name.replace(_SPLIT[0], _FUSED)] = torch.cat(parts)
        elif not any(split in name for split in _SPLIT):
            fused[to_native(name)] = tensor
    return fused


def needs_text_tensor(name: str, num_layers: int) -> bool:
    """Whether a stored text-encoder tensor is used: not the last layer, the final norm or the language-model head."""
    return bool(text_encoder_keys(num_layers)(name))


def text_encoder_keys(num_layers: int) -> KeyMap:
    """How to read a Qwen3 file of `num_layers` layers, saved with or without its head, into all layers but the last."""

    def targets(name: str) -> tuple[str, ...]:
        ours = name.removeprefix("model.")
        layer = _TEXT_LAYER.match(ours)
        is_last = layer is not None and int(layer[1]) == num_layers - 1
        return () if is_last or ours in ("norm.weight", "lm_head.weight") else (ours,)

    return targets
