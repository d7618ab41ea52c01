"""LoRA files: written so that diffusers and ComfyUI both load them; read in every layout in common use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from simpletuner.adapters.names import Pair, Role, parse_pairs
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.problems import ModelError, Problem

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
LAYOUTS = ("comfyui", "diffusers")
DEFAULT_LAYOUT = "comfyui"

_OWN_METADATA = "simpletuner"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_OTHER_KINDS = (("lokr_", "LoKr"), ("hada_", "LoHa"), ("oft_", "OFT"))


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

    "comfyui" writes `diffusion_model.` names and an alpha for each module: diffusers, ComfyUI and ai-toolkit load it at
    the right strength. "diffusers" writes what diffusers' own `save_lora_weights` does, `transformer.` names with alpha
    in the metadata; ComfyUI takes such a file for alpha = rank.

    Equal arguments give equal bytes.

    Raises:
        FileSystemError: the file cannot be written (full disk, no permission); an older file of that name is intact.
    """
    assert layout in LAYOUTS, layout
    prefix = "diffusion_model." if layout == "comfyui" else "transformer."
    contents = {prefix + key: tensor for key, tensor in tensors.items()}
    if layout == "comfyui":
        for key in [key for key in contents if key.endswith(Role.MAGNITUDE.value)]:
            contents[key.removesuffix(Role.MAGNITUDE.value) + "dora_scale"] = contents.pop(key)[:, None]
        downs = [key for key in contents if key.endswith(Role.DOWN.value)]
        contents |= {key.removesuffix(Role.DOWN.value) + "alpha": torch.tensor(info.alpha) for key in downs}
    write_weights(path, contents, _metadata(info, tensors, layout))


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small safetensors file, completely or not at all; equal arguments give equal bytes.

    Raises:
        FileSystemError: the file cannot be written (full disk, no permission); an older file of that name is intact.
    """
    contents = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _write(path, _with_sorted_metadata(safetensors.torch.save(contents, metadata=dict(metadata))))


def load_lora(path: Path, module_names: Sequence[str] = ()) -> LoraFile:
    """Read a LoRA file: ours, diffusers', peft's, ai-toolkit's, ComfyUI's or kohya's names.

    `module_names` are the model's linear layers (`targets.linear_names`); needed for names with underscores in place
    of dots and for fused projections.

    Raises:
        ModelError: the file is damaged, or holds something else than LoRA.
        FileSystemError: the file is missing or cannot be read.
    """
    tensors, metadata = read_weights(path)
    pairs, rest = parse_pairs(tensors, module_names)
    if rest or not pairs:
        kinds = (kind for mark, kind in _OTHER_KINDS if any(mark in key for key in rest))
        params = {"path": str(path), "kind": next(kinds, "?"), "keys": ", ".join(rest[:3]) or "-"}
        raise ModelError(Problem(code="E-LORA-KIND", params=params))
    pairs = _with_diffusers_alphas(pairs, metadata)
    info = _info(pairs, metadata)
    state = {}
    for module, pair in pairs.items():
        state[f"{module}.{Role.DOWN.value}"] = pair.down
        state[f"{module}.{Role.UP.value}"] = pair.up
        if pair.magnitude is not None:
            state[f"{module}.{Role.MAGNITUDE.value}"] = pair.magnitude
    return LoraFile(tensors=state, scales={module: pair.scale for module, pair in pairs.items()}, info=info)


def _metadata(info: LoraInfo, tensors: Mapping[str, Tensor], layout: str) -> dict[str, str]:
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
    if layout == "diffusers":
        modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
        config: dict[str, object] = {"r": info.rank, "lora_alpha": info.alpha, "target_modules": modules}
        if any(key.endswith(Role.MAGNITUDE.value) for key in tensors):
            config["use_dora"] = True
        metadata[_DIFFUSERS_METADATA] = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    return metadata


def _with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of the keys: the library writes them in a random one."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return b"".join((len(text).to_bytes(8, "little"), text, data[header_end:]))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with os_errors_as_problems(path):
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ModelError: the file is damaged.
        FileSystemError: it is missing or cannot be read.
    """
    with os_errors_as_problems(path):
        path.open("rb").close()  # safetensors tells a missing file from a damaged one only in words
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            params = {"path": str(path), "reason": str(error)}
            raise ModelError(Problem(code="E-LORA-DAMAGED", params=params)) from error


def _with_diffusers_alphas(pairs: dict[str, Pair], metadata: Mapping[str, str]) -> dict[str, Pair]:
    """Give pairs without an alpha key the alpha that diffusers keeps in the metadata, as peft reads it."""
    config = _json(metadata.get(_DIFFUSERS_METADATA))
    alpha, patterns = config.get("transformer.lora_alpha"), config.get("transformer.alpha_pattern") or {}
    if alpha is None:
        return pairs
    completed = {}
    for module, pair in pairs.items():
        special = [value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
        own = float((special or [alpha])[0])
        completed[module] = replace(pair, alpha=own) if pair.alpha is None else pair
    return completed


def _info(pairs: Mapping[str, Pair], metadata: Mapping[str, str]) -> LoraInfo:
    """Our own metadata, or what another program's file tells."""
    rank, scale = Counter((p.down.shape[0], p.scale) for p in pairs.values()).most_common(1)[0][0]
    known = {f.name for f in fields(LoraInfo)}
    own = {name: value for name, value in _json(metadata.get(_OWN_METADATA)).items() if name in known}
    for name in ("targets", "trigger_words"):
        own[name] = tuple(own.get(name, ()))
    return LoraInfo(**{"title": metadata.get("modelspec.title", ""), **own, "rank": rank, "alpha": rank * scale})


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
