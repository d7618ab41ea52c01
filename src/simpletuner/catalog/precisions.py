"""Number formats of the frozen base model, with what they can do. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from simpletuner.catalog.libraries import BITSANDBYTES, QUANTO, Library

ANY_DEVICE = ("cpu", "cuda", "mps")
_CPU_CUDA = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A number format of frozen weights.

    bits: of one weight, the scales of its group included; None: as the weights are stored otherwise.
    row_bytes: what a row of a weight takes besides.
    library: needed to compute with it; None: nothing beyond torch.
    devices: torch device types that compute with it.
    capability: the least CUDA compute capability of a GPU that computes with it, times ten; 0: any.
    offloadable: its weights are plain tensors, so that they can be streamed and kept on disk.
    refused: code of the problem that says why it is known by name only; `instead` is the nearest that is offered.
    """

    name: str
    bits: float | None = None
    row_bytes: int = 0
    library: Library | None = None
    devices: tuple[str, ...] = ANY_DEVICE
    capability: int = 0
    offloadable: bool = True
    refused: str | None = None
    instead: str = "int8-torchao"

    def weight_bytes(self, rows: int, columns: int, *, default_bytes: int) -> int:
        """Memory of a weight [rows, columns]; `default_bytes` per weight where the format is not quantised."""
        if self.bits is None:
            return rows * columns * default_bytes
        return round(rows * columns * self.bits / 8) + rows * self.row_bytes

    @property
    def is_quantised(self) -> bool:
        return self.bits is not None

    @property
    def runs_anywhere(self) -> bool:
        return self.devices == ANY_DEVICE

    @property
    def keeps_plain_parts(self) -> bool:
        """Quantised, into plain tensors: what `quantized_model_dir` can keep."""
        return self.is_quantised and self.offloadable


_SDNQ = ("int8", "uint8", "int16", "uint16", "fp16", "fp8", "int6", "int5", "uint5", "uint4", "uint3", "uint2")
_KNOWN_ONLY = (
    Precision(name="int2-quanto", refused="E-PRECISION-COARSE", instead="nf4-bnb"),
    Precision(name="fp8uz-quanto", refused="E-PRECISION-FORMAT", instead="fp8wo-torchao"),
    # Measured: the gradients that torchao passes through this format point elsewhere (cosine 0.58).
    Precision(name="int8dq-torchao", refused="E-PRECISION-GRADIENTS"),
    Precision(name="int8dq-int4-torchao", refused="E-PRECISION-GRADIENTS", instead="int4-torchao"),
    Precision(name="fp8-int4-torchao", refused="E-PRECISION-GRADIENTS", instead="int4-torchao"),
    *(Precision(name=f"{number}-sdnq", refused="E-PRECISION-SDNQ") for number in _SDNQ),
    Precision(name="fp8-native", refused="E-PRECISION-FORMAT", instead="fp8wo-torchao"),
    Precision(name="fp8-transformerengine", refused="E-PRECISION-FORMAT", instead="fp8-torchao"),
)

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        precision.name: precision
        for precision in (
            Precision(name="no_change"),
            Precision(name="int8-torchao", bits=8, row_bytes=4),
            Precision(name="fp8-torchao", bits=8, row_bytes=4, devices=_CPU_CUDA, capability=89),
            Precision(name="fp8wo-torchao", bits=8, row_bytes=4, devices=_CPU_CUDA),
            Precision(name="int4-torchao", bits=4 + 32 / 128),
            Precision(name="nf4-bnb", bits=4 + 8 / 64 + 32 / (64 * 256), library=BITSANDBYTES, devices=_CPU_CUDA),
            Precision(name="int8-quanto", bits=8, row_bytes=4, library=QUANTO, offloadable=False),
            Precision(name="int4-quanto", bits=4 + 32 / 128, library=QUANTO, offloadable=False, instead="int4-torchao"),
            Precision(name="fp8-quanto", bits=8, row_bytes=4, library=QUANTO, devices=_CPU_CUDA, offloadable=False),
            *_KNOWN_ONLY,
        )
    }
)

PRECISION_SPELLINGS = (("int8", "int8-torchao"), ("nf4", "nf4-bnb"), ("none", "no_change"), ("no", "no_change"))
