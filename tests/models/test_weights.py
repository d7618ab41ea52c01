"""Finding a pipeline's files on disk: every layout a user may have, and what is said when something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.weights import resolve_file, resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.problems import ExitCode, Fix, ModelError, Problem


@pytest.fixture
def folder(pipeline_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "z-image"
    shutil.copytree(pipeline_dir, copy)
    return copy


def problem_of(*args: Any, **kwargs: Any) -> tuple[Problem, str]:
    """The one problem of a call and its English text."""
    with pytest.raises(ModelError) as caught:
        resolve_pipeline(*args, spec=Z_IMAGE, **kwargs)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    texts = [render_problem(problem, language) for language in LANGUAGES]
    assert all(hint and "{" not in title + hint for title, hint in texts)
    return problem, "\n".join(text or "" for text in texts[0])


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(rename(path.name)))


# What is found


def test_a_folder_in_diffusers_layout(folder: Path) -> None:
    files = resolve_pipeline(str(folder), spec=Z_IMAGE)
    assert files.source == str(folder)
    assert files.transformer.shards == (folder / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert files.transformer.config_path == folder / "transformer" / "config.json"
    assert files.vae.shards == (folder / "vae" / "diffusion_pytorch_model.safetensors",)
    assert files.text_encoder.shards == (folder / "text_encoder" / "model.safetensors",)
    assert files.tokenizer_dir == folder / "tokenizer"
    assert files.scheduler_config == folder / "scheduler" / "scheduler_config.json"


def test_shards_are_those_of_the_index_and_of_the_text_encoder_those_in_use(folder: Path, pipeline: Any) -> None:
    shutil.rmtree(folder / "text_encoder")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    index = json.loads((folder / "text_encoder" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    weight_map: dict[str, str] = index["weight_map"]
    unused = ("model.layers.2.", "model.norm.", "lm_head.")
    expected = {shard for name, shard in weight_map.items() if not name.startswith(unused)}
    skipped = set(weight_map.values()) - expected
    assert skipped, "the fixture must have a shard that holds nothing in use"
    for name in skipped:
        (folder / "text_encoder" / name).unlink()
    files = resolve_pipeline(str(folder), spec=Z_IMAGE)
    assert {path.name for path in files.text_encoder.shards} == expected


def test_a_variant_is_preferred_and_plain_files_serve_where_it_is_missing(folder: Path) -> None:
    shutil.copy(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors",
    )
    files = resolve_pipeline(str(folder), spec=Z_IMAGE, variant="fp16")
    assert files.transformer.shards[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert files.vae.shards[0].name == "diffusion_pytorch_model.safetensors"
    assert (
        resolve_pipeline(str(folder), spec=Z_IMAGE).transformer.shards[0].name == "diffusion_pytorch_model.safetensors"
    )


def test_the_only_weight_file_of_a_folder_may_have_any_name(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / "mine.safetensors")
    assert resolve_pipeline(str(folder), spec=Z_IMAGE).transformer.shards[0].name == "mine.safetensors"


def test_a_single_transformer_file_takes_the_rest_from_the_companion(folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "mine.safetensors"
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(single)
    alone = resolve_pipeline(str(single), spec=Z_IMAGE, companion=str(folder))
    assert alone.transformer.shards == (single,)
    assert alone.transformer.config_path == folder / "transformer" / "config.json"
    assert alone.vae.shards[0].parent == folder / "vae"
    assert resolve_pipeline(str(folder), spec=Z_IMAGE, transformer=str(single)) == alone


def test_a_config_beside_a_single_file_wins(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "transformer", other)
    files = resolve_pipeline(str(folder), spec=Z_IMAGE, transformer=str(other / "diffusion_pytorch_model.safetensors"))
    assert files.transformer.config_path == other / "config.json"


@pytest.mark.parametrize("subfolder", ["transformer", "none", "", None])
def test_a_transformer_from_another_folder(folder: Path, tmp_path: Path, subfolder: str | None) -> None:
    other = tmp_path / "other"
    inside = other / "transformer" if subfolder == "transformer" else other
    shutil.copytree(folder / "transformer", inside)
    shutil.rmtree(folder / "transformer")
    files = resolve_pipeline(str(folder), spec=Z_IMAGE, transformer=str(other), transformer_subfolder=subfolder)
    assert files.transformer.shards[0].parent == inside


@pytest.mark.parametrize("inside", ["vae", "."])
def test_a_vae_from_another_folder_or_its_root(folder: Path, tmp_path: Path, inside: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "vae", other / inside)
    shutil.rmtree(folder / "vae")
    assert resolve_pipeline(str(folder), spec=Z_IMAGE, vae=str(other)).vae.shards[0].parent == other / inside


def test_a_missing_scheduler_is_no_problem(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    assert resolve_pipeline(str(folder), spec=Z_IMAGE).scheduler_config is None


# What is said


def test_a_missing_path_names_what_is_near(folder: Path) -> None:
    wrong = folder.with_name("z-imgae")
    problem, text = problem_of(str(wrong))
    assert problem.code == "E-MODEL-PATH-NEAR"
    assert problem.path == "/pretrained_model_name_or_path"
    assert problem.fixes == [Fix(key="pretrained_model_name_or_path", value=str(folder))]
    assert f"There is no model at {wrong}" in text
    assert f"In {folder.parent} there is: z-image" in text


def test_a_missing_path_says_where_was_looked(tmp_path: Path) -> None:
    problem, text = problem_of(str(tmp_path / "deep" / "deeper" / "model"))
    assert problem.code == "E-MODEL-PATH"
    assert "deep does not exist" in text
    assert f"Looked in {tmp_path}" in text


@pytest.mark.parametrize("name", ["./model", "~/no such model", "model.safetensors", "C:\\models\\z", "a/b/c"])
def test_what_cannot_be_a_repository_is_a_path(name: str) -> None:
    assert problem_of(name)[0].code in ("E-MODEL-PATH", "E-MODEL-PATH-NEAR")


def test_the_option_at_fault_is_named(folder: Path) -> None:
    for option, argument in (
        ("pretrained_transformer_model_name_or_path", "transformer"),
        ("pretrained_vae_model_name_or_path", "vae"),
    ):
        assert problem_of(str(folder), **{argument: str(folder / "gone" / "x")})[0].path == f"/{option}"


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_other_formats_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    problem, text = problem_of(str(folder / name))
    assert problem.code == "E-MODEL-FORMAT"
    assert "is neither a .safetensors nor a .gguf file" in text


def test_a_single_file_needs_a_companion(folder: Path) -> None:
    problem, text = problem_of(str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    assert problem.code == "E-MODEL-NO-COMPANION"
    assert "is a single file" in text


def test_two_transformers_are_one_too_many(folder: Path) -> None:
    single = str(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    problem, text = problem_of(single, transformer=str(folder), companion=str(folder))
    assert problem.code == "E-MODEL-TWO-TRANSFORMERS"
    assert "Two transformers are given" in text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_an_incomplete_folder_says_what_is_missing_and_what_there_is(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    problem, text = problem_of(str(folder))
    assert problem.code == "E-MODEL-LAYOUT"
    assert f"has no {part}/" in text
    assert "scheduler/" in text


def test_a_lone_transformer_folder_says_how_to_use_it(folder: Path) -> None:
    problem, text = problem_of(str(folder / "transformer"))
    assert problem.code == "E-MODEL-ONLY-ONE-PART"
    assert "is one part of a model" in text
    assert {fix.key for fix in problem.fixes} == {
        "pretrained_transformer_model_name_or_path",
        "pretrained_transformer_subfolder",
    }


def test_a_wrong_subfolder_says_the_right_one(folder: Path) -> None:
    problem, text = problem_of(str(folder), transformer=str(folder / "transformer"))
    assert problem.code == "E-MODEL-SUBFOLDER"
    assert problem.fixes == [Fix(key="pretrained_transformer_subfolder", value="none")]
    assert "Set `pretrained_transformer_subfolder` to none" in text
    problem, _ = problem_of(str(folder), transformer=str(folder), transformer_subfolder="none")
    assert problem.fixes == [Fix(key="pretrained_transformer_subfolder", value="transformer")]


def test_missing_weights_say_what_was_looked_for_and_found(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    problem, text = problem_of(str(folder))
    assert problem.code == "E-MODEL-NO-WEIGHTS"
    assert "looked for transformer/diffusion_pytorch_model.safetensors, found diffusion_pytorch_model.bin" in text


def test_a_missing_shard_is_named(folder: Path, pipeline: Any) -> None:
    shutil.rmtree(folder / "transformer")
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    problem, text = problem_of(str(folder))
    assert problem.code == "E-MODEL-SHARDS"
    assert f"transformer/{shard.name}" in text


@pytest.mark.parametrize(
    "weight_map", [None, {"a": "../../etc/passwd"}, {"a": "/etc/passwd"}, {"a": "..\\x"}, {"a": 1}]
)
def test_an_index_cannot_lead_elsewhere(folder: Path, weight_map: object) -> None:
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    problem, text = problem_of(str(folder))
    assert problem.code == "E-MODEL-INDEX"
    assert "is not an index of weight files" in text


@pytest.mark.parametrize(
    ("part", "change", "found"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("vae", {"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ("text_encoder", {"model_type": "t5"}, "t5"),
    ],
)
def test_a_part_of_another_family_is_refused(folder: Path, part: str, change: dict[str, str], found: str) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    problem, text = problem_of(str(folder))
    assert problem.code == "E-MODEL-KIND"
    assert f"describes {found}; the {part} of this family is" in text


def test_a_variant_that_nothing_has_is_refused(folder: Path) -> None:
    problem, text = problem_of(str(folder), variant="fp8")
    assert problem.code == "E-MODEL-VARIANT"
    assert "no weights of the variant fp8" in text


# One file


def test_one_file_by_its_path_or_by_its_folder(folder: Path) -> None:
    expected = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for name in (str(expected), str(expected.parent)):
        found = resolve_file(name, file_name=expected.name, part="adapter", option="init_lora")
        assert found == expected


def test_a_folder_without_the_file_says_what_it_has(folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_file(str(folder / "vae"), file_name="lora.safetensors", part="adapter", option="init_lora")
    (problem,) = caught.value.problems
    assert (problem.code, problem.path) == ("E-MODEL-NO-WEIGHTS", "/init_lora")
    title, _ = render_problem(problem, "en")
    assert "no weights of the adapter: looked for lora.safetensors, found diffusion_pytorch_model" in title
