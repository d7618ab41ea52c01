import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.argv import parse_arguments
from simpletuner.config.root import options
from simpletuner.config.settings import OriginKind

SPELLINGS = (
    lambda key, value: [f"--{key}", value],
    lambda key, value: [f"--{key}={value}"],
    lambda key, value: [f"--{key.replace('_', '-')}={value}"],
    lambda key, value: [f"{key}={value}"],
    lambda key, value: ["--set", f"{key}={value}"],
    lambda key, value: [f"--set={key}={value}"],
)
VALUED = sorted(name for name, option in options().items() if option.kind != "flag")
FLAGS = sorted(name for name, option in options().items() if option.kind == "flag")


def pairs(words):
    line = parse_arguments(words)
    assert not line.problems
    return [(s.key.lstrip("-").replace("-", "_"), s.value) for s in line.settings]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(VALUED), st.text(min_size=1).filter(lambda v: not v.startswith("-")), st.integers(0, 5)
        ),
        max_size=6,
    )
)
def test_every_spelling_says_the_same(chosen):
    words = [word for key, value, how in chosen for word in SPELLINGS[how](key, value)]
    assert pairs(words) == [(key, value) for key, value, _ in chosen]


@given(st.sampled_from(FLAGS), st.sampled_from(FLAGS))
def test_a_bare_flag_is_true_and_takes_no_neighbour(first, second):
    assert pairs([f"--{first}", f"--no-{second}"]) == [(first, True), (second, False)]


@pytest.mark.parametrize("word", ["true", "False", "1", "no"])
def test_a_flag_takes_the_word_behind_it_if_it_says_true_or_false(word):
    assert pairs(["--debug", word]) == [("debug", word)]
    assert pairs(["--debug", "config.json"]) == [("debug", True)]


@given(st.integers(max_value=-1))
def test_negative_numbers_are_values(number):
    assert pairs(["--seed", str(number)]) == [("seed", str(number))]


@settings(max_examples=300)
@given(st.lists(st.text() | st.sampled_from(["--", "-", "--set", "--env", "--seed", "a=b", "--no-debug", "-e", "x"])))
def test_any_words_are_read_without_an_exception(words):
    line = parse_arguments(words)
    assert all(setting.origin.kind is OriginKind.FLAG for setting in line.settings)
    assert all(problem.code.startswith("E-") for problem in line.problems)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["my.json"], ("my.json", None, None, None)),
        (["--env", "night"], (None, "night", None, None)),
        (["-env", "night"], (None, "night", None, None)),
        (["--example=demo"], (None, None, "demo", None)),
        (["-e", "demo"], (None, None, "demo", None)),
        (["--config_path", "a/b", "--config-backend", "toml"], ("a/b", None, None, "toml")),
    ],
)
def test_words_that_choose_the_file(words, expected):
    line = parse_arguments(words)
    assert (line.config, line.environment, line.example, line.backend) == expected
    assert not line.settings
    assert not line.problems


def test_origins_are_as_written():
    line = parse_arguments(["--Lora-Rank=4", "seed=1", "--set", "debug=true"])
    assert [str(s.origin) for s in line.settings] == ["--Lora-Rank", "seed", "--set debug"]
