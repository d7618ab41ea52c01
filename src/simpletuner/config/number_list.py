"""Lists of numbers as people write them: "0.1, 0.5, 1" or [0.1, 0.5, 1]."""

from __future__ import annotations

import math


def parse_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma list, with or without brackets. Raises ValueError with the part that is no number."""
    inside = text.strip().removeprefix("[").removesuffix("]")
    return tuple(_number(part.strip()) for part in inside.split(","))


def _number(part: str) -> float:
    try:
        number = float(part)
    except ValueError:
        raise ValueError(part) from None
    if not math.isfinite(number):
        raise ValueError(part)
    return number
