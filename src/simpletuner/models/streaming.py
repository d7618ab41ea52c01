"""Fill a module from safetensors files, one tensor at a time, so that a model never lies in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from simpletuner.models.files import Header, StoredTensor, WeightFiles, read_header
from simpletuner.models.sources import has_numbers, open_source, weights_of
from simpletuner.problems import ModelError, Problem

KeyMap = Callable[[str], Sequence[str]]
"""Stored name -> names of the parameters it holds, stacked along its rows in this order; empty: not needed."""

_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".lokr_w", ".hada_w")
# Scales beside 8-bit weights: ComfyUI's scaled fp8 and int8, torchao, bitsandbytes, optimum-quanto.
_QUANTISATION_MARKS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", ".quant_map")
_NUM_NAMED = 5


OnProgress = Callable[[int, int], None]
"""(bytes read, bytes to read)."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Linear layers that take another form as soon as their weight is read, so that it never lies in memory whole.

    `make(name, weight [out, in])` returns the layer to put in the place of the linear layer `name`, which has no bias.
    It is given the numbers as stored: on the device with `on_device`, else in main memory, and what it returns is then
    moved. Of the layers in `ready` the numbers are elsewhere already: nothing is read, and the weight is on the meta
    device.
    """

    layers: frozenset[str]
    make: Callable[[str, Tensor], nn.Module]
    on_device: bool = True
    ready: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A low-rank change of weights as they are read: the weight of the module `name` becomes W + up @ down, in float32.

    `pairs`: name -> (down [rank, in], up [out, rank]). `key` stands for all of it where results are kept.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    key: str

    def added(self, name: str, weight: Tensor) -> Tensor:
        """The changed weight [out, in] of module `name`, float32 on its device; one that has no change as it is."""
        pair = self.pairs.get(name)
        if pair is None:
            return weight
        down, up = (factor.to(weight.device, torch.float32) for factor in pair)
        return torch.addmm(weight.float(), up, down)


def quantising(layers: frozenset[str], quantise: Callable[[Tensor], nn.Module], *, on_device: bool) -> Conversion:
    """The conversion that calls `quantise(weight)` for each of `layers`."""
    return Conversion(layers=layers, make=lambda name, weight: quantise(weight), on_device=on_device)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows `start` to `stop` of a stored tensor are the parameter `name`; None: all of it."""

    stored: StoredTensor
    name: str
    rows: tuple[int, int] | None


