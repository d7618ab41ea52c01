"""The `simpletuner` command: finds the subcommand, imports only that, and turns every failure into a message."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner import __version__
from simpletuner.i18n import choose_language, text
from simpletuner.problems import ExitCode, Fix, Problem, SimpletunerError

COMMANDS = (
    "train",
    "generate",
    "estimate",
    "plot",
    "convert",
    "merge",
    "extract",
    "resize",
    "inspect",
    "config",
    "dataset",
    "examples",
    "runs",
)
"""Each is a module of this folder with `run(argv, language) -> exit code`."""

_HELP_FLAGS = ("-h", "--help", "help")


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """The words of the command line, sorted. `rest` are the subcommand's own."""

    command: str | None
    rest: tuple[str, ...]
    language: str | None
    debug: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); return its exit status."""
    call = sort_words(sys.argv[1:] if argv is None else argv)
    language = choose_language(call.language, os.environ)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that somebody replaced
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _dispatch(call, language)
        sys.stdout.flush()
        return code
    except SimpletunerError as error:
        _show_traceback(call)
        _report(error.problems, language)
        return int(error.exit_code)
    except KeyboardInterrupt:
        _show_traceback(call)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left, as `head` does. Python would complain once more while it shuts down.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)
    except Exception as error:
        _show_traceback(call)
        return _report_unexpected(error, language)


def sort_words(argv: Sequence[str]) -> Invocation:
    """Take --lang and --debug out, wherever they stand; the first word left is the command."""
    words: list[str] = []
    language: str | None = None
    debug = False
    rest = iter(argv)
    for word in rest:
        if word == "--":
            words += [word, *rest]
        elif word == "--lang":
            language = next(rest, None)
        elif word.startswith("--lang="):
            language = word.partition("=")[2]
        else:
            debug = debug or word.lower() in ("--debug", "--debug=true", "debug=true")
            words.append(word)
    if words and words[0] == "--debug":
        words = [*words[1:2], "--debug", *words[2:]] if len(words) > 1 else []
    command = words[0] if words else None
    return Invocation(command=command, rest=tuple(words[1:]), language=language, debug=debug)


def help_page(language: str) -> str:
    """What `simpletuner --help` prints."""
    width = max(map(len, COMMANDS))
    commands = (f"  {name:{width}}  {text(f'command.{name}', language)}" for name in COMMANDS)
    return text("main.help", language, version=__version__, commands="\n".join(commands))


def _dispatch(call: Invocation, language: str) -> int:
    if call.command is None or call.command in _HELP_FLAGS:
        print(help_page(language))
        return 0
    if call.command in ("--version", "-v", "-V"):
        print(f"simpletuner {__version__}")
        return 0
    if call.command not in COMMANDS:
        raise SimpletunerError(_unknown_command(call.command), ExitCode.USAGE)
    # Only a run has an option of this name; the other commands just show tracebacks.
    words = call.rest if call.command == "train" else tuple(word for word in call.rest if word != "--debug")
    module = importlib.import_module(f"simpletuner.cli.{call.command}")
    code: int = module.run(words, language)
    return code


def _unknown_command(word: str) -> Problem:
    commands = ", ".join(COMMANDS)
    guess = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.6)
    if not guess:
        return Problem(code="E-COMMAND", params={"word": word, "commands": commands})
    fixes = (Fix(key="simpletuner", value=guess[0]),)
    return Problem(code="E-COMMAND-MISSPELT", params={"word": word, "suggestion": guess[0]}, fixes=fixes)


def _report(problems: Sequence[Problem], language: str) -> None:
    from simpletuner.cli.report import print_problems

    print_problems(problems, language)


def _report_unexpected(error: Exception, language: str) -> int:
    """An OSError is mostly the machine's state, not a mistake of ours; anything else is."""
    from simpletuner.events.oserrors import problem_from_oserror

    if isinstance(error, OSError) and error.filename is not None:
        _report([problem_from_oserror(error, str(error.filename))], language)
        return int(ExitCode.ENVIRONMENT)
    params = {"kind": type(error).__name__, "message": str(error).strip() or "-"}
    _report([Problem(code="E-UNEXPECTED", params=params)], language)
    return int(ExitCode.FAILED)


def _show_traceback(call: Invocation) -> None:
    if call.debug:
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
