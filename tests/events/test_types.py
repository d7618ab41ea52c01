"""Events: JSON and back is the identity, and other versions are tolerated."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.events import types as t
from simpletuner.events.codec import DecodeError, decode, encode, parse_object, to_line
from simpletuner.problems import Fix, Problem, Severity

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
FINITE_OR_INFINITE = st.floats(allow_nan=False)


def values_of(hint: object) -> st.SearchStrategy[object]:
    """Every value that a field of this type may have."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is object:
        return SCALARS
    if hint is Problem:
        return problems()
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (tuple, Sequence):
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is Mapping or origin is typing.get_origin(Mapping[str, int]):
        return st.dictionaries(st.text(), JSON, max_size=3)
    if args:
        return st.one_of(*(values_of(arg) for arg in args))
    if dataclasses.is_dataclass(hint):
        return instances(typing.cast(type, hint))
    simple = {int: st.integers(), float: FINITE_OR_INFINITE, str: st.text(), bool: st.booleans(), type(None): st.none()}
    return simple[typing.cast(type, hint)]


def instances(kind: type) -> st.SearchStrategy[object]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})


def problems() -> st.SearchStrategy[Problem]:
    return st.builds(
        Problem,
        code=st.text(),
        severity=st.sampled_from(Severity),
        params=st.dictionaries(st.text(), JSON, max_size=3),
        origin=st.none() | st.text(),
        path=st.none() | st.text(),
        fixes=st.lists(st.builds(Fix, key=st.text(), value=JSON), max_size=2).map(tuple),
    )


@given(st.one_of(*(instances(kind) for kind in t.EVENTS.values())))
def test_json_round_trip_is_the_identity(event):
    line = to_line(t.to_json(event))
    assert b"\n" not in line
    assert t.from_json(parse_object(line)) == event


@settings(max_examples=50)
@given(st.sampled_from(sorted(t.EVENTS)), JSON)
def test_fields_of_a_newer_version_are_ignored(name, extra):
    event = minimal(t.EVENTS[name])
    assert t.from_json({**t.to_json(event), "field of tomorrow": extra}) == event


@settings(max_examples=20)
@given(st.text().filter(lambda name: name not in t.EVENTS), st.dictionaries(st.text(), JSON))
def test_an_event_of_a_newer_version_is_kept_as_it_is(name, fields):
    fields.pop("event", None)
    value = {"event": name, **fields}
    event = t.from_json(value)
    assert isinstance(event, t.UnknownEvent)
    assert t.to_json(event) == value


@pytest.mark.parametrize("fields", [{}, {"step": "one"}, {"step": True}, {"step": 1.5}])
def test_a_known_name_with_another_shape_is_unknown(fields):
    assert isinstance(t.from_json({"event": "validation.started", "num_images": 1, **fields}), t.UnknownEvent)


def test_every_event_is_registered_under_its_name_and_leaves_the_journals_fields_alone():
    kinds = set(t.Event.__subclasses__()) - {t.UnknownEvent}
    assert set(t.EVENTS.values()) == kinds
    for name, kind in t.EVENTS.items():
        assert kind.name == name
        assert not {field.name for field in dataclasses.fields(kind)} & {"seq", "time", "event"}


def test_not_a_number_survives_as_valid_json():
    event = dataclasses.replace(minimal(t.StepFinished), loss=float("nan"), grad_norm=float("inf"))
    line = to_line(t.to_json(event))
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == "NaN"
    again = t.from_json(parse_object(line))
    assert again.loss != again.loss
    assert again.grad_norm == float("inf")


def test_what_json_cannot_say_becomes_text():
    assert encode({"path": PurePosixPath("a/b"), "set": {1}}) == {"path": "a/b", "set": [1]}


def test_a_lone_surrogate_of_a_file_name_survives():
    event = t.LogLine(source="x", message="caf\udce9.png")
    assert t.from_json(parse_object(to_line(t.to_json(event)))) == event


def test_a_number_is_read_as_the_declared_kind():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both:
        whole: int = 0
        real: float = 0.0

    assert isinstance(decode(Both, {"real": 1}).real, float)
    with pytest.raises(DecodeError):
        decode(Both, {"whole": 1.5})


def minimal(kind):
    """An instance with the plainest values."""
    plain = {int: 1, float: 1.0, str: "x", bool: False}
    hints = typing.get_type_hints(kind)
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    special = {"problem": Problem(code="E-X"), "requested": 1, "used": 2}

    def value(name):
        hint = hints[name]
        if name in special:
            return special[name]
        if typing.get_origin(hint) is typing.Literal:
            return typing.get_args(hint)[0]
        return () if typing.get_origin(hint) is tuple else plain[hint]

    return kind(**{name: value(name) for name in required})
