"""What `simpletuner generate` is asked for: prompts, adapters, and a grid of settings. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from types import MappingProxyType

from simpletuner.problems import ConfigError, Fix, Problem
from simpletuner.validation.requests import ImageRequest, Prompt, read_prompts, safe_name

MAX_IMAGES = 4096
_NAME_LENGTH = 40
BASE = "base"
"""As a checkpoint: the model without the adapters."""
LAST = "last"
"""As a checkpoint: the finished adapter of a run."""

Value = str | int | float


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """An adapter and how much it counts. `place` is a file, a run's directory, or a repository."""

    place: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One direction of a grid. Checkpoints without values are all those of the run."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How one image is made. `strength` multiplies that of every adapter; `checkpoint` replaces a run's own adapter.

    `guidance` is on Z-Image's scale, where 0 is off.
    """

    steps: int
    guidance: float
    shift: float
    negative_prompt: str
    strength: float = 1.0
    checkpoint: str = LAST


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to make. `column` and `row` place it in the grid; `values` are its own along each axis."""

    request: ImageRequest
    setup: Setup
    values: tuple[Value, ...]
    column: int
    row: int


@dataclass(frozen=True, kw_only=True)
class _AxisKind:
    read: Callable[[str], Value]
    low: float
    high: float
    example: str

    def value(self, text: str) -> Value:
        """Raises ValueError for a text that is no value."""
        value = self.read(text)
        if not isinstance(value, str) and not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(text)
        return value


_AXES: Mapping[str, _AxisKind] = MappingProxyType(
    {
        "strength": _AxisKind(read=float, low=-100, high=100, example="0,0.5,1"),
        "seed": _AxisKind(read=int, low=0, high=2**31 - 1, example="1,2,3"),
        "steps": _AxisKind(read=int, low=1, high=1000, example="8,20,30"),
        "guidance": _AxisKind(read=float, low=0, high=30, example="0,2,4"),
        "shift": _AxisKind(read=float, low=0.01, high=100, example="1,3,6"),
        "checkpoint": _AxisKind(read=str, low=0, high=0, example="base,200,400,last"),
    }
)


def parse_adapter(text: str) -> AdapterChoice:
    """ "style.safetensors@0.8": the file style.safetensors, which counts 0.8 times.

    Raises:
        ConfigError: there is no file before the strength.
    """
    place, at, strength = text.rpartition("@")
    try:
        number = float(strength) if at else 1.0
    except ValueError:  # an "@" within a name
        place, number = text, 1.0
    place = place if at else text
    if not place.strip() or not math.isfinite(number):
        raise ConfigError(Problem(code="E-GENERATE-ADAPTER", params={"value": text}, origin="--lora"))
    return AdapterChoice(place=place, strength=number)


def parse_axis(text: str) -> Axis:
    """ "strength=0,0.5,1", or "checkpoint" for all.

    Raises:
        ConfigError: no such axis, or a value that it cannot have.
    """
    name, _, written = text.partition("=")
    kind = _AXES.get(name.strip().lower())
    if kind is None:
        near = get_close_matches(name, _AXES, n=1)
        fixes = tuple(Fix(key="--grid", value=f"{guess}={_AXES[guess].example}") for guess in near)
        params = {"name": name, "axes": ", ".join(_AXES)}
        raise ConfigError(Problem(code="E-GENERATE-AXIS", params=params, origin="--grid", fixes=fixes))
    words = [word.strip() for word in written.split(",") if word.strip()]
    name = name.strip().lower()
    if not words and name != "checkpoint":
        raise _bad_value(name, written, kind)
    values = []
    for word in words:
        try:
            values.append(kind.value(word))
        except ValueError:
            raise _bad_value(name, word, kind) from None
    return Axis(name=name, values=tuple(dict.fromkeys(values)))


