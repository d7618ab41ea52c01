"""A linear layer with a LyCORIS update around it: W x + b + strength times what the algorithm adds.

LoKr has a path of its own. Its update is a Kronecker product, s (w1 (x) w2), which is never written out: the input of a
token is laid out as a matrix, w1 mixes its rows and w2 its columns, and the second product adds straight to the base
layer's output. Backward takes two products of that size and keeps nothing but the input; the first product is so
small that it is taken again. Letters: R rows, O = o1 o2 outputs, I = i1 i2 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.adapters.algorithms import difference, scale_of
from simpletuner.adapters.layer import (
    AdaptedLinear,
    FrozenBase,
    is_frozen_product,
    multiply,
    multiply_transposed,
)
from simpletuner.catalog.lycoris import Update


class LycorisLinear(AdaptedLinear):
    """`base_layer`, which may have other adapters itself, with one update named `name`."""

    def __init__(self, base_layer: nn.Module, update: Update, tensors: Mapping[str, Tensor], *, name: str) -> None:
        """`tensors` are those of `catalog.lycoris.shapes`; they become trained parameters."""
        super().__init__(base_layer)
        self.update = update
        self.trained = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in tensors.items()})
        self._is_frozen_product = is_frozen_product(base_layer)
        self.scales[name], self.strengths[name] = 1.0, 1.0
        self.active = (name,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> trained tensor."""
        return cast("dict[str, Tensor]", dict(self.trained.items()))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, None)

    def forward_given(self, x: Tensor, out: Tensor) -> Tensor:
        """As `forward(x)`, which gave `out` before."""
        return self._forward(x, out)

    def _forward(self, x: Tensor, known: Tensor | None) -> Tensor:
        if not any(self.strengths[name] for name in self.active):
            return cast("Tensor", self.base_layer(x))
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)
        (strength,) = (self.strengths[name] for name in self.active)
        drops = self.training and self.update.drops
        if self.update.algo == "lokr":
            if self._is_frozen_product and not drops:
                return self._kronecker(x, self.base_layer, strength, known)
            added = self._kronecker(x, None, strength, None)
            out = cast("Tensor", self.base_layer(x))
        else:
            out = cast("Tensor", self.base_layer(x))
            with torch.autocast(kind, enabled=False):
                added = difference(self.update, self.tensors, x, self._without_bias(out), self._product, strength)
        return out + (_dropped(self.update, added) if drops else added)

    def _kronecker(self, x: Tensor, base: nn.Module | None, strength: float, known: Tensor | None) -> Tensor:
        t = self.tensors
        with torch.autocast(x.device.type, enabled=False):
            first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        second = (t["lokr_w2"],) if "lokr_w2" in t else (t["lokr_w2_a"], t["lokr_w2_b"])
        scale = strength * scale_of(self.update, t)
        return cast("Tensor", _KroneckerLinear.apply(x, base, scale, (known,), first, *second))

    def _without_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out - self.bias.to(out.dtype)

    def _product(self, x: Tensor) -> Tensor:
        return self._without_bias(cast("Tensor", self.base_layer(x)))

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.update.algo}: {sizes}"


def _dropped(update: Update, added: Tensor) -> Tensor:
    """An update with the parts left out that this step does without."""
    if update.module_dropout and torch.rand(()) < update.module_dropout:
        return torch.zeros_like(added)
    if update.rank_dropout:
        kept = (torch.rand(added.shape[-1], device=added.device) > update.rank_dropout).to(added.dtype)
        added = added * (kept / kept.mean().clamp(min=1e-6) if update.rank_dropout_scale else kept)
    return F.dropout(added, update.dropout) if update.dropout else added


class _KroneckerLinear(torch.autograd.Function):
    """W x + b + scale (w1 (x) w2) x in x's dtype; without a base the last term alone.

    w2 [o2, i2] is given whole or as two factors. The graph holds the base layer, not its weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear | FrozenBase | None,
        scale: float,
        known: tuple[Tensor | None],
        first: Tensor,
        *second: Tensor,
    ) -> Tensor:
        dtype, rows = x.dtype, x.reshape(-1, x.shape[-1])
        out_large = second[0].shape[0]
        (out,) = known  # in a tuple: autograd would return an argument as a copy
        with torch.autocast(x.device.type, enabled=False):
            if out is None:
                mixed = _mixed(first.to(dtype), rows)
                *inner, last = (part.to(dtype) for part in reversed(second))
                for part in inner:
                    mixed = mixed @ part.t()
                if base is None:
                    out = (mixed @ last.t()).mul_(scale).view(len(rows), -1)
                else:
                    out = multiply(base, rows)
                    out.view(-1, out_large).addmm_(mixed, last.t(), alpha=scale)
        ctx.save_for_backward(x, first, *second)
        ctx.base, ctx.scale = base, scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, first, *second = ctx.saved_tensors
        dtype, rows, num_rows = x.dtype, x.reshape(-1, x.shape[-1]), x.numel() // x.shape[-1]
        gradient = gradient.reshape(num_rows, -1)
        mixer = first.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            mixed = _mixed(mixer, rows)
            of_second, of_mixed = _of_product(gradient, mixed, second, ctx.scale)
            del mixed
            of_mixed = of_mixed.view(num_rows, len(mixer), -1)
            inputs = rows.view(num_rows, mixer.shape[1], -1)
            of_first = torch.bmm(of_mixed, inputs.transpose(1, 2)).sum(dim=0).to(first.dtype)
            of_x: Tensor | None = None
            if ctx.needs_input_grad[0]:
                turned = mixer.t().expand(num_rows, -1, -1)
                if ctx.base is None:
                    of_x = torch.bmm(turned, of_mixed)
                else:
                    of_x = multiply_transposed(ctx.base, gradient).view_as(inputs).baddbmm_(turned, of_mixed)
        return (None if of_x is None else of_x.reshape(x.shape), None, None, None, of_first, *of_second)


def _mixed(first: Tensor, rows_RI: Tensor) -> Tensor:
    """w1 over the blocks of each row, [R o1, i2]."""
    blocks = rows_RI.reshape(len(rows_RI), first.shape[1], -1)
    # Not matmul: that computes in another order where a gradient is wanted.
    return torch.bmm(first.expand(len(blocks), -1, -1), blocks).view(-1, blocks.shape[-1])


def _of_product(
    gradient: Tensor, mixed: Tensor, second: list[Tensor], scale: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of w2, or of its factors, and of what it was multiplied by."""
    gradient = gradient.reshape(len(mixed), -1)
    if len(second) == 1:
        (whole,) = second
        of_whole = (gradient.t() @ mixed).mul_(scale).to(whole.dtype)
        return (of_whole,), (gradient @ whole.to(gradient.dtype)).mul_(scale)
    left, right = (part.to(gradient.dtype) for part in second)
    of_inner = (gradient @ left).mul_(scale)
    of_left = (gradient.t() @ (mixed @ right.t())).mul_(scale)
    of_right = of_inner.t() @ mixed
    return (of_left.to(second[0].dtype), of_right.to(second[1].dtype)), of_inner @ right
