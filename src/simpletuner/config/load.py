"""From command line, environment and files to one frozen configuration with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from simpletuner.catalog.upstream import UPSTREAM, Effect, asks_for_something
from simpletuner.config.argv import parse_arguments
from simpletuner.config.build import build_section, convert_setting, invalid_names
from simpletuner.config.data_rules import broken_data_rules
from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.datasets_file import load_datasets
from simpletuner.config.derive import Settings, derive
from simpletuner.config.files import environment_settings, file_settings
from simpletuner.config.lycoris_rules import full_without_regularisation
from simpletuner.config.names import closest_option, meaning_of
from simpletuner.config.paths import shown_path
from simpletuner.config.root import Config, options, sections
from simpletuner.config.rules import broken_rules
from simpletuner.config.search import FoundConfig, find_config
from simpletuner.config.settings import DEFAULT_ORIGIN, Origin, Setting
from simpletuner.config.values import show
from simpletuner.problems import ConfigError, DatasetError, Fix, Problem, Severity


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A configuration that is free of errors.

    `origins`: option -> where its value comes from. `warnings`: what the user should know, warnings and notices.
    `config_path` is None where no file was used; `searched` are the places that were looked at, in order.
    """

    config: Config
    datasets: DatasetsConfig
    origins: Mapping[str, Origin]
    warnings: tuple[Problem, ...]
    config_path: Path | None
    searched: tuple[Path, ...]


def load_run_config(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    must_run: bool = True,
    check_folders: bool = True,
    needs_files: bool = True,
) -> LoadedConfig:
    """Read everything that says how a run is to be. Flags win over the environment, it over files, they over the
    flavour, it over defaults.

    `argv` are the words after the command's own flags. Without `must_run`, what this version knows but cannot do yet
    (quantisation, say) is a warning, so that a configuration can be checked and shown; a run must not start from it.
    Without `check_folders`, the folders of the datasets need not be there: what is shown may belong elsewhere.
    Without `needs_files`, flags alone will do; a file that is named or found is read all the same.
    Raises ConfigError with every problem at once; DatasetError if only folders of datasets are missing.
    """
    gathered = _gather(argv, environ, cwd, needs_files=needs_files)
    winners, problems, refused = _resolve(gathered.settings, environ)
    problems = [*gathered.problems, *problems]
    derived = derive(winners, config_path=gathered.found.path, cwd=cwd)
    config, refused_values = _build(derived.settings)
    problems += refused_values
    origins = _origins(derived.settings)
    problems += derived.notices
    broken, beyond = broken_rules(config, origins, invalid_names(problems))
    problems += broken
    refused += beyond
    datasets = load_datasets(config, environ=environ, cwd=cwd, is_needed=needs_files)
    problems += (_with_origin(problem, origins) for problem in datasets.problems)
    problems += full_without_regularisation(config, datasets.config, origins)
    problems += (_with_origin(problem, origins) for problem in broken_data_rules(config, datasets.config, origins))
    refused += datasets.refused
    problems += refused if must_run else (replace(p, severity=Severity.WARNING) for p in refused)
    is_wrong = any(problem.severity is Severity.ERROR for problem in problems)
    problems += datasets.absent if check_folders else ()
    if any(problem.severity is Severity.ERROR for problem in problems):
        told = sorted(problems, key=lambda problem: problem.severity is not Severity.ERROR)
        raise ConfigError(told) if is_wrong else DatasetError(told)
    assert datasets.config is not None
    return LoadedConfig(
        config=config,
        datasets=datasets.config,
        origins=origins,
        warnings=tuple(problems),
        config_path=gathered.found.path,
        searched=gathered.found.searched,
    )


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """Everything that was set, from the weakest source to the strongest."""

    settings: tuple[Setting, ...]
    found: FoundConfig
    problems: tuple[Problem, ...]


