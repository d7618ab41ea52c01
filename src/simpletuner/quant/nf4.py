"""4-bit NormalFloat through bitsandbytes (Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314), with the
scales quantised to 8 bits too: 4.13 bits for a weight.

bitsandbytes is imported when the first weight is packed or read.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from simpletuner.quant.linear import Parts, WeightFormat

_BLOCK = 64  # weights that share a scale
_NESTED_BLOCK = 256  # scales that share a scale


class NF4Format(WeightFormat):
    """bitsandbytes' tensors under our names; the two code books are constants and are not stored."""

    name = "nf4-bnb"
    part_names = ("codes", "absmax", "nested_absmax", "nested_offset")

    def __init__(self) -> None:
        # On a CPU it recommends a package that fetches kernels from the hub at run time.
        logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
        self._books: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        return {
            "codes": codes,
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "nested_offset": state.offset,
        }

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        book, nested_book = self._code_books(parts["codes"].device)
        # Blocks run on over the ends of rows, but the library's CPU kernel (0.50) begins a new one with every row: it
        # is shown one long row where that matters.
        rows, columns = shape
        as_read = shape if columns % _BLOCK == 0 else (1, rows * columns)
        nested = QuantState(
            absmax=parts["nested_absmax"], blocksize=_NESTED_BLOCK, code=nested_book, dtype=torch.float32
        )
        state = QuantState(
            absmax=parts["absmax"],
            shape=torch.Size(as_read),
            code=book,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=parts["nested_offset"],
            state2=nested,
        )
        weight: Tensor = dequantize_4bit(parts["codes"], state)
        return weight.view(shape)

    def _code_books(self, device: torch.device) -> tuple[Tensor, Tensor]:
        books = self._books.get(device)
        if books is None:
            books = self._books[device] = _make_code_books(device)
        return books


def _make_code_books(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4 and the 256 of the nested scales, as the library makes them."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    levels: Any = get_4bit_type("nf4", device=device)
    return levels, create_dynamic_map().to(device)
