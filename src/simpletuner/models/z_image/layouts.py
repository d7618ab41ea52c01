"""Names of stored tensors: how the layouts in use call what our modules call otherwise.

Three layouts of the transformer: diffusers' (ours), ComfyUI's with fused q, k, v, and ComfyUI's all-in-one file with
a prefix and other models beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from simpletuner.models.streaming import KeyMap

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FUSED = ".attention.qkv."
_SPLIT = (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")
# (ComfyUI's, ours); a leading "^" stands for the start of the name.
_RENAMED = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
    ("^x_embedder.", "^all_x_embedder.2-1."),
    ("^final_layer.", "^all_final_layer.2-1."),
)
# ComfyUI's files keep a norm that the architecture's predecessor had and that nothing uses.
_UNUSED = frozenset({"norm_final.weight"})

_TEXT_LAYER = re.compile(r"layers\.(\d+)\.")


def transformer_keys(names: Collection[str]) -> KeyMap:
    """How to read a transformer file that holds tensors of these names, whichever of the three layouts it has."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")

    def targets(name: str) -> tuple[str, ...]:
        if not name.startswith(prefix) or name.removeprefix(prefix) in _UNUSED:
            return ()
        ours = _rename(name.removeprefix(prefix), to_ours=True)
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
            fused[_rename(name, to_ours=False)] = tensor
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


def _rename(name: str, *, to_ours: bool) -> str:
    anchored = f"^{name}"
    for comfy, ours in _RENAMED:
        anchored = anchored.replace(comfy, ours) if to_ours else anchored.replace(ours, comfy)
    return anchored.removeprefix("^")
