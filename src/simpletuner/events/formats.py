"""Numbers, sizes and times as people read them. A Spanish number has a decimal comma."""

from __future__ import annotations

import math

_SIZES = ("B", "kB", "MB", "GB", "TB")
_COUNTS = ("", " k", " M", " B")


def decimal(value: float, digits: int, language: str) -> str:
    """`value` with `digits` decimals: "3.41" or "3,41"."""
    text = f"{value:.{digits}f}"
    return text.replace(".", ",") if language == "es" else text


def significant(value: float, language: str) -> str:
    """Three significant digits at any magnitude: "0.321", "12.3", "1.2e-5"."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return scientific(value, language)
    magnitude = int(f"{value:.2e}".split("e")[1])  # after rounding: 0.9996 is 1.00
    return decimal(value, min(3, max(0, 2 - magnitude)), language)


def scientific(value: float, language: str = "en") -> str:
    """As short as a learning rate is written: "1e-4", "9.55e-5", "0"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa.replace('.', ',') if language == 'es' else mantissa}e{int(exponent)}"


def size(num_bytes: float, language: str) -> str:
    """Bytes in decimal units: "162 MB", "1.2 GB"."""
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(_SIZES) - 1:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit and value < 9.95 else 0
    return f"{decimal(value, digits, language)} {_SIZES[unit]}"


def parameters(count: int, language: str) -> str:
    """A number of parameters: "860", "1.23 M", "6.15 B"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_COUNTS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{significant(value, language) if unit else count}{_COUNTS[unit]}"


def duration(seconds: float, language: str = "en") -> str:
    """The two leading units: "0.4 s", "41 s", "2 m 05 s", "1 h 12 m", "3 d 4 h"."""
    if seconds < 9.95:
        return f"{decimal(max(0.0, seconds), 1, language)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} m"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def rounded_duration(seconds: float) -> str:
    """A duration that was rounded on purpose: no unit that says nothing ("3 m", "1 h 10 m")."""
    text = duration(seconds) if seconds >= 10 else f"{round(seconds)} s"
    return text.removesuffix(" 00 s").removesuffix(" 00 m")


def compact_duration(seconds: float) -> str:
    """The same for `key=value` lines: "45s", "3m", "1h10m"."""
    return rounded_duration(seconds).replace(" ", "")
