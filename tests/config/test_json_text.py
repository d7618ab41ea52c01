import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.json_text import MAX_DEPTH, parse_json, repeated_key_warnings
from simpletuner.problems import ConfigError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 2]))
def test_reads_what_json_writes(value, indent):
    assert parse_json(json.dumps(value, indent=indent), "x").value == value


@given(VALUES)
def test_a_trailing_comma_changes_nothing(value):
    text = json.dumps([value, {"key": value}], indent=1)
    relaxed = text[:-1].rstrip() + " , \n]"
    assert parse_json(relaxed, "x").value == [value, {"key": value}]


@settings(max_examples=300)
@given(st.text(alphabet='{}[]",:0123456789.eE+-tfn \n\\ulas/') | st.text())
def test_any_text_is_a_value_or_one_located_error(text):
    try:
        found = parse_json(text, "c.json")
    except ConfigError as error:
        (problem,) = error.problems
        line, column = problem.params["line"], problem.params["column"]
        assert problem.origin == f"c.json:{line}:{column}"
        assert 1 <= line <= text.count("\n") + 1
        assert 1 <= column <= len(text) + 1
    else:
        assert _without_trailing_commas(text) == found.value


def _without_trailing_commas(text):
    """The value by the standard parser, for texts that hold no trailing comma; else what we found ourselves."""
    try:
        return json.loads(text)
    except ValueError:
        assert "," in text
        return parse_json(text, "x").value


def test_lines_are_those_of_the_keys():
    text = '{\n "a": 1,\n\n "b": [\n  {"c/d": 2},\n  3\n ]\n}'
    lines = parse_json(text, "x").lines
    assert lines == {"/a": 2, "/b": 4, "/b/0": 5, "/b/0/c~1d": 5, "/b/1": 6}


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ('{"a": 1\n "b": 2}', "E-JSON-COMMA", 2, 2),
        ('{"a" 1}', "E-JSON-COLON", 1, 6),
        ('{\n// note\n"a": 1}', "E-JSON-KEY", 2, 1),
        ("{'a': 1}", "E-JSON-KEY", 1, 2),
        ('{"a": True}', "E-JSON-VALUE", 1, 7),
        ('{"a": 01}', "E-JSON-VALUE", 1, 7),
        ('{"a": NaN}', "E-JSON-VALUE", 1, 7),
        ('{"a": }', "E-JSON-VALUE", 1, 7),
        ('{"a": "x', "E-JSON-STRING", 1, 7),
        (r'{"a": "C:\data"}', "E-JSON-STRING", 1, 10),
        ('{"a": 1}\n}', "E-JSON-EXTRA", 2, 1),
        ('{"a": [1,', "E-JSON-END", 1, 10),
        ("", "E-JSON-END", 1, 1),
        ("[" * (MAX_DEPTH + 2), "E-JSON-DEPTH", 1, MAX_DEPTH + 2),
    ],
)
def test_every_mistake_has_its_place(text, code, line, column):
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "c.json")
    (problem,) = caught.value.problems
    assert (problem.code, problem.params["line"], problem.params["column"]) == (code, line, column)


def test_a_repeated_key_is_said_with_the_line_of_the_one_that_counts():
    document = parse_json('{"a": 1,\n"a": 2}', "c.json")
    assert document.value == {"a": 2}
    (warning,) = repeated_key_warnings(document, "c.json")
    assert (warning.code, warning.origin, warning.params) == ("W-KEY-REPEATED", "c.json:2", {"key": "a"})
