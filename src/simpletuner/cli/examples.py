"""`simpletuner examples`: ready configurations that the package ships."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.names import closest
from simpletuner.config.paths import EXAMPLES_DIR, shown_path
from simpletuner.config.search import example_names
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.i18n import text
from simpletuner.problems import ExitCode, Fix, Problem, SimpletunerError

ACTIONS = ("list", "copy")


def run(argv: Sequence[str], language: str) -> int:
    """Carry out `simpletuner examples list|copy`; return the exit status."""
    action, *words = argv or ("--help",)
    if action in ("-h", "--help", "help") or "-h" in words or "--help" in words:
        print(text("examples.help", language))
        return 0
    match action:
        case "list":
            return _list(words, language)
        case "copy":
            return _copy(words, language)
    params = {"word": action, "commands": ", ".join(ACTIONS)}
    raise SimpletunerError(Problem(code="E-COMMAND", params=params), ExitCode.USAGE)


def _list(words: Sequence[str], language: str) -> int:
    if words:
        raise _usage("E-ARGUMENT-EXTRA", argument=words[0])
    width = max(map(len, example_names()))
    for name in example_names():
        print(f"{name:{width}}  {text(f'example.{name}', language)}")
    return 0


def _copy(words: Sequence[str], language: str) -> int:
    name, destination = _read_copy_words(words)
    if name not in example_names():
        guess = closest(name, example_names())
        params = {"name": name, "examples": ", ".join(example_names())}
        fixes = (Fix(key="simpletuner examples copy", value=guess),) if guess else ()
        raise SimpletunerError(Problem(code="E-EXAMPLE-UNKNOWN", params=params, fixes=fixes), ExitCode.USAGE)
    folder = Path("config") / name if destination is None else Path(destination)
    existing = [folder / path.name for path in _files(name) if (folder / path.name).exists()]
    if existing:
        raise _usage("E-EXAMPLE-EXISTS", file=existing[0].as_posix())
    with os_errors_as_problems(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in _files(name):
            _copy_file(path, folder, name)
    config = shown_path(folder / "config.json", Path.cwd())
    print(text("examples.copied", language, folder=shown_path(folder, Path.cwd()), config=config))
    return 0


def _copy_file(path: Path, folder: Path, name: str) -> None:
    """Copy one file; references to the example's own files then mean the copies."""
    if path.suffix != ".json":
        shutil.copyfile(path, folder / path.name)
        return
    content = path.read_text(encoding="utf-8").replace(f"config/examples/{name}/", f"{folder.as_posix()}/")
    (folder / path.name).write_text(content, encoding="utf-8", newline="\n")


def _files(name: str) -> list[Path]:
    return sorted(path for path in (EXAMPLES_DIR / name).iterdir() if path.is_file())


def _read_copy_words(words: Sequence[str]) -> tuple[str, str | None]:
    names: list[str] = []
    destination: str | None = None
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag == "--dest":
            destination = value if equals else next(rest, "")
            if not destination:
                raise _usage("E-FLAG-NO-VALUE", flag="--dest")
        elif word.startswith("-") or names:
            raise _usage("E-ARGUMENT-EXTRA", argument=word)
        else:
            names.append(word)
    if not names:
        raise _usage("E-EXAMPLE-WHICH", examples=", ".join(example_names()))
    return names[0], destination


def _usage(code: str, **params: object) -> SimpletunerError:
    return SimpletunerError(Problem(code=code, params=params), ExitCode.USAGE)
