"""A trained transformer as a folder in the diffusers layout, and back, one tensor in main memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.models.files import read_header
from simpletuner.models.tensors import read_tensor, write_tensors
from simpletuner.models.z_image.transformer import PATCH, ZImageTransformerConfig
from simpletuner.problems import ModelError, Problem

MAX_SHARD_BYTES = 5 << 30
_STEM = "diffusion_pytorch_model"
_AXES_LENS = (1024, 512, 512)  # of the published checkpoints; diffusers' tables of positions are that long


def save_transformer(
    folder: Path,
    config: ZImageTransformerConfig,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write all weights, under the checkpoint's names and in their own dtypes; complete, or the old folder stays.

    Raises:
        FileSystemError: there is no room, or no right to write there.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with os_errors_as_problems(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            (partial / "config.json").write_text(json.dumps(_diffusers_config(config), indent=2), encoding="utf-8")
            shards = list(_shards(tensors, max_shard_bytes))
            names = [f"{_STEM}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            if len(shards) == 1:
                names = [f"{_STEM}.safetensors"]
            else:
                weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
                total = sum(tensor.nbytes for tensor in tensors.values())
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                (partial / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
            for name, shard in zip(names, shards, strict=True):
                write_tensors(partial / name, shard, {"format": "pt"})
            replaced = folder.with_name(f".{folder.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.replace(replaced)
            partial.replace(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def load_weights_of_(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `save_transformer` wrote into `tensors`, exactly.

    Raises:
        ModelError: a file is damaged, or holds another model; nothing is changed in the latter case.
    """
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    shapes = {stored.name: stored.shape for header in headers for stored in header.tensors}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ModelError(Problem(code="E-FULL-WEIGHTS", params={"path": str(folder)}))
    for header in headers:
        with header.path.open("rb", buffering=0) as file:
            for stored in header.tensors:
                tensors[stored.name].copy_(read_tensor(file, stored))


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _diffusers_config(config: ZImageTransformerConfig) -> dict[str, object]:
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [PATCH],
        "all_f_patch_size": [1],
        **asdict(config),
        "n_kv_heads": config.n_heads,
        "qk_norm": True,
        "axes_lens": list(_AXES_LENS),
    }
