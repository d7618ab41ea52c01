"""What an optimizer is built from: the options that all share, and the arguments of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simpletuner.catalog.optimizers import OPTIMIZERS, Optimizer

Argument = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What every optimizer takes. `beta1` and `beta2` None mean the optimizer's own defaults.

    `seed` feeds the stochastic rounding of the optimizers that round; the others ignore it. `arguments` are the
    optimizer's own, by the names of its row in `catalog.optimizers`.
    """

    learning_rate: float
    beta1: float | None = None
    beta2: float | None = None
    weight_decay: float = 0.01
    epsilon: float = 1e-8
    seed: int = 0
    arguments: Mapping[str, Argument] = field(default_factory=dict)


def keywords(row: Optimizer, settings: OptimizerSettings) -> dict[str, object]:
    """The settings under the names that all libraries give them, without what this optimizer does not read."""
    found: dict[str, object] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if row.betas:
        beta1, beta2, *more = row.betas
        found["betas"] = (
            beta1 if settings.beta1 is None else settings.beta1,
            beta2 if settings.beta2 is None else settings.beta2,
            *more,
        )
    if row.epsilon:
        found["eps"] = settings.epsilon
    found |= {argument.name: argument.default for argument in row.arguments if argument.default is not None}
    return found | dict(settings.arguments)


def hyper_parameters(name: str) -> frozenset[str]:
    """The entries of a parameter group that the settings decide, whatever the library calls them. What else is in a
    group, the optimizer keeps there for itself: how far it is, what rate it found."""
    shared = {"lr", "betas", "beta1", "beta2", "beta3", "eps", "weight_decay"}
    return frozenset(shared | {argument.name for argument in OPTIMIZERS[name].arguments})


def state_layout(name: str, arguments: Mapping[str, Argument]) -> str:
    """The optimizer and what else decides which states it keeps: equal for two runs whose states fit each other."""
    told = {a.name: arguments.get(a.name, a.default) for a in OPTIMIZERS[name].arguments if a.shapes_state}
    defaults = {a.name: a.default for a in OPTIMIZERS[name].arguments}
    changed = (key for key, value in told.items() if value is not False and value != defaults[key])
    return " ".join((name, *(f"{key}={told[key]}" for key in changed)))
