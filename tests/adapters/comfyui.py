"""What ComfyUI does with the keys of a Z-Image adapter, from the description of its formats, key by key and slowly.

Its model has fused projections, `layers.N.attention.qkv` and `.out`. It knows a weight by the native name after
`diffusion_model.`, by the flattened native name after `lora_unet_`, and by the name that diffusers uses after
`diffusion_model.`, `transformer.`, nothing, or underscored after `lycoris_`; q, k and v of diffusers are slices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SPLIT = ("attention.to_q", "attention.to_k", "attention.to_v")
_NATIVE = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_NUM_BLOCKS = 2


def known_names(dim: int) -> dict[str, tuple[str, slice]]:
    """Name in a file, without a suffix -> (native weight, the rows that it changes)."""
    known: dict[str, tuple[str, slice]] = {}
    everything = slice(None)
    for block in range(_NUM_BLOCKS):
        own: dict[str, tuple[str, slice]] = {}
        for native in _NATIVE:
            name = f"layers.{block}.{native}"
            known[f"diffusion_model.{name}"] = (name, everything)
            known["lora_unet_" + name.replace(".", "_")] = (name, everything)
            if native.startswith("feed_forward"):
                own[name] = (name, everything)
        for index, split in enumerate(_SPLIT):
            own[f"layers.{block}.{split}"] = (f"layers.{block}.attention.qkv", slice(index * dim, (index + 1) * dim))
        own[f"layers.{block}.attention.to_out.0"] = (f"layers.{block}.attention.out", everything)
        for name, where in own.items():
            for prefix in ("diffusion_model.", "transformer.", ""):
                known[prefix + name] = where
            known["lycoris_" + name.replace(".", "_")] = where
    return known


def comfyui_deltas(tensors: Mapping[str, Tensor], *, dim: int) -> tuple[dict[str, Tensor], set[str]]:
    """(native weight -> what is added to it, keys that were not used)."""
    deltas: dict[str, Tensor] = {}
    used: set[str] = set()

    def take(name: str, *suffixes: str) -> Tensor | None:
        for suffix in suffixes:
            if f"{name}.{suffix}" in tensors:
                used.add(f"{name}.{suffix}")
                return tensors[f"{name}.{suffix}"].float()
        return None

    for name, (native, rows) in known_names(dim).items():
        alpha = take(name, "alpha")
        down, up = take(name, "lora_A.weight", "lora_down.weight"), take(name, "lora_B.weight", "lora_up.weight")
        w1, w2 = take(name, "lokr_w1"), take(name, "lokr_w2")
        w1_a, w1_b, w2_a, w2_b = (take(name, f"lokr_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
        hada = [take(name, f"hada_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b")]
        rank = None
        if down is not None and up is not None:
            delta, rank = up @ down, down.shape[0]
        elif all(part is not None for part in hada):
            a, b, c, d = hada
            delta, rank = (a @ b) * (c @ d), b.shape[0]
        elif any(part is not None for part in (w1, w1_a)):
            if w1 is None:
                w1, rank = w1_a @ w1_b, w1_b.shape[0]
            if w2 is None:
                w2, rank = w2_a @ w2_b, w2_b.shape[0]
            delta = torch.kron(w1, w2)
        else:
            continue
        if alpha is not None and rank is not None:
            delta = delta * (alpha / rank)
        total = 3 * dim if native.endswith("qkv") else delta.shape[0]
        deltas.setdefault(native, torch.zeros(total, delta.shape[1]))[rows] += delta
    return deltas, set(tensors) - used
