"""What a recomputed block keeps beside its input: outputs of linear layers, which are then not multiplied again.

A layer's output [S, D] stands in for its product: a share of the recomputation is saved for the memory of one more
activation. The layer's gradients still take its input, which is recomputed. Values and gradients are bit for bit the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class TakesOutput(Protocol):
    """A layer that can be told what it gives."""

    def forward_given(self, x: Tensor, out: Tensor) -> Tensor:
        """As `forward(x)`, graph included, where `out` is what that gave before."""


class KeptOutput:
    """Stands in for the `forward` of a layer, and is that, unless it is told to note or to use what it gives."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._forward: Callable[[Tensor], Tensor] = layer.forward
        self._noted: list[Tensor] | None = None
        self._given: Iterator[Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._given is not None:
            return _forward_given(self._layer, self._forward, x, next(self._given))
        out = self._forward(x)
        if self._noted is not None:
            self._noted.append(out.detach())
        return out

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """The list to which what the layer gives is added."""
        noted = self._noted = []
        try:
            yield noted
        finally:
            self._noted = None

    @contextmanager
    def giving(self, given: Sequence[Tensor]) -> Iterator[None]:
        """Let it give these, one at each call, instead of computing them."""
        self._given = iter(given)
        try:
            yield
        finally:
            self._given = None


def _forward_given(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> Tensor:
    if type(layer) is nn.Linear:
        is_frozen = not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
        return cast("Tensor", _KnownProduct.apply(x, layer, (out,))) if is_frozen else forward(x)
    return layer.forward_given(x, out) if isinstance(layer, TakesOutput) else forward(x)


class _KnownProduct(torch.autograd.Function):
    """A frozen linear layer whose output is known: what is left is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, known: tuple[Tensor]) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        (out,) = known  # autograd would return an argument as a copy
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            x_gradient = (rows @ ctx.layer.weight.to(rows.dtype)).view(*gradient.shape[:-1], -1)
        return x_gradient.to(ctx.dtype), None, None
