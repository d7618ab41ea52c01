"""What a rule is, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simpletuner.config.root import Config, options
from simpletuner.config.settings import Origin, OriginKind
from simpletuner.problems import Fix, Problem

Origins = Mapping[str, Origin]
Check = Callable[[Config, Origins], "Problem | Sequence[Problem] | None"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A check of the options `names`; the problem is told as one of the first. `is_limit`: not wrong, but beyond
    this version or this machine."""

    names: tuple[str, ...]
    check: Check
    is_limit: bool = False

    def problems(self, config: Config, origins: Origins) -> Sequence[Problem]:
        found = self.check(config, origins)
        if found is None:
            return ()
        return (found,) if isinstance(found, Problem) else found


def rule(*names: str) -> Callable[[Check], Rule]:
    """Make a function a rule about the options `names`. It is left out where one of them is invalid itself."""
    return lambda check: Rule(names=names, check=check)


def limit(*names: str) -> Callable[[Check], Rule]:
    """Make a function a limit of this version or machine, about the options `names`."""
    return lambda check: Rule(names=names, check=check, is_limit=True)


def place_of(names: tuple[str, ...], origins: Origins) -> str | None:
    """Where the first of `names` that somebody set was set."""
    return next((origins[name].place for name in names if was_set(name, origins)), None)


def was_set(name: str, origins: Origins) -> bool:
    """Whether somebody gave the option a value."""
    return origins[name].kind not in (OriginKind.DEFAULT, OriginKind.FLAVOUR, OriginKind.PLAN)


def was_changed(c: Config, name: str, origins: Origins) -> bool:
    """Whether somebody gave the option a value that is not its default anyway."""
    return was_set(name, origins) and c.option(name) != options()[name].default


def short_fix(name: str, value: float) -> Fix:
    """Set the option to the number, written with as few digits as people would."""
    short = float(f"{value:g}")
    return Fix(key=name, value=int(short) if short.is_integer() else short)
