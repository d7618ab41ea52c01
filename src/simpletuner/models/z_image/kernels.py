"""The element-wise mathematics between the matrix products, with statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def scaled_rms_norm(x_GSD: Tensor, weight_D: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * scale."""
    return rms_norm(x_GSD, weight_D, eps) * scale


def gated_residual(x_GSD: Tensor, update_GSD: Tensor, weight_D: Tensor, gate: Tensor, eps: float) -> Tensor:
    """x + gate * rms_norm(update)."""
    return torch.addcmul(x_GSD, gate.expand_as(x_GSD), rms_norm(update_GSD, weight_D, eps))


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value."""
    return F.silu(gate) * value


def norm_rope(x_GSHd: Tensor, weight_d: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """Normalise each head, then rotate its channel pairs by `rotation`, complex64 [..., S, 1, d/2]."""
    normed = F.rms_norm(x_GSHd.float(), x_GSHd.shape[-1:], weight_d.float(), eps)
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_GSHd.dtype)
