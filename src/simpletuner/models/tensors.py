"""Bytes of a safetensors file to tensors and back, one tensor at a time and without a memory map.

Mapped pages count as memory of the process until the system takes them back, so a model that is read through a map
seems to lie there twice; and a mapped tensor changes when its file does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from simpletuner.models.files import StoredTensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
_ALIGNMENT = 8  # safetensors pads its header with spaces so that the data begin at a multiple of it


def read_tensor(file: BinaryIO, stored: StoredTensor) -> Tensor:
    """The tensor in main memory of its own.

    Args:
        file: opened unbuffered.
    Raises:
        KeyError: a number format that torch lacks.
        EOFError: the file ends before the tensor does.
    """
    dtype = DTYPES[stored.dtype]
    raw = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
    file.seek(stored.start)
    view = bytes_of(raw)
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError(stored.name)
        view = view[count:]
    return raw.view(dtype).view(stored.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, complete or not at all, holding one tensor in main memory at a time.

    The largest elements come first, as the format wants it, so that every tensor is aligned.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. Nothing is left behind.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _, tensor in ordered:
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, not a copy."""
    return memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy()))
