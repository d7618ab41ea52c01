"""Optimizers by name, with what they can do. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """`betas` are the defaults. `available`: this version can run it; the others are only known by name."""

    name: str
    betas: tuple[float, float] = (0.9, 0.999)
    available: bool = False


_KNOWN_ONLY = (
    "adamw_schedulefree", "adamw_schedulefree+aggressive", "adamw_schedulefree+no_kahan", "adamw_fused",
    "adamw_torchao", "ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8", "adafactor", "prodigy", "soap",
    "muon", "dion", "stochastic-lion",
    "optimi-stableadamw", "optimi-adamw", "optimi-lion", "optimi-radam", "optimi-ranger", "optimi-adan",
    "optimi-adam", "optimi-sgd", "bnb-adagrad", "bnb-adagrad8bit", "bnb-adam", "bnb-adam8bit", "bnb-adamw",
    "bnb-adamw8bit", "bnb-adamw-paged", "bnb-adamw8bit-paged", "bnb-ademamix", "bnb-ademamix8bit",
    "bnb-ademamix-paged", "bnb-ademamix8bit-paged", "bnb-lion", "bnb-lion8bit", "bnb-lion-paged",
    "bnb-lion8bit-paged", "torch-adamw", "torch-adafactor", "deepspeed-adamw",
)  # fmt: skip

OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        optimizer.name: optimizer
        for optimizer in (
            Optimizer(name="adamw_bf16", available=True),
            Optimizer(name="adamw", available=True),
            Optimizer(name="lion", betas=(0.9, 0.99), available=True),
            *(Optimizer(name=name) for name in _KNOWN_ONLY),
        )
    }
)