def _gather(argv: Sequence[str], environ: Mapping[str, str], cwd: Path, *, needs_files: bool) -> _Gathered:
    line = parse_arguments(argv)
    problems = list(line.problems)
    surrounding, more = environment_settings(environ)
    problems += more
    needed = needs_files and not _names_datasets((*surrounding, *line.settings))
    try:
        found = find_config(line, environ=environ, cwd=cwd, needed=needed)
        written, more = file_settings(found, environ=environ, cwd=cwd)
    except ConfigError as error:
        unknown = _resolve(line.settings, environ)[1]
        raise ConfigError([*problems, *error.problems, *unknown]) from error
    problems += more
    problems += (
        Problem(
            code="W-CONFIG-UNREAD",
            severity=Severity.WARNING,
            params={"file": shown_path(path, cwd), "used": shown_path(found.path or cwd, cwd)},
        )
        for path in found.unread
    )
    return _Gathered(settings=(*written, *surrounding, *line.settings), found=found, problems=tuple(problems))


def _names_datasets(settings: Sequence[Setting]) -> bool:
    return any(meaning_of(setting.key).name == "data_backend_config" for setting in settings)


def _resolve(settings: Sequence[Setting], environ: Mapping[str, str]) -> tuple[Settings, list[Problem], list[Problem]]:
    """(converted winners by option, problems, what is known but cannot be done)."""
    winners: dict[str, Setting] = {}
    foreign: dict[str, Setting] = {}
    problems: list[Problem] = []
    for setting in settings:
        meaning = meaning_of(setting.key)
        if meaning.what == "unknown":
            problems.append(_unknown_key(setting))
        elif meaning.what != "ignored":
            (winners if meaning.what == "option" else foreign)[meaning.name] = setting
    converted: dict[str, Setting] = {}
    for name, setting in winners.items():
        good, problem = convert_setting(setting, options()[name], environ)
        if good is not None:
            converted[name] = good
        if problem is not None:
            problems.append(problem)
    asked = {name: setting for name, setting in foreign.items() if asks_for_something(UPSTREAM[name], setting.value)}
    refused = [_refusal(name, asked[name]) for name in asked if UPSTREAM[name].effect is Effect.RESULT]
    return converted, problems + _missing_options(asked), refused


def _unknown_key(setting: Setting) -> Problem:
    key = setting.key.lstrip("-")
    suggestion = closest_option(setting.key)
    place = setting.origin.place
    if suggestion is None:
        return Problem(code="E-KEY-UNKNOWN", params={"key": key}, origin=place, path=f"/{key}")
    fixes = (Fix(key=suggestion, value=setting.value),)
    params = {"key": key, "suggestion": suggestion}
    return Problem(code="E-KEY-MISSPELT", params=params, origin=place, path=f"/{key}", fixes=fixes)


def _refusal(name: str, setting: Setting) -> Problem:
    """An option that would change what is trained: going on without it would be a silent change of plan."""
    params = {"key": name, "value": show(setting.value)}
    return Problem(code="E-NOT-YET", params=params, origin=setting.origin.place, path=f"/{name}")


def _missing_options(asked: Settings) -> list[Problem]:
    """One warning for each kind of loss, naming the options."""
    found: list[Problem] = []
    for effect in (Effect.MEMORY, Effect.SPEED, Effect.OTHER):
        names = [name for name in asked if UPSTREAM[name].effect is effect]
        if names:
            first = asked[names[0]]
            problem = Problem(
                code=f"W-NOT-YET-{effect.name}",
                severity=Severity.WARNING,
                params={"keys": ", ".join(names)},
                origin=first.origin.place,
                path=f"/{names[0]}",
            )
            found.append(problem)
    return found


def _build(settings: Settings) -> tuple[Config, list[Problem]]:
    built = {name: build_section(model, settings, options()) for name, model in sections().items()}
    problems = [problem for _, found in built.values() for problem in found]
    return Config.model_validate({name: section for name, (section, _) in built.items()}), problems


def _origins(settings: Settings) -> Mapping[str, Origin]:
    return MappingProxyType({name: settings[name].origin if name in settings else DEFAULT_ORIGIN for name in options()})


def _with_origin(problem: Problem, origins: Mapping[str, Origin]) -> Problem:
    if problem.origin is not None or problem.path is None:
        return problem
    return replace(problem, origin=origins[problem.path[1:]].place)
