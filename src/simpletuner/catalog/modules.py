"""Names of Z-Image's modules: what a LoRA adapts, what is never quantised, what ComfyUI calls otherwise. Stdlib only.

A pattern is a full name in which `*` stands for the number of a block: "layers.*.attention.to_q".
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

ATTENTION_LINEARS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
MLP_LINEARS = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
MODULATION = "adaLN_modulation.0"

_ATTENTION = tuple(f"layers.*.{name}" for name in ATTENTION_LINEARS)
_MLP = tuple(f"layers.*.{name}" for name in MLP_LINEARS)
_REFINERS = tuple(f"{s}.*.{n}" for s in ("noise_refiner", "context_refiner") for n in ATTENTION_LINEARS + MLP_LINEARS)
_MODULATIONS = (f"layers.*.{MODULATION}", f"noise_refiner.*.{MODULATION}")
_ENDS = (
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "cap_embedder.1",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
)

LORA_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": _ATTENTION,
        "attention+mlp": _ATTENTION + _MLP,
        "all": _ATTENTION + _MLP + _REFINERS + _MODULATIONS + _ENDS,
    }
)
"""Value of lora_targets -> patterns."""

NEVER_QUANTISED = _MODULATIONS + _ENDS
"""Small, and every token or every step passes through them."""

FUSED_QKV = "attention.qkv"
"""ComfyUI keeps these projections stacked along their rows, in one matrix."""

SPLIT_QKV = ("attention.to_q", "attention.to_k", "attention.to_v")

# (ComfyUI's, ours); a leading "^" stands for the start of the name.
_RENAMED = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
    ("^x_embedder.", "^all_x_embedder.2-1."),
    ("^final_layer.", "^all_final_layer.2-1."),
)


def from_native(name: str) -> str:
    """Our name of ComfyUI's module or tensor; a name that both share, or a fused one, stays as it is."""
    anchored = f"^{name}."
    for native, ours in _RENAMED:
        anchored = anchored.replace(native, ours)
    return anchored.removeprefix("^").removesuffix(".")


def to_native(name: str) -> str:
    """ComfyUI's name of our module or tensor; q, k and v are not fused."""
    anchored = f"^{name}."
    for native, ours in _RENAMED:
        anchored = anchored.replace(ours, native)
    return anchored.removeprefix("^").removesuffix(".")


def is_target(name: str, target: str) -> bool:
    """Whether `target` stands for the module: its full name, an ending at a dot ("to_q"), or a pattern."""
    return name == target or name.endswith("." + target) or ("*" in target and fnmatchcase(name, target))
