"""Dataclasses to JSON values and back, driven by the declared field types.

One encoder and one decoder serve the events, `run.json` and the control files. `decode(T, encode(x)) == x` for every
frozen dataclass whose fields are JSON scalars, enums, other dataclasses, `tuple[X, ...]`, `Sequence[X]` (read as a
tuple), `Mapping[str, X]`, `object` (JSON values as they are) or optional ones of these. JSON has no NaN and no
infinities: a float field carries them as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from typing import TypeAlias, TypeVar, cast

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
T = TypeVar("T")

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class DecodeError(ValueError):
    """The JSON value does not have the shape of the type."""


def encode(value: object) -> JsonValue:
    """Return `value` as JSON values. An object of an unknown kind becomes its text."""
    if isinstance(value, Enum):
        return encode(value.value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name_of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [encode(item) for item in value]
    return str(value)


def decode(kind: type[T], value: JsonValue) -> T:
    """Build a `kind` from JSON values. Keys that `kind` does not have are ignored: a newer version may add some.

    Raises:
        DecodeError: a field without a default is missing, or a value has another type.
    """
    return cast(T, _decode(kind, value))


def to_line(value: JsonValue) -> bytes:
    """One line of UTF-8 JSON, without the line end. Characters stay readable; a lone surrogate is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def to_text(value: JsonValue) -> str:
    """Indented JSON for files that people open, with a line end."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def parse_object(text: str | bytes) -> dict[str, JsonValue]:
    """Read one JSON object. Raises DecodeError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    if not isinstance(value, dict):
        raise DecodeError(f"expected an object, got {type(value).__name__}")
    return cast("dict[str, JsonValue]", value)


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return typing.get_type_hints(kind)


def _decode(hint: object, value: JsonValue) -> object:
    origin = typing.get_origin(hint)
    if hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(hint), value)
    if origin is typing.Literal:
        return _expect(value in typing.get_args(hint), hint, value)
    if origin in (tuple, collections.abc.Sequence):
        _expect(isinstance(value, list), hint, value)
        return tuple(_decode(typing.get_args(hint)[0], item) for item in cast("list[JsonValue]", value))
    if origin is collections.abc.Mapping:
        _expect(isinstance(value, dict), hint, value)
        item_hint = typing.get_args(hint)[1]
        return {key: _decode(item_hint, item) for key, item in cast("dict[str, JsonValue]", value).items()}
    assert isinstance(hint, type), f"no decoder for fields of type {hint!r}"
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value)
    if issubclass(hint, Enum):
        _expect(value in [member.value for member in hint], hint, value)
        return hint(value)
    return _decode_scalar(hint, value)


def _decode_union(hints: tuple[object, ...], value: JsonValue) -> object:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        if hint is not type(None):
            try:
                return _decode(hint, value)
            except DecodeError:
                continue
    raise DecodeError(f"{value!r} is none of {hints}")


def _decode_scalar(hint: type, value: JsonValue) -> object:
    if hint is float:
        if isinstance(value, str):
            _expect(value in _NOT_FINITE, hint, value)
            return _NOT_FINITE[value]
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), hint, value)
        return float(cast(float, value))
    if hint is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), hint, value)
    return _expect(isinstance(value, hint), hint, value)


def _decode_dataclass(hint: type, value: JsonValue) -> object:
    _expect(isinstance(value, dict), hint, value)
    fields = cast("dict[str, JsonValue]", value)
    hints = _hints(hint)
    known = {f.name: _decode(hints[f.name], fields[f.name]) for f in dataclasses.fields(hint) if f.name in fields}
    try:
        return hint(**known)
    except TypeError as error:
        raise DecodeError(str(error)) from error


def _expect(condition: bool, hint: object, value: JsonValue) -> JsonValue:
    if not condition:
        raise DecodeError(f"{value!r} is not a {hint}")
    return value
