import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.env import parse_env_file, split_words
from simpletuner.problems import ConfigError

WORDS = st.text(alphabet="abcXYZ019._=/:-, #$'\"", max_size=12)


def values(text, environ=None):
    return {v.name: v.value for v in parse_env_file(text, "config.env", environ or {})}


@given(st.lists(WORDS.filter(lambda word: "'" not in word), max_size=6))
def test_words_in_single_quotes_come_back(words):
    assert split_words(" ".join(f"'{word}'" for word in words)) == words


@given(st.lists(st.text(alphabet="abc019.=/:-,", min_size=1), max_size=6))
def test_plain_words_are_split_as_a_shell_does(words):
    assert split_words(" ".join(words)) == shlex.split(" ".join(words))


@settings(max_examples=300)
@given(st.text())
def test_splitting_never_fails(text):
    assert all(isinstance(word, str) for word in split_words(text))


def test_windows_paths_survive():
    assert split_words(r"--output_dir C:\data\new --x") == ["--output_dir", r"C:\data\new", "--x"]


def test_the_specifications_block_of_flags_is_read():
    text = """--enable_group_offload \\
--group_offload_type block_level \\
--group_offload_use_stream \\
# optional: spill offloaded weights to disk instead of RAM
# --group_offload_to_disk_path /fast-ssd/simpletuner-offload
"""
    assert split_words(text) == [
        "--enable_group_offload",
        "--group_offload_type",
        "block_level",
        "--group_offload_use_stream",
    ]


@settings(max_examples=300)
@given(st.text(alphabet="ABc= \n#\"'$+{}\\;x1") | st.text())
def test_any_file_is_read_or_refused_with_its_line(text):
    try:
        parse_env_file(text, "config.env", {})
    except ConfigError as error:
        (problem,) = error.problems
        assert problem.code == "E-ENV-SYNTAX"
        assert problem.origin == f"config.env:{problem.params['line']}"


@given(st.text(alphabet=st.characters(exclude_characters="'\r", exclude_categories=("Cs",))))
def test_single_quotes_keep_everything(value):
    assert values(f"export A='{value}'") == {"A": value}


def test_assignments_append_expand_and_ignore_comments():
    text = """
# a comment
export BASE=/data   # and another
export MODEL_NAME="$BASE/${KIND}"
TRAINER_EXTRA_ARGS="--lora_rank 4"
TRAINER_EXTRA_ARGS+=" --seed 1"
"""
    assert values(text, {"KIND": "turbo"}) == {
        "BASE": "/data",
        "MODEL_NAME": "/data/turbo",
        "TRAINER_EXTRA_ARGS": "--lora_rank 4 --seed 1",
    }


def test_the_line_of_a_variable_is_its_last_assignment():
    (variable,) = parse_env_file("A=1\n\nA=2\n", "config.env", {})
    assert (variable.value, variable.line) == ("2", 3)


@pytest.mark.parametrize("statement", ["source x.sh", "A=$(nproc)", "A=`nproc`", "A='open", "A=a b", "if true; then"])
def test_nothing_is_executed_and_no_statement_is_skipped(statement):
    with pytest.raises(ConfigError) as caught:
        parse_env_file(f"B=1\n{statement}\n", "config.env", {})
    assert caught.value.problems[0].origin == "config.env:2"
