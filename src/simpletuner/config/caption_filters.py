"""`caption_filter_list` as people write it: a list, or a file of entries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from simpletuner.catalog.caption_filters import BadFilterError, parse_filter
from simpletuner.config.json_text import read_text
from simpletuner.config.paths import fill_path, is_file, shown_path
from simpletuner.problems import ConfigError, Problem

KEY = "caption_filter_list"


def read_filters(text: str, cwd: Path) -> list[str]:
    """The entries of the file that `text` names: a JSON list of texts, or one entry per line.

    Raises: ConfigError: there is no such file, it cannot be read, or its list holds something else.
    """
    path = Path(fill_path(text, cwd))
    shown = shown_path(path, cwd)
    if not is_file(path):
        raise ConfigError(Problem(code="E-FILTER-FILE", params={"key": KEY, "file": shown}))
    content = read_text(path, shown)
    if path.suffix.lower() != ".json":
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        entries = json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(Problem(code="E-FILTER-JSON", params={"key": KEY, "file": shown}))
    return [entry for entry in entries if entry]


def bad_filters(entries: Iterable[str]) -> Iterator[Problem]:
    """One problem for each entry that is no filter."""
    for entry in entries:
        try:
            parse_filter(entry)
        except BadFilterError as error:
            params = {"key": KEY, "entry": entry, "reason": str(error)}
            yield Problem(code="E-FILTER-EXPRESSION", params=params, path=f"/{KEY}")
