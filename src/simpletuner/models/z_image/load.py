"""Load the transformer's weights, from any layout, straight to where and what they shall be."""

from __future__ import annotations

import torch

from simpletuner.models.files import WeightFiles, read_json, unsupported
from simpletuner.models.streaming import load_weights_, stored_names
from simpletuner.models.z_image.layouts import transformer_keys
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig


def load_transformer(
    files: WeightFiles, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ZImageTransformer:
    """The transformer on `device`, its parameters frozen and in `dtype`.

    Raises:
        ModelError: the files are damaged, hold another model, or one that this module does not implement.
    """
    try:
        config = ZImageTransformerConfig.from_dict(read_json(files.config_path))
    except (TypeError, ValueError) as error:
        raise unsupported(files.config_path, error) from error
    with torch.device("meta"):
        transformer = ZImageTransformer(config)
    keys = transformer_keys(stored_names(files))
    load_weights_(transformer, files, keys=keys, dtype=dtype, device=torch.device(device))
    return transformer.eval()
