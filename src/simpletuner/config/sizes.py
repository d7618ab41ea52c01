"""Sizes as people write them: "1024x1024", "1024", "1.0", and lists of these."""

from __future__ import annotations

import math
import re

SIZE_STEP_PX = 16
"""Image edges are multiples of this: the VAE halves three times and a patch is two latents wide."""

_LARGEST_MEGAPIXELS = 128


def parse_resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Read a comma list of sizes; each becomes (width, height) px.

    "1280x768" is taken as written; "1024" is a square; a single number below 128 is megapixels, whose square is
    rounded to multiples of 64 px. Raises ValueError with the part that is not a size.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(_parse_one(part) for part in parts if part) or _refuse(text)


def check_resolutions(text: str) -> str:
    """Validator: `text` unchanged if every size is understood and a multiple of 16 px. Raises ValueError."""
    for width_px, height_px in parse_resolutions(text):
        if width_px % SIZE_STEP_PX or height_px % SIZE_STEP_PX:
            _refuse(f"{width_px}x{height_px}")
    return text


def nearest_size(text: str) -> str | None:
    """The closest allowed size to what `text` seems to say ("1000x770" -> "1008x768"), or None."""
    numbers = [int(n) for n in re.findall(r"\d+", text)][:2]
    if not numbers or min(numbers) < SIZE_STEP_PX // 2 or max(numbers) > 16384:
        return None
    width, height = (max(SIZE_STEP_PX, round(n / SIZE_STEP_PX) * SIZE_STEP_PX) for n in (numbers[0], numbers[-1]))
    return f"{width}x{height}"


def _parse_one(part: str) -> tuple[int, int]:
    pair = re.fullmatch(r"(\d{1,5})\s*[xX\u00d7*]\s*(\d{1,5})", part)
    if pair:
        width_px, height_px = int(pair[1]), int(pair[2])
        return (width_px, height_px) if width_px and height_px else _refuse(part)[0]
    if not re.fullmatch(r"\d{1,5}(\.\d{1,6})?", part) or float(part) <= 0:
        _refuse(part)
    number = float(part)
    if number >= _LARGEST_MEGAPIXELS:
        if number != int(number):
            _refuse(part)
        return int(number), int(number)
    edge_px = max(64, round(math.sqrt(number * 1024 * 1024) / 64) * 64)
    return edge_px, edge_px


def _refuse(part: str) -> tuple[tuple[int, int], ...]:
    raise ValueError(part)


_BYTES = re.compile(r"(\d+(?:[.,]\d+)?)\s*(|[kmgt]i?b?)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """ "10GB", "9.5 GiB", "800 MB"; a number alone is gigabytes. Raises ValueError for anything else."""
    found = _BYTES.fullmatch(text.strip())
    if found is None or float(found[1].replace(",", ".")) <= 0:
        raise ValueError(text)
    unit = (found[2] or "gb").lower()
    step = 1024 if "i" in unit else 1000
    return int(float(found[1].replace(",", ".")) * step ** ("kmgt".index(unit[0]) + 1))


def is_bytes(text: str) -> bool:
    """Whether `parse_bytes` understands the text."""
    try:
        parse_bytes(text)
    except ValueError:
        return False
    return True