def load_weights_(
    module: nn.Module,
    files: WeightFiles,
    *,
    keys: KeyMap,
    dtype: torch.dtype,
    device: torch.device,
    conversion: Conversion | None = None,
    addition: Addition | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Replace every parameter and persistent buffer of `module`, made on the meta device, by the stored ones.

    They arrive frozen, on `device`; floating-point ones in `dtype`, but for the layers of `conversion`. What `addition`
    adds is added before either, where the layer will be made. Everything is checked before anything is read; beside
    what is loaded, one tensor at a time is in memory.

    Raises:
        ModelError: a file is damaged, or what is stored and what the module has differ; every difference at once.
    """
    headers = [read_header(shard) for shard in files.shards]
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    plan = _plan(headers, shapes, keys, files)
    converted, ready = (conversion.layers, conversion.ready) if conversion is not None else (frozenset(), frozenset())
    plan = {path: [p for p in pieces if _layer_of(p.name) not in ready] for path, pieces in plan.items()}
    total_bytes = sum(tensor.stop - tensor.start for header in headers for tensor in header.tensors)
    by_path = {header.path: header for header in headers}
    if conversion is not None:
        for layer in sorted(ready):
            weight = cast("Tensor", module.get_submodule(layer).weight)
            place_module_(module, layer, conversion.make(layer, weight))
    for name, tensor, done_bytes in _read_all(plan, by_path):
        layer = _layer_of(name)
        if addition is not None and layer in addition.pairs:
            on_device = conversion is None or layer not in converted or conversion.on_device
            tensor = addition.added(layer, tensor.to(device) if on_device else tensor)
        if conversion is not None and layer in converted:
            place_module_(module, layer, _convert(module, layer, tensor, conversion, device))
        else:
            place_tensor_(module, name, tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device))
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    module.requires_grad_(False)


def place_tensor_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `module`, frozen."""
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    is_parameter = last in owner._parameters
    setattr(owner, last, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def place_module_(module: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` where `module` has its submodule `name`."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, replacement)


def _convert(module: nn.Module, name: str, weight: Tensor, conversion: Conversion, device: torch.device) -> nn.Module:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear) and layer._parameters["bias"] is None
    if conversion.on_device:
        weight = weight.to(device)
    return conversion.make(name, weight).train(layer.training).to(device)


def _layer_of(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def stored_names(files: WeightFiles) -> frozenset[str]:
    """Names of all stored tensors."""
    return frozenset(tensor.name for shard in files.shards for tensor in weights_of(read_header(shard)))


def _plan(
    headers: Iterable[Header], shapes: Mapping[str, tuple[int, ...]], keys: KeyMap, files: WeightFiles
) -> Mapping[Path, Sequence[_Piece]]:
    """Which rows of which file are which parameter; raises if the two sides do not match one to one."""
    plan: dict[Path, list[_Piece]] = {}
    unexpected: list[str] = []
    wrong: list[Problem] = []
    stored = {header.path: weights_of(header) for header in headers}
    all_names = [tensor.name for tensors in stored.values() for tensor in tensors]
    codes = [t.name for tensors in stored.values() for t in tensors if keys(t.name) and not has_numbers(t)]
    if codes:
        params = {"part": files.part, "path": _where(files)}
        raise ModelError(Problem(code="E-MODEL-QUANTISED", params=params))
    for header in headers:
        pieces = plan.setdefault(header.path, [])
        for tensor in stored[header.path]:
            names = keys(tensor.name)
            if not all(name in shapes for name in names):
                unexpected.append(tensor.name)
            elif names:
                expected = _stacked([shapes[name] for name in names])
                if tensor.shape != expected:
                    wrong.append(_shape_problem(header.path, tensor, expected))
                pieces.extend(_split(tensor, names, shapes))
    found = {piece.name for pieces in plan.values() for piece in pieces}
    missing = [name for name in shapes if name not in found]
    if missing or unexpected or wrong:
        raise ModelError(_mismatch(files, all_names, missing=missing, unexpected=unexpected, wrong=wrong))
    return plan


def _stacked(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len(shapes) == 1:
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _split(stored: StoredTensor, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[_Piece]:
    if len(names) == 1:
        return [_Piece(stored=stored, name=names[0], rows=None)]
    pieces, start = [], 0
    for name in names:
        stop = start + shapes[name][0]
        pieces.append(_Piece(stored=stored, name=name, rows=(start, stop)))
        start = stop
    return pieces


def _read_all(
    plan: Mapping[Path, Sequence[_Piece]], headers: Mapping[Path, Header]
) -> Iterator[tuple[str, Tensor, int]]:
    """(parameter, its numbers as stored, bytes read so far), file by file, in the order in which they lie there."""
    done_bytes = 0
    for path, pieces in plan.items():
        with open_source(headers[path]) as source:
            previous: StoredTensor | None = None
            for piece in pieces:
                if piece.stored is not previous:
                    whole, previous = source.read(piece.stored), piece.stored
                    done_bytes += piece.stored.stop - piece.stored.start
                # Of some rows a copy, aligned as ever: the last bit of a product may depend on the alignment.
                yield piece.name, whole if piece.rows is None else whole[slice(*piece.rows)].clone(), done_bytes


def _mismatch(
    files: WeightFiles,
    all_names: Sequence[str],
    *,
    missing: Sequence[str],
    unexpected: Sequence[str],
    wrong: Sequence[Problem],
) -> list[Problem]:
    """The most telling problems: what the file is instead, if that is plain; else every difference."""
    params: dict[str, object] = {"part": files.part, "path": _where(files)}
    if _any_has(all_names, _LORA_MARKS):
        return [Problem(code="E-MODEL-IS-LORA", params=params)]
    if _any_has(all_names, _QUANTISATION_MARKS):
        return [Problem(code="E-MODEL-QUANTISED", params=params)]
    if len(unexpected) == len(all_names):
        return [Problem(code="E-MODEL-OTHER", params={**params, "names": _first(all_names)})]
    problems = list(wrong[:_NUM_NAMED])
    for code, names in (("E-MODEL-MISSING-TENSORS", missing), ("E-MODEL-UNEXPECTED-TENSORS", unexpected)):
        if names:
            problems.append(Problem(code=code, params={**params, "count": len(names), "names": _first(names)}))
    return problems


def _shape_problem(path: Path, tensor: StoredTensor, expected: tuple[int, ...]) -> Problem:
    sizes = {"found": "x".join(map(str, tensor.shape)), "expected": "x".join(map(str, expected))}
    return Problem(code="E-MODEL-SHAPE", params={"path": path, "name": tensor.name, **sizes})


def _where(files: WeightFiles) -> Path:
    return files.shards[0] if len(files.shards) == 1 else files.shards[0].parent


def _any_has(names: Iterable[str], marks: Sequence[str]) -> bool:
    return any(mark in name for name in names for mark in marks)


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(islice(names, _NUM_NAMED))
    return f"{shown}, ..." if len(names) > _NUM_NAMED else shown
