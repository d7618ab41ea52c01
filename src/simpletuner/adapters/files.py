"""LoRA files: written so that diffusers and ComfyUI both load them; read in every layout in common use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What a LoRA file says about itself, stored in its metadata. Empty strings are left out."""

    rank: int
    alpha: float
    base_model: str = ""
    architecture: str = ""
    targets: tuple[str, ...] = ()
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    comment: str = ""
    config_hash: str = ""
    global_step: int = 0


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file in our own names: what `adapter_state` returns, with the alpha its factors are meant for."""

    tensors: Mapping[str, Tensor]
    info: LoraInfo


def save_lora(path: Path, tensors: Mapping[str, Tensor], info: LoraInfo, *, layout: str = "diffusers") -> None:
    """Write a LoRA file, completely or not at all. `layout` is "diffusers" or "comfyui"; both load in both."""
    raise NotImplementedError


def load_lora(path: Path) -> LoraFile:
    """Read a LoRA file: ours, diffusers, ai-toolkit or ComfyUI prefixes, kohya's names with alpha."""
    raise NotImplementedError
