"""From a raw value (JSON, TOML, or text of a flag or a variable) to the value of an option's type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace

from simpletuner.config.fields import Option
from simpletuner.config.names import closest
from simpletuner.problems import Fix, Problem

TRUE_WORDS = frozenset(("true", "yes", "on", "1"))
FALSE_WORDS = frozenset(("false", "no", "off", "0"))
_NONE_WORDS = frozenset(("none", "null"))
_PLACEHOLDER = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class BadValueError(Exception):
    """A value that an option cannot have; `problem` lacks only its origin."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.code)
        self.problem = problem


def fill_variables(value: object, key: str, environ: Mapping[str, str]) -> object:
    """Replace {env:NAME} in texts, also inside lists and objects. Raises BadValueError if NAME is not set."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda found: _variable(found[1], key, environ), value)
    if isinstance(value, list):
        return [fill_variables(item, key, environ) for item in value]
    if isinstance(value, dict):
        return {name: fill_variables(item, key, environ) for name, item in value.items()}
    return value


def is_unset(value: object, option: Option) -> bool:
    """Whether a raw value asks for nothing: null, or an empty text where that is no value of its own."""
    if value is None:
        return True
    if not isinstance(value, str):
        return False
    word = value.strip().lower()
    if option.kind != "text" and option.optional and word in _NONE_WORDS:
        return True
    return not word and not option.opt.keeps_empty


def convert(value: object, option: Option) -> object:
    """The value in the option's type; bounds are pydantic's business. Raises BadValueError."""
    match option.kind:
        case "flag":
            return _flag(value, option)
        case "integer":
            return _integer(value, option)
        case "number":
            return _number(value, option)
        case "list":
            return _list(value, option)
        case "text":
            return _text(value, option)
        case "object":
            return _object(value, option)


def show(value: object) -> str:
    """A value as it is written in a message: short, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def fold(text: str) -> str:
    """A choice without the differences that people do not see: case, - for _."""
    return text.strip().lower().replace("_", "-")


def _variable(name: str, key: str, environ: Mapping[str, str]) -> str:
    if name not in environ:
        raise BadValueError(Problem(code="E-VARIABLE-MISSING", params={"key": key, "variable": name}))
    return environ[name]


def _flag(value: object, option: Option) -> bool:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise _refused("E-VALUE-FLAG", value, option)


def _integer(value: object, option: Option) -> int:
    if isinstance(value, str):
        spellings = {fold(spelling): number for spelling, number in option.opt.spellings}
        value = spellings.get(fold(value), value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _finite(value)
    if number is None or number != math.floor(number):
        raise _refused("E-VALUE-INTEGER", value, option)
    return int(number)


def _number(value: object, option: Option) -> float | int:
    number = _finite(value)
    if number is None:
        raise _refused("E-VALUE-NUMBER", value, option)
    return int(number) if number == math.floor(number) and abs(number) < 2**53 else number


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _list(value: object, option: Option) -> tuple[object, ...]:
    if option.opt.holds == "aspects":
        return _aspects(value, option)
    if isinstance(value, str) and option.opt.holds == "prompts":
        value = [value]
    elif isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _refused("E-VALUE-LIST", text, option) from error
        else:
            value = [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) and item for item in value):
        raise _refused("E-VALUE-LIST", value, option)
    return tuple(value)


def _aspects(value: object, option: Option) -> tuple[object, ...]:
    """Numbers (1.5) or objects ({"aspect": 1.5, "weight": 0.3}), in one list or apart."""
    items = value if isinstance(value, list) else [value]
    found = tuple(item if isinstance(item, dict) else {"aspect": _finite(item)} for item in items)
    numbers = [_finite(number) for item in found for number in item.values()]
    known = all({"aspect"} <= item.keys() <= {"aspect", "weight"} for item in found)
    if not found or not known or any(number is None or number <= 0 for number in numbers):
        raise _refused("E-VALUE-ASPECTS", value, option)
    return found


def _object(value: object, option: Option) -> dict[str, object]:
    """An object, or its JSON text; `true` and `false` stand for {"enable": true} where there is such a key."""
    parts = {part.name: part for part in option.parts}
    if isinstance(value, bool) and "enable" in parts:
        return {"enable": value}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _refused("E-VALUE-OBJECT", value, option) from error
    if not isinstance(value, dict):
        raise _refused("E-VALUE-OBJECT", value, option)
    found: dict[str, object] = {}
    for raw_key, item in value.items():
        key = raw_key.strip().replace("-", "_")
        part = parts.get(key)
        if part is None and key.startswith("_"):
            continue
        if part is None:
            guess = closest(key, parts)
            fixes = (Fix(key=f"{option.name}.{guess}", value=item),) if guess else ()
            params = {"key": option.name, "name": raw_key, "keys": ", ".join(parts)}
            raise BadValueError(Problem(code="E-VALUE-OBJECT-KEY", params=params, fixes=fixes))
        if not is_unset(item, part):
            found[key] = convert(item, replace(part, name=f"{option.name}.{key}"))
    return found


def _text(value: object, option: Option) -> str:
    if option.opt.holds == "json" and isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool) and any(spelling == "true" for spelling, _ in option.opt.spellings):
        value = "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _refused("E-VALUE-TEXT", value, option)
    return _choice(value, option) if option.choices else value


def _choice(value: str, option: Option) -> str:
    spellings = {fold(choice): choice for choice in (*option.choices, *option.opt.foreign)}
    spellings.update((fold(spelling), choice) for spelling, choice in option.opt.spellings)
    if fold(value) in spellings:
        return spellings[fold(value)]
    guess = closest(fold(value), (word for word, choice in spellings.items() if choice in option.choices))
    fixes = (Fix(key=option.name, value=spellings[guess]),) if guess else ()
    params = {"key": option.name, "value": show(value), "choices": ", ".join(option.choices)}
    raise BadValueError(Problem(code="E-VALUE-CHOICE", params=params, fixes=fixes))


def _refused(code: str, value: object, option: Option) -> BadValueError:
    shown = "***" if option.opt.holds == "secret" else show(value)
    return BadValueError(Problem(code=code, params={"key": option.name, "value": shown}))
