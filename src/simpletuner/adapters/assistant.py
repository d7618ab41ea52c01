"""The assistant adapter of a distilled model: there while training, gone while sampling and in every saved file.

A model distilled to few steps loses that ability when it is trained on plain images. An assistant LoRA that already
holds this loss is active, frozen, during training, so that the trained adapter does not learn it; without the
assistant the trained adapter works on the distilled model as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.frozen import attach_frozen
from simpletuner.adapters.lora import ADAPTER_NAME, LoraReport, activate_, set_scale

ASSISTANT_NAME = "assistant"


def attach_assistant(model: nn.Module, file: Path, *, dtype: torch.dtype) -> LoraReport:
    """Add the assistant, frozen. Call it before `apply_lora` of the trained adapter, `activate_with_assistant_` after.

    Raises:
        ConfigError: the file adapts a module that the model lacks.
        ModelError: the file is damaged, holds something else than LoRA, or is for another model.
    """
    _, report = attach_frozen(model, file, dtype=dtype, adapter_name=ASSISTANT_NAME, option="/assistant_lora_path")
    return report


def activate_with_assistant_(model: nn.Module, *, strength: float) -> None:
    """Let the trained adapter and the assistant act together, the latter `strength` times."""
    activate_(model, (ASSISTANT_NAME, ADAPTER_NAME))
    set_scale(model, strength, ASSISTANT_NAME)
