"""A saved transformer is read by our own loader and by diffusers, and put back bit for bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.files import WeightFiles
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.save import load_weights_of_, save_transformer
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.problems import ModelError

SIZES = {"dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12, "axes_dims": (8, 8, 8)}


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> ZImageTransformer:
    torch.manual_seed(seed)
    made = ZImageTransformer(ZImageTransformerConfig(**SIZES))
    with torch.no_grad():
        made.cap_pad_token.normal_()
    return made.to(dtype)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reader_gets_the_weights_bit_for_bit(tmp_path, dtype, max_shard_bytes):
    from diffusers import ZImageTransformer2DModel

    saved, folder = model(dtype=dtype), tmp_path / "transformer"
    state = saved.state_dict()
    for _ in range(2):  # a second time over the first
        save_transformer(folder, saved.config, state, max_shard_bytes=max_shard_bytes)
    shards = tuple(sorted(folder.glob("*.safetensors")))
    assert len(shards) == 1 if max_shard_bytes > 1 << 20 else len(shards) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    files = WeightFiles(part="transformer", config_path=folder / "config.json", shards=shards)
    ours = load_transformer(files, dtype=dtype)
    assert ours.config == saved.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    again = model(seed=1, dtype=dtype)
    load_weights_of_(folder, again.state_dict())
    for other in (ours, theirs, again):
        found = other.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_another_models_weights_are_refused(tmp_path):
    save_transformer(tmp_path / "transformer", model().config, model().state_dict())
    larger = ZImageTransformer(ZImageTransformerConfig(**{**SIZES, "n_layers": 3}))
    before = {key: value.clone() for key, value in larger.state_dict().items()}
    with pytest.raises(ModelError) as error:
        load_weights_of_(tmp_path / "transformer", larger.state_dict())
    (problem,) = error.value.problems
    assert problem.code == "E-FULL-WEIGHTS"
    assert all("transformer" in render_problem(problem, language)[0] for language in LANGUAGES)
    assert all(torch.equal(before[key], value) for key, value in larger.state_dict().items())
    assert json.loads((tmp_path / "transformer/config.json").read_text())["_class_name"] == "ZImageTransformer2DModel"
