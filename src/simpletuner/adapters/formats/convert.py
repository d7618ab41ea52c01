"""Adapters made of adapters: another layout, another rank, a weighted sum. What is lost is measured on what is written.

Every function returns a `Made`: the file's tensors and metadata, and how far its updates are from what they should be.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce as reduce_pairwise

import torch
from torch import Tensor

from simpletuner.adapters.formats.fuse import split
from simpletuner.adapters.formats.layouts import Layout
from simpletuner.adapters.formats.lowrank import Reduction, as_lora, difference_norm, reduce, update_norm
from simpletuner.adapters.formats.names import DIFFUSERS_KEY, HASH_KEY, is_fused, json_object, split_of
from simpletuner.adapters.formats.read import parse_adapter
from simpletuner.adapters.formats.weights import (
    Adapter,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    WeightedSum,
)
from simpletuner.adapters.formats.write import fits, to_tensors
from simpletuner.problems import ModelError, Problem

OnProgress = Callable[[int, int], None]
"""(modules done, modules in all)."""

DEFAULT_ENERGY = 0.9999
"""Share of a LoKr update that its LoRA keeps, if nothing else is asked for."""

_OWN_METADATA = "simpletuner"
_TRIGGERS = "modelspec.trigger_phrase"
_STALE_METADATA = (DIFFUSERS_KEY, HASH_KEY, "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How far written updates are from those they stand for, relative, in the Frobenius norm.

    `total` is that of all modules together, `largest` that of the module `worst`.
    """

    total: float
    largest: float
    worst: str


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file to be written, and what can be said of it. `ranks` are (smallest, largest) of its modules."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    num_modules: int
    kinds: tuple[str, ...]
    ranks: tuple[int, int]
    loss: Loss


