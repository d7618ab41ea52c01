"""A quantised transformer kept on disk: the next start reads half or a quarter of the bytes and quantises nothing.

One safetensors file for each number format: every tensor of the model under its own name, the parts of quantised layers
among them, and in the metadata what it was made from. A file of anything else is refused, never repaired or replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.memory.streaming import StreamBuilder
from simpletuner.models.files import WeightFiles, fingerprint, read_header
from simpletuner.models.streaming import OnProgress, place_module_, place_tensor_
from simpletuner.models.tensors import read_tensor, write_tensors
from simpletuner.models.z_image.load import empty_transformer, quantisable_layers
from simpletuner.models.z_image.transformer import ZImageTransformer
from simpletuner.problems import Fix, ModelError, Problem
from simpletuner.quant.build import FORMATS
from simpletuner.quant.linear import FrozenLinear

_MADE_FROM = "made_from"
# Part of what a file is made from. Raise it when the same weights would be stored in another way.
_RECIPE = "1"


def kept_path(folder: Path, precision: str) -> Path:
    """Where the model in that number format lies."""
    return folder / f"transformer-{precision}.safetensors"


def keep_transformer(
    path: Path,
    transformer: ZImageTransformer,
    files: WeightFiles,
    *,
    precision: str,
    dtype: torch.dtype,
    addition_key: str = "",
    elsewhere: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the quantised `transformer`, made from `files`; complete or not at all.

    Args:
        addition_key: stands for what was added to the weights.
        elsewhere: those of its tensors that are not in it, because they stream.
    Raises:
        OSError: no room, or no right to write there.
    """
    made_from = _made_from(files, precision, dtype, addition_key)
    write_tensors(path, {**transformer.state_dict(), **(elsewhere or {})}, {_MADE_FROM: made_from})


def load_kept_transformer(
    path: Path,
    files: WeightFiles,
    *,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    addition_key: str = "",
    builder: StreamBuilder | None = None,
    on_progress: OnProgress,
) -> ZImageTransformer:
    """The transformer as `keep_transformer` wrote it.

    Args:
        builder: takes those layers that shall stream; they are not put on `device`.
    Raises:
        ModelError: E-QUANTISED-DIR, it was made from other weights or is not whole.
    """
    header = read_header(path)
    if header.metadata.get(_MADE_FROM) != _made_from(files, precision, dtype, addition_key):
        raise _refusal(path)
    transformer, form = empty_transformer(files), FORMATS[precision]
    unfilled = {layer: dict[str, Tensor]() for layer in quantisable_layers(transformer)}
    expected = {name for name in transformer.state_dict() if name.removesuffix(".weight") not in unfilled}
    with path.open("rb", buffering=0) as file:
        for stored in header.tensors:
            tensor = read_tensor(file, stored)
            layer, _, part = stored.name.rpartition(".")
            if layer in unfilled:
                unfilled[layer][part] = tensor
                if unfilled[layer].keys() == set(form.part_names):
                    frozen = _frozen(transformer, layer, unfilled.pop(layer), precision)
                    if builder is not None and layer in builder.names:
                        builder.take(layer, frozen)
                    place_module_(transformer, layer, frozen.to(device))
            else:
                place_tensor_(transformer, stored.name, tensor.to(device))
                expected.discard(stored.name)
            on_progress(stored.stop, header.size_bytes)
    if unfilled or expected:
        raise _refusal(path)
    return transformer.requires_grad_(False).eval()


def _frozen(transformer: ZImageTransformer, layer: str, parts: Mapping[str, Tensor], precision: str) -> FrozenLinear:
    plain = transformer.get_submodule(layer)
    assert isinstance(plain, torch.nn.Linear)
    return FrozenLinear(parts, (plain.out_features, plain.in_features), None, form=FORMATS[precision])


def _made_from(files: WeightFiles, precision: str, dtype: torch.dtype, addition_key: str) -> str:
    parts = [_RECIPE, fingerprint(files), precision, str(dtype), *([addition_key] if addition_key else [])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _refusal(path: Path) -> ModelError:
    fixes = (Fix(key="quantized_model_dir", value=str(path.parent / "other")),)
    return ModelError(Problem(code="E-QUANTISED-DIR", params={"path": path}, path="/quantized_model_dir", fixes=fixes))
