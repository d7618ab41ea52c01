"""Optimizers by name. Adding one takes a function here or in `libraries`, and a row in `catalog.optimizers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.optim.adamw_bf16 import AdamWBf16
from simpletuner.optim.libraries import MAKERS
from simpletuner.optim.lion import Lion
from simpletuner.optim.settings import OptimizerSettings, keywords
from simpletuner.problems import ConfigError, Fix, Problem


def build_optimizer(name: str, params: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the optimizer `name` (a row of `catalog.optimizers`) over `params`, in the order given.

    Its state (`state.optimizer_state`) holds everything a resumed run needs. The configuration has checked the name,
    the arguments, the library and the device before.

    Raises:
        ConfigError: the optimizer moves matrices only and there are other parameters.
    """
    row, trained = OPTIMIZERS[name], list(params)
    others = sum(param.ndim != 2 for param in trained)
    if row.matrices_only and others:
        told = {"optimizer": name, "count": others}
        fixes = (Fix(key="optimizer", value=row.instead),)
        raise ConfigError(Problem(code="E-OPTIM-MATRICES", params=told, path="/optimizer", fixes=fixes))
    options = keywords(row, settings)
    if name in _OWN:
        return _OWN[name](trained, options, settings.seed)
    return MAKERS[name](name)(trained, **options)


def set_learning_rate_(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the rate of the next update. Where a library keeps it in a tensor, it stays there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _adamw(params: list[nn.Parameter], options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **options, foreach=True)


def _adamw_bf16(params: list[nn.Parameter], options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    return AdamWBf16(params, **options, seed=seed)


def _lion(params: list[nn.Parameter], options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    return Lion(params, **options, seed=seed)


_Own = Callable[[list[nn.Parameter], dict[str, Any], int], torch.optim.Optimizer]
_OWN: Mapping[str, _Own] = MappingProxyType({"adamw": _adamw, "adamw_bf16": _adamw_bf16, "lion": _lion})
