"""Weight formats of our own: plain, 8-bit integers and floats, 4-bit integers.

The numbers are those of torchao's weight-only formats, so a model quantised here equals one quantised there, but the
products are ours: scales of whole rows go to the activations, where they cost little, and codes are turned into
numbers by one cast.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from simpletuner.quant.linear import Parts, WeightFormat

_PIECE_NUMBERS = 1 << 19  # weights that a processor packs at a time
_PIECE_NUMBERS_GPU = 1 << 23
_GROUP = 128  # weights that share a scale in the 4-bit format
_TINY = 1e-12  # a row of zeros has this scale


class PlainFormat(WeightFormat):
    """The weight as it is; for layers that are streamed but not quantised."""

    name = "plain"
    part_names = ("values",)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {"values": weight}

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return parts["values"].to(dtype)


class RowwiseFormat(WeightFormat):
    """Each row is packed by itself."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        pieces = [self.pack_rows(piece) for piece in weight.split(rows_per_piece(weight))]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in self.part_names}

    @abstractmethod
    def pack_rows(self, weight: Tensor) -> dict[str, Tensor]:
        """As `pack`, of a few rows; the parts of several such pieces are those of the whole, one after the other."""


class RowScaledFormat(RowwiseFormat):
    """8-bit codes with one float32 scale for each row: weight = codes * scale."""

    part_names = ("codes", "scale")

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return (parts["codes"].float() * parts["scale"][:, None]).to(dtype)

    def multiply(self, x_RI: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        # In place: computed in float32 and rounded once, without a float32 copy of the product.
        return F.linear(x_RI, parts["codes"].to(x_RI.dtype)).mul_(parts["scale"])

    def multiply_transposed(self, x_RO: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        return (x_RO * parts["scale"]).to(x_RO.dtype) @ parts["codes"].to(x_RO.dtype)


class Int8Format(RowScaledFormat):
    """8-bit integers, as torchao's Int8WeightOnlyConfig. Every code is exact in bfloat16."""

    name = "int8-torchao"

    def pack_rows(self, weight: Tensor) -> dict[str, Tensor]:
        numbers = weight.float()
        scale = (numbers.abs().amax(dim=1) / 127.5).clamp_(min=_TINY)
        codes = (numbers * scale.reciprocal()[:, None]).round_().clamp_(-128, 127).to(torch.int8)
        return {"codes": codes, "scale": scale}


class Float8Format(RowScaledFormat):
    """8-bit floats (e4m3), as torchao's Float8WeightOnlyConfig."""

    name = "fp8wo-torchao"
    _LARGEST = 448.0  # of e4m3

    def pack_rows(self, weight: Tensor) -> dict[str, Tensor]:
        numbers = weight.float()
        scale = (numbers.abs().amax(dim=1) / self._LARGEST).clamp_(min=_TINY)
        codes = (numbers / scale[:, None]).clamp_(-self._LARGEST, self._LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes, "scale": scale}


class Float8DynamicFormat(Float8Format):
    """As `Float8Format`, and the activations of the forward product in 8 bits too, scaled by row: for float8 units.

    Backward multiplies in the activations' dtype, so gradients are not rounded to 8 bits.

    Needs an NVIDIA card of compute capability 8.9 (Ada, Hopper) or later.
    """

    name = "fp8-torchao"

    def multiply(self, x_RI: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        scale = (x_RI.abs().amax(dim=1, keepdim=True).float() / self._LARGEST).clamp_(min=_TINY)
        codes = (x_RI / scale).clamp_(-self._LARGEST, self._LARGEST).to(torch.float8_e4m3fn)
        out_dtype = torch.bfloat16 if x_RI.dtype == torch.float32 else x_RI.dtype
        out: Tensor = torch._scaled_mm(
            codes, parts["codes"].t(), scale_a=scale, scale_b=parts["scale"][None], out_dtype=out_dtype
        )
        return out.to(x_RI.dtype)


class Int4Format(RowwiseFormat):
    """4-bit integers, two in a byte, with scale and offset for each group of a row: weight = codes * scale + offset.

    The grid of torchao's Int4WeightOnlyConfig: 16 levels evenly from the group's least to its greatest weight.
    """

    name = "int4-torchao"
    part_names = ("codes", "scale", "offset")

    def pack_rows(self, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        # A last group that is not full repeats its last weight, which changes neither its least nor its greatest.
        padded = F.pad(weight.float()[None], (0, -columns % _GROUP), mode="replicate")[0]
        groups = padded.view(rows, -1, _GROUP)
        offset, greatest = groups.aminmax(dim=2)
        scale = ((greatest - offset) / 15).clamp_(min=_TINY)
        # Rounded first, so that the codes are chosen for the numbers that will be read.
        scale, offset = scale.bfloat16(), offset.bfloat16()
        codes = ((groups - offset[..., None].float()) / scale[..., None].float()).round_().clamp_(0, 15)
        flat = codes.to(torch.uint8).view(rows, -1)
        return {"codes": flat[:, ::2] | (flat[:, 1::2] << 4), "scale": scale, "offset": offset}

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        rows, columns = shape
        codes = parts["codes"]
        levels = torch.stack((codes & 15, codes >> 4), dim=-1).view(rows, -1, _GROUP).to(dtype)
        scale, offset = (parts[name].to(dtype)[..., None] for name in ("scale", "offset"))
        return levels.mul_(scale).add_(offset).view(rows, -1)[:, :columns]


def rows_per_piece(weight: Tensor) -> int:
    """Rows of a weight [O, I] to pack at a time: intermediate results stay in a processor's cache, where those of a
    large weight as a whole would take ten times the memory of its parts."""
    numbers = _PIECE_NUMBERS if weight.device.type == "cpu" else _PIECE_NUMBERS_GPU
    return max(1, numbers // weight.shape[1])
