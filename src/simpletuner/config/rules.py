"""Rules that concern more than one option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from simpletuner.config.root import Config
from simpletuner.config.settings import Origin
from simpletuner.problems import Problem

Check = Callable[[Config], Problem | None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A check of the options `names`; the problem is told as one of the first."""

    names: tuple[str, ...]
    check: Check


def rule(*names: str) -> Callable[[Check], Rule]:
    """Make a function a rule about the options `names`. It is left out where one of them is invalid itself."""
    return lambda check: Rule(names=names, check=check)


def broken_rules(config: Config, origins: Mapping[str, Origin], invalid: frozenset[str]) -> list[Problem]:
    """The problem of every rule that `config` breaks."""
    found: list[Problem] = []
    for known in RULES:
        problem = None if invalid & set(known.names) else known.check(config)
        if problem is not None:
            name = known.names[0]
            origin = problem.origin or origins[name].place
            found.append(replace(problem, origin=origin, path=problem.path or f"/{name}"))
    return found


@rule("max_train_steps", "num_train_epochs")
def run_has_one_length(c: Config) -> Problem | None:
    steps, epochs = c.run.max_train_steps, c.run.num_train_epochs
    if steps and epochs:
        return Problem(code="E-LENGTH-TWICE", params={"steps": steps, "epochs": epochs})
    return None if steps or epochs else Problem(code="E-LENGTH-NONE")


RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
