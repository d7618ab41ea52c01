"""A linear layer with low-rank updates: W x + b + the sum of scale B A x over the active adapters.

Modules and parameters have the names that peft gives them (`base_layer`, `lora_A.<adapter>.weight`), so peft and
diffusers exchange weights with us under the same keys. The forward is one autograd function: adding the two products
afterwards, as a plain formula does, takes passes of its own over a tensor as large as the layer's output, and as many
in backward. Here both additions happen inside the matrix products, which saves about a tenth of the layer's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class FrozenBase(Protocol):
    """A frozen base layer that keeps its weight in a form of its own and multiplies by it itself, without a graph."""

    @property
    def device(self) -> torch.device:
        """Where it computes; its weight may be elsewhere now."""

    def multiply(self, x_RI: Tensor) -> Tensor:
        """W x + b [R, O] of rows [R, I], in their dtype; a new tensor."""

    def multiply_transposed(self, x_RO: Tensor) -> Tensor:
        """W^T x [R, I] of rows [R, O], in their dtype; a new tensor."""


class LoraLinear(nn.Module):
    """`base_layer` with adapters around it; those in `active` act, each `strengths[name]` times its trained scale.

    At strength 0 an adapter is as if it were not there, to the last bit.

    `scales` are alpha / rank. `dropouts` zero a share of an adapter's input while training.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._base_multiplies_itself = isinstance(base_layer, FrozenBase)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.scales: dict[str, float] = {}
        self.strengths: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.train(base_layer.training)

    def add_adapter(self, name: str, *, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0) -> None:
        """Add and activate A = `down` [rank, in] and B = `up` [out, rank]; both become trained parameters."""
        for parts, weight in ((self.lora_A, down), (self.lora_B, up)):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            part.weight = nn.Parameter(weight)
            parts[name] = part
        self.scales[name], self.strengths[name], self.dropouts[name] = scale, 1.0, dropout
        self.active = (*self.active, name)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        if isinstance(self.base_layer, FrozenBase):
            return self.base_layer.device
        tensors = (*self.base_layer.parameters(), *self.base_layer.buffers())
        return tensors[0].device

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of an adapter."""
        return cast("Tensor", self.lora_A[name].weight), cast("Tensor", self.lora_B[name].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, None)

    def forward_given(self, x: Tensor, out: Tensor) -> Tensor:
        """As `forward(x)`, which gave `out` before: what is computed is what backward needs."""
        return self._forward(x, out)

    def _forward(self, x: Tensor, known: Tensor | None) -> Tensor:
        base = self.base_layer
        active = [name for name in self.active if self.strengths[name]]
        if not active:
            return cast("Tensor", base(x))
        scales = tuple(self.scales[name] * self.strengths[name] for name in active)
        pairs = [self.pair(name) for name in active]
        drops = self.training and any(self.dropouts[name] > 0 for name in active)
        is_plain = type(base) is nn.Linear and not base.weight.requires_grad
        if drops or not (is_plain or self._base_multiplies_itself):
            return self._general_forward(x, active)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = [weight for pair in pairs for weight in pair]
        return cast("Tensor", _LowRankLinear.apply(x.to(dtype), base, scales, (known,), *flat))

    def _general_forward(self, x: Tensor, active: Sequence[str]) -> Tensor:
        """With dropout, or around a base that is trained or of a library's own: the formula, left to autograd."""
        out = self.base_layer(x)
        for name in active:
            down, up = self.pair(name)
            inner = F.linear(F.dropout(x, self.dropouts[name], self.training), down.to(x.dtype))
            out = out + F.linear(inner, up.to(inner.dtype)) * (self.scales[name] * self.strengths[name])
        return cast("Tensor", out)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank {self.pair(name)[0].shape[0]}" for name in self.scales)


class _LowRankLinear(torch.autograd.Function):
    """In x's dtype, whatever the weights' dtypes. The base is frozen; so is a pair that needs no gradient.

    The graph holds the base layer, not its weight: a layer may keep that elsewhere until backward comes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear | FrozenBase,
        scales: tuple[float, ...],
        known: tuple[Tensor | None],
        *pairs: Tensor,
    ) -> Tensor:
        dtype, rows = x.dtype, x.reshape(-1, x.shape[-1])
        inners = []
        (out,) = known  # in a tuple: autograd would return an argument as a copy
        with torch.autocast(x.device.type, enabled=False):
            if out is None:
                out = _multiply(base, rows)
            for down, up, scale in zip(pairs[::2], pairs[1::2], scales, strict=True):
                inner = rows @ down.to(dtype).t()
                if known[0] is None:
                    out.addmm_(inner, up.to(dtype).t(), alpha=scale)
                inners.append(inner)
        ctx.save_for_backward(x, *pairs, *inners)
        ctx.base, ctx.scales = base, scales
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.scales)
        downs, ups, inners = saved[: 2 * count : 2], saved[1 : 2 * count : 2], saved[2 * count :]
        dtype, rows, gradient = x.dtype, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        x_gradient: Tensor | None = None
        gradients: list[Tensor | None] = [None] * (2 * count)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                x_gradient = _multiply_transposed(ctx.base, gradient)
            for index, (down, up, inner, scale) in enumerate(zip(downs, ups, inners, ctx.scales, strict=True)):
                inner_gradient = (gradient @ up.to(dtype)).mul_(scale)
                if ctx.needs_input_grad[4 + 2 * index]:
                    gradients[2 * index] = (inner_gradient.t() @ rows).to(down.dtype)
                if ctx.needs_input_grad[5 + 2 * index]:
                    gradients[2 * index + 1] = (gradient.t() @ inner).mul_(scale).to(up.dtype)
                if x_gradient is not None:
                    x_gradient.addmm_(inner_gradient, down.to(dtype))
        return (None if x_gradient is None else x_gradient.view_as(x), None, None, None, *gradients)


def _multiply(base: nn.Linear | FrozenBase, x_RI: Tensor) -> Tensor:
    if type(base) is not nn.Linear:
        return cast("FrozenBase", base).multiply(x_RI)
    return F.linear(x_RI, base.weight.to(x_RI.dtype), None if base.bias is None else base.bias.to(x_RI.dtype))


def _multiply_transposed(base: nn.Linear | FrozenBase, x_RO: Tensor) -> Tensor:
    if type(base) is not nn.Linear:
        return cast("FrozenBase", base).multiply_transposed(x_RO)
    return x_RO @ base.weight.to(x_RO.dtype)