def convert(
    adapter: Adapter,
    layout: Layout,
    *,
    reduction: Reduction | None = None,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Made:
    """The adapter in another layout. What the layout cannot hold becomes LoRA, by default with DEFAULT_ENERGY.

    A `reduction` makes LoRA of everything; a `dtype` casts.
    """
    source = split(adapter)
    modules = {}
    for done, (name, weights) in enumerate(source.modules.items(), start=1):
        on_progress(done, len(source.modules))
        if reduction is None and fits(name, weights, layout):
            modules[name] = weights
        else:
            exact = as_lora(weights) if reduction is None else None
            made = exact or reduce(weights, reduction or Reduction(energy=DEFAULT_ENERGY))
            modules[name] = _cast(made, weights.tensors[0].dtype)
    return _finish(source.modules, modules, layout, dtype, metadata=source.metadata)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An adapter that takes part in a sum `strength` times. `name` is for the result's metadata."""

    name: str
    adapter: Adapter
    strength: float


def merge(
    adapters: Sequence[Weighted],
    layout: Layout,
    *,
    reduction: Reduction | None = None,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Made:
    """The sum of adapters, each times its strength: LoRA whose rank is the sum of theirs, or what `reduction` leaves.

    The result has the widest number format of its parts, or `dtype`.

    Raises:
        ModelError: E-MERGE-DORA, E-MERGE-SHAPES.
    """
    sources = [(split(part.adapter), part.strength) for part in adapters]
    if any(adapter.has_magnitudes for adapter, _ in sources):
        raise ModelError(Problem(code="E-MERGE-DORA"))
    parts = [(name, weights, strength) for adapter, strength in sources for name, weights in adapter.modules.items()]
    if dtype is None:
        dtype = reduce_pairwise(torch.promote_types, (weights.tensors[0].dtype for _, weights, _ in parts))
    wanted: dict[str, ModuleWeights | WeightedSum] = {}
    made: dict[str, ModuleWeights] = {}
    names = dict.fromkeys(name for name, _, _ in parts)
    for done, name in enumerate(names, start=1):
        on_progress(done, len(names))
        wanted[name], made[name] = _sum(name, [(weights, strength) for own, weights, strength in parts if own == name])
        if reduction is not None:
            made[name] = reduce(made[name], reduction)
    return _finish(wanted, made, layout, dtype, metadata=_merged_metadata(adapters))


def _merged_metadata(adapters: Sequence[Weighted]) -> dict[str, str]:
    """What the parts agree on, their trigger words together, and their names."""
    first, *others = (part.adapter.metadata for part in adapters)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    triggers = dict.fromkeys(
        word.strip()
        for part in adapters
        for word in part.adapter.metadata.get(_TRIGGERS, "").split(",")
        if word.strip()
    )
    if triggers:
        common[_TRIGGERS] = ", ".join(triggers)
    told = ", ".join(f"{part.name}@{part.strength:g}" for part in adapters)
    return {**common, "modelspec.title": " + ".join(part.name for part in adapters), "modelspec.merged_from": told}


def _sum(name: str, parts: Sequence[tuple[ModuleWeights, float]]) -> tuple[LoraWeights | WeightedSum, LoraWeights]:
    """(the weighted sum, the same as LoRA in float32): one and the same but for parts that are no LoRA."""
    if len({weights.shape for weights, _ in parts}) > 1:
        shapes = ", ".join("x".join(map(str, weights.shape)) for weights, _ in parts)
        raise ModelError(Problem(code="E-MERGE-SHAPES", params={"module": name, "shapes": shapes}))
    exact = [as_lora(weights) for weights, _ in parts]
    ups, downs = [], []
    for lora, (weights, strength) in zip(exact, parts, strict=True):
        summand = lora or reduce(weights, Reduction(energy=DEFAULT_ENERGY), dtype=torch.float32)
        ups.append(summand.up.float() * (summand.scale * strength))
        downs.append(summand.down.float())
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    total = LoraWeights(down=down, up=up, alpha=float(down.shape[0]))
    return (WeightedSum(parts=tuple(parts)) if None in exact else total), total


def _finish(
    wanted: Mapping[str, ModuleWeights | WeightedSum],
    modules: Mapping[str, ModuleWeights],
    layout: Layout,
    dtype: torch.dtype | None,
    *,
    metadata: Mapping[str, str],
) -> Made:
    """Write `modules`, read what was written, compare it with what was wanted."""
    if dtype is not None:
        modules = {name: _cast(weights, dtype) for name, weights in modules.items()}
    tensors = to_tensors(Adapter(modules=modules, metadata={}), layout)
    written = parse_adapter(tensors, {}, path=layout.name, known=None)
    ranks = [weights.rank or min(weights.shape) for weights in written.modules.values()]
    return Made(
        tensors=tensors,
        metadata=_metadata(metadata, written),
        num_modules=len(written.modules),
        kinds=tuple(sorted({_kind(weights) for weights in written.modules.values()})),
        ranks=(min(ranks), max(ranks)),
        loss=measure(wanted, split(written)),
    )


def measure(wanted: Mapping[str, ModuleWeights | WeightedSum], found: Adapter) -> Loss:
    """Compare updates with those of an adapter; the modules of both are split, as far as they can be."""
    squares, total, largest, worst = 0.0, 0.0, 0.0, "-"
    for name, weights in wanted.items():
        norm = update_norm(weights)
        error = _difference(name, weights, found)
        squares, total = squares + error**2, total + norm**2
        relative = error / norm if norm else error
        if relative > largest:
            largest, worst = relative, name
    return Loss(total=math.sqrt(squares / total) if total else math.sqrt(squares), largest=largest, worst=worst)


def _difference(name: str, weights: ModuleWeights | WeightedSum, found: Adapter) -> float:
    other = found.modules.get(name)
    if other is not None:
        if _same(weights, other):
            return 0.0
        return difference_norm(weights, other)
    if is_fused(name):
        delta = weights.delta()
        for rows, part in zip(delta.chunk(3), split_of(name), strict=True):
            if part in found.modules:
                rows.sub_(found.modules[part].delta())
        return float(delta.norm(dtype=torch.float64))
    return update_norm(weights)


def _same(first: ModuleWeights | WeightedSum, second: ModuleWeights) -> bool:
    if isinstance(first, WeightedSum):
        return False
    same_tensors = len(first.tensors) == len(second.tensors) and first.kind == second.kind
    pairs = zip(first.tensors, second.tensors, strict=False)
    return same_tensors and first.scale == second.scale and all(torch.equal(a, b) for a, b in pairs)


def _cast(weights: ModuleWeights, dtype: torch.dtype) -> ModuleWeights:
    if isinstance(weights, LoraWeights):
        return replace(weights, down=weights.down.to(dtype), up=weights.up.to(dtype))
    if isinstance(weights, LohaWeights):
        (a, b), (c, d) = weights.w1, weights.w2
        return replace(weights, w1=(a.to(dtype), b.to(dtype)), w2=(c.to(dtype), d.to(dtype)))
    assert isinstance(weights, LokrWeights)
    return replace(
        weights,
        w1=tuple(factor.to(dtype) for factor in weights.w1),
        w2=tuple(factor.to(dtype) for factor in weights.w2),
    )


def _kind(weights: ModuleWeights) -> str:
    return weights.kind if weights.magnitude is None else f"{weights.kind} + DoRA"


def _metadata(source: Mapping[str, str], written: Adapter) -> dict[str, str]:
    """What the file said before, with the rank and alpha that most modules have now."""
    kept = {key: value for key, value in source.items() if key not in _STALE_METADATA}
    sizes = [(w.rank, w.scale * w.rank) for w in written.modules.values() if isinstance(w, LoraWeights)]
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "z-image/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LoRA",
        **kept,
    }
    if sizes:
        rank, alpha = Counter(sizes).most_common(1)[0][0]
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
        own = json_object(kept.get(_OWN_METADATA))
        if own:
            metadata[_OWN_METADATA] = json.dumps({**own, "rank": rank, "alpha": alpha})
    return metadata