def read_prompt_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a library (.json, nickname -> prompt), or one on every line that is not empty.

    Raises:
        ConfigError: it is missing or says nothing.
    """
    if path.suffix.lower() == ".json":
        return read_prompts(None, path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        params = {"path": str(path), "reason": getattr(error, "strerror", None) or "UTF-8"}
        raise ConfigError(Problem(code="E-GENERATE-PROMPT-FILE", params=params, origin="--prompt-file")) from error
    return written_prompts([line.strip() for line in lines if line.strip()])


def written_prompts(texts: Sequence[str]) -> tuple[Prompt, ...]:
    """Prompts with names made of their first words."""
    return tuple(Prompt(id=_first_words(text), text=text) for text in texts)


def plan_shots(
    prompts: Sequence[Prompt],
    *,
    sizes: Sequence[tuple[int, int]],
    seed: int,
    num: int,
    setup: Setup,
    axes: Sequence[Axis] = (),
) -> tuple[Shot, ...]:
    """Every image, in the order of the sheet: rows are prompts, sizes, seeds and all axes but the first, columns the
    first axis; without one, the seeds. The n-th image of a prompt has `seed` + n, unless there is an axis of seeds.

    Raises:
        ConfigError: an axis twice, no prompt, or more images than anybody can want.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        params = {"name": next(name for name in names if names.count(name) > 1)}
        raise ConfigError(Problem(code="E-GENERATE-AXIS-TWICE", params=params, origin="--grid"))
    if not prompts:
        raise ConfigError(Problem(code="E-GENERATE-NO-PROMPT"))
    seeds = [seed] if "seed" in names else [seed + index for index in range(num)]
    if not axes and num > 1:
        axes, seeds = (Axis(name="seed", values=tuple(seeds)),), [seed]
    columns, *others = axes or (Axis(name="", values=("",)),)
    rows = [
        (prompt, size, first_seed, tuple(zip(others, values, strict=True)))
        for prompt, size, first_seed in product(prompts, sizes, seeds)
        for values in product(*(axis.values for axis in others))
    ]
    if len(rows) * len(columns.values) > MAX_IMAGES:
        counts = {"count": len(rows) * len(columns.values), "limit": MAX_IMAGES}
        raise ConfigError(Problem(code="E-GENERATE-MANY", params=counts))
    return tuple(
        _shot(prompt, size, first_seed, ((columns, value), *rest), setup, place=(column, row))
        for row, (prompt, size, first_seed, rest) in enumerate(rows)
        for column, value in enumerate(columns.values)
    )


def _shot(
    prompt: Prompt,
    size: tuple[int, int],
    seed: int,
    at: Sequence[tuple[Axis, Value]],
    setup: Setup,
    *,
    place: tuple[int, int],
) -> Shot:
    chosen = {axis.name: value for axis, value in at if axis.name}
    seed = int(chosen.get("seed", seed))
    changed: dict[str, object] = {name: value for name, value in chosen.items() if name != "seed"}
    own = replace(setup, **changed)  # type: ignore[arg-type]
    return Shot(
        request=ImageRequest(prompt=prompt, size=size, seed=seed, index=0),
        setup=replace(own, strength=own.strength * prompt.strength),
        values=tuple(chosen.values()),
        column=place[0],
        row=place[1],
    )


def in_working_order(shots: Sequence[Shot]) -> Iterator[tuple[Setup, list[Shot]]]:
    """The shots by setup, those of one checkpoint together: adapters are loaded once each."""
    by_setup: dict[Setup, list[Shot]] = {}
    for shot in shots:
        by_setup.setdefault(shot.setup, []).append(shot)
    order = list(dict.fromkeys(setup.checkpoint for setup in by_setup))
    yield from sorted(by_setup.items(), key=lambda item: order.index(item[0].checkpoint))


def _first_words(text: str) -> str:
    words = safe_name(text).split("_")
    kept = [word for index, word in enumerate(words) if len("_".join(words[: index + 1])) <= _NAME_LENGTH]
    return "_".join(kept) or words[0][:_NAME_LENGTH]


def _bad_value(name: str, value: str, kind: _AxisKind) -> ConfigError:
    params = {"name": name, "value": value, "example": f"{name}={kind.example}"}
    return ConfigError(Problem(code="E-GENERATE-VALUE", params=params, origin="--grid"))
