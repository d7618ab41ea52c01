"""Stochastic rounding to bfloat16.

bfloat16 keeps 8 bits of mantissa. Rounding to nearest loses every change smaller than half a unit in the last place,
2^-9 of the value: Adam's second moment with beta2 = 0.999 moves by 2^-10 of itself and would stand still. Rounding up
with the probability of the part cut off keeps the expectation, so many small changes add up (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551; for bfloat16 training Zamirai et al. 2020, https://arxiv.org/abs/2010.06192).

The dither that decides is a lattice with a random shift (Cranley & Patterson 1976): element i gets (i * c + shift)
mod 2^16, with one shift for each call. Each element's dither is uniform and independent from step to step, which is
all that unbiasedness needs; across elements it is spread more evenly than independent numbers would be, and it costs
two integer operations instead of a random generator. It is the same on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOWER_HALF = 0xFFFF
_UPPER_HALF = -0x10000  # of an int32: what bfloat16 keeps of a float32
_GOLDEN = 40503  # 2^16 / golden ratio, odd: successive multiples fill 0..2^16 - 1 evenly and without repeats


class Dither:
    """Uniform 16-bit numbers that depend on nothing but `seed`, `step` and `index`, and on how many were drawn."""

    def __init__(self, lattice: Tensor, *, seed: int, step: int, index: int) -> None:
        """`lattice`: a prefix of `lattice_of`, at least as long as what is drawn."""
        self._lattice = lattice
        self._key = f"{seed}/{step}/{index}"
        self._num_drawn = 0

    def draw(self, count: int) -> Tensor:
        """Return int32 [count], each in 0..65535."""
        digest = hashlib.blake2b(f"{self._key}/{self._num_drawn}".encode(), digest_size=2).digest()
        self._num_drawn += 1
        return (self._lattice[:count] + int.from_bytes(digest, "little")).bitwise_and_(_LOWER_HALF)


def lattice_of(count: int, device: torch.device) -> Tensor:
    """int32 [count]: i * c mod 2^16."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(_GOLDEN).bitwise_and_(_LOWER_HALF)


def stochastic_round_(values: Tensor, dither: Dither) -> Tensor:
    """Round float32 `values` [N] in place to numbers that bfloat16 holds; the expectation of each is its old value.

    A value that bfloat16 holds already, an infinity and a NaN stay as they are.
    """
    bits = values.view(torch.int32)
    bits.add_(dither.draw(values.numel())).bitwise_and_(_UPPER_HALF)
    return values
