"""Adapters merged into a transformer's own weights, shard by shard: memory for one tensor and its update, no more."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.adapters.formats.convert import Weighted
from simpletuner.adapters.formats.fuse import split
from simpletuner.adapters.formats.names import is_fused, near_names, split_of
from simpletuner.adapters.formats.weights import ModuleWeights, merge_
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.models.files import Header
from simpletuner.problems import ModelError, Problem
from simpletuner.tools.stored import Change, StoredModel, open_model, rewrite

_CONFIGS = ("config.json", "*.safetensors.index.json")
_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class _Addend:
    """What one adapter adds to one layer: all of `weights`, or the given third of its rows where it is fused."""

    weights: ModuleWeights
    strength: float
    third: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weights.shape
        return (rows if self.third is None else rows // 3), columns

    def add_to_(self, weight_OI: Tensor) -> None:
        delta_OI, magnitude_O = self.weights.delta(), self.weights.magnitude
        if self.third is not None:
            delta_OI = delta_OI.chunk(3)[self.third]
            magnitude_O = None if magnitude_O is None else magnitude_O.chunk(3)[self.third]
        merge_(weight_OI, delta_OI, magnitude_O, self.strength)


_Addends = Mapping[str, Sequence[_Addend]]


def merge_into(
    shards: Sequence[Path],
    adapters: Sequence[Weighted],
    target: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the model with the adapters in it; return how many layers changed.

    A single file gives the file `target`, in the layout and number format that it had; several, or one with a
    config.json beside it, give the folder `target` with files of the same names and the configuration. Either is
    there when everything is written, or not at all.

    Raises:
        ModelError: an adapter is for another model, or the model is quantised. Nothing is written then.
        FileSystemError: the disk is full or read-only.
    """
    model = open_model(shards)
    addends = _by_layer(model, adapters)
    metadata = {"modelspec.merged_from": ", ".join(f"{part.name}@{part.strength:g}" for part in adapters)}
    layout = _layers_by_stored_name(model)
    total, done = sum(len(header.tensors) for header in model.headers), 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    def write(header: Header, path: Path) -> None:
        changes: dict[str, Change] = {}
        for tensor in header.tensors:
            own = {name: rows for name, rows in layout[tensor.name].items() if name in addends}
            if own:
                changes[tensor.name] = partial(_change, rows=own, addends=addends)
        rewrite(header, path, changes, metadata=metadata, on_tensor=count)

    if not writes_folder(shards):
        write(model.headers[0], target)
        return len(addends)
    with _built_beside(target) as folder:
        for header in model.headers:
            write(header, folder / header.path.name)
        for pattern in _CONFIGS:
            for path in shards[0].parent.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    return len(addends)


def writes_folder(shards: Sequence[Path]) -> bool:
    """Whether the result is a folder: the model is one in the diffusers layout."""
    return len(shards) > 1 or (shards[0].parent / "config.json").is_file()


@contextmanager
def _built_beside(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` when the block has ended well; files that `target` had besides stay."""
    with os_errors_as_problems(target):
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield building
            building.chmod(0o755)
            if not target.exists():
                building.replace(target)
                return
            for path in building.iterdir():
                path.replace(target / path.name)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _by_layer(model: StoredModel, adapters: Sequence[Weighted]) -> _Addends:
    """Layer -> what is added to it, in order; everything is checked."""
    found: dict[str, list[_Addend]] = {}
    known = tuple(name.removesuffix(".weight") for name in model.weights if name.endswith(".weight"))
    for part in adapters:
        own = dict(_addends(part))
        foreign = [name for name in own if name not in known]
        if foreign:
            params = {
                "path": part.name,
                "count": len(foreign),
                "total": len(own),
                "names": ", ".join(foreign[:_NUM_NAMED]),
                "near": ", ".join(near_names(foreign[0], known)) or "-",
            }
            raise ModelError(Problem(code="E-LORA-OTHER-MODEL", params=params))
        for name, addend in own.items():
            expected = model.weights[f"{name}.weight"].shape
            if expected != addend.shape:
                sizes = {"found": "x".join(map(str, addend.shape)), "expected": "x".join(map(str, expected))}
                raise ModelError(Problem(code="E-LORA-SIZE", params={"path": part.name, "module": name, **sizes}))
            found.setdefault(name, []).append(addend)
    return found


def _addends(part: Weighted) -> Iterator[tuple[str, _Addend]]:
    for name, weights in split(part.adapter).modules.items():
        if is_fused(name):
            for third, own in enumerate(split_of(name)):
                yield own, _Addend(weights=weights, strength=part.strength, third=third)
        else:
            yield name, _Addend(weights=weights, strength=part.strength)


def _layers_by_stored_name(model: StoredModel) -> Mapping[str, Mapping[str, slice]]:
    """Stored tensor -> the layers whose weights it holds, and their rows in it."""
    layout: dict[str, dict[str, slice]] = {t.name: {} for header in model.headers for t in header.tensors}
    for name, weight in model.weights.items():
        if name.endswith(".weight"):
            layout[weight.stored.name][name.removesuffix(".weight")] = slice(weight.start, weight.stop)
    return layout


def _change(stored: Tensor, *, rows: Mapping[str, slice], addends: _Addends) -> Tensor:
    """The stored tensor in float32 with everything added."""
    changed = stored.to(torch.float32, copy=True)
    for name, own in rows.items():
        for addend in addends[name]:
            addend.add_to_(changed[own])
    return changed
