"""Weight files as numbers: what 8-bit and GGUF files hold is turned into float32, one tensor at a time, as it is read.

Of 8-bit floats two layouts are read: plain ones, and ComfyUI's scaled ones, where `<module>.scale_weight` (or
`<module>.weight_scale`) holds what the numbers of `<module>.weight` are to be multiplied by, one for all or one a row.
GGUF files keep the names of the model that they were made from; the package `gguf` knows the numbers of their blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from simpletuner.models.files import Header, StoredTensor, is_gguf, open_gguf
from simpletuner.models.tensors import DTYPES, read_tensor
from simpletuner.problems import ModelError, Problem

_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = (".scale_input", ".input_scale")  # of activations: nothing that weights need
_MARKER, _DESCRIPTION = "scaled_fp8", ".comfy_quant"
_KNOWN_DESCRIPTION = frozenset({"format", "full_precision_matrix_mult"})


class WeightSource(Protocol):
    """One open weight file."""

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor in main memory of its own, in a floating-point format of at least 16 bits if it has one.

        Raises:
            ModelError: E-MODEL-TENSOR, it cannot be read.
        """


def weights_of(header: Header) -> tuple[StoredTensor, ...]:
    """The tensors of a file that are weights, not scales or descriptions of other weights that are read here."""
    helpers = _helpers(header)
    return tuple(tensor for tensor in header.tensors if tensor.name not in helpers)


def has_numbers(stored: StoredTensor) -> bool:
    """Whether what is stored are numbers, not codes of a format that is not read here."""
    dtype = DTYPES.get(stored.dtype)
    return stored.dtype.startswith("GGML_") or dtype is None or dtype.is_floating_point


@contextmanager
def open_source(header: Header) -> Iterator[WeightSource]:
    """The file, open."""
    if is_gguf(header.path):
        yield _GgufSource(header.path)
        return
    with header.path.open("rb", buffering=0) as file:
        yield _SafetensorsSource(file, header)


class _SafetensorsSource:
    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file, self._path = file, header.path
        self._scales = _scales(header)

    def read(self, stored: StoredTensor) -> Tensor:
        tensor = self._raw(stored)
        if stored.dtype not in _FLOAT8:
            return tensor
        numbers = tensor.float()
        scale = self._scales.get(stored.name)
        return numbers if scale is None else numbers.mul_(self._raw(scale).float().reshape(-1, 1))

    def _raw(self, stored: StoredTensor) -> Tensor:
        try:
            return read_tensor(self._file, stored)
        except (KeyError, EOFError) as error:
            params = {"path": self._path, "name": stored.name, "dtype": stored.dtype}
            raise ModelError(Problem(code="E-MODEL-TENSOR", params=params)) from error


class _GgufSource:
    def __init__(self, path: Path) -> None:
        from gguf.quants import dequantize

        self._dequantize = dequantize
        self._path = path
        self._tensors: Mapping[str, Any] = {tensor.name: tensor for tensor in open_gguf(path).tensors}

    def read(self, stored: StoredTensor) -> Tensor:
        found = self._tensors[stored.name]
        try:
            numbers = self._dequantize(found.data, found.tensor_type)
        except NotImplementedError as error:
            params = {"path": self._path, "name": stored.name, "dtype": stored.dtype}
            raise ModelError(Problem(code="E-MODEL-TENSOR", params=params)) from error
        return torch.tensor(numbers, dtype=torch.float32).reshape(stored.shape)


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    weight: StoredTensor
    scale: StoredTensor


def _scales(header: Header) -> Mapping[str, StoredTensor]:
    """Name of a weight of 8-bit floats -> what it is to be multiplied by."""
    return {pair.weight.name: pair.scale for pair in _scaled(header)}


def _scaled(header: Header) -> Iterator[_Scaled]:
    by_name = {tensor.name: tensor for tensor in header.tensors}
    for weight in header.tensors:
        if weight.dtype not in _FLOAT8 or not weight.name.endswith(".weight"):
            continue
        module = weight.name.removesuffix(".weight")
        scale = next((by_name[module + suffix] for suffix in _SCALES if module + suffix in by_name), None)
        if scale is not None and _numel(scale.shape) in (1, weight.shape[0]) and _is_plain(header, by_name, module):
            yield _Scaled(weight=weight, scale=scale)


def _helpers(header: Header) -> frozenset[str]:
    """Names of what only describes weights of 8-bit floats that can be read."""
    names = {tensor.name for tensor in header.tensors}
    eights = {t.name.removesuffix(".weight") for t in header.tensors if t.dtype in _FLOAT8}
    found = {name for name in names if name == _MARKER or name.endswith(f".{_MARKER}")} if eights else set()
    for pair in _scaled(header):
        module = pair.weight.name.removesuffix(".weight")
        found |= {pair.scale.name} | {
            module + suffix for suffix in (*_BESIDE, _DESCRIPTION) if module + suffix in names
        }
    return frozenset(found)


def _is_plain(header: Header, by_name: Mapping[str, StoredTensor], module: str) -> bool:
    """Whether the description beside a weight, if there is one, says no more than that it is scaled 8-bit floats."""
    stored = by_name.get(module + _DESCRIPTION)
    if stored is None:
        return True
    with header.path.open("rb", buffering=0) as file:
        try:
            told = json.loads(bytes(read_tensor(file, stored).view(torch.uint8).tolist()))
        except (ValueError, KeyError, EOFError):
            return False
    return (
        isinstance(told, dict)
        and told.keys() <= _KNOWN_DESCRIPTION
        and str(told.get("format")).startswith(("float8_e4m3fn", "float8_e5m2"))
        and not str(told.get("format")).endswith("blockwise")
    )


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
