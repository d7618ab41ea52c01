"""Tensors of an adapter file, in any of the known layouts, to an `Adapter`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from simpletuner.adapters.formats.names import (
    DIFFUSERS_KEY,
    LOKR_W1,
    LOKR_W1_PAIR,
    LOKR_W2,
    LOKR_W2_PAIR,
    Key,
    Part,
    group_keys,
    is_fused,
    is_known,
    json_object,
    looks_like_model,
    missing_parts,
    near_names,
    split_of,
    unread_problem,
)
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights
from simpletuner.problems import ModelError, Problem

_NUM_NAMED = 3


def parse_adapter(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, path: str, known: Collection[str] | None = ()
) -> Adapter:
    """Read an adapter.

    Args:
        path: the file's name, for messages.
        known: the linear layers of the model that it is for; empty: those of Z-Image; None: any names will do.
    Raises:
        ModelError: E-LORA-OTHER-MODEL, E-LORA-IS-MODEL, E-LORA-KIND, E-LORA-INCOMPLETE, E-LORA-PARTS.
    """
    modules, rest = group_keys(tensors)
    if known is not None:
        _check_names(modules, known, path)
    if rest or not modules:
        raise ModelError(_not_an_adapter(tensors, rest, path))
    problems = [problem for name, keys in modules.items() if (problem := _incomplete(name, keys, path))]
    if not problems:
        parts = {name: {part: tensors[key.text] for part, key in keys.items()} for name, keys in modules.items()}
        problems = [problem for name, found in parts.items() if (problem := _ill_shaped(name, found, path))]
    if problems:
        raise ModelError(problems[:_NUM_NAMED])
    weights = {name: _weights(found) for name, found in parts.items()}
    return Adapter(modules=_with_alphas_of_metadata(weights, metadata), metadata=dict(metadata))


def _check_names(modules: Collection[str], known: Collection[str], path: str) -> None:
    """Every module must be one that the model has, or a fused one of three that it has."""

    def has(name: str) -> bool:
        return is_known(name) if not known else name in known or (is_fused(name) and split_of(name)[0] in known)

    foreign = [name for name in modules if not has(name)]
    if not foreign:
        return
    near = dict.fromkeys(name for module in foreign[:_NUM_NAMED] for name in near_names(module, tuple(known)))
    params = {
        "path": path,
        "count": len(foreign),
        "total": len(modules),
        "names": _some(foreign),
        "near": ", ".join(list(near)[:_NUM_NAMED]) or "-",
    }
    raise ModelError(Problem(code="E-LORA-OTHER-MODEL", params=params))


def _not_an_adapter(tensors: Mapping[str, Tensor], rest: Sequence[str], path: str) -> Problem:
    if len(rest) == len(tensors) and looks_like_model(rest):
        return Problem(code="E-LORA-IS-MODEL", params={"path": path})
    return unread_problem(rest, path)


def _incomplete(module: str, keys: Mapping[Part, Key], path: str) -> Problem | None:
    missing = missing_parts(keys)
    if not missing:
        return None
    stem = next(iter(keys.values())).stem
    params = {
        "path": path,
        "module": stem,
        "missing": ", ".join(part.value for part in missing),
        "present": ", ".join(key.suffix.removeprefix(".") for key in keys.values()),
    }
    return Problem(code="E-LORA-INCOMPLETE", params=params)


def _ill_shaped(module: str, parts: Mapping[Part, Tensor], path: str) -> Problem | None:
    """A problem if the tensors do not multiply to a matrix, or are no matrices."""
    pairs = [
        (Part.UP, Part.DOWN),
        LOKR_W1_PAIR,
        LOKR_W2_PAIR,
        (Part.HADA_W1_A, Part.HADA_W1_B),
        (Part.HADA_W2_A, Part.HADA_W2_B),
    ]
    matrices = {part: tensor for part, tensor in parts.items() if part not in (Part.ALPHA, Part.MAGNITUDE)}
    good = all(tensor.ndim == 2 and tensor.is_floating_point() for tensor in matrices.values())
    good = good and all(parts[a].shape[1] == parts[b].shape[0] for a, b in pairs if a in parts and b in parts)
    good = good and (Part.ALPHA not in parts or parts[Part.ALPHA].numel() == 1)
    if good and Part.HADA_W1_A in parts:
        good = all(
            parts[a].shape == parts[b].shape
            for a, b in ((Part.HADA_W1_A, Part.HADA_W2_A), (Part.HADA_W1_B, Part.HADA_W2_B))
        )
    good = good and len({part.value.split("_")[0] for part in matrices}) == 1  # one kind, not two in one place
    if good and Part.MAGNITUDE in parts:
        rows = _weights(parts).shape[0]
        good = tuple(parts[Part.MAGNITUDE].shape) in ((rows,), (rows, 1))
    if good and is_fused(module):
        good = _weights(parts).shape[0] % 3 == 0
    if good:
        return None
    shapes = ", ".join(f"{part.value} {list(tensor.shape)}" for part, tensor in parts.items())
    return Problem(code="E-LORA-PARTS", params={"path": path, "module": module, "shapes": shapes})


def _weights(parts: Mapping[Part, Tensor]) -> ModuleWeights:
    alpha = float(parts[Part.ALPHA].item()) if Part.ALPHA in parts else None
    magnitude = parts[Part.MAGNITUDE].flatten() if Part.MAGNITUDE in parts else None
    if Part.UP in parts:
        return LoraWeights(down=parts[Part.DOWN], up=parts[Part.UP], alpha=alpha, magnitude=magnitude)
    if Part.HADA_W1_A in parts:
        first = (parts[Part.HADA_W1_A], parts[Part.HADA_W1_B])
        second = (parts[Part.HADA_W2_A], parts[Part.HADA_W2_B])
        return LohaWeights(w1=first, w2=second, alpha=alpha, magnitude=magnitude)
    w1, w2 = (
        tuple(parts[part] for part in (whole if whole[0] in parts else pair))
        for whole, pair in ((LOKR_W1, LOKR_W1_PAIR), (LOKR_W2, LOKR_W2_PAIR))
    )
    return LokrWeights(w1=w1, w2=w2, alpha=alpha, magnitude=magnitude)


def _with_alphas_of_metadata(
    modules: Mapping[str, ModuleWeights], metadata: Mapping[str, str]
) -> Mapping[str, ModuleWeights]:
    """Give LoRA without an alpha key the alpha that diffusers keeps in the metadata, as peft reads it."""
    config = json_object(metadata.get(DIFFUSERS_KEY))
    alpha, patterns = config.get("transformer.lora_alpha"), config.get("transformer.alpha_pattern") or {}
    if alpha is None:
        return modules
    completed = {}
    for name, weights in modules.items():
        special = [value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
        own = float((special or [alpha])[0])
        completed[name] = replace(weights, alpha=own) if weights.alpha is None else weights
    return completed


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" (+{rest})" if rest > 0 else "")
