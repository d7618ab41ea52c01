"""The planner's sizes are those of the models themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import simpletuner
from simpletuner.adapters.files import LoraInfo, save_lora
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.models.streaming import place_module_
from simpletuner.models.z_image.load import quantisable_layers
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.planner.sizes import TextEncoderSizes, TransformerSizes, VaeSizes, lora_rank, read_sizes
from simpletuner.quant.build import quantiser

DEMO = Path(simpletuner.__file__).parent / "assets" / "demo_base"


def stored_params(part: str) -> int:
    import struct

    total = 0
    for path in (DEMO / part).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(torch.Size(v["shape"]).numel() for name, v in header.items() if name != "__metadata__")
    return total


def test_the_released_transformer():
    with torch.device("meta"):
        model = ZImageTransformer(ZImageTransformerConfig())
    assert TransformerSizes().num_params == model.num_params == 6_154_908_736
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer.name: (layer.rows, layer.columns) for layer in TransformerSizes().linears()} == shapes


def test_the_demo_base_is_read_from_its_files():
    sizes = read_sizes(str(DEMO))
    assert sizes.is_read
    assert sizes.transformer.num_params == stored_params("transformer")
    assert sizes.vae.num_params == stored_params("vae")
    assert VaeSizes().num_params == 83_819_683  # the published autoencoder
    assert TextEncoderSizes().num_params == 3_921_534_720
    assert not read_sizes("Tongyi-MAI/Z-Image").is_read


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao", "fp8wo-torchao", "int4-torchao"])
def test_weights_take_what_the_catalog_says(precision):
    sizes = read_sizes(str(DEMO)).transformer
    config = json.loads((DEMO / "transformer" / "config.json").read_text())
    model = ZImageTransformer(ZImageTransformerConfig.from_dict(config))
    make = quantiser(precision, torch.float32)
    for name in quantisable_layers(model) if make is not None else ():
        place_module_(model, name, make(model.get_submodule(name).weight.detach()))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # Rows of 192 cannot be cut into the usual groups of 128: with half as many weights a scale counts twice.
    off = 0.06 if precision == "int4-torchao" else 2e-3
    assert sizes.weight_bytes(PRECISIONS[precision], default_bytes=4) == pytest.approx(held, rel=off)


def test_the_rank_of_a_file_is_the_largest_of_its_layers(tmp_path):
    path = tmp_path / "lora.safetensors"
    pairs = {"a": 3, "b": 5}
    state = {f"{n}.lora_A.weight": torch.zeros(r, 7) for n, r in pairs.items()}
    save_lora(
        path, state | {f"{n}.lora_B.weight": torch.zeros(9, r) for n, r in pairs.items()}, LoraInfo(rank=3, alpha=3.0)
    )
    assert lora_rank(path) == 5
    assert lora_rank(tmp_path / "missing") is None
    (tmp_path / "page.html").write_text("<html>not a model</html>")
    assert lora_rank(tmp_path / "page.html") is None


@pytest.mark.parametrize("inside", ["text_encoder", ""])
def test_a_text_encoder_from_elsewhere_has_its_own_sizes(tmp_path, inside):
    config = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    assert read_sizes(str(DEMO), text_encoder=str(tmp_path)).text_encoder.num_hidden_layers == 9
    assert read_sizes(str(DEMO), text_encoder="owner/name") == read_sizes(str(DEMO))
