"""A transformer's weights on disk under our names, one tensor at a time; and such a file written anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from torch import Tensor

from simpletuner.adapters.formats.names import group_keys
from simpletuner.events.files import replacing
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.models.files import Header, StoredTensor, read_header
from simpletuner.models.tensors import DTYPES, bytes_of, read_tensor
from simpletuner.models.z_image.layouts import transformer_keys
from simpletuner.problems import ModelError, Problem

_FLOATS = ("F64", "F32", "F16", "BF16")
_COPY_BYTES = 8 << 20
_ALIGNMENT = 8

Change = Callable[[Tensor], Tensor]
"""A stored tensor -> its new numbers, of the same shape, in any floating-point format."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Where a parameter lies: rows `start` to `stop` of a stored tensor."""

    path: Path
    stored: StoredTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.stored.shape[1:])

    def read(self) -> Tensor:
        """Its numbers as stored."""
        with self.path.open("rb", buffering=0) as file:
            return read_tensor(file, self.stored)[self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A transformer's files and, by our names, its parameters."""

    headers: tuple[Header, ...]
    weights: Mapping[str, Weight]


def open_model(shards: Sequence[Path]) -> StoredModel:
    """Read the headers.

    Raises:
        ModelError: a file is damaged, is an adapter (E-MODEL-IS-LORA), or holds quantised numbers
            (E-STORED-QUANTISED).
    """
    headers = tuple(read_header(shard) for shard in shards)
    names = [tensor.name for header in headers for tensor in header.tensors]
    if group_keys(names)[0]:
        params = {"path": str(shards[0]), "part": "transformer"}
        raise ModelError(Problem(code="E-MODEL-IS-LORA", params=params))
    keys = transformer_keys(names)
    weights: dict[str, Weight] = {}
    for header in headers:
        for tensor in header.tensors:
            own = keys(tensor.name)
            if own and tensor.dtype not in _FLOATS:
                params = {"path": str(header.path), "name": tensor.name, "dtype": tensor.dtype}
                raise ModelError(Problem(code="E-STORED-QUANTISED", params=params))
            rows = tensor.shape[0] // len(own) if own and tensor.shape else 1
            for index, name in enumerate(own):
                weights[name] = Weight(path=header.path, stored=tensor, start=index * rows, stop=(index + 1) * rows)
    return StoredModel(headers=headers, weights=weights)


def rewrite(
    header: Header,
    target: Path,
    changes: Mapping[str, Change],
    metadata: Mapping[str, str],
    on_tensor: Callable[[], None],
) -> None:
    """Write a file like that of `header`, with some tensors changed; complete or not at all.

    One tensor at a time is in memory. `changes` are by stored name; results are rounded to the stored format.

    Raises:
        FileSystemError: it cannot be written; an older file of that name is intact.
    """
    position = 0
    entries: dict[str, object] = {"__metadata__": dict(sorted({**header.metadata, **metadata}.items()))}
    for tensor in header.tensors:
        size = tensor.stop - tensor.start
        offsets = [position, position + size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with os_errors_as_problems(target), header.path.open("rb", buffering=0) as source, replacing(target) as sink:
        sink.write(len(text).to_bytes(_ALIGNMENT, "little") + text)
        for tensor in header.tensors:
            for piece in _pieces(cast("BinaryIO", source), tensor, changes.get(tensor.name)):
                sink.write(piece)
            on_tensor()


def _pieces(file: BinaryIO, tensor: StoredTensor, change: Change | None) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a few MiB at a time."""
    if change is not None:
        changed = change(read_tensor(file, tensor)).to(DTYPES[tensor.dtype]).contiguous()
        yield bytes_of(changed)
        return
    file.seek(tensor.start)
    remaining = tensor.stop - tensor.start
    while remaining:
        piece = file.read(min(_COPY_BYTES, remaining))
        if not piece:
            raise EOFError(tensor.name)
        remaining -= len(piece)
        yield piece
