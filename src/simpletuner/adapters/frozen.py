"""An adapter from a file, attached as it is: it acts and is not trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.files import MAGNITUDE, LoraFile, load_lora
from simpletuner.adapters.lora import LoraReport, LoraSettings, apply_lora, start_from_
from simpletuner.adapters.targets import linear_names
from simpletuner.problems import ModelError, Problem

_NUM_NAMED = 3


def load_fitting(model: nn.Module, file: Path, *, option: str) -> LoraFile:
    """Read a LoRA file for `model`, which may be on the meta device.

    Args:
        option: JSON pointer of the option that named the file, for problems.
    Raises:
        ModelError: the file is damaged, holds something else than LoRA, or is for a model with other layers.
    """
    adapter = load_lora(file, linear_names(model))
    layers = {name: model.get_submodule(name) for name in linear_names(model)}
    sizes = []
    for name in adapter.scales:
        down, up = adapter.tensors[f"{name}.lora_A.weight"], adapter.tensors[f"{name}.lora_B.weight"]
        layer = layers[name]
        found, expected = f"{up.shape[0]}x{down.shape[1]}", f"{layer.out_features}x{layer.in_features}"
        if found != expected:
            sizes.append(f"{name}: {found} / {expected}")
    if sizes:
        raise _other_sizes(file, option, sizes)
    return adapter


def attach_frozen(
    model: nn.Module, adapter: LoraFile, *, dtype: torch.dtype, adapter_name: str, option: str
) -> tuple[LoraSettings, LoraReport]:
    """Add a fitting adapter under `adapter_name`; it is the only active one then. Nothing of the model is trained."""
    # Modules may differ in rank and alpha: the largest rank holds them all, and `start_from_` keeps their scales.
    rank = max(t.shape[0] for key, t in adapter.tensors.items() if key.endswith(".lora_A.weight"))
    is_dora = any(key.endswith(MAGNITUDE) for key in adapter.tensors)
    settings = LoraSettings(rank=rank, alpha=rank, targets=tuple(adapter.scales), dora=is_dora)
    report = apply_lora(model, settings, dtype=dtype, adapter_name=adapter_name, option=option)
    start_from_(model, adapter, settings, adapter_name)
    model.requires_grad_(False)
    return settings, report


def _other_sizes(file: Path, option: str, sizes: list[str]) -> ModelError:
    shown = ", ".join(sizes[:_NUM_NAMED]) + (f" (+{len(sizes) - _NUM_NAMED})" if len(sizes) > _NUM_NAMED else "")
    return ModelError(Problem(code="E-ADAPTER-SIZES", params={"path": str(file), "told": shown}, path=option))
