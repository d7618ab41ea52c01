"""A value somebody set, and where it was set."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OriginKind(str, Enum):
    """The sources of values; a later one wins over an earlier one."""

    DEFAULT = "default"
    FLAVOUR = "flavour"
    PLAN = "plan"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"

    @property
    def rank(self) -> int:
        """Position in the order of precedence; the highest wins."""
        return list(OriginKind).index(self)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value comes from. `place` is for people: "config/config.json:14", "--lora_rank", "LEARNING_RATE"."""

    kind: OriginKind
    place: str

    def __str__(self) -> str:
        return self.place


DEFAULT_ORIGIN = Origin(kind=OriginKind.DEFAULT, place="default")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value as it was written: the key without leading dashes, the raw value, and its origin."""

    key: str
    value: object
    origin: Origin
