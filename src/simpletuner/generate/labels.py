"""Settings of generated images in words. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from simpletuner.generate.request import Shot, Value
from simpletuner.i18n import text


class Named(Protocol):
    """An adapter as far as words go."""

    @property
    def label(self) -> str:
        """What it is called."""

    @property
    def strength(self) -> float:
        """How much it counts."""


def described(shots: Sequence[Shot], adapters: Sequence[Named], language: str) -> list[str]:
    """How many images of which sizes, and what they have in common."""
    sizes = ", ".join(dict.fromkeys(size_text(shot) for shot in shots))
    count = text(f"count.images.{'one' if len(shots) == 1 else 'other'}", language, n=len(shots))
    return [count, sizes, *in_common(shots, adapters, language)]


def in_common(shots: Sequence[Shot], adapters: Sequence[Named], language: str) -> list[str]:
    """The settings that all shots share; the adapters with their strengths."""
    found = []
    for axis in ("steps", "guidance", "shift", "seed"):
        values = {_value_of(shot, axis) for shot in shots}
        if len(values) == 1:
            found.append(label(axis, values.pop(), language))
    return [*found, *(f"{adapter.label}@{adapter.strength:g}" for adapter in adapters)]


def label(axis: str, value: Value, language: str) -> str:
    """ "guidance 2 (CFG 3)"."""
    if axis == "checkpoint" and isinstance(value, str) and not value.isdigit():
        return text(f"generate.checkpoint.{value}", language)
    shown = value if isinstance(value, str) else f"{value:.10g}"
    usual = f"{value + 1:.10g}" if isinstance(value, float | int) else ""
    return text(f"generate.axis.{axis}", language, value=shown, usual=usual)


def size_text(shot: Shot) -> str:
    """ "1024x768"."""
    width_px, height_px = shot.request.size
    return f"{width_px}x{height_px}"


def _value_of(shot: Shot, axis: str) -> Value:
    if axis == "seed":
        return shot.request.seed
    value: Value = getattr(shot.setup, axis)
    return value
