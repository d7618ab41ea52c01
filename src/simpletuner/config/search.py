"""Which configuration file a run uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.argv import CommandLine
from simpletuner.config.env import BACKEND_NAMES, CONFIG_PATH_NAME, ENVIRONMENT_NAMES, first_set
from simpletuner.config.names import closest
from simpletuner.config.paths import EXAMPLES_DIR, expand_home, is_file, shown_path
from simpletuner.problems import ConfigError, Fix, Problem

SUFFIXES = (".json", ".toml", ".env")
_BACKENDS = {"json": (".json",), "toml": (".toml",), "env": (".env",), "cmd": ()}


@dataclass(frozen=True, kw_only=True)
class FoundConfig:
    """`path` is None where no file is used. `searched`: what was looked for, in order, up to the one found.
    `example`: the packaged example that it belongs to. `unread`: files beside it that say nothing in this run."""

    path: Path | None
    searched: tuple[Path, ...]
    example: str | None = None
    unread: tuple[Path, ...] = ()


def example_names() -> tuple[str, ...]:
    """The packaged example configurations."""
    return tuple(sorted(path.parent.name for path in EXAMPLES_DIR.glob("*/config.json")))


def find_config(line: CommandLine, *, environ: Mapping[str, str], cwd: Path, needed: bool) -> FoundConfig:
    """Follow, in this order: the command line, CONFIG_PATH, the environment's name, ./config.*, config/config.*.

    Raises ConfigError with everything that was searched if what was named is not there, or if nothing was named,
    nothing found and a file is `needed`.
    """
    suffixes = _suffixes(line, environ)
    if line.example is not None:
        return _find_example(line.example)
    named = _named(line, environ)
    if named is not None:
        name, source = named
        return _pick(tuple(_candidates_of_name(name, cwd, suffixes)), name=name, source=source)
    places = tuple(folder / f"config{suffix}" for folder in (cwd, cwd / "config") for suffix in suffixes)
    found = next((place for place in places if is_file(place)), None)
    if found is None and needed and places:
        searched = ", ".join(shown_path(place, cwd) for place in places) or "-"
        raise ConfigError(Problem(code="E-CONFIG-NONE", params={"searched": searched}))
    unread = tuple(p for p in places if found is not None and p != found and p.parent == found.parent and is_file(p))
    upto = places if found is None else places[: places.index(found) + 1]
    return FoundConfig(path=found, searched=upto, unread=unread)


def _suffixes(line: CommandLine, environ: Mapping[str, str]) -> tuple[str, ...]:
    chosen = ("--config_backend", line.backend) if line.backend else first_set(BACKEND_NAMES, environ)
    if chosen is None:
        return SUFFIXES
    place, value = chosen
    if value.lower() not in _BACKENDS:
        params = {"value": value, "choices": ", ".join(_BACKENDS)}
        raise ConfigError(Problem(code="E-CONFIG-BACKEND", params=params, origin=place))
    return _BACKENDS[value.lower()]


def _named(line: CommandLine, environ: Mapping[str, str]) -> tuple[str, str | None] | None:
    """(name or path of the configuration, where it was named)."""
    if line.config:
        return line.config, None
    if line.environment:
        return line.environment, "--env"
    path = first_set((CONFIG_PATH_NAME,), environ)
    environment = first_set(ENVIRONMENT_NAMES, environ)
    for place, name in filter(None, (path, environment)):
        if name != "default":
            return name, place
    return None


def _candidates_of_name(name: str, cwd: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    path = cwd / expand_home(name)
    if path.suffix in SUFFIXES:
        yield path
        yield cwd / "config" / name
        return
    for suffix in suffixes:
        yield path / f"config{suffix}"
    for suffix in suffixes:
        yield Path(f"{path}{suffix}")
    for suffix in suffixes:
        yield cwd / "config" / name / f"config{suffix}"
    if ".json" in suffixes:
        yield EXAMPLES_DIR / name / "config.json"


def _pick(places: tuple[Path, ...], *, name: str, source: str | None) -> FoundConfig:
    found = next((place for place in places if is_file(place)), None)
    if found is None:
        searched = ", ".join(place.as_posix() for place in places) or "-"
        raise ConfigError(Problem(code="E-CONFIG-NAMED", params={"name": name, "searched": searched}, origin=source))
    example = found.parent.name if found.parent.parent == EXAMPLES_DIR else None
    return FoundConfig(path=found, searched=places[: places.index(found) + 1], example=example)


def _find_example(name: str) -> FoundConfig:
    names = example_names()
    if name not in names:
        guess = closest(name, names)
        fixes = (Fix(key="--example", value=guess),) if guess else ()
        params = {"name": name, "examples": ", ".join(names)}
        raise ConfigError(Problem(code="E-EXAMPLE-UNKNOWN", params=params, origin="--example", fixes=fixes))
    path = EXAMPLES_DIR / name / "config.json"
    return FoundConfig(path=path, searched=(path,), example=name)
