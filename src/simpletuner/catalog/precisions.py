"""Number formats of the frozen base model. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`library`: the package that implements it. `available`: this version can run it; others are known by name."""

    name: str
    library: str | None
    available: bool = False


_SDNQ = ("int8", "uint8", "int16", "uint16", "fp16", "fp8", "int6", "int5", "uint5", "uint4", "uint3", "uint2")
_BY_LIBRARY = (
    ("optimum-quanto", ("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "fp8uz-quanto")),
    (
        "torchao",
        (
            "int8-torchao", "int4-torchao", "int8dq-torchao", "int8dq-int4-torchao", "fp8-torchao", "fp8wo-torchao",
            "fp8-int4-torchao",
        ),
    ),
    ("bitsandbytes", ("nf4-bnb",)),
    ("sdnq", tuple(f"{number}-sdnq" for number in _SDNQ)),
    ("torch", ("fp8-native",)),
    ("transformer-engine", ("fp8-transformerengine",)),
)  # fmt: skip

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "no_change": Precision(name="no_change", library=None, available=True),
        **{name: Precision(name=name, library=library) for library, names in _BY_LIBRARY for name in names},
    }
)

PRECISION_SPELLINGS = (("int8", "int8-torchao"), ("nf4", "nf4-bnb"), ("none", "no_change"), ("no", "no_change"))
