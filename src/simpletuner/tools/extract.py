"""A LoRA out of a fine-tune: the best one of a rank for the difference of two models, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from simpletuner.adapters.formats.lowrank import reduce_matrix
from simpletuner.adapters.formats.names import is_known
from simpletuner.adapters.formats.weights import Adapter, LoraWeights, ModuleWeights
from simpletuner.problems import ModelError, Problem
from simpletuner.tools.stored import StoredModel, open_model

_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The LoRA and how much of the difference it holds.

    `energy` in [0, 1] is the share of the squared difference of all linear layers, `smallest` that of the layer
    `worst`. `left_out` are tensors that differ but that a LoRA cannot change.
    """

    adapter: Adapter
    energy: float
    smallest: float
    worst: str
    left_out: tuple[str, ...]

    def described(self, metadata: Mapping[str, str]) -> Adapter:
        """The adapter with these entries in its metadata."""
        return replace(self.adapter, metadata=metadata)


def extract(
    base: Sequence[Path],
    tuned: Sequence[Path],
    *,
    rank: int,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """Compare two transformers, whatever layouts they are stored in; layers that are equal get no adapter.

    Raises:
        ModelError: E-EXTRACT-DIFFER, other layers or sizes; E-EXTRACT-EQUAL, nothing differs.
    """
    first, second = open_model(base), open_model(tuned)
    _check_alike(first, second)
    modules: dict[str, ModuleWeights] = {}
    left_out = []
    kept_square, total_square, smallest, worst = 0.0, 0.0, 1.0, "-"
    for done, name in enumerate(first.weights, start=1):
        on_progress(done, len(first.weights))
        layer = name.removesuffix(".weight")
        delta = second.weights[name].read().float() - first.weights[name].read().float()
        if not delta.any():
            continue
        if not is_known(layer) or not name.endswith(".weight"):
            left_out.append(name)
            continue
        lora, norm, error = _extract(delta, rank, dtype)
        modules[layer] = lora
        kept_square, total_square = kept_square + norm**2 - error**2, total_square + norm**2
        energy = 1 - (error / norm) ** 2
        if energy <= smallest:
            smallest, worst = energy, layer
    if not modules:
        raise ModelError(Problem(code="E-EXTRACT-EQUAL", params={"base": base[0].name, "tuned": tuned[0].name}))
    return Extracted(
        adapter=Adapter(modules=modules, metadata={}),
        energy=kept_square / total_square,
        smallest=smallest,
        worst=worst,
        left_out=tuple(left_out),
    )


def _extract(delta_OI: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[LoraWeights, float, float]:
    """(LoRA, norm of the difference, norm of what the LoRA misses), both measured."""
    lora = reduce_matrix(delta_OI, rank, dtype=dtype)
    norm = float(delta_OI.norm(dtype=torch.float64))
    error = float((delta_OI - lora.delta()).norm(dtype=torch.float64))
    return lora, norm, min(error, norm)


def _check_alike(first: StoredModel, second: StoredModel) -> None:
    names = [n for n in {**first.weights, **second.weights} if not _is_alike(first, second, n)]
    if names:
        params = {"count": len(names), "names": ", ".join(names[:_NUM_NAMED])}
        raise ModelError(Problem(code="E-EXTRACT-DIFFER", params=params))


def _is_alike(first: StoredModel, second: StoredModel, name: str) -> bool:
    one, other = first.weights.get(name), second.weights.get(name)
    return one is not None and other is not None and one.shape == other.shape
