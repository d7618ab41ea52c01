"""How far back a rollout begins, by strategy. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

OFFSET_STRATEGIES: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {
        "uniform": lambda offset, most: 1.0,
        "biased_early": lambda offset, most: float(offset),
        "biased_late": lambda offset, most: float(most + 1 - offset),
    }
)
"""Strategy -> weight of `offset` sampling steps, of 1 to `most`. Early: the rollout begins early in the schedule, with
many steps to go; late: with few."""


def offset_shares(strategy: str, most: int) -> tuple[float, ...]:
    """Probabilities of 1, 2, ... `most` steps."""
    weights = [OFFSET_STRATEGIES[strategy](offset, most) for offset in range(1, most + 1)]
    return tuple(weight / sum(weights) for weight in weights)


def mean_offset(strategy: str, most: int) -> float:
    """Steps of a rollout on average, where the schedule leaves room for all of them."""
    return sum(offset * share for offset, share in enumerate(offset_shares(strategy, most), 1))
