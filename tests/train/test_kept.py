"""A quantised model comes back from disk as it was, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import simpletuner
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.files import WeightFiles
from simpletuner.models.weights import resolve_pipeline
from simpletuner.models.z_image.load import load_transformer, quantisable_layers
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.problems import ModelError
from simpletuner.quant.build import FORMATS, quantiser
from simpletuner.quant.linear import FrozenLinear
from simpletuner.train.kept import keep_transformer, kept_path, load_kept_transformer

DEMO_BASE = Path(simpletuner.__file__).parent / "assets" / "demo_base"
PRECISIONS = [name for name in FORMATS if name != "plain"]


@pytest.fixture(scope="module")
def files() -> WeightFiles:
    return resolve_pipeline(str(DEMO_BASE), spec=Z_IMAGE).transformer


def quantised(files, precision):
    return load_transformer(files, dtype=torch.float32, quantise=quantiser(precision, torch.float32))


def load(path, files, precision, dtype=torch.float32):
    device = torch.device("cpu")
    return load_kept_transformer(
        path, files, precision=precision, dtype=dtype, device=device, on_progress=lambda done, total: None
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_round_trip(files, tmp_path, precision):
    path = kept_path(tmp_path / "made", precision)
    model = quantised(files, precision)
    keep_transformer(path, model, files, precision=precision, dtype=torch.float32)
    again = load(path, files, precision)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_the_large_layers_are_quantised(files):
    model = quantised(files, "int8-torchao")
    frozen = {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert frozen == quantisable_layers(load_transformer(files, dtype=torch.float32))
    assert {name.split(".")[-2] for name in frozen} == {"attention", "to_out", "feed_forward"}
    assert any("adaLN_modulation" in name for name in plain) and any("embedder" in name for name in plain)


@pytest.mark.parametrize("change", ["weights", "dtype", "truncated", "missing"])
def test_anything_else_is_refused(files, tmp_path, change):
    path = kept_path(tmp_path, "int8-torchao")
    model = quantised(files, "int8-torchao")
    if change == "missing":
        model.layers[0].attention.to_q = torch.nn.Identity()
    keep_transformer(path, model, files, precision="int8-torchao", dtype=torch.float32)
    dtype = torch.float32
    if change == "weights":
        other = tmp_path / "other.safetensors"
        content = bytearray(files.shards[0].read_bytes())
        content[-1] ^= 1
        other.write_bytes(content)
        files = dataclasses.replace(files, shards=(other,))
    if change == "dtype":
        dtype = torch.bfloat16
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError) as caught:
        load(path, files, "int8-torchao", dtype)
    (problem,) = caught.value.problems
    assert problem.code == ("E-MODEL-TRUNCATED" if change == "truncated" else "E-QUANTISED-DIR")
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        assert str(path) in title and hint
    assert path.exists()


def test_an_interrupted_write_leaves_nothing_that_a_later_start_would_trust(files, tmp_path, monkeypatch):
    path = kept_path(tmp_path, "int8-torchao")
    model = quantised(files, "int8-torchao")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        keep_transformer(path, model, files, precision="int8-torchao", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
