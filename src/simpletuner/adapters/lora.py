"""LoRA on any model: peft owns the layers and the parameter names, this file the settings around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ADAPTER_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """One LoRA adapter.

    `targets` are module names: a full name, an ending ("to_q", "feed_forward.w1") or a pattern with `*`
    ("layers.*.attention.to_q"). The update is scaled by `alpha / rank`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What `apply_lora` did. `modules` are the adapted modules' names in the model's order."""

    modules: tuple[str, ...]
    num_params: int

    @property
    def num_modules(self) -> int:
        return len(self.modules)


def apply_lora(
    model: nn.Module, settings: LoraSettings, *, dtype: torch.dtype = torch.float32, adapter_name: str = ADAPTER_NAME
) -> LoraReport:
    """Freeze `model` and give each targeted linear layer a trainable low-rank pair of `dtype`, on its device.

    A starts Kaiming-uniform from `settings.seed` alone and B at zero, so the model's output does not change.
    Raises `ConfigError` for a target that matches no linear layer.
    """
    raise NotImplementedError


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_state(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Return copies-free references "<module>.lora_A.weight" [rank, in] and "<module>.lora_B.weight" [out, rank]."""
    raise NotImplementedError


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = ADAPTER_NAME) -> None:
    """Copy what `adapter_state` returned into the model's adapter, exactly. Raises `ModelError` if names or shapes differ."""
    raise NotImplementedError


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model predicts as without any adapter."""
    raise NotImplementedError
    yield


def set_scale(model: nn.Module, scale: float, adapter_name: str = ADAPTER_NAME) -> None:
    """Set the adapter's strength: 1 as trained, 0 off."""
    raise NotImplementedError
