"""JSON with the line of every value, and errors that say where and what.

A comma before a closing bracket is accepted, as people add lines to the end of a file. Otherwise plain JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from simpletuner.problems import ConfigError, Problem, Severity

MAX_DEPTH = 64

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}
_WORD = re.compile(r"[A-Za-z_0-9.+-]+")


@dataclass(frozen=True, kw_only=True)
class JsonDocument:
    """A parsed file. `lines`: JSON pointer -> line (from 1) of the key, or of the value in a list.
    `repeated`: pointers of keys that a later one of the same name replaced."""

    value: object
    lines: Mapping[str, int]
    repeated: tuple[str, ...]


def read_text(path: Path, shown: str) -> str:
    """The text of a file. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = Problem(code="E-FILE-ENCODING", params={"file": shown, "byte": error.start}, origin=shown)
        raise ConfigError(problem) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            Problem(code="E-FILE-READ", params={"file": shown, "reason": reason}, origin=shown)
        ) from error


def parse_json(text: str, shown: str) -> JsonDocument:
    """Parse `text`; `shown` names the file in messages. Raises ConfigError with line and column of the mistake."""
    reader = _Reader(text, shown)
    value = reader.document()
    return JsonDocument(value=value, lines=MappingProxyType(reader.lines), repeated=tuple(reader.repeated))


def repeated_key_warnings(document: JsonDocument, shown: str) -> list[Problem]:
    """A warning for every key that is written twice in one object."""
    return [
        Problem(
            code="W-KEY-REPEATED",
            severity=Severity.WARNING,
            params={"key": pointer.rsplit("/", 1)[-1]},
            origin=f"{shown}:{document.lines[pointer]}",
            path=pointer,
        )
        for pointer in document.repeated
    ]


def escape_pointer(key: str) -> str:
    """A key as a part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


class _Reader:
    def __init__(self, text: str, shown: str) -> None:
        self._text = text
        self._shown = shown
        self._at = 0
        self.lines: dict[str, int] = {}
        self.repeated: list[str] = []

    def document(self) -> object:
        self._skip_space()
        value = self._value("", 0)
        self._skip_space()
        if self._at < len(self._text):
            self._fail("E-JSON-EXTRA")
        return value

    def _value(self, pointer: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            self._fail("E-JSON-DEPTH")
        match self._peek():
            case "{":
                return self._object(pointer, depth)
            case "[":
                return self._array(pointer, depth)
            case '"':
                return self._string()
            case _:
                return self._scalar()

    def _object(self, pointer: str, depth: int) -> dict[str, object]:
        found: dict[str, object] = {}
        self._at += 1
        self._skip_space()
        while self._peek() != "}":
            if self._peek() != '"':
                self._fail("E-JSON-KEY")
            line = self._line()
            key = self._string()
            child = f"{pointer}/{escape_pointer(key)}"
            if key in found:
                self.repeated.append(child)
            self.lines[child] = line
            self._skip_space()
            if self._peek() != ":":
                self._fail("E-JSON-COLON", key=key)
            self._at += 1
            self._skip_space()
            found[key] = self._value(child, depth + 1)
            self._comma("}")
        self._at += 1
        return found

    def _array(self, pointer: str, depth: int) -> list[object]:
        found: list[object] = []
        self._at += 1
        self._skip_space()
        while self._peek() != "]":
            child = f"{pointer}/{len(found)}"
            self.lines[child] = self._line()
            found.append(self._value(child, depth + 1))
            self._comma("]")
        self._at += 1
        return found

    def _comma(self, closing: str) -> None:
        self._skip_space()
        if self._peek() == ",":
            self._at += 1
            self._skip_space()
        elif self._peek() != closing:
            self._fail("E-JSON-COMMA", closing=closing)

    def _string(self) -> str:
        try:
            value, self._at = json.decoder.scanstring(self._text, self._at + 1, True)  # type: ignore[attr-defined]
        except json.JSONDecodeError as error:
            self._at = error.pos
            self._fail("E-JSON-STRING")
        assert isinstance(value, str)
        return value

    def _scalar(self) -> object:
        word = _WORD.match(self._text, self._at)
        if word is None:
            self._fail("E-JSON-VALUE", found=self._text[self._at])
        if word[0] in _WORDS:
            self._at = word.end()
            return _WORDS[word[0]]
        number = _NUMBER.fullmatch(word[0])
        if number is None or len(word[0]) > 300:
            self._fail("E-JSON-VALUE", found=word[0][:40])
        self._at = word.end()
        return float(word[0]) if number[1] or number[2] else int(word[0])

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _peek(self) -> str:
        if self._at >= len(self._text):
            self._fail("E-JSON-END")
        return self._text[self._at]

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1

    def _fail(self, code: str, **params: object) -> NoReturn:
        line = self._line()
        column = self._at - (self._text.rfind("\n", 0, self._at) + 1) + 1
        raise ConfigError(
            Problem(
                code=code,
                params={"file": self._shown, "line": line, "column": column, **params},
                origin=f"{self._shown}:{line}:{column}",
            )
        )
