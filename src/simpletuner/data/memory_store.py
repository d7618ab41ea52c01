"""Tensors by key in the memory of the run: a `TensorStore` of which nothing is left afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class MemoryStore:
    """Holds what is put into it; is its own writer."""

    def __init__(self) -> None:
        self._entries: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Tensor:
        """Return a fresh CPU tensor, as it was put. Raises: KeyError: absent."""
        return self._entries[key].clone()

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor. A key that is there already is kept."""
        self._entries.setdefault(key, tensor.detach().to("cpu", copy=True).contiguous())

    def discard_damaged(self, keys: Iterable[str]) -> int:
        """Memory does not fade: 0 entries are gone."""
        del keys
        return 0

    @contextmanager
    def writer(self, *, group_entries: int = 1) -> Iterator[MemoryStore]:
        """The store itself: there are no files that could hold groups of entries."""
        del group_entries
        yield self
