"""Settings to a section: convert, validate, and turn every mistake into a problem with its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simpletuner.config.fields import Option, Section
from simpletuner.config.settings import Setting
from simpletuner.config.sizes import nearest_size
from simpletuner.config.values import BadValueError, convert, fill_variables, is_unset, show
from simpletuner.problems import Fix, Problem

S = TypeVar("S", bound=Section)

_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def convert_setting(
    setting: Setting, option: Option, environ: Mapping[str, str]
) -> tuple[Setting | None, Problem | None]:
    """(the setting with a value of the option's type, None), (None, the problem), or twice None if it sets nothing."""
    try:
        filled = fill_variables(setting.value, option.name, environ)
        if is_unset(filled, option):
            return None, None
        return replace(setting, key=option.name, value=convert(filled, option)), None
    except BadValueError as refused:
        return None, replace(refused.problem, origin=setting.origin.place, path=f"/{option.name}")


def build_section(
    model: type[S], settings: Mapping[str, Setting], options: Mapping[str, Option]
) -> tuple[S, list[Problem]]:
    """Validate converted settings. A value that is refused becomes a problem, and the section has its default."""
    values = {name: setting.value for name, setting in settings.items() if name in model.model_fields}
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    problems = [_problem_of(details, settings, options) for details in found]
    refused = {str(details["loc"][0]) for details in found}
    kept = {name: value for name, value in values.items() if name not in refused}
    return model.model_validate(kept), problems


def invalid_names(problems: Sequence[Problem]) -> frozenset[str]:
    """The options that some problem is about."""
    return frozenset(problem.path[1:] for problem in problems if problem.path)


def _problem_of(details: ErrorDetails, settings: Mapping[str, Setting], options: Mapping[str, Option]) -> Problem:
    name = str(details["loc"][0])
    setting, option = settings[name], options[name]
    params: dict[str, object] = {"key": name, "value": show(setting.value)}
    for part in (part for part in option.parts if part.name in details["loc"][1:]):
        params, option = {"key": f"{name}.{part.name}", "value": show(details["input"])}, part
    fixes: tuple[Fix, ...] = ()
    context = details.get("ctx", {})
    if details["type"] in _BOUND_ERRORS:
        code = "E-VALUE-RANGE"
        params["bounds"] = ", ".join(option.bounds)
    elif details["type"] == "multiple_of":
        code = "E-VALUE-MULTIPLE"
        params["step"] = context["multiple_of"]
    else:
        assert name == "validation_resolution", f"conversion let a wrong type through: {details}"
        code = "E-VALUE-SIZE"
        params["part"] = str(context.get("error", setting.value))
        size = nearest_size(str(params["part"]))
        fixes = (Fix(key=name, value=size),) if size else ()
    return Problem(code=code, params=params, origin=setting.origin.place, path=f"/{name}", fixes=fixes)
