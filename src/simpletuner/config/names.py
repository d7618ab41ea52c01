"""What a key means: an option of ours, one that only upstream has, a leftover, or a mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from simpletuner.catalog.upstream import IGNORED_KEYS, IGNORED_PREFIXES, UPSTREAM
from simpletuner.config.root import option_aliases, options


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """`name` is canonical. `is_flag`: takes true or false, so that a bare --name is complete."""

    name: str
    what: Literal["option", "upstream", "ignored", "unknown"]
    is_flag: bool = False


def meaning_of(key: str) -> Meaning:
    """Look a key up. Leading dashes, - for _ and capitals do not matter."""
    name = key.strip().lstrip("-").replace("-", "_").lower()
    name = option_aliases().get(name, name)
    if name in options():
        return Meaning(name=name, what="option", is_flag=options()[name].kind == "flag")
    if name in UPSTREAM:
        return Meaning(name=name, what="upstream", is_flag=UPSTREAM[name].is_flag)
    if name in IGNORED_KEYS or name.startswith(IGNORED_PREFIXES):
        return Meaning(name=name, what="ignored")
    return Meaning(name=name, what="unknown")


def closest_option(key: str) -> str | None:
    """The option, alias or known name that `key` most looks like, or None if nothing comes near."""
    return closest(meaning_of(key).name, (*options(), *option_aliases(), *UPSTREAM))


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` most looks like, or None if nothing comes near."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.72)
    return found[0] if found else None


def closest_key(key: str, candidates: Iterable[str]) -> str | None:
    """The key of a dataset that `key` most looks like: one that it begins, or that belongs outside of an object of
    keys; or the `closest`."""
    names = list(candidates)
    inner = key.partition(".")[2]
    if inner in names:
        return inner
    longer = [name for name in names if name.startswith(f"{key}_")]
    return longer[0] if len(longer) == 1 else closest(key, names)
