"""An adapter from a file, attached as it is: it acts and is not trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.files import load_lora
from simpletuner.adapters.lora import LoraReport, LoraSettings, apply_lora, start_from_
from simpletuner.adapters.targets import linear_names


def attach_frozen(
    model: nn.Module, file: Path, *, dtype: torch.dtype, adapter_name: str, option: str
) -> tuple[LoraSettings, LoraReport]:
    """Add the adapter of a file under `adapter_name`; it is the only active one then. Nothing of the model is trained.

    Args:
        option: JSON pointer of the option that named the file, for problems.
    Raises:
        ConfigError: the file adapts a module that the model lacks.
        ModelError: the file is damaged, holds something else than LoRA, or is for another model.
    """
    adapter = load_lora(file, linear_names(model))
    # Modules may differ in rank and alpha: the largest rank holds them all, and `start_from_` keeps their scales.
    rank = max(t.shape[0] for key, t in adapter.tensors.items() if key.endswith(".lora_A.weight"))
    settings = LoraSettings(rank=rank, alpha=rank, targets=tuple(adapter.scales))
    report = apply_lora(model, settings, dtype=dtype, adapter_name=adapter_name, option=option)
    start_from_(model, adapter, settings, adapter_name)
    model.requires_grad_(False)
    return settings, report
