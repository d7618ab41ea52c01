"""Texts: both languages have the same ones, with the same braces, and none is missing or idle."""

import ast
import json
import re
import string
from pathlib import Path

import pytest

import simpletuner
from simpletuner.i18n import LANGUAGES, catalog, choose_language, render_problem, text
from simpletuner.problems import Problem

PACKAGE = Path(simpletuner.__file__).parent
AREAS = sorted(path.name for path in (PACKAGE / "locales/en").glob("*.json"))
# The English help of an option is its declaration.
ONLY_TRANSLATED = re.compile(r"(option|dataset)\.[\w.]+\.help")
CODE = re.compile(r"[EWI]-[A-Z][A-Z0-9]*(-[A-Z0-9]+)*")


def area(language, name):
    return json.loads((PACKAGE / "locales" / language / name).read_text(encoding="utf-8"))


def braces(template):
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def test_the_languages_have_the_same_areas():
    assert {path.name for path in (PACKAGE / "locales/es").glob("*.json")} == set(AREAS)
    assert {path.name for path in (PACKAGE / "locales").iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("name", AREAS)
def test_an_area_has_the_same_texts_with_the_same_braces(name):
    english, spanish = area("en", name), area("es", name)
    assert {key for key in spanish if not ONLY_TRANSLATED.fullmatch(key)} == english.keys()
    for key, template in english.items():
        assert braces(spanish[key]) == braces(template), key
        assert spanish[key].strip() == spanish[key] != "", key


def codes_in_sources():
    """(codes written in full, beginnings of codes that are put together)."""
    whole, beginnings = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                whole.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                start = str(node.values[0].value)
                if re.fullmatch(r"[EWI]-[A-Z-]*", start):
                    beginnings.add(start)
    return whole, beginnings


def test_every_code_has_a_text_and_every_text_a_code():
    whole, beginnings = codes_in_sources()
    titles = {key.split(".")[1] for key in catalog("en") if key.startswith("problem.") and key.endswith(".title")}
    hints = {key.split(".")[1] for key in catalog("en") if key.startswith("problem.") and key.endswith(".hint")}
    assert not whole - titles
    assert not {code for code in titles - whole if not code.startswith(tuple(beginnings))}
    assert hints <= titles


def test_a_text_falls_back_to_english_and_then_to_its_key():
    key = next(iter(area("en", "config.json")))
    assert text(key, "xx", **dict.fromkeys(braces(catalog("en")[key]), "?"))
    assert text("no.such.text", "es") == "no.such.text"


@pytest.mark.parametrize(
    ("requested", "environ", "language"),
    [
        (None, {}, "en"),
        ("es", {"SIMPLETUNER_LANG": "en"}, "es"),
        (None, {"SIMPLETUNER_LANG": "es", "LANG": "en_US.UTF-8"}, "es"),
        (None, {"LANG": "es_AR.UTF-8"}, "es"),
        (None, {"LC_ALL": "C", "LANG": "es_ES"}, "es"),
        ("fr", {"LANG": "fr_FR"}, "en"),
    ],
)
def test_the_language_is_chosen_in_order(requested, environ, language):
    assert choose_language(requested, environ) == language


def test_braces_in_values_stay_as_they_are():
    problem = Problem(code="E-KEY-UNKNOWN", params={"key": "{x}"})
    assert "{x}" in render_problem(problem, "en")[0]


# One word for one thing: what a reader of the Spanish texts should never meet, and what is said instead.
AVOIDED = {
    r"conjuntos? de datos": "dataset",
    r"cubetas?": "bucket",
    r"línea de órdenes|la misma orden": "comando",
    r"librerías?": "biblioteca",
    r"directorios?": "carpeta",
    r"ficheros?": "archivo",
    r"puntos? de control": "checkpoint",
    r"ritmo de aprendizaje": "tasa de aprendizaje",
}
ROOT = Path(__file__).resolve().parent.parent
SPANISH = [*(PACKAGE / "locales" / "es").glob("*.json"), *ROOT.glob("*.es.md"), *(ROOT / "docs").rglob("*.es.md")]


@pytest.mark.parametrize("path", sorted(SPANISH), ids=lambda path: path.name)
def test_spanish_has_one_word_for_one_thing(path):
    texts = " ".join(path.read_text(encoding="utf-8").split())  # over the ends of lines, too
    for pattern, instead in AVOIDED.items():
        found = re.search(rf"\b({pattern})\b", texts, re.IGNORECASE)
        assert found is None, f"{found[0]!r}: say {instead!r}"
