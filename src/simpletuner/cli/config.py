"""`simpletuner config`: check a configuration, show what it comes to, explain options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from simpletuner.cli.report import print_problems, problems_as_data
from simpletuner.config.load import LoadedConfig, load_run_config
from simpletuner.config.paths import shown_path
from simpletuner.i18n import text
from simpletuner.problems import ConfigError, DatasetError, ExitCode, Fix, Problem, Severity, SimpletunerError

ACTIONS = ("validate", "show", "explain", "schema")


def run(argv: Sequence[str], language: str) -> int:
    """Carry out `simpletuner config ACTION ...`; return the exit status."""
    action, *words = argv or ("--help",)
    if action in ("-h", "--help", "help") or "-h" in words or "--help" in words:
        print(text("config.help", language))
        return 0
    match action:
        case "validate":
            return _validate(words, language)
        case "show":
            return _show(words, language)
        case "explain":
            return _explain(words, language)
        case "schema":
            return _schema(words)
    params = {"word": action, "commands": ", ".join(ACTIONS)}
    raise SimpletunerError(Problem(code="E-COMMAND", params=params), ExitCode.USAGE)


def _validate(words: list[str], language: str) -> int:
    as_json, options = _take("--json", words)
    try:
        loaded = _load(options)
        _check_datasets(loaded)
    except (ConfigError, DatasetError) as error:
        if not as_json:
            raise
        print(_problems_json(error.problems, language))
        return int(error.exit_code)
    if as_json:
        print(_problems_json(loaded.warnings, language))
        return 0
    print_problems(loaded.warnings, language)
    sys.stderr.flush()
    if loaded.warnings:
        print()
    print(_summary(loaded, language))
    if any(problem.code.startswith("E-") for problem in loaded.warnings):
        print(text("config.refused", language))
    return 0


def _show(words: list[str], language: str) -> int:
    from simpletuner.config.effective import effective_json, value_lines

    as_json, words = _take("--json", words)
    with_origin, words = _take("--origin", words)
    only_changed, words = _take("--changed", words)
    from simpletuner.planner.choose import planned
    from simpletuner.train.places import storage_of

    loaded = planned(_load(words, check_folders=False)).loaded
    if as_json:
        print(effective_json(loaded), end="")
        return 0
    searched = ", ".join(shown_path(path, Path.cwd()) for path in loaded.searched)
    if with_origin and searched:
        print(text("config.searched", language, searched=searched) + "\n")
    for line in value_lines(loaded, language, with_origin=with_origin, only_changed=only_changed):
        print(line)
    print(f"\n# {text('config.datasets', language, file=shown_path(loaded.datasets.path, Path.cwd()))}")
    datasets = loaded.datasets
    for dataset in (*datasets.images, *datasets.evals, *datasets.masks):
        print(f"{dataset.id}: {storage_of(dataset, cache_dir=Path(loaded.config.data.cache_dir)).id}")
    return 0


def _explain(words: list[str], language: str) -> int:
    from simpletuner.cli.help import explain

    if not words:
        raise SimpletunerError(Problem(code="E-EXPLAIN-WHAT"), ExitCode.USAGE)
    pages = [explain(word, language) for word in words]
    for word, page in zip(words, pages, strict=True):
        if page is None:
            raise ConfigError(_unknown(word))
    print("\n\n".join(page for page in pages if page is not None))
    return 0


def _schema(words: list[str]) -> int:
    from simpletuner.config.schema import json_schema

    if words:
        raise SimpletunerError(Problem(code="E-ARGUMENT-EXTRA", params={"argument": words[0]}), ExitCode.USAGE)
    print(json.dumps(json_schema(), ensure_ascii=False, indent=2))
    return 0


def _load(words: Sequence[str], *, check_folders: bool = True) -> LoadedConfig:
    """What this version cannot do yet is no mistake of the configuration: it is shown as a warning here."""
    return load_run_config(words, environ=os.environ, cwd=Path.cwd(), must_run=False, check_folders=check_folders)


def _check_datasets(loaded: LoadedConfig) -> None:
    """Look into the folders as a run would, by their names only. Raises DatasetError."""
    from simpletuner.data.plan import folder_problems
    from simpletuner.train.start import dataset_spec

    datasets = loaded.datasets
    pictures = (*datasets.images, *datasets.evals)
    found = folder_problems([dataset_spec(d, loaded.config, datasets.embeds_of(d)) for d in pictures])
    if found:
        raise DatasetError([*found, *loaded.warnings])


def _take(flag: str, words: list[str]) -> tuple[bool, list[str]]:
    return flag in words, [word for word in words if word != flag]


def _summary(loaded: LoadedConfig, language: str) -> str:
    by_severity = [problem.severity for problem in loaded.warnings]
    file = shown_path(loaded.config_path, Path.cwd()) if loaded.config_path else text("config.no_file", language)
    return text(
        "config.valid",
        language,
        file=file,
        datasets=len(loaded.datasets.images),
        warnings=by_severity.count(Severity.WARNING),
    )


def _problems_json(problems: Sequence[Problem], language: str) -> str:
    return json.dumps(problems_as_data(problems, language), ensure_ascii=False, indent=2)


def _unknown(word: str) -> Problem:
    from simpletuner.config.names import closest_option

    suggestion = closest_option(word)
    if suggestion is None:
        return Problem(code="E-KEY-UNKNOWN", params={"key": word})
    fixes = (Fix(key="simpletuner config explain", value=suggestion),)
    return Problem(code="E-KEY-MISSPELT", params={"key": word, "suggestion": suggestion}, fixes=fixes)
