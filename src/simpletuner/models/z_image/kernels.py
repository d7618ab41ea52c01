"""The element-wise mathematics between the matrix products. Statistics and products in float32, whatever the dtype.

Written by hand because autograd, given the formulas, would keep several intermediate tensors per norm and make about
twice as many passes over memory; here each function keeps its inputs and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(x: Tensor, coefficient: Tensor, eps: float) -> Tensor:
    """x / rms(x) * coefficient over the last dimension (RMS norm, Zhang & Sennrich 2019), in x's dtype.

    `coefficient` broadcasts to x: the norm's weight, times whatever else scales its output.
    """
    out: Tensor = _Normalise.apply(x, coefficient, eps)
    return out


def add_normalised(x: Tensor, update: Tensor, coefficient: Tensor, eps: float) -> Tensor:
    """x + update / rms(update) * coefficient, in x's dtype."""
    return x + normalise(update, coefficient, eps)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020, "GLU Variants Improve Transformer")."""
    out: Tensor = _SwiGLU.apply(gate, value)
    return out


def rotate(x_GSHd: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each pair of channels, read as a complex number, by `rotation`, complex64 [..., S, 1, d/2]."""
    pairs = torch.view_as_complex(x_GSHd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_GSHd.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: Tensor, eps: float) -> Tensor:
        inverse_rms = _inverse_rms(x, eps)
        ctx.save_for_backward(x, coefficient, inverse_rms)
        return (x * inverse_rms).mul_(coefficient).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, coefficient, inverse_rms = ctx.saved_tensors
        x_gradient = coefficient_gradient = None
        if ctx.needs_input_grad[0]:
            scaled = gradient * coefficient if coefficient.dtype == torch.float32 else gradient.float() * coefficient
            projection = torch.linalg.vecdot(scaled, x.to(scaled.dtype))[..., None]
            projection *= inverse_rms.pow(3).mul_(-1.0 / x.shape[-1])
            x_gradient = scaled.mul_(inverse_rms).addcmul_(x.to(scaled.dtype), projection).to(x.dtype)
        if ctx.needs_input_grad[1]:
            normed = (x * inverse_rms).mul_(gradient)
            coefficient_gradient = normed.sum_to_size(coefficient.shape).to(coefficient.dtype)
        return x_gradient, coefficient_gradient, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        gate, value = ctx.saved_tensors
        gate_gradient: Tensor = torch.ops.aten.silu_backward(gradient * value, gate)
        return gate_gradient, F.silu(gate).mul_(gradient)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), float32 [..., 1]."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
