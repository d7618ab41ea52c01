"""Fine-tuned transformers as they are passed around: one tiny model in every form loads to the same weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.files import fingerprint
from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.layouts import to_comfy
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.problems import ModelError
from simpletuner.quant.build import quantiser

PREFIX = "model.diffusion_model."
Form = Callable[[Mapping[str, Tensor], Path], Path]


@pytest.fixture(scope="module")
def tensors(pipeline: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}


def safetensors(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def of_dtype(dtype: torch.dtype) -> Form:
    return lambda tensors, folder: safetensors({name: t.to(dtype) for name, t in tensors.items()}, folder)


def scaled_fp8(*, by_row: bool = False, described: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> Form:
    """As ComfyUI has it: a scale beside every linear weight, the rest in bfloat16."""

    def write(tensors: Mapping[str, Tensor], folder: Path) -> Path:
        found: dict[str, Tensor] = {"scaled_fp8": torch.empty(0, dtype=dtype)}
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or not name.endswith(".weight"):
                found[name] = tensor.bfloat16()
                continue
            module = name.removesuffix(".weight")
            largest = tensor.abs().amax(dim=1) if by_row else tensor.abs().max()
            scale = largest / torch.finfo(dtype).max
            found[name] = (tensor / scale.reshape(-1, 1)).to(dtype)
            found[f"{module}.weight_scale" if described else f"{module}.scale_weight"] = scale
            found[f"{module}.input_scale" if described else f"{module}.scale_input"] = torch.ones(())
            if described:
                text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
                found[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        return safetensors(found, folder)

    return write


def as_gguf(kind: gguf.GGMLQuantizationType) -> Form:
    """Matrices in that format, all else in float32, as converters do it."""

    def write(tensors: Mapping[str, Tensor], folder: Path) -> Path:
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "lumina2")
        for name, tensor in tensors.items():
            used = kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), used), raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


Q = gguf.GGMLQuantizationType
# form -> (how it is written, largest error as a share of the largest weight of the row or tensor)
FORMS: dict[str, tuple[Form, float]] = {
    "float32": (of_dtype(torch.float32), 0.0),
    "bfloat16": (of_dtype(torch.bfloat16), 2**-8),
    "float16": (of_dtype(torch.float16), 2**-10),
    "fp8": (of_dtype(torch.float8_e4m3fn), 2**-4),
    "fp8-e5m2": (of_dtype(torch.float8_e5m2), 2**-3),
    "scaled-fp8": (scaled_fp8(), 2**-4),
    "scaled-fp8-rows": (scaled_fp8(by_row=True), 2**-4),
    "scaled-fp8-described": (scaled_fp8(described=True), 2**-4),
    "gguf-f32": (as_gguf(Q.F32), 0.0),
    "gguf-f16": (as_gguf(Q.F16), 2**-10),
    "gguf-bf16": (as_gguf(Q.BF16), 2**-8),
    "gguf-q8_0": (as_gguf(Q.Q8_0), 1 / 127),
    "gguf-q4_0": (as_gguf(Q.Q4_0), 1 / 7),
}


@pytest.fixture
def resolve(pipeline_dir: Path) -> Callable[..., PipelineFiles]:
    return lambda **options: resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE, **options)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "comfyui-all-in-one"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_weights_to_its_rounding(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, form: str, layout: str
) -> None:
    write, bound = FORMS[form]
    named = dict(tensors) if layout == "diffusers" else to_comfy(tensors)
    prefix = PREFIX if layout == "comfyui-all-in-one" else ""
    path = write({prefix + name: tensor for name, tensor in named.items()}, tmp_path)
    files = resolve(transformer=str(path))
    loaded = load_transformer(files.transformer, dtype=torch.float32).state_dict()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.float32
        error = (loaded[name] - tensor).abs().max()
        assert error <= bound * tensor.abs().max(), (name, error)


@pytest.mark.parametrize("form", ["fp8", "scaled-fp8", "gguf-q8_0"])
def test_they_can_be_quantised_as_they_are_read(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    files = resolve(transformer=str(FORMS[form][0](to_comfy(tensors), tmp_path)))
    plain = load_transformer(files.transformer, dtype=torch.float32)
    model = load_transformer(files.transformer, dtype=torch.float32, quantise=quantiser("int8-torchao", torch.float32))
    name = "layers.0.feed_forward.w1"
    weight = plain.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    unpacked = model.get_submodule(name).unpacked()  # type: ignore[operator]
    assert (unpacked - weight).abs().max() <= weight.abs().max() / 127


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_a_changed_weight_is_another_model(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    write = FORMS["gguf-q8_0" if suffix == ".gguf" else "scaled-fp8"][0]
    prints = set()
    for index, change in enumerate((0.0, 0.5, 0.0)):
        folder = tmp_path / str(index)
        folder.mkdir()
        changed = {**tensors, "layers.0.attention.to_q.weight": tensors["layers.0.attention.to_q.weight"] + change}
        prints.add(fingerprint(resolve(transformer=str(write(changed, folder))).transformer))
    assert len(prints) == 2


def int8(tensors: Mapping[str, Tensor], *, scales: bool) -> dict[str, Tensor]:
    name = "layers.0.attention.to_q"
    found = {**tensors, f"{name}.weight": torch.ones(96, 96, dtype=torch.int8)}
    return {**found, f"{name}.weight_scale": torch.ones(96)} if scales else found


def described_as(told: object) -> Callable[[Mapping[str, Tensor], Path], Path]:
    def write(tensors: Mapping[str, Tensor], folder: Path) -> Path:
        path = scaled_fp8(described=True)(tensors, folder)
        from safetensors.torch import load_file

        found = load_file(path)
        text = told if isinstance(told, bytes) else json.dumps(told).encode()
        found["layers.0.attention.to_q.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        return safetensors(found, folder)

    return write


REFUSED: dict[str, Form] = {
    "int8": lambda tensors, folder: safetensors(int8(tensors, scales=False), folder),
    "int8-scaled": lambda tensors, folder: safetensors(int8(tensors, scales=True), folder),
    "rotated": described_as({"format": "float8_e4m3fn", "convrot": True}),
    "other": described_as({"format": "nvfp4"}),
    "blocks": described_as({"format": "float8_e4m3fn_blockwise"}),
    "broken": described_as(b"\xff"),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_quantised_otherwise_is_refused_with_what_is_read(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, form: str, language: str
) -> None:
    files = resolve(transformer=str(REFUSED[form](tensors, tmp_path)))
    with pytest.raises(ModelError) as caught:
        load_transformer(files.transformer, dtype=torch.float32)
    (problem,) = caught.value.problems
    assert problem.code == "E-MODEL-QUANTISED"
    hint = render_problem(problem, language)[1]
    assert hint is not None and "fp8" in hint and "GGUF" in hint and "bf16" in hint


@pytest.mark.parametrize("language", LANGUAGES)
def test_missing_and_unexpected_tensors_of_a_gguf_are_named(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, language: str
) -> None:
    renamed = {name.replace("layers.1.feed_forward.w1", "layers.1.mlp"): tensor for name, tensor in tensors.items()}
    files = resolve(transformer=str(as_gguf(Q.Q8_0)(renamed, tmp_path)))
    with pytest.raises(ModelError) as caught:
        load_transformer(files.transformer, dtype=torch.float32)
    told = " ".join(render_problem(problem, language)[0] for problem in caught.value.problems)
    assert "layers.1.feed_forward.w1.weight" in told
    assert "layers.1.mlp.weight" in told


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_file_that_is_no_gguf_is_told(resolve: Any, tmp_path: Path, language: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(ModelError) as caught:
        load_transformer(resolve(transformer=str(path)).transformer, dtype=torch.float32)
    assert caught.value.problems[0].code == "E-MODEL-GGUF"
    assert "model.gguf" in render_problem(caught.value.problems[0], language)[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_the_package_a_gguf_says_what_to_install(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    path = as_gguf(Q.F32)(tensors, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError) as caught:
        load_transformer(resolve(transformer=str(path)).transformer, dtype=torch.float32)
    hint = render_problem(caught.value.problems[0], language)[1]
    assert hint is not None and "simpletuner[gguf]" in hint


@pytest.mark.parametrize("place", ["pipeline", "folder", "file"])
def test_the_text_encoder_may_come_from_elsewhere(
    resolve: Any, pipeline_dir: Path, pipeline: Any, tmp_path: Path, place: str
) -> None:
    changed = tmp_path / "other"
    shutil.copytree(pipeline_dir / "text_encoder", changed / "text_encoder")
    state = {name: tensor + 0.1 for name, tensor in pipeline.text_encoder.state_dict().items()}
    file = changed / "text_encoder" / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    named = {"pipeline": changed, "folder": changed / "text_encoder", "file": tmp_path / "qwen.safetensors"}[place]
    if place == "file":
        shutil.copy(file, named)
    own, other = resolve(), resolve(text_encoder=str(named))
    assert (other.transformer, other.vae, other.tokenizer_dir) == (own.transformer, own.vae, own.tokenizer_dir)
    loaded = load_prompt_encoder(other.text_encoder, other.tokenizer_dir, dtype=torch.float32).model.state_dict()
    assert loaded
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[f"model.{name}"]), name


@pytest.mark.parametrize("subfolder", ["none", "", None])
def test_a_transformer_in_the_root_of_a_folder(
    resolve: Any, pipeline_dir: Path, tensors: dict[str, Tensor], tmp_path: Path, subfolder: str | None
) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(pipeline_dir / "transformer", folder)
    files = resolve(transformer=str(folder), transformer_subfolder=subfolder)
    loaded = load_transformer(files.transformer, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_with_nothing_but_one_file_means_that_file(
    resolve: Any, tensors: dict[str, Tensor], tmp_path: Path, count: int
) -> None:
    path = safetensors(to_comfy(tensors), tmp_path)
    if count == 1:
        assert resolve(transformer=str(tmp_path)).transformer.shards == (path,)
        return
    shutil.copy(path, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        resolve(transformer=str(tmp_path))
    assert caught.value.problems[0].code == "E-MODEL-LAYOUT"
