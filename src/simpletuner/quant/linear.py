"""A frozen linear layer whose weight lies in memory in another form than the one it is computed in.

The weight is a handful of plain tensors ("parts": codes, scales) in a `WeightFormat`; a product turns them back into
numbers of the activations' dtype, in forward and again in backward. Autograd keeps neither the parts nor the numbers,
only the layer: so the parts may lie elsewhere between two uses, which is what streaming needs (`before_use`).

Shape letters: R rows of activations, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = Mapping[str, Tensor]


class WeightFormat(ABC):
    """How a weight [O, I] is stored. A format has no state: what a weight needs is among its parts."""

    name: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a floating-point weight [O, I], on its device."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the parts stand for, in `dtype`."""

    def multiply(self, x_RI: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """x W^T [R, O] in x's dtype."""
        return F.linear(x_RI, self.unpack(parts, shape, x_RI.dtype))

    def multiply_transposed(self, x_RO: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """x W [R, I] in x's dtype: what `multiply` is in backward."""
        return x_RO @ self.unpack(parts, shape, x_RO.dtype)


class FrozenLinear(nn.Linear):
    """W x + b with W in a `WeightFormat` and nothing trained.

    The parts are buffers under their own names. `before_use`, if set, is called before the parts are read, in forward
    and in backward; it may put them where `x` is. `streamed_to`, if set, is where the layer computes: its parts are
    then somebody else's to move, and lie on the meta device while they are not here.
    """

    def __init__(self, parts: Parts, shape: tuple[int, int], bias: Tensor | None, *, form: WeightFormat) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.form = form
        self.before_use: Callable[[], None] | None = None
        self.streamed_to: torch.device | None = None
        for name in form.part_names:
            self.register_buffer(name, parts[name])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, *, form: WeightFormat) -> FrozenLinear:
        """Pack a floating-point weight [O, I]."""
        rows, columns = weight.shape
        return cls(form.pack(weight.detach()), (rows, columns), bias, form=form)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors themselves."""
        return {name: self._buffers[name] for name in self.form.part_names}  # type: ignore[misc]

    def set_parts(self, parts: Parts) -> None:
        """Let `parts` be the stored tensors, wherever they lie."""
        self._buffers.update(parts)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.streamed_to or self.parts()[self.form.part_names[0]].device

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers [O, I]: a new tensor, for exports and comparisons."""
        if self.before_use is not None:
            self.before_use()
        return self.form.unpack(self.parts(), self.shape, dtype)

    def multiply(self, x_RI: Tensor) -> Tensor:
        """W x + b [R, O] in x's dtype, without a graph."""
        if self.before_use is not None:
            self.before_use()
        out = self.form.multiply(x_RI, self._buffers, self.shape)  # type: ignore[arg-type]
        return out if self.bias is None else out.add_(self.bias.to(out.dtype))

    def multiply_transposed(self, x_RO: Tensor) -> Tensor:
        """W^T x [R, I] in x's dtype, without a graph."""
        if self.before_use is not None:
            self.before_use()
        return self.form.multiply_transposed(x_RO, self._buffers, self.shape)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, None)

    def forward_given(self, x: Tensor, out: Tensor) -> Tensor:
        """As `forward(x)`, which gave `out` before: nothing is multiplied."""
        return self._forward(x, out)

    def _forward(self, x: Tensor, known: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out: Tensor = _FrozenProduct.apply(x.to(dtype), self, (known,))
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """What `.to(...)` does to every tensor of a model; parts that are streamed stay with their streamer."""
        parts = self.parts()
        if self.streamed_to is not None:
            self.set_parts(dict.fromkeys(parts))  # type: ignore[arg-type]
        try:
            super()._apply(fn, recurse)
        finally:
            if self.streamed_to is not None:
                self.set_parts(parts)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form.name}"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, known: tuple[Tensor | None]) -> Tensor:
        ctx.layer = layer
        (out,) = known  # in a tuple: autograd would return an argument as a copy
        if out is not None:
            return out.view_as(out)
        with torch.autocast(x.device.type, enabled=False):
            out = layer.multiply(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            x_gradient = ctx.layer.multiply_transposed(gradient.reshape(-1, gradient.shape[-1]))
        return x_gradient.view(*gradient.shape[:-1], -1), None, None
