"""Weights arrive exactly, from every layout, and nothing else passes for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.files import WeightFiles, fingerprint, read_header
from simpletuner.models.tensors import read_tensor, write_tensors
from simpletuner.models.weights import resolve_pipeline
from simpletuner.models.z_image.layouts import text_encoder_keys, to_comfy, transformer_keys
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.models.z_image.vae import load_latent_codec
from simpletuner.problems import ExitCode, ModelError


@pytest.fixture(scope="module")
def tensors(pipeline: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}


@pytest.fixture
def write(pipeline_dir: Path, tmp_path: Path) -> Any:
    """Write tensors as a single transformer file beside the tiny pipeline's config."""

    def to_file(tensors: Mapping[str, Tensor]) -> WeightFiles:
        path = tmp_path / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        config = tmp_path / "config.json"
        shutil.copy(pipeline_dir / "transformer" / "config.json", config)
        return WeightFiles(part="transformer", config_path=config, shards=(path,))

    return to_file


def assert_holds(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def codes(files: WeightFiles) -> list[str]:
    with pytest.raises(ModelError) as caught:
        load_transformer(files, dtype=torch.float32)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    for problem in caught.value.problems:
        for language in LANGUAGES:
            title, hint = render_problem(problem, language)
            assert hint
            assert "{" not in title + hint
    return [problem.code for problem in caught.value.problems]


def message(files: WeightFiles) -> str:
    with pytest.raises(ModelError) as caught:
        load_transformer(files, dtype=torch.float32)
    return render_problem(caught.value.problems[0], "en")[0]


# What arrives


def test_a_folder_saved_by_diffusers_loads_exactly(pipeline_dir: Path, tensors: dict[str, Tensor]) -> None:
    files = resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE)
    transformer = load_transformer(files.transformer, dtype=torch.float32)
    assert_holds(transformer, tensors)
    assert not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_shards_load_like_one_file(pipeline: Any, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    pipeline.transformer.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = tuple(sorted(tmp_path.glob("*.safetensors")))
    assert len(shards) > 2
    files = WeightFiles(part="transformer", config_path=tmp_path / "config.json", shards=shards)
    assert_holds(load_transformer(files, dtype=torch.float32), tensors)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_comfyui_files_load_exactly(write: Any, tensors: dict[str, Tensor], prefix: str) -> None:
    comfy = {prefix + name: tensor for name, tensor in to_comfy(tensors).items()}
    comfy[prefix + "norm_final.weight"] = torch.ones(96)  # an unused leftover that the published files have
    if prefix == "model.diffusion_model.":
        comfy["vae.decoder.conv_in.weight"] = torch.ones(2, 2)  # an all-in-one file has other models beside it
    assert_holds(load_transformer(write(comfy), dtype=torch.float32), tensors)


def test_comfyui_names_are_the_published_ones(tensors: dict[str, Tensor]) -> None:
    comfy = to_comfy(tensors)
    assert comfy["layers.0.attention.qkv.weight"].shape == (3 * 96, 96)
    expected = {
        "x_embedder.weight",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.bias",
        "layers.1.attention.out.weight",
        "layers.1.attention.q_norm.weight",
        "noise_refiner.0.attention.k_norm.weight",
        "context_refiner.0.attention.qkv.weight",
        "cap_embedder.1.bias",
        "t_embedder.mlp.0.weight",
        "x_pad_token",
    }
    assert expected <= comfy.keys()
    assert not any("to_q" in name or "all_" in name for name in comfy)


def test_every_comfyui_name_leads_back_to_where_it_came_from(tensors: dict[str, Tensor]) -> None:
    comfy = to_comfy(tensors)
    keys = transformer_keys(comfy)
    back: dict[str, Tensor] = {}
    for name, tensor in comfy.items():
        targets = keys(name)
        back.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_our_reading_of_comfyui_files_agrees_with_diffusers(tensors: dict[str, Tensor]) -> None:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    theirs = convert_z_image_transformer_checkpoint_to_diffusers(to_comfy(tensors))
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_numbers_are_converted_while_loading(
    write: Any, tensors: dict[str, Tensor], stored: torch.dtype, wanted: torch.dtype
) -> None:
    files = write({name: tensor.to(stored) for name, tensor in tensors.items()})
    assert_holds(
        load_transformer(files, dtype=wanted), {name: tensor.to(stored).to(wanted) for name, tensor in tensors.items()}
    )


def test_a_loaded_model_does_not_depend_on_its_file_any_more(write: Any, tensors: dict[str, Tensor]) -> None:
    files = write(tensors)
    transformer = load_transformer(files, dtype=torch.float32)
    size = files.shards[0].stat().st_size
    with files.shards[0].open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size // 2))
    assert_holds(transformer, tensors)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_text_encoder_loads_with_or_without_its_head(pipeline_dir: Path, tmp_path: Path, prefix: str) -> None:
    source = pipeline_dir / "text_encoder"
    shutil.copy(source / "config.json", tmp_path)
    stored = load_file(source / "model.safetensors")
    save_file(
        {prefix + name.removeprefix("model."): tensor for name, tensor in stored.items()}, tmp_path / "m.safetensors"
    )
    files = WeightFiles(part="text_encoder", config_path=tmp_path / "config.json", shards=(tmp_path / "m.safetensors",))
    encoder = load_prompt_encoder(files, pipeline_dir / "tokenizer", dtype=torch.float32)
    assert torch.equal(encoder.model.state_dict()["embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_only_the_layers_in_use_are_needed() -> None:
    keys = text_encoder_keys(36)
    assert keys("model.layers.34.mlp.up_proj.weight") == ("layers.34.mlp.up_proj.weight",)
    assert keys("model.embed_tokens.weight") == ("embed_tokens.weight",)
    for unused in ("model.layers.35.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "norm.weight"):
        assert keys(unused) == ()


# What does not


def test_missing_and_unexpected_tensors_are_named(write: Any, tensors: dict[str, Tensor]) -> None:
    changed = dict(tensors)
    changed["layers.0.surprise.weight"] = changed.pop("layers.0.attention.to_q.weight")
    files = write(changed)
    assert codes(files) == ["E-MODEL-MISSING-TENSORS", "E-MODEL-UNEXPECTED-TENSORS"]
    assert "lacks 1 tensors of the transformer: layers.0.attention.to_q.weight" in message(files)


def test_a_wrong_shape_is_named_with_both_shapes(write: Any, tensors: dict[str, Tensor]) -> None:
    files = write({**tensors, "layers.0.feed_forward.w1.weight": torch.zeros(8, 96)})
    assert codes(files) == ["E-MODEL-SHAPE"]
    assert "layers.0.feed_forward.w1.weight" in message(files)
    assert "8x96; the model needs 256x96" in message(files)


def test_a_config_of_another_size_is_noticed(write: Any, tensors: dict[str, Tensor]) -> None:
    files = write(tensors)
    config = json.loads(files.config_path.read_text(encoding="utf-8"))
    files.config_path.write_text(json.dumps({**config, "n_layers": 3}), encoding="utf-8")
    assert codes(files) == ["E-MODEL-MISSING-TENSORS"]


def test_a_lora_is_recognised(write: Any) -> None:
    files = write({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 96)})
    assert codes(files) == ["E-MODEL-IS-LORA"]
    assert "is a LoRA, not a transformer" in message(files)


def test_quantised_weights_are_recognised(write: Any, tensors: dict[str, Tensor]) -> None:
    scale = {"layers.0.attention.to_q.scale_weight": torch.ones(1)}
    files = write({**tensors, **scale})
    assert codes(files) == ["E-MODEL-QUANTISED"]
    assert "in a way that is not read here" in message(files)


def test_another_model_is_recognised(write: Any) -> None:
    files = write({"decoder.conv_in.weight": torch.zeros(4, 4)})
    assert codes(files) == ["E-MODEL-OTHER"]
    assert "It holds: decoder.conv_in.weight" in message(files)


def test_a_checkpoint_with_parts_that_we_lack_is_refused(write: Any, tensors: dict[str, Tensor]) -> None:
    files = write(tensors)
    config = json.loads(files.config_path.read_text(encoding="utf-8"))
    files.config_path.write_text(json.dumps({**config, "siglip_feat_dim": 1152}), encoding="utf-8")
    assert codes(files) == ["E-MODEL-UNSUPPORTED"]
    assert "siglip_feat_dim" in message(files)


@pytest.mark.parametrize(
    ("part", "change"), [("vae", {"norm_num_groups": 3}), ("text_encoder", {"num_hidden_layers": "many"})]
)
def test_a_config_that_the_library_refuses_is_reported(
    pipeline_dir: Path, tmp_path: Path, part: str, change: dict[str, object]
) -> None:
    config = json.loads((pipeline_dir / part / "config.json").read_text(encoding="utf-8"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, **change}), encoding="utf-8")
    files = WeightFiles(part=part, config_path=path, shards=tuple((pipeline_dir / part).glob("*.safetensors")))
    loaders: dict[str, Callable[[], object]] = {
        "vae": lambda: load_latent_codec(files, dtype=torch.float32),
        "text_encoder": lambda: load_prompt_encoder(files, pipeline_dir / "tokenizer", dtype=torch.float32),
    }
    with pytest.raises(ModelError) as caught:
        loaders[part]()
    assert caught.value.problems[0].code == "E-MODEL-UNSUPPORTED"


def test_a_truncated_file_says_how_much_is_missing(write: Any, tensors: dict[str, Tensor]) -> None:
    files = write(tensors)
    whole = files.shards[0].read_bytes()
    files.shards[0].write_bytes(whole[:-100])
    assert codes(files) == ["E-MODEL-TRUNCATED"]
    assert f"{len(whole) - 100} bytes of {len(whole)}" in message(files)
    files.shards[0].write_bytes(whole[:100])
    assert codes(files) == ["E-MODEL-TRUNCATED"]


@pytest.mark.parametrize(
    "contents", [b"", b"<!doctype html><html></html>", b"\x08\0\0\0\0\0\0\0not json", b'\x09\0\0\0\0\0\0\0{"a": {}}']
)
def test_a_file_that_only_bears_the_name_is_refused(write: Any, contents: bytes) -> None:
    files = write({"a": torch.zeros(1)})
    files.shards[0].write_bytes(contents)
    assert codes(files) == ["E-MODEL-NOT-SAFETENSORS"]
    assert "its contents are something else" in message(files)


def test_a_git_lfs_pointer_is_recognised(write: Any) -> None:
    files = write({"a": torch.zeros(1)})
    files.shards[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    assert codes(files) == ["E-MODEL-LFS-POINTER"]
    assert "git-lfs pointer" in message(files)


@pytest.mark.parametrize(("text", "where"), [('{"a": 1,}', "line 1, column 9"), ("[1]", "line 1"), ("", "line 1")])
def test_broken_json_says_where(write: Any, tensors: dict[str, Tensor], text: str, where: str) -> None:
    files = write(tensors)
    files.config_path.write_text(text, encoding="utf-8")
    assert codes(files) == ["E-MODEL-JSON"]
    assert where in message(files)


@pytest.mark.parametrize(
    ("name", "text", "code", "words"),
    [
        ("tokenizer.json", "{}", "E-MODEL-TOKENIZER", "cannot be read"),
        ("chat_template.jinja", None, "E-MODEL-NO-TEMPLATE", "has no chat template"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_reported(
    pipeline_dir: Path, tmp_path: Path, name: str, text: str | None, code: str, words: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(pipeline_dir / "tokenizer", folder)
    (folder / name).unlink() if text is None else (folder / name).write_text(text, encoding="utf-8")
    files = resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE)
    with pytest.raises(ModelError) as caught:
        load_prompt_encoder(files.text_encoder, folder, dtype=torch.float32)
    assert caught.value.problems[0].code == code
    assert words in render_problem(caught.value.problems[0], "en")[0]


# What identifies them


def test_a_fingerprint_is_of_the_contents_not_of_the_place(
    write: Any, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    files = write(tensors)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(files.shards[0], elsewhere / "other-name.safetensors")
    config = json.loads(files.config_path.read_text(encoding="utf-8"))
    (elsewhere / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9"}), encoding="utf-8")
    copy = WeightFiles(
        part="transformer", config_path=elsewhere / "config.json", shards=(elsewhere / "other-name.safetensors",)
    )
    assert fingerprint(files) == fingerprint(copy)


def test_a_fingerprint_changes_with_one_number_the_dtype_or_the_config(write: Any, tensors: dict[str, Tensor]) -> None:
    found = {fingerprint(write(tensors))}
    nudged = tensors["layers.1.ffn_norm2.weight"].clone()
    nudged[5] += 1e-6
    found.add(fingerprint(write({**tensors, "layers.1.ffn_norm2.weight": nudged})))
    found.add(fingerprint(write({name: tensor.half() for name, tensor in tensors.items()})))
    files = write(tensors)
    config = json.loads(files.config_path.read_text(encoding="utf-8"))
    files.config_path.write_text(json.dumps({**config, "t_scale": 1.0}), encoding="utf-8")
    found.add(fingerprint(files))
    assert len(found) == 4


def test_a_fingerprint_of_a_large_file_sees_every_tensor(tmp_path: Path) -> None:
    """Files over 32 MiB are sampled; training changes whole tensors, the smallest too."""
    config = tmp_path / "config.json"
    config.write_text("{}", encoding="utf-8")
    path = tmp_path / "large.safetensors"
    files = WeightFiles(part="transformer", config_path=config, shards=(path,))
    large = {f"layer{index}": torch.zeros(1 << 20) for index in range(10)}
    large |= {f"norm{index}": torch.zeros(100) for index in range(10)}
    save_file(large, path)
    assert read_header(path).size_bytes > 32 << 20
    plain = fingerprint(files)
    header = read_header(path)
    for tensor in header.tensors:
        with path.open("r+b") as file:
            file.seek(tensor.start)
            file.write(b"\x01" * (tensor.stop - tensor.start))
        assert fingerprint(files) != plain, tensor.name
        with path.open("r+b") as file:
            file.seek(tensor.start)
            file.write(b"\0" * (tensor.stop - tensor.start))
        assert fingerprint(files) == plain


def test_a_number_format_that_torch_lacks_is_named(write: Any, tensors: Mapping[str, Tensor]) -> None:
    files = write(tensors)
    path = files.shards[0]
    raw = path.read_bytes()
    # As long as the name that it replaces, so that the header keeps its length.
    path.write_bytes(raw.replace(b'"F32"', b'"F3X"', 1))
    assert codes(files) == ["E-MODEL-TENSOR"]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = {
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "codes": torch.randint(0, 255, (7, 1), generator=generator, dtype=torch.uint8),
        "float8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "empty": torch.empty(0, 3),
    }
    path = tmp_path / "new" / "x.safetensors"
    write_tensors(path, expected, {"b": "2", "a": "1"})
    header = read_header(path)
    assert header.metadata == {"a": "1", "b": "2"}
    with path.open("rb", buffering=0) as file:
        found = {stored.name: read_tensor(file, stored) for stored in header.tensors}
    library = load_file(path)
    for name, tensor in expected.items():
        for other in (found[name], library[name]):
            assert other.dtype == tensor.dtype and torch.equal(other.float(), tensor.float()), name
