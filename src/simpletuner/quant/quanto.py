"""optimum-quanto's layers, as the library makes them. Their weights are tensor subclasses that cannot be streamed."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

QTYPES = MappingProxyType({"int8-quanto": "qint8", "int4-quanto": "qint4", "fp8-quanto": "qfloat8"})


def quanto_linear(weight: Tensor, *, name: str, dtype: torch.dtype) -> nn.Module:
    """A frozen quantised layer of the weight [O, I], without bias; `name` is the precision's row in the catalog."""
    from optimum import quanto

    rows, columns = weight.shape
    plain = nn.Linear(columns, rows, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer: nn.Module = quanto.QLinear.from_module(plain, weights=getattr(quanto, QTYPES[name]))
    layer.freeze()  # type: ignore[operator]
    return layer.requires_grad_(False)
