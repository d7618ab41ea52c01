"""Load the transformer's weights, from any layout, straight to where and what they shall be."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from simpletuner.models.files import WeightFiles, read_json, unsupported
from simpletuner.models.streaming import Addition, Conversion, OnProgress, load_weights_, quantising, stored_names
from simpletuner.models.z_image.layouts import transformer_keys
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig


def load_transformer(
    files: WeightFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantise: Callable[[Tensor], nn.Module] | None = None,
    quantise_on_device: bool = True,
    conversion: Conversion | None = None,
    addition: Addition | None = None,
    on_progress: OnProgress | None = None,
) -> ZImageTransformer:
    """The transformer on `device`, its parameters frozen and in `dtype`.

    Args:
        quantise: weight [out, in] -> the layer that takes the place of a linear layer, for all but those that every
            token or every step passes through (`FamilySpec.never_quantised`).
        quantise_on_device: call it on `device` rather than in main memory.
        conversion: in place of `quantise`, for other layers or other changes.
        addition: what is added to weights before that.
    Raises:
        ModelError: the files are damaged, hold another model, or one that this module does not implement.
    """
    transformer = empty_transformer(files)
    if conversion is None and quantise is not None:
        conversion = quantising(quantisable_layers(transformer), quantise, on_device=quantise_on_device)
    load_weights_(
        transformer,
        files,
        keys=transformer_keys(stored_names(files)),
        dtype=dtype,
        device=torch.device(device),
        conversion=conversion,
        addition=addition,
        on_progress=on_progress,
    )
    return transformer.eval()


def empty_transformer(files: WeightFiles) -> ZImageTransformer:
    """The transformer that the files describe, on the meta device.

    Raises:
        ModelError: E-MODEL-UNSUPPORTED, the config describes something that this module does not implement.
    """
    try:
        config = ZImageTransformerConfig.from_dict(read_json(files.config_path))
    except (TypeError, ValueError) as error:
        raise unsupported(files.config_path, error) from error
    with torch.device("meta"):
        return ZImageTransformer(config)


def quantisable_layers(transformer: nn.Module) -> frozenset[str]:
    """Names of the linear layers that may take another number format."""
    return frozenset(
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not any(fnmatchcase(name, p) for p in Z_IMAGE.never_quantised)
    )
