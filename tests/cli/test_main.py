"""The command line as a whole: speed, dispatch, and what a user sees when something goes wrong."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner import __version__
from simpletuner.cli import main as cli
from simpletuner.cli.main import COMMANDS, main, sort_words
from simpletuner.problems import ExitCode, Problem, SimpletunerError


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLETUNER_LANG", "en")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "CONFIG_PATH", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def in_a_process(*argv, cwd):
    """(seconds of processor time, exit status, output) of the command line in a fresh interpreter.

    Processor time, start of the interpreter included: what a user waits for on a machine that is not busy.
    """
    code = (
        "import sys, time\n"
        "from simpletuner.cli.main import main\n"
        f"status = main({list(argv)!r})\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)))\n"
        "print('SECONDS', time.process_time())\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    seconds = float(done.stdout.rsplit("SECONDS ", 1)[1])
    return seconds, done.returncode, done.stdout + done.stderr


def test_help_is_fast_and_imports_nothing_heavy(tmp_path):
    seconds, status, output = in_a_process("--help", cwd=tmp_path)
    assert status == 0
    assert "HEAVY []" in output
    assert seconds < 0.25
    assert all(command in output for command in COMMANDS)


def test_a_typo_is_reported_before_anything_heavy_is_imported(tmp_path):
    seconds, status, output = in_a_process("train", "--example", "demo", "--lora_rnk=4", cwd=tmp_path)
    assert status == ExitCode.USAGE
    assert "HEAVY []" in output
    assert "Did you mean lora_rank?" in output
    assert seconds < 0.8


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"simpletuner {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_in_both_languages(capsys, argv):
    assert main([*argv, "--lang", "es"]) == 0
    spanish = capsys.readouterr().out
    assert main([*argv, "--lang=en"]) == 0
    english = capsys.readouterr().out
    assert spanish.startswith("SimpleTuner")
    assert "Comandos" in spanish
    assert "Commands" in english


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["-h", "memory"], ["--help-all"]])
@pytest.mark.parametrize("language", ["en", "es"])
def test_help_of_train(capsys, argv, language):
    assert main(["train", *argv, "--lang", language]) == 0
    page = capsys.readouterr().out
    assert "--gradient_checkpointing" in page
    assert ("--lora_rank" in page) == (argv != ["-h", "memory"])
    assert "train.help" not in page


def test_an_unknown_command_is_guessed(capsys):
    assert main(["trian"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("✗ E-COMMAND-MISSPELT\n  trian is not a command. Did you mean train?")
    assert main(["qqq", "--lang=es"]) == ExitCode.USAGE
    assert (
        "El comando qqq no existe.\n  Hay estos: train, generate, estimate, config, examples, runs."
        in capsys.readouterr().err
    )


def test_an_unknown_group(capsys):
    assert main(["train", "-h", "memroy"]) == ExitCode.USAGE
    assert "There is no group memroy." in capsys.readouterr().err
    assert main(["train", "-h", "memroy", "--lang", "es"]) == ExitCode.USAGE
    assert "No existe el grupo memroy." in capsys.readouterr().err


class FakeCommand:
    """Stands where a subcommand's module would be, and fails as told."""

    def __init__(self, failure):
        self.failure = failure

    def run(self, argv, language):
        raise self.failure


def fail_with(monkeypatch, failure, *argv):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: FakeCommand(failure))
    return main(["train", *argv])


def test_errors_of_ours_become_messages(monkeypatch, capsys):
    problem = Problem(code="E-DEVICE", params={"value": "tpu"}, origin="--device")
    assert fail_with(monkeypatch, SimpletunerError([problem] * 2, ExitCode.DATASET)) == ExitCode.DATASET
    error = capsys.readouterr().err
    assert error.count("✗ E-DEVICE  --device\n  tpu is not a device.\n") == 2
    assert "Traceback" not in error


@pytest.mark.parametrize("flags", [["--debug"], ["--debug=true"]])
def test_debug_shows_the_traceback(monkeypatch, capsys, flags):
    assert fail_with(monkeypatch, ZeroDivisionError("division by zero"), *flags) == ExitCode.FAILED
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "E-UNEXPECTED" in error


@pytest.mark.parametrize(("language", "words"), [("en", "This is a bug"), ("es", "Es un fallo")])
def test_an_unexpected_error_is_one_clear_message(monkeypatch, capsys, language, words):
    assert fail_with(monkeypatch, KeyError("x"), "--lang", language) == ExitCode.FAILED
    error = capsys.readouterr().err
    assert "KeyError: 'x'" in error
    assert words in error
    assert "Traceback" not in error


def test_errors_of_the_system_name_the_file(monkeypatch, capsys):
    failure = OSError(28, "No space left on device", "/full/file")
    assert fail_with(monkeypatch, failure) == ExitCode.ENVIRONMENT
    error = capsys.readouterr().err
    assert "E-DISK-FULL" in error
    assert "/full/file" in error


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    assert fail_with(monkeypatch, KeyboardInterrupt()) == ExitCode.INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    code = "import sys; from simpletuner.cli.main import main; sys.exit(main(['train', '--help-all']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@given(st.lists(st.text()))
def test_words_are_sorted_without_losing_any(words):
    call = sort_words(words)
    kept = [word for word in (call.command, *call.rest) if word is not None]
    assert sorted(kept) == sorted(call_without_language(words))


def call_without_language(words):
    """The words that are not --lang, its value, or a --debug that is the only word."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--":
            return [*kept, word, *rest]
        if word == "--lang":
            next(rest, None)
        elif not word.startswith("--lang="):
            kept.append(word)
    return [] if kept == ["--debug"] else kept


def test_debug_may_stand_before_the_command():
    call = sort_words(["--debug", "train", "x.json"])
    assert (call.command, call.rest, call.debug) == ("train", ("--debug", "x.json"), True)


@pytest.mark.parametrize(
    ("environ", "is_terminal", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
    ],
)
def test_colour_is_for_terminals(environ, is_terminal, expected):
    from simpletuner.cli.report import has_color

    class Out:
        def isatty(self):
            return is_terminal

    assert has_color(Out(), environ) is expected
