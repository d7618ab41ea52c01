"""The assistant adapter of a distilled model: there while training, gone while sampling and in every saved file.

A model distilled to few steps loses that ability when it is trained on plain images. An assistant LoRA that already
holds this loss is active, frozen, during training, so that the trained adapter does not learn it; without the
assistant the trained adapter works on the distilled model as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.files import load_lora
from simpletuner.adapters.lora import (
    ADAPTER_NAME,
    LoraReport,
    LoraSettings,
    activate_,
    apply_lora,
    set_scale,
    start_from_,
)
from simpletuner.adapters.targets import linear_names

ASSISTANT_NAME = "assistant"


def attach_assistant(model: nn.Module, file: Path, *, dtype: torch.dtype) -> LoraReport:
    """Add the assistant, frozen. Call it before `apply_lora` of the trained adapter, `activate_with_assistant_` after.

    Raises:
        ModelError: the file is damaged, holds something else than LoRA, or is for another model.
    """
    assistant = load_lora(file, linear_names(model))
    # Modules may differ in rank and alpha: the largest rank holds them all, and `start_from_` keeps their scales.
    rank = max(t.shape[0] for key, t in assistant.tensors.items() if key.endswith(".lora_A.weight"))
    settings = LoraSettings(rank=rank, alpha=rank, targets=tuple(assistant.scales))
    report = apply_lora(model, settings, dtype=dtype, adapter_name=ASSISTANT_NAME, option="/assistant_lora_path")
    start_from_(model, assistant, settings, ASSISTANT_NAME)
    model.requires_grad_(False)
    return report


def activate_with_assistant_(model: nn.Module, *, strength: float) -> None:
    """Let the trained adapter and the assistant act together, the latter `strength` times."""
    activate_(model, (ASSISTANT_NAME, ADAPTER_NAME))
    set_scale(model, strength, ASSISTANT_NAME)
