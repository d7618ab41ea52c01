"""Command-line words to settings: `--key value`, `--key=value`, `--key`, `--no-key`, `KEY=VALUE`, `--set KEY=VALUE`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.config.names import meaning_of
from simpletuner.config.settings import Origin, OriginKind, Setting
from simpletuner.config.values import FALSE_WORDS, TRUE_WORDS
from simpletuner.problems import Problem

_SELECTORS = {
    "env": "environment",
    "example": "example",
    "config_path": "config",
    "config_backend": "backend",
}
_SHORT = {"-e": "--example", "-env": "--env"}
_PAIR = re.compile(r"(--)?([A-Za-z_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the words say. `config`, `environment`, `example` and `backend` choose the configuration file."""

    settings: tuple[Setting, ...] = ()
    config: str | None = None
    environment: str | None = None
    example: str | None = None
    backend: str | None = None
    problems: tuple[Problem, ...] = ()


def parse_arguments(words: Sequence[str]) -> CommandLine:
    """Read the words of the command line that follow `train` or `config validate`. Never raises."""
    reader = _Reader(words, OriginKind.FLAG, "")
    reader.read()
    chosen = dict(reader.chosen)
    return CommandLine(
        settings=tuple(reader.settings),
        config=chosen.get("config"),
        environment=chosen.get("environment"),
        example=chosen.get("example"),
        backend=chosen.get("backend"),
        problems=tuple(reader.problems),
    )


def parse_extra_arguments(words: Sequence[str], origin: Origin) -> tuple[list[Setting], list[Problem]]:
    """Read the words of TRAINER_EXTRA_ARGS: options only. Every setting has the variable's own origin."""
    reader = _Reader(words, origin.kind, origin.place)
    reader.read()
    refused = [reader.problem("E-ARGUMENT-EXTRA", argument=value) for _, value in reader.chosen]
    return reader.settings, [*reader.problems, *refused]


class _Reader:
    def __init__(self, words: Sequence[str], kind: OriginKind, place: str) -> None:
        self._words = list(words)
        self._kind = kind
        self._place = place
        self._at = 0
        self.settings: list[Setting] = []
        self.chosen: list[tuple[str, str]] = []
        self.problems: list[Problem] = []

    def read(self) -> None:
        only_positional = False
        while self._at < len(self._words):
            word = self._words[self._at]
            self._at += 1
            if word == "--":
                only_positional = True
            elif only_positional or not word.startswith("-") or word == "-":
                self._positional(word)
            elif word in _SHORT:
                self._flag(_SHORT[word])
            elif word.startswith("--"):
                self._flag(word)
            else:
                self.problems.append(self.problem("E-FLAG-SHORT", flag=word))

    def problem(self, code: str, **params: object) -> Problem:
        return Problem(code=code, params=params, origin=self._place or None)

    def _positional(self, word: str) -> None:
        if _PAIR.fullmatch(word):
            self._pair(word, word.split("=", 1)[0])
        elif any(kind == "config" for kind, _ in self.chosen):
            self.problems.append(self.problem("E-ARGUMENT-EXTRA", argument=word))
        else:
            self.chosen.append(("config", word))

    def _flag(self, word: str) -> None:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_").lower()
        if name in _SELECTORS or name == "set":
            given = value if equals else self._next_word()
            if given is None or not given:
                self.problems.append(self.problem("E-FLAG-NO-VALUE", flag=flag))
            elif name == "set":
                self._pair(given, flag)
            else:
                self.chosen.append((_SELECTORS[name], given))
            return
        if equals:
            self._add(flag, value, flag)
            return
        meaning = meaning_of(flag)
        if meaning.what == "unknown" and name.startswith("no_") and meaning_of(name[3:]).is_flag:
            self._add(name[3:], False, flag)
        elif meaning.is_flag:
            self._add(flag, self._next_truth(), flag)
        else:
            self._take_value(flag, known=meaning.what != "unknown")

    def _take_value(self, flag: str, *, known: bool) -> None:
        following = self._next_word()
        if following is None and known:
            self.problems.append(self.problem("E-FLAG-NO-VALUE", flag=flag))
        else:
            self._add(flag, following or "", flag)

    def _next_word(self) -> str | None:
        """The next word if it can be a value; a negative number can."""
        if self._at >= len(self._words) or self._words[self._at].startswith("--"):
            return None
        self._at += 1
        return self._words[self._at - 1]

    def _next_truth(self) -> object:
        """The next word if it says true or false, else True: the flag stood alone."""
        if self._at < len(self._words) and self._words[self._at].lower() in TRUE_WORDS | FALSE_WORDS:
            self._at += 1
            return self._words[self._at - 1]
        return True

    def _pair(self, text: str, place: str) -> None:
        found = _PAIR.fullmatch(text)
        if found is None:
            self.problems.append(self.problem("E-SET-SYNTAX", argument=text))
        else:
            self._add(found[2], found[3], place if place != "--set" else f"--set {found[2]}")

    def _add(self, key: str, value: object, place: str) -> None:
        origin = Origin(kind=self._kind, place=self._place or place)
        self.settings.append(Setting(key=key, value=value, origin=origin))
