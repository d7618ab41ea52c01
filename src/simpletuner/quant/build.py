"""Number formats by name. Adding one takes a class or a function in this folder and a row in `catalog.precisions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from simpletuner.quant.formats import Float8DynamicFormat, Float8Format, Int4Format, Int8Format, PlainFormat
from simpletuner.quant.linear import FrozenLinear, WeightFormat
from simpletuner.quant.nf4 import NF4Format
from simpletuner.quant.quanto import QTYPES, quanto_linear

PLAIN = PlainFormat()
FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        form.name: form
        for form in (PLAIN, Int8Format(), Float8Format(), Float8DynamicFormat(), Int4Format(), NF4Format())
    }
)


def quantiser(precision: str, dtype: torch.dtype) -> Callable[[Tensor], nn.Module] | None:
    """weight [O, I] -> frozen layer in the number format `precision`, on the weight's device; None for "no_change".

    `dtype` is that of the activations, which a library's own layers must be told.
    """
    if precision in FORMATS:
        return partial(FrozenLinear.from_weight, bias=None, form=FORMATS[precision])
    return partial(quanto_linear, name=precision, dtype=dtype) if precision in QTYPES else None
