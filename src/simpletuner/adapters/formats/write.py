"""An `Adapter` to the tensors of a file, in any of the layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.adapters.formats.fuse import can_split, fuse, split
from simpletuner.adapters.formats.layouts import Layout
from simpletuner.adapters.formats.names import (
    LOHA_PARTS,
    LOKR_W1,
    LOKR_W1_PAIR,
    LOKR_W2,
    LOKR_W2_PAIR,
    Part,
    is_fused,
)
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights
from simpletuner.catalog.modules import to_native


def fits(name: str, weights: ModuleWeights, layout: Layout) -> bool:
    """Whether the layout has a place for this module as it is; else it must become LoRA first."""
    if weights.kind not in layout.kinds:
        return False
    return layout.fused or not is_fused(name) or can_split(weights) or layout.name == "comfyui"


def to_tensors(adapter: Adapter, layout: Layout) -> dict[str, Tensor]:
    """The file's tensors. Every module must fit; three that cannot be fused exactly stay apart."""
    arranged = fuse(split(adapter)) if layout.fused else split(adapter)
    contents: dict[str, Tensor] = {}
    for name, weights in arranged.modules.items():
        assert fits(name, weights, layout), (name, weights.kind, layout.name)
        stem = layout.prefix + _spelled(name, layout)
        for suffix, tensor in _parts(weights, layout).items():
            contents[f"{stem}.{suffix}"] = tensor.detach().cpu().contiguous()
    return contents


def _spelled(name: str, layout: Layout) -> str:
    own = to_native(name) if layout.fused else name
    return own.replace(".", "_") if layout.flat else own


def _parts(weights: ModuleWeights, layout: Layout) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    if isinstance(weights, LoraWeights):
        parts[layout.down] = weights.down
        parts[layout.up] = weights.up if layout.alpha_keys else folded(weights).up
    elif isinstance(weights, LohaWeights):
        parts = dict(zip((part.value for part in LOHA_PARTS), weights.tensors, strict=True))
    else:
        parts = _lokr_parts(weights)
    if weights.magnitude is not None:
        if layout.alpha_keys:
            parts[Part.MAGNITUDE.value] = weights.magnitude.reshape(-1, 1)
        else:
            parts["lora_magnitude_vector"] = weights.magnitude
    if layout.alpha_keys:
        alpha = weights.alpha if weights.alpha is not None else weights.rank
        if alpha is not None:
            parts["alpha"] = torch.tensor(float(alpha))
    return parts


def folded(weights: LoraWeights) -> LoraWeights:
    """The same with alpha = rank: the scale is in the up matrix."""
    if weights.scale == 1:
        return weights
    up = (weights.up.float() * weights.scale).to(weights.up.dtype)
    return LoraWeights(down=weights.down, up=up, alpha=float(weights.rank), magnitude=weights.magnitude)


def _lokr_parts(weights: LokrWeights) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for factors, whole, pair in ((weights.w1, LOKR_W1, LOKR_W1_PAIR), (weights.w2, LOKR_W2, LOKR_W2_PAIR)):
        names = whole if len(factors) == 1 else pair
        parts |= {part.value: factor for part, factor in zip(names, factors, strict=True)}
    return parts
