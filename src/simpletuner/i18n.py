"""Texts for people, in English and Spanish. Standard library only.

Catalogs are flat JSON objects, `locales/<language>/<area>.json`, key -> text with `{named}` braces. English is the
fallback for a key that a language lacks (a test asserts that none does).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from simpletuner.problems import Problem

LANGUAGES = ("en", "es")
_LOCALES_DIR = Path(__file__).parent / "locales"


def choose_language(requested: str | None, environ: Mapping[str, str] | None = None) -> str:
    """Return "es" or "en": the requested one, else SIMPLETUNER_LANG, else the locale variables, else English."""
    environ = os.environ if environ is None else environ
    wanted = (requested, *(environ.get(name) for name in ("SIMPLETUNER_LANG", "LC_ALL", "LC_MESSAGES", "LANG")))
    for value in wanted:
        if value and value[:2].lower() in LANGUAGES:
            return value[:2].lower()
    return "en"


@cache
def catalog(language: str) -> Mapping[str, str]:
    """Every text of one language, merged from its area files."""
    texts: dict[str, str] = {}
    for path in sorted((_LOCALES_DIR / language).glob("*.json")):
        area: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        assert not texts.keys() & area.keys(), f"{path} repeats {sorted(texts.keys() & area.keys())}"
        texts.update(area)
    return texts


def text(key: str, language: str, /, **params: object) -> str:
    """The text of `key` with its braces filled; the key itself if no catalog has it."""
    template = catalog(language).get(key) or catalog("en").get(key) or key
    return template.format(**params)


def render_problem(problem: Problem, language: str) -> tuple[str, str | None]:
    """Return (what is wrong, what to do or None) of a problem as sentences."""
    params = dict(problem.params)
    title = text(f"problem.{problem.code}.title", language, **params)
    hint_key = f"problem.{problem.code}.hint"
    has_hint = hint_key in catalog("en")
    return title, text(hint_key, language, **params) if has_hint else None
