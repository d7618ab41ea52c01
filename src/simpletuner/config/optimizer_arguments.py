"""`optimizer_config`: the arguments that one optimizer takes beside the options that all share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from simpletuner.catalog.optimizers import Argument, Optimizer
from simpletuner.config.names import closest
from simpletuner.config.values import FALSE_WORDS, TRUE_WORDS, show
from simpletuner.problems import Fix, Problem

Value = bool | int | float | str

# What libraries call the things that are options of every optimizer here.
_OPTIONS = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "beta1": "optimizer_beta1",
    "beta2": "optimizer_beta2",
    "betas": "optimizer_beta1",
    "weight_decay": "adam_weight_decay",
    "eps": "adam_epsilon",
    "epsilon": "adam_epsilon",
    "warmup_steps": "lr_warmup_steps",
}


class _RefusedError(Exception):
    """The text cannot be read, or a value is not one that the argument can have."""

    def __init__(self, code: str, **params: object) -> None:
        super().__init__(code)
        self.problem = Problem(code=code, params=params, path="/optimizer_config")


def read_arguments(written: str | None, optimizer: Optimizer) -> tuple[Mapping[str, Value], tuple[Problem, ...]]:
    """(the arguments by name, everything that is wrong with them) of `key=value,key=value` or a JSON object."""
    try:
        pairs = _pairs(written or "")
    except _RefusedError as refused:
        return {}, (refused.problem,)
    known = {argument.name: argument for argument in optimizer.arguments}
    read: dict[str, Value] = {}
    problems: list[Problem] = []
    for name, value in pairs.items():
        if name not in known:
            problems.append(_unknown(name, value, pairs, optimizer))
            continue
        try:
            read[name] = _convert(value, known[name])
        except _RefusedError as refused:
            params = {"argument": name, "value": show(value), "optimizer": optimizer.name, **refused.problem.params}
            problems.append(replace(refused.problem, params=params))
    return read, tuple(problems)


def _pairs(written: str) -> dict[str, object]:
    text = written.strip()
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _RefusedError("E-OPTIMIZER-CONFIG", part=show(text)) from error
        return {str(name).strip(): value for name, value in found.items()}
    pairs: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value):
            raise _RefusedError("E-OPTIMIZER-CONFIG", part=show(part))
        pairs[name] = value
    return pairs


def _unknown(name: str, value: object, pairs: Mapping[str, object], optimizer: Optimizer) -> Problem:
    params: dict[str, object] = {"argument": name, "optimizer": optimizer.name}
    path = "/optimizer_config"
    if name in _OPTIONS:
        params["option"] = _OPTIONS[name]
        fixes = () if isinstance(value, (list, dict)) else (Fix(key=_OPTIONS[name], value=value),)
        return Problem(code="E-OPTIMIZER-ARGUMENT-OPTION", params=params, path=path, fixes=fixes)
    names = [argument.name for argument in optimizer.arguments]
    if not names:
        return Problem(code="E-OPTIMIZER-ARGUMENT-NONE", params=params, path=path)
    params["known"] = ", ".join(names)
    suggestion = closest(name, names)
    if suggestion is None:
        return Problem(code="E-OPTIMIZER-ARGUMENT-UNKNOWN", params=params, path=path)
    mended = ",".join(f"{suggestion if key == name else key}={show(told)}" for key, told in pairs.items())
    fixes = (Fix(key="optimizer_config", value=mended),)
    params["suggestion"] = suggestion
    return Problem(code="E-OPTIMIZER-ARGUMENT-MISSPELT", params=params, path=path, fixes=fixes)


def _convert(value: object, argument: Argument) -> Value:
    word = str(value).strip().lower()
    if argument.kind == "flag":
        if word not in TRUE_WORDS | FALSE_WORDS:
            raise _RefusedError("E-OPTIMIZER-ARGUMENT-VALUE", choices="true, false")
        return word in TRUE_WORDS
    if argument.kind == "text":
        if word not in argument.choices:
            raise _RefusedError("E-OPTIMIZER-ARGUMENT-VALUE", choices=", ".join(argument.choices))
        return word
    try:
        number = math.nan if isinstance(value, bool) else float(word)
    except ValueError:
        number = math.nan
    is_whole = argument.kind == "integer"
    if not argument.low <= number <= argument.high or math.isinf(number) or (is_whole and number != int(number)):
        code = "E-OPTIMIZER-ARGUMENT-INTEGER" if is_whole else "E-OPTIMIZER-ARGUMENT-NUMBER"
        raise _RefusedError(code, bounds=", ".join(_bounds(argument)))
    return int(number) if is_whole else number


def _bounds(argument: Argument) -> Iterator[str]:
    if not math.isinf(argument.low):
        yield f">= {argument.low:g}"
    if not math.isinf(argument.high):
        yield f"<= {argument.high:g}"
