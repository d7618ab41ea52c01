"""Optimizers by name. Adding one takes a function here and a row in `catalog.optimizers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.optim.adamw_bf16 import AdamWBf16
from simpletuner.optim.lion import Lion


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What every optimizer takes. `beta1` and `beta2` None mean the optimizer's own defaults.

    `seed` feeds the stochastic rounding of the optimizers that round; the others ignore it.
    """

    learning_rate: float
    beta1: float | None = None
    beta2: float | None = None
    weight_decay: float = 0.01
    epsilon: float = 1e-8
    seed: int = 0


def build_optimizer(name: str, params: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the optimizer `name` (an available row of `catalog.optimizers`) over `params`, in the order given.

    Its `state_dict` holds everything a resumed run needs. Raises `KeyError` for an unknown name: the configuration
    has checked it before.
    """
    return _BUILDERS[name](list(params), settings)


def set_learning_rate_(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def restore_optimizer_(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a saved state, but keep this run's hyper-parameters: `load_state_dict` alone would bring back the old
    run's weight decay and betas in silence. Raises `ValueError` if the parameters are not the saved ones."""
    ours = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state_dict)
    for group, hyper in zip(optimizer.param_groups, ours, strict=True):
        group.update(hyper)


def _betas(name: str, settings: OptimizerSettings) -> tuple[float, float]:
    beta1, beta2 = OPTIMIZERS[name].betas
    return (
        beta1 if settings.beta1 is None else settings.beta1,
        beta2 if settings.beta2 is None else settings.beta2,
    )


def _adamw(params: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        params,
        lr=settings.learning_rate,
        betas=_betas("adamw", settings),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def _adamw_bf16(params: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return AdamWBf16(
        params,
        lr=settings.learning_rate,
        betas=_betas("adamw_bf16", settings),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )


def _lion(params: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return Lion(
        params,
        lr=settings.learning_rate,
        betas=_betas("lion", settings),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )


_Builder = Callable[[list[nn.Parameter], OptimizerSettings], torch.optim.Optimizer]
_BUILDERS: Mapping[str, _Builder] = MappingProxyType({"adamw": _adamw, "adamw_bf16": _adamw_bf16, "lion": _lion})
