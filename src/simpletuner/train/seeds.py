"""Random numbers as pure functions of (seed, what for, where), so that any step can be drawn again alone."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose: equal arguments give equal numbers, others independent ones."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator for one purpose. On the CPU, so that every device trains on the same noise."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))
