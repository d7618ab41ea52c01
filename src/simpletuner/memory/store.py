"""Where streamed weights are while they are not on the device: each group's parts end to end in one block of bytes.

So a group moves with one copy. `RamStore` keeps the blocks in main memory, pinned for a GPU; `SpillStore` (spill.py) in
files.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner.memory.groups import aligned

Parts = Mapping[str, Tensor]
_PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """A tensor within a block; `start` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, block: Tensor) -> Tensor:
        """The tensor in `block`, uint8 [n]; shares its memory."""
        return block[self.start : self.start + self.size_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Layer -> part -> where it lies in the group's block."""

    layers: Mapping[str, Mapping[str, PartLayout]]
    size_bytes: int

    def views(self, block: Tensor) -> dict[str, dict[str, Tensor]]:
        """The tensors of all layers in `block`, uint8 [at least size_bytes]."""
        return {layer: {name: p.view(block) for name, p in parts.items()} for layer, parts in self.layers.items()}


def lay_out(layers: Mapping[str, Parts]) -> GroupLayout:
    """Places for the tensors of a group, in the order given, each aligned as a tensor of its own is."""
    places: dict[str, dict[str, PartLayout]] = {}
    start = 0
    for layer, parts in layers.items():
        for name, tensor in parts.items():
            place = PartLayout(dtype=tensor.dtype, shape=tuple(tensor.shape), start=start)
            places.setdefault(layer, {})[name] = place
            start += aligned(place.size_bytes)
    return GroupLayout(layers=places, size_bytes=start)


class GroupStore(ABC):
    """Blocks by the number of their group. Filled once with `put` and `finish`, then only read."""

    @abstractmethod
    def put(self, group: int, layers: Mapping[str, Parts]) -> None:
        """Take a copy of the group's tensors, wherever they are."""

    @abstractmethod
    def finish(self) -> None:
        """All groups are there."""

    @abstractmethod
    def layout(self, group: int) -> GroupLayout: ...

    @abstractmethod
    def block(self, group: int) -> Tensor | None:
        """The block in main memory, uint8 [size]; None if it must be read."""

    @abstractmethod
    def read(self, group: int, into: Tensor) -> None:
        """Read the block into `into`, uint8 [size] in main memory."""


class RamStore(GroupStore):
    """Blocks in main memory; `pinned` ones can be copied to a GPU while it computes."""

    def __init__(self, num_groups: int, *, pinned: bool) -> None:
        self._pinned = pinned
        self._layouts: list[GroupLayout | None] = [None] * num_groups
        self._blocks: list[HostBytes | None] = [None] * num_groups

    def put(self, group: int, layers: Mapping[str, Parts]) -> None:
        layout = lay_out(layers)
        block = HostBytes(layout.size_bytes, pinned=self._pinned)
        copy_parts(layers, layout, block.tensor)
        self._layouts[group], self._blocks[group] = layout, block

    def finish(self) -> None:
        assert all(block is not None for block in self._blocks)

    def layout(self, group: int) -> GroupLayout:
        found = self._layouts[group]
        assert found is not None
        return found

    def block(self, group: int) -> Tensor:
        found = self._blocks[group]
        assert found is not None
        return found.tensor

    def read(self, group: int, into: Tensor) -> None:
        into.copy_(self.block(group))


class HostBytes:
    """Bytes of main memory, uint8 [size], pinned if asked for and allowed; some systems allow only so much.

    The memory is registered with the driver after it was allocated: torch's own pinned allocator takes the next power
    of two, which for the blocks of a large model is half as much again. Pages are registered whole, so no two of
    these share one.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.is_pinned = False
        if not pinned:
            self.tensor = torch.empty(size_bytes, dtype=torch.uint8)
            return
        whole_bytes = -(-size_bytes // _PAGE) * _PAGE
        memory = torch.empty(whole_bytes + _PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % _PAGE
        self.tensor = memory[start : start + size_bytes]
        runtime: Any = torch.cuda.cudart()
        self.is_pinned = int(runtime.cudaHostRegister(self.tensor.data_ptr(), whole_bytes, 0)) == 0
        if self.is_pinned:
            weakref.finalize(self, _unregister, runtime, self.tensor)


def copy_parts(layers: Mapping[str, Parts], layout: GroupLayout, block: Tensor) -> None:
    """Copy tensors to their places in `block`; the gaps become zeros, so that equal groups are equal bytes."""
    block.zero_()
    views = layout.views(block)
    for layer, parts in layers.items():
        for name, tensor in parts.items():
            views[layer][name].copy_(tensor)


def meta_parts(layout: Mapping[str, PartLayout]) -> dict[str, Tensor]:
    """Tensors without memory in the place of those of a layer."""
    return {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in layout.items()}


def group_of_layer(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """Layer -> the number of its group."""
    return {name: index for index, members in enumerate(groups) for name in members}


def _unregister(runtime: Any, tensor: Tensor) -> None:
    """`tensor` is here so that its memory is there until now. A copy from it may still be on its way."""
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(tensor.data_ptr())
