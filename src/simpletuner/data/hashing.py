"""Stable hashes: the data layer's only source of identity and of randomness. Standard library only.

Every choice (crop position, caption, order) is a function of a seed and of what it is about, never of a generator's
state. The same inputs give the same answer on every platform and Python version.
"""

from __future__ import annotations

import hashlib
import struct

_DIGEST_BYTES = 16


def content_hash(data: bytes) -> str:
    """Identity of a file's bytes: 32 hex digits."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def stable_hash(*parts: str | int) -> str:
    """Identity of a tuple of texts and integers: 32 hex digits. ("a", "bc") and ("ab", "c") differ."""
    return _digest(parts, _DIGEST_BYTES).hex()


def draw(*parts: str | int) -> int:
    """A uniform integer in [0, 2**64), a function of `parts` alone."""
    return int.from_bytes(_digest(parts, 8), "big")


def draw_unit(*parts: str | int) -> float:
    """A uniform float in [0, 1), a function of `parts` alone."""
    return (draw(*parts) >> 11) * 2.0**-53


def draw_many(count: int, *parts: str | int) -> tuple[int, ...]:
    """`count` independent uniform integers in [0, 2**64), a function of `parts` alone; more of them begin alike."""
    return struct.unpack(f">{count}Q", hashlib.shake_128(_encoded(parts)).digest(8 * count))


def _digest(parts: tuple[str | int, ...], size: int) -> bytes:
    return hashlib.blake2b(_encoded(parts), digest_size=size).digest()


def _encoded(parts: tuple[str | int, ...]) -> bytes:
    """Different parts, different bytes."""
    pieces: list[bytes] = []
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        pieces += b"%c%d:" % (b"i" if isinstance(part, int) else b"s", len(text)), text
    return b"".join(pieces)
