"""Which linear layers of a model get an adapter."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from simpletuner.catalog.modules import is_target
from simpletuner.problems import ConfigError, Problem


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's linear layers in its order; an adapted layer counts once, under its own name."""
    names: list[str] = []
    for name, outer in model.named_modules():
        module = outer
        if names and name.startswith(names[-1] + "."):
            continue  # the inside of an adapted layer
        while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
            module = inner
        if isinstance(module, nn.Linear):
            names.append(name)
    return tuple(names)


def match_targets(names: Sequence[str], targets: Iterable[str], *, path: str) -> tuple[str, ...]:
    """Return those of `names` that a target stands for, in the order of `names`.

    A target is a full name, an ending at a dot ("to_q", "feed_forward.w1") or a pattern with `*` over the full name.

    Raises:
        ConfigError: one problem for each target that matches nothing; `path` is the option's JSON pointer.
    """
    chosen: set[str] = set()
    problems = []
    for target in targets:
        matched = [name for name in names if is_target(name, target)]
        chosen.update(matched)
        if not matched:
            near = ", ".join(_near(names, target))
            problems.append(Problem(code="E-LORA-TARGET", params={"target": target, "near": near}, path=path))
    if problems:
        raise ConfigError(problems)
    return tuple(name for name in names if name in chosen)


def _near(names: Sequence[str], target: str, count: int = 6) -> list[str]:
    """Endings that the user may have meant: those that contain the target's last part first."""
    endings = dict.fromkeys(_without_numbers(name) for name in names)
    word = target.replace("*", "").strip(".").rsplit(".", 1)[-1]
    containing = [ending for ending in endings if word and word in ending]
    by_last = {ending.rsplit(".", 1)[-1]: ending for ending in reversed(endings)}
    similar = [by_last[last] for last in difflib.get_close_matches(word, by_last, n=count, cutoff=0.3)]
    return list(dict.fromkeys([*containing, *similar]))[:count] or list(endings)[:count]


def _without_numbers(name: str) -> str:
    """ "layers.3.attention.to_q" -> "attention.to_q": what is the same in every block."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name
