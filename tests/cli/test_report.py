"""Problems at a terminal: sentences are broken between words, and nothing is broken that somebody copies."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.cli.report import print_problems, problem_block
from simpletuner.problems import Fix, Problem

WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=90), min_size=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def problem(text: str) -> Problem:
    """One whose sentence ends with `text`."""
    return Problem(
        code="E-UNEXPECTED", params={"kind": "Error", "message": text}, fixes=(Fix(key="a", value="b c " * 40),)
    )


@given(WORDS, st.integers(40, 200), st.sampled_from(["en", "es"]))
def test_breaking_loses_no_word_and_only_a_long_word_is_wider_than_the_terminal(words, width, language):
    whole = list(problem_block(problem(" ".join(words)), language))
    broken = list(problem_block(problem(" ".join(words)), language, width=width))
    assert " ".join(" ".join(broken).split()) == " ".join(" ".join(whole).split())
    assert (broken[0], broken[-1]) == (whole[0], whole[-1])  # code and fix
    for line in broken[1:-1]:
        assert line.startswith("  ")
        assert len(line) <= width or " " not in line.strip()


def test_lists_keep_their_indent():
    paths = "\n".join(f"  /a/rather/long/folder/number/{n}" for n in range(2))
    lines = list(problem_block(Problem(code="E-RUN-AMBIGUOUS", params={"paths": paths}), "en", width=60))
    assert "    /a/rather/long/folder/number/1" in lines


@pytest.mark.parametrize(("columns", "lines"), [(60, 5), (500, 1)])
def test_a_terminal_is_asked_for_its_width(monkeypatch, columns, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    print_problems([problem("word " * 40 + "end")], "en", out=out)
    shown = out.getvalue().split("This is a bug")[0].splitlines()[1:]
    assert len([line for line in shown if line.strip()]) == lines
    assert max(map(len, shown)) <= columns


def test_a_file_gets_whole_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = io.StringIO()
    print_problems([problem("word " * 40 + "end")], "en", out=out)
    assert f"{'word ' * 40}end" in out.getvalue()
