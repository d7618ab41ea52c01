"""Where to compute, and in which number format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from simpletuner.config.root import Config
from simpletuner.events.progress import Reporter
from simpletuner.events.types import SettingOverridden
from simpletuner.problems import ConfigError, Problem

MixedPrecision = Literal["bf16", "fp16", "no"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """`weights` is the dtype of the frozen base model, `autocast` the dtype of matrix products if it differs."""

    device: torch.device
    weights: torch.dtype
    autocast: torch.dtype | None

    @property
    def name(self) -> str:
        """The format of the matrix products: "bf16", "fp16" or "fp32"."""
        wanted = self.autocast or self.weights
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(wanted, "fp32")

    def autocasting(self) -> AbstractContextManager[object]:
        """The block computes its matrix products in the format that they shall have."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)


def choose_device(requested: str) -> torch.device:
    """The device that `device` names; "auto" takes a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise _no_device(requested) from None
    found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= found.get(device.type, 0):
        raise _no_device(requested)
    if requested == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def settle_compute(config: Config, run: Reporter) -> Compute:
    """Where a run computes and in which formats, as `config` says; a notice is told."""
    compute, override = choose_compute(
        choose_device(config.run.device),
        mixed_precision=config.memory.mixed_precision,
        base_model_default_dtype=config.memory.base_model_default_dtype,
    )
    if override is not None:
        run.emit(override)
    return compute


def choose_compute(
    device: torch.device, *, mixed_precision: MixedPrecision, base_model_default_dtype: Literal["bf16", "fp32"]
) -> tuple[Compute, SettingOverridden | None]:
    """The number formats for this device; with a notice if it lacks the one that was asked for.

    Without hardware for it, half precision is several times slower than float32, so float32 is used instead.
    """
    if mixed_precision != "no" and not _is_fast(device, mixed_precision):
        override = SettingOverridden(
            option="mixed_precision", requested=mixed_precision, used="no", reason="override.mixed_precision"
        )
        return Compute(device=device, weights=torch.float32, autocast=None), override
    compute = _DTYPES[mixed_precision]
    keeps_float32 = base_model_default_dtype == "fp32" and compute != torch.float32
    weights = torch.float32 if keeps_float32 else compute
    return Compute(device=device, weights=weights, autocast=compute if keeps_float32 else None), None


def device_name(device: torch.device) -> str:
    """What people call it: "NVIDIA GeForce RTX 4090", "CPU, 8 threads"."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"


def _is_fast(device: torch.device, mixed_precision: str) -> bool:
    if device.type == "cpu":
        # Matrix units for bfloat16 (AMX); without them a product is slower than in float32.
        return mixed_precision == "bf16" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    if device.type == "cuda" and mixed_precision == "bf16":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def _no_device(requested: str) -> ConfigError:
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    params = {"requested": requested, "found": ", ".join(found)}
    return ConfigError(Problem(code="E-DEVICE-NOT-FOUND", params=params, path="/device"))
