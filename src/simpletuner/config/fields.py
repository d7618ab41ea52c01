"""How an option is declared, once: a typed field with an `Opt` marker and a docstring below it.

Everything else is read from that declaration: flag, config key, reference page, help, JSON schema, validation.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_OF_NUMBERS = ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

Level = Literal["basic", "advanced", "expert"]
Kind = Literal["flag", "integer", "number", "text", "list", "object"]
Holds = Literal["text", "path", "location", "json", "prompts", "aspects", "secret"]


@dataclass(frozen=True, kw_only=True)
class Opt:
    """What a type cannot say about an option.

    `holds`: "path" is a file or folder of this machine, "location" a folder or a hub id, "json" text or an object,
    "prompts" one text or a list of them, "aspects" numbers or objects, "secret" a text that is never shown.
    `aliases`: other names of the option. `choices`: the allowed texts, if they come from a catalog. `spellings`:
    accepted spelling -> choice. `foreign`: texts that are no choices, but that a rule refuses with a reason of its own.
    `keeps_empty`: "" is a value of its own rather than "not set". `shown_default`: how the reference shows a
    default that is computed.
    """

    level: Level = "advanced"
    unit: str | None = None
    aliases: tuple[str, ...] = ()
    holds: Holds = "text"
    choices: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    foreign: tuple[str, ...] = ()
    keeps_empty: bool = False
    shown_default: str | None = None

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if not self.choices:
            return schema
        return core_schema.no_info_after_validator_function(self._check_choice, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        if self.choices:
            found["enum"] = list(self.choices)
        elif self.spellings and found.get("type") == "integer":
            words = {"enum": [spelling for spelling, _ in self.spellings]}
            found = {"anyOf": [{key: found.pop(key) for key in _OF_NUMBERS if key in found}, words], **found}
        found["x-level"] = self.level
        if self.unit:
            found["x-unit"] = self.unit
        if self.aliases:
            found["x-aliases"] = list(self.aliases)
        if self.holds != "text":
            found["x-holds"] = self.holds
        return found

    def _check_choice(self, value: object) -> object:
        if value is not None and value not in (*self.choices, *self.foreign):
            raise PydanticCustomError("choice", "not one of the choices")
        return value


class Section(BaseModel):
    """A group of options. Frozen; unknown names are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )


@dataclass(frozen=True, kw_only=True)
class Option:
    """One declared option, as the parsers and the reference see it. `bounds` such as ">= 1"; `parts`: the keys of an
    object."""

    name: str
    section: str
    kind: Kind
    default: object
    optional: bool
    required: bool
    choices: tuple[str, ...]
    bounds: tuple[str, ...]
    help: str
    opt: Opt
    parts: tuple[Option, ...] = ()


def describe(model: type[Section], section: str) -> tuple[Option, ...]:
    """Every option that `model` declares, in order; a section inside it without an Opt(...) of its own is none."""
    own = {name: info for name, info in model.model_fields.items() if info.metadata or not is_section(info.annotation)}
    return tuple(_describe_field(name, section, info) for name, info in own.items())


def is_section(annotation: object) -> TypeGuard[type[Section]]:
    """Whether a type is a group of options."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _describe_field(name: str, section: str, info: FieldInfo) -> Option:
    opt = next((m for m in info.metadata if isinstance(m, Opt)), None)
    assert opt is not None, f"{section}.{name} lacks an Opt(...) marker"
    assert info.description, f"{section}.{name} lacks a docstring"
    bare, optional = _without_none(info.annotation)
    kind, choices = _kind_of(bare)
    return Option(
        name=name,
        section=section,
        kind=kind,
        default=None if info.is_required() else info.get_default(call_default_factory=True, validated_data={}),
        optional=optional,
        required=info.is_required(),
        choices=choices or opt.choices,
        bounds=tuple(_bounds(info.metadata)),
        help=" ".join(info.description.split()),
        opt=opt,
        parts=describe(bare, f"{section}.{name}") if is_section(bare) else (),
    )


def _without_none(annotation: object) -> tuple[object, bool]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = tuple(a for a in get_args(annotation) if a is not type(None))
        optional = len(rest) < len(get_args(annotation))
        return (rest[0] if len(rest) == 1 else rest), optional
    return annotation, False


def _kind_of(annotation: object) -> tuple[Kind, tuple[str, ...]]:
    if get_origin(annotation) is Literal:
        return "text", tuple(str(a) for a in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return "list", ()
    if is_section(annotation):
        return "object", ()
    simple: Mapping[object, Kind] = {
        bool: "flag",
        int: "integer",
        float: "number",
        str: "text",
        SecretStr: "text",
    }
    if isinstance(annotation, tuple):  # a union: text or a list of texts
        return "list", ()
    return simple[annotation], ()


def _bounds(metadata: list[Any]) -> list[str]:
    signs: tuple[tuple[type, str, Callable[[Any], object]], ...] = (
        (annotated_types.Ge, ">=", lambda m: m.ge),
        (annotated_types.Gt, ">", lambda m: m.gt),
        (annotated_types.Le, "<=", lambda m: m.le),
        (annotated_types.Lt, "<", lambda m: m.lt),
    )
    return [f"{sign} {bound(m)}" for m in metadata for kind, sign, bound in signs if isinstance(m, kind)]
