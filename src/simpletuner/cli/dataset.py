"""`simpletuner dataset`: what is in the datasets, what a run would make of it, and filling its caches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.cli.command_console import CommandConsole
from simpletuner.cli.report import print_problems, problems_as_data
from simpletuner.config.load import LoadedConfig, load_run_config
from simpletuner.config.search import SUFFIXES
from simpletuner.events.progress import SinkReporter
from simpletuner.i18n import text
from simpletuner.problems import ExitCode, Problem, Severity, SimpletunerError

if TYPE_CHECKING:
    from simpletuner.train.caching import CacheSummary

ACTIONS = ("scan", "buckets", "captions", "cache")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words of the command, sorted. `shows_all`: names without a limit. `words`: those of the configuration."""

    as_json: bool
    shows_all: bool
    words: tuple[str, ...]


def run(argv: Sequence[str], language: str) -> int:
    """Carry out `simpletuner dataset ACTION ...`; return the exit status."""
    action, *words = argv or ("--help",)
    if action in ("-h", "--help", "help") or "-h" in words or "--help" in words:
        print(text("data_command.help", language))
        return 0
    if action not in ACTIONS:
        params = {"word": action, "commands": ", ".join(ACTIONS)}
        raise SimpletunerError(Problem(code="E-COMMAND", params=params), ExitCode.USAGE)
    asked = sort_words(words, cwd=Path.cwd())
    carry_out: Callable[[LoadedConfig, Asked, str], int] = {
        "scan": _scan,
        "buckets": _buckets,
        "captions": _captions,
        "cache": _cache,
    }[action]
    try:
        loaded = load_run_config(
            asked.words, environ=os.environ, cwd=Path.cwd(), must_run=action == "cache", check_folders=False
        )
        return carry_out(loaded, asked, language)
    except SimpletunerError as error:
        if not asked.as_json:
            raise
        print(json.dumps({"problems": problems_as_data(error.problems, language)}, ensure_ascii=False, indent=2))
        return int(error.exit_code)


def sort_words(words: Sequence[str], *, cwd: Path) -> Asked:
    """Take the command's own flags out. The path of a datasets file becomes the option that names one, together with
    the configuration beside it, if there is one."""
    own = {"--json", "--all"}
    rest = [word for word in words if word not in own]
    for at, word in enumerate(rest):
        is_value = at > 0 and rest[at - 1].startswith("--") and "=" not in rest[at - 1]
        if not is_value and _is_datasets_file(cwd / word):
            folder = (cwd / word).parent
            beside = [str(folder)] if any((folder / f"config{suffix}").is_file() for suffix in SUFFIXES) else []
            rest[at : at + 1] = [*beside, "--data_backend_config", str(cwd / word)]
            break
    return Asked(as_json="--json" in words, shows_all="--all" in words, words=tuple(rest))


def _scan(loaded: LoadedConfig, asked: Asked, language: str) -> int:
    from simpletuner.cli.dataset_data import survey_as_data
    from simpletuner.cli.dataset_text import scan_lines
    from simpletuner.train.survey import survey_run

    survey = survey_run(loaded, run=_reporter(language))
    if asked.as_json:
        return _print_json(survey_as_data(survey), survey.problems, language)
    return _print_page(scan_lines(survey, language, shows_all=asked.shows_all), survey.problems, language)


def _buckets(loaded: LoadedConfig, asked: Asked, language: str) -> int:
    from simpletuner.cli.dataset_data import buckets_as_data
    from simpletuner.cli.dataset_text import bucket_lines
    from simpletuner.train.survey import survey_run

    survey = survey_run(loaded, run=_reporter(language), with_duplicates=False)
    if asked.as_json:
        return _print_json(buckets_as_data(survey), survey.problems, language)
    return _print_page(bucket_lines(survey, language, shows_all=asked.shows_all), survey.problems, language)


def _captions(loaded: LoadedConfig, asked: Asked, language: str) -> int:
    from simpletuner.cli.dataset_data import captions_as_data
    from simpletuner.cli.dataset_text import caption_lines
    from simpletuner.train.survey import survey_run_captions

    report = survey_run_captions(loaded, run=_reporter(language))
    if asked.as_json:
        return _print_json(captions_as_data(report), report.problems, language)
    return _print_page(caption_lines(report, language, shows_all=asked.shows_all), report.problems, language)


def _cache(loaded: LoadedConfig, asked: Asked, language: str) -> int:
    reporter = _reporter(language)
    with reporter.phase("environment"):
        from simpletuner.train.caching import fill_caches

    summary = fill_caches(loaded, run=reporter)
    print_cached(summary, language, as_json=asked.as_json)
    return 0


def print_cached(summary: CacheSummary, language: str, *, as_json: bool) -> None:
    """What was cached, on standard output."""
    from simpletuner.cli.dataset_data import cached_as_data
    from simpletuner.cli.dataset_text import cached_lines

    if as_json:
        print(json.dumps(cached_as_data(summary), ensure_ascii=False, indent=2))
    else:
        print("\n".join(cached_lines(summary, language)))


def _reporter(language: str) -> SinkReporter:
    """Progress on standard error."""
    return SinkReporter([CommandConsole(language, sys.stderr)])


def _print_json(data: dict[str, object], problems: Sequence[Problem], language: str) -> int:
    print(json.dumps({**data, "problems": problems_as_data(problems, language)}, ensure_ascii=False, indent=2))
    return _exit_code(problems)


def _print_page(lines: Iterable[str], problems: Sequence[Problem], language: str) -> int:
    print("\n".join(lines))
    sys.stdout.flush()
    if problems:
        print(file=sys.stderr)
    print_problems(problems, language)
    return _exit_code(problems)


def _exit_code(problems: Sequence[Problem]) -> int:
    """As a run with these datasets would end at once."""
    is_refused = any(problem.severity is Severity.ERROR for problem in problems)
    return int(ExitCode.DATASET if is_refused else ExitCode.OK)


def _is_datasets_file(path: Path) -> bool:
    """Whether it is a JSON file with a list in it."""
    try:
        with path.open("rb") as stream:
            return path.suffix == ".json" and stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except (OSError, ValueError):
        return False
