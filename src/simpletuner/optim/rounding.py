"""Stochastic rounding to bfloat16.

bfloat16 keeps 8 bits of mantissa. Rounding to nearest loses every change smaller than half a unit in the last place,
2^-9 of the value: Adam's second moment with beta2 = 0.999 moves by 2^-10 of itself and would stand still. Rounding up
with the probability of the part cut off keeps the expectation, so many small changes add up (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551; for bfloat16 training Zamirai et al. 2020, https://arxiv.org/abs/2010.06192).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_UPPER_HALF = -0x10000  # of an int32: what bfloat16 keeps of a float32


class RoundingNoise:
    """A stream of uniform 16-bit numbers that depends on nothing but `seed`, `step`, `index` and the device type."""

    def __init__(self, *, device: torch.device, seed: int, step: int, index: int) -> None:
        digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=4).digest()
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))

    def draw(self, count: int) -> Tensor:
        """Return int32 [count], each in 0..65535."""
        # One 64-bit draw makes four numbers: a quarter of the time of drawing them one by one.
        bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=self._generator.device)
        bits.random_(-(2**63), None, generator=self._generator)
        return bits.view(torch.int16)[:count].to(torch.int32).add_(0x8000)


def stochastic_round_(values: Tensor, noise: RoundingNoise) -> Tensor:
    """Round float32 `values` [N] in place to numbers that bfloat16 holds; the expectation of each is its old value.

    A value that bfloat16 holds already, an infinity and a NaN stay as they are.
    """
    bits = values.view(torch.int32)
    bits.add_(noise.draw(values.numel())).bitwise_and_(_UPPER_HALF)
    return values
