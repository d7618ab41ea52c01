"""Small models that are used rarely, piece by piece on the device: what the autoencoder needs.

Each piece is a module that is called as a whole. Its tensors lie in main memory; they are copied to the device when it
is called and the copies are dropped when it returns. Nothing is copied back, so nothing may be trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def apply_module_swap(pieces: Iterable[nn.Module], *, device: torch.device) -> int:
    """Let each of `pieces`, frozen and in main memory, be on `device` while it runs. Returns how many there are."""
    count = 0
    for piece in pieces:
        swap = _Swap(piece, device)
        piece.register_forward_pre_hook(swap.bring)
        piece.register_forward_hook(swap.drop, always_call=True)
        count += 1
    return count


class _Swap:
    """The tensors of one piece at home, in main memory."""

    def __init__(self, piece: nn.Module, device: torch.device) -> None:
        self._device = device
        self._homes = [tensor.data for tensor in _tensors(piece)]

    def bring(self, piece: nn.Module, args: Any) -> None:
        for tensor, home in zip(_tensors(piece), self._homes, strict=True):
            tensor.data = home.to(self._device, copy=True)

    def drop(self, piece: nn.Module, args: Any, out: Any) -> None:
        for tensor, home in zip(_tensors(piece), self._homes, strict=True):
            tensor.data = home


def _tensors(piece: nn.Module) -> Iterator[Tensor]:
    yield from piece.parameters()
    yield from piece.buffers()
