"""4-bit NormalFloat through bitsandbytes (Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314), with the
scales quantised to 8 bits too: 4.13 bits for a weight.

bitsandbytes is imported when the first weight is packed or read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpletuner.quant.formats import rows_per_piece
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
        from bitsandbytes.functional import quantize_blockwise

        levels, _ = self._code_books(weight.device)
        # The codes piece by piece; the scales are quantised around the mean of all.
        pieces = [_codes_and_scales(piece, levels) for piece in _pieces(weight)]
        codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        offset = scales.mean()
        absmax, state = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK)
        return {"codes": codes, "absmax": absmax, "nested_absmax": state.absmax, "nested_offset": offset}

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


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    """The weight in pieces of rows that are whole blocks; a weight of which that is not true in one piece."""
    rows = rows_per_piece(weight)
    return (weight,) if rows * weight.shape[1] % _BLOCK or weight.numel() % _BLOCK else weight.split(rows)


def _codes_and_scales(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte, and the float32 scale of each block: bit for bit the library's.

    On a CPU without the library, whose search for the nearest level takes five times as long.
    """
    if weight.device.type != "cpu" or weight.numel() % _BLOCK:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight.contiguous(), blocksize=_BLOCK, compress_statistics=False, quant_type="nf4")
        return codes, state.absmax
    blocks = weight.reshape(-1, _BLOCK).float()
    scales = blocks.abs().amax(dim=1)
    numbers = (blocks * scales.clamp(min=1e-38).reciprocal_()[:, None]).view(-1)
    codes = torch.zeros(numbers.shape, dtype=torch.uint8)
    for middle in (levels[:-1] + levels[1:]).div_(2).tolist():
        codes += numbers > middle
    pairs = codes.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1])[:, None], scales


def _make_code_books(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4 and the 256 of the nested scales, as the library makes them."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    levels: Any = get_4bit_type("nf4", device=device)
    return levels, create_dynamic_map().to(device)
