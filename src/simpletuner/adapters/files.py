"""LoRA files: written so that diffusers and ComfyUI both load them; read in every layout in common use."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from simpletuner.adapters.formats.fuse import split
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.names import HASH_KEY, Part, json_object
from simpletuner.adapters.formats.read import parse_adapter
from simpletuner.adapters.formats.weights import Adapter, LoraWeights
from simpletuner.adapters.formats.write import to_tensors
from simpletuner.events.files import replacing
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.problems import ModelError, Problem

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
DEFAULT_LAYOUT = "comfyui"

MAGNITUDE = "lora_magnitude_vector"
"""Ending of the keys of a DoRA's row lengths [out], in `lora.adapter_state`."""

_OWN_METADATA = "simpletuner"
_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What a LoRA file says about itself, stored in its metadata. `rank` and `alpha` are those of most modules."""

    rank: int
    alpha: float
    base_model: str = ""
    architecture: str = ""
    targets: tuple[str, ...] = ()
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    comment: str = ""
    config_hash: str = ""
    global_step: int = 0


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file in the model's own names.

    `tensors` have the keys of `lora.adapter_state`, as stored; a module's update is B A times its entry in `scales`.
    """

    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]
    info: LoraInfo


def save_lora(path: Path, tensors: Mapping[str, Tensor], info: LoraInfo, *, layout: str = DEFAULT_LAYOUT) -> None:
    """Write the result of `lora.adapter_state` as a LoRA file, completely or not at all.

    `layout` is one of `formats.layouts.LAYOUTS`. The default loads at the right strength in ComfyUI, diffusers and
    ai-toolkit, and is read back bit for bit. Equal arguments give equal bytes.

    Raises:
        FileSystemError: the file cannot be written (full disk, no permission); an older file of that name is intact.
    """
    downs = [key for key in tensors if key.endswith(Part.DOWN.value)]
    modules = {
        key.removesuffix(f".{Part.DOWN.value}"): LoraWeights(
            down=tensors[key],
            up=tensors[key.removesuffix(Part.DOWN.value) + Part.UP.value],
            alpha=info.alpha,
            magnitude=tensors.get(key.removesuffix(Part.DOWN.value) + MAGNITUDE),
        )
        for key in downs
    }
    contents = to_tensors(Adapter(modules=modules, metadata={}), LAYOUTS[layout])
    write_safetensors(path, contents, _metadata(info))


def load_lora(path: Path, module_names: Sequence[str] = ()) -> LoraFile:
    """Read a LoRA file in any of the layouts that `formats.names` lists.

    `module_names` are the model's linear layers (`targets.linear_names`): what the file adapts must be among them.

    Raises:
        ModelError: the file is damaged, holds something else than LoRA, or is for another model.
        FileSystemError: the file is missing or cannot be read.
    """
    tensors, metadata = read_safetensors(path)
    adapter = split(parse_adapter(tensors, metadata, path=str(path), known=module_names or None))
    pairs = {name: w for name, w in adapter.modules.items() if isinstance(w, LoraWeights)}
    others = [name for name in adapter.modules if name not in pairs]
    if others:
        kind = adapter.modules[others[0]].kind
        params = {"path": str(path), "kind": kind, "keys": ", ".join(others[:_NUM_NAMED])}
        raise ModelError(Problem(code="E-LORA-KIND", params=params))
    state = {}
    for module, pair in pairs.items():
        state[f"{module}.{Part.DOWN.value}"] = pair.down
        state[f"{module}.{Part.UP.value}"] = pair.up
        if pair.magnitude is not None:
            state[f"{module}.{MAGNITUDE}"] = pair.magnitude
    scales = {module: pair.scale for module, pair in pairs.items()}
    return LoraFile(tensors=state, scales=scales, info=_info(pairs, metadata))


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of any kind and layout for Z-Image, fused modules as they are.

    Raises:
        ModelError: the file is damaged, is no adapter, lacks keys, or is for another model.
        FileSystemError: the file is missing or cannot be read.
    """
    tensors, metadata = read_safetensors(path)
    return parse_adapter(tensors, metadata, path=str(path))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file.

    Raises:
        ModelError: E-LORA-DAMAGED.
        FileSystemError: the file is missing or cannot be read.
    """
    with os_errors_as_problems(path):
        path.open("rb").close()  # safetensors tells a missing file from a damaged one only in words
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            params = {"path": str(path), "reason": str(error)}
            raise ModelError(Problem(code="E-LORA-DAMAGED", params=params)) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file completely or not at all; equal arguments give equal bytes. A hash of the tensors is added.

    Raises:
        FileSystemError: the file cannot be written; an older file of that name is intact.
    """
    _write(path, _with_final_metadata(safetensors.torch.save(dict(tensors), metadata=dict(metadata))))


def _metadata(info: LoraInfo) -> dict[str, str]:
    """The file's metadata: modelspec (https://github.com/Stability-AI/ModelSpec), what other tools show, and ours."""
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{info.architecture or 'unknown'}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.title or "LoRA",
        "ss_network_dim": str(info.rank),
        "ss_network_alpha": f"{info.alpha:g}",
        "global_step": str(info.global_step),
        _OWN_METADATA: json.dumps(asdict(info)),
    }
    if info.trigger_words:
        metadata["modelspec.trigger_phrase"] = ", ".join(info.trigger_words)
    if info.comment:
        metadata["modelspec.comment"] = info.comment
    if info.base_model:
        metadata["ss_base_model_version"] = info.base_model
    return metadata


def _with_final_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of the keys, which the library writes in a random one, and a hash.

    The hash is modelspec's: of all bytes after the header.
    """
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    metadata = {**header["__metadata__"], HASH_KEY: "0x" + hashlib.sha256(memoryview(data)[header_end:]).hexdigest()}
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return b"".join((len(text).to_bytes(8, "little"), text, data[header_end:]))


def _write(path: Path, data: bytes) -> None:
    with os_errors_as_problems(path), replacing(path) as stream:
        stream.write(data)


def _info(pairs: Mapping[str, LoraWeights], metadata: Mapping[str, str]) -> LoraInfo:
    """Our own metadata, or what another program's file tells."""
    rank, scale = Counter((p.rank, p.scale) for p in pairs.values()).most_common(1)[0][0]
    known = {f.name for f in fields(LoraInfo)}
    own = {name: value for name, value in json_object(metadata.get(_OWN_METADATA)).items() if name in known}
    for name in ("targets", "trigger_words"):
        own[name] = tuple(own.get(name, ()))
    return LoraInfo(**{"title": metadata.get("modelspec.title", ""), **own, "rank": rank, "alpha": rank * scale})
