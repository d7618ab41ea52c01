"""Settings of configuration files and of the process environment."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from simpletuner.config.argv import parse_extra_arguments
from simpletuner.config.env import EXTRA_ARGUMENTS, VARIABLES, Variable, parse_env_file, split_words
from simpletuner.config.json_text import parse_json, read_text, repeated_key_warnings
from simpletuner.config.names import closest, meaning_of
from simpletuner.config.paths import shown_path
from simpletuner.config.root import sections
from simpletuner.config.search import FoundConfig
from simpletuner.config.settings import Origin, OriginKind, Setting
from simpletuner.config.values import show
from simpletuner.problems import ConfigError, Problem, Severity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Found = tuple[list[Setting], list[Problem]]


def file_settings(found: FoundConfig, *, environ: Mapping[str, str], cwd: Path) -> Found:
    """Settings of the configuration file, and its problems. Raises ConfigError if it cannot be read at all."""
    if found.path is None:
        return [], []
    shown = shown_path(found.path, cwd)
    text = read_text(found.path, shown)
    match found.path.suffix:
        case ".toml":
            return _toml_settings(text, shown)
        case ".env":
            return _env_settings(parse_env_file(text, shown, environ), shown)
        case _:
            return _json_settings(text, shown)


def environment_settings(environ: Mapping[str, str]) -> Found:
    """Settings of the variables that stand for options, TRAINER_EXTRA_ARGS last: it wins over the others."""
    settings = [
        Setting(key=option, value=environ[name], origin=Origin(kind=OriginKind.ENVIRONMENT, place=name))
        for name, option in VARIABLES.items()
        if environ.get(name)
    ]
    origin = Origin(kind=OriginKind.ENVIRONMENT, place=EXTRA_ARGUMENTS)
    more, problems = parse_extra_arguments(split_words(environ.get(EXTRA_ARGUMENTS, "")), origin)
    return [*settings, *more], problems


def _json_settings(text: str, shown: str) -> Found:
    document = parse_json(text, shown)
    if not isinstance(document.value, dict):
        raise ConfigError(Problem(code="E-CONFIG-OBJECT", params={"file": shown}, origin=shown))
    lines = {pointer[1:].replace("~1", "/").replace("~0", "~"): line for pointer, line in document.lines.items()}
    settings, problems = _of_mapping(document.value, lines, shown)
    return settings, [*repeated_key_warnings(document, shown), *problems]


def _toml_settings(text: str, shown: str) -> Found:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+), column (\d+)", str(error))
        origin = f"{shown}:{place[1]}:{place[2]}" if place else shown
        reason = str(error).partition(" (at ")[0]
        params = {"file": shown, "reason": reason}
        raise ConfigError(Problem(code="E-TOML-SYNTAX", params=params, origin=origin)) from error
    lines = dict(_toml_lines(text))
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat.update(value if key in sections() and isinstance(value, dict) else {key: value})
    return _of_mapping(flat, lines, shown)


def _toml_lines(text: str) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(text.split("\n"), start=1):
        found = re.match(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""", line)
        if found:
            yield found[1], number


def _of_mapping(values: Mapping[str, object], lines: Mapping[str, int], shown: str) -> Found:
    settings: list[Setting] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for key, value in values.items():
        place = f"{shown}:{lines[key]}" if key in lines else shown
        origin = Origin(kind=OriginKind.FILE, place=place)
        if key == EXTRA_ARGUMENTS:
            words = split_words(value) if isinstance(value, str) else [str(word) for word in _as_list(value)]
            more, found = parse_extra_arguments(words, origin)
            settings += more
            problems += found
            continue
        name = meaning_of(key).name
        if name in seen:
            params = {"key": key, "other": seen[name]}
            problems.append(Problem(code="W-KEY-ALIASED", severity=Severity.WARNING, params=params, origin=place))
        seen[name] = key
        settings.append(Setting(key=key, value=value, origin=origin))
    return settings, problems


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _env_settings(variables: tuple[Variable, ...], shown: str) -> Found:
    settings: list[Setting] = []
    problems: list[Problem] = []
    extra: list[Setting] = []
    for variable in variables:
        origin = Origin(kind=OriginKind.FILE, place=f"{shown}:{variable.line}")
        option = VARIABLES.get(variable.name) or _option_of_variable(variable.name)
        if variable.name == EXTRA_ARGUMENTS:
            extra, more = parse_extra_arguments(split_words(variable.value), origin)
            problems += more
        elif option is not None:
            settings.append(Setting(key=option, value=variable.value, origin=origin))
        else:
            problems += _misspelt(variable, origin)
    return [*settings, *extra], problems


def _option_of_variable(name: str) -> str | None:
    """Any option may stand in config.env as its name in capitals."""
    meaning = meaning_of(name)
    return meaning.name if meaning.what in ("option", "upstream") else None


def _misspelt(variable: Variable, origin: Origin) -> list[Problem]:
    """A file may have variables of its own; only one that looks like one of ours is worth a word."""
    guess = closest(variable.name, (*VARIABLES, EXTRA_ARGUMENTS))
    if guess is None:
        return []
    params = {"name": variable.name, "suggestion": guess, "value": show(variable.value)}
    return [Problem(code="W-VARIABLE-UNKNOWN", severity=Severity.WARNING, params=params, origin=origin.place)]
