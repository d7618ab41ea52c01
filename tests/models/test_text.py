"""Prompt embeddings are those of diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import PromptEncoder, encoder_id, load_prompt_encoder


@pytest.fixture(scope="module")
def files(pipeline_dir: Path) -> PipelineFiles:
    return resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE)


@pytest.fixture(scope="module")
def encoder(files: PipelineFiles) -> PromptEncoder:
    return load_prompt_encoder(files.text_encoder, files.tokenizer_dir, dtype=torch.float32)


def prompt_of(encoder: PromptEncoder, num_tokens: int) -> str:
    """A prompt that makes `num_tokens` tokens with the template around it: every digit is one token."""
    around = len(encoder.tokenizer(encoder._message(""))["input_ids"])
    return "7" * (num_tokens - around)


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 511, 512])
def test_one_prompt_equals_the_pipelines(encoder: PromptEncoder, pipeline: Any, num_tokens: int) -> None:
    prompt = prompt_of(encoder, num_tokens)
    (ours,) = encoder.encode([prompt])
    (theirs,) = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]
    assert ours.shape == (num_tokens, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "7", "a red circle", "7" * 900, "caf\u00e9 \u56fe\u50cf\n\n  two  spaces"])
def test_any_text_equals_the_pipelines(encoder: PromptEncoder, pipeline: Any, prompt: str) -> None:
    (ours,) = encoder.encode([prompt])
    (theirs,) = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]
    assert len(ours) == min(len(theirs), 512)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_embedding_depends_on_nothing_but_its_prompt(encoder: PromptEncoder, pipeline: Any) -> None:
    prompts = ["7", prompt_of(encoder, 33), "", "a photo of a red circle on a blue background", "7" * 600]
    together = encoder.encode(prompts)
    theirs = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
    for prompt, ours, reference in zip(prompts, together, theirs, strict=True):
        assert torch.equal(ours, encoder.encode([prompt])[0])
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_the_last_layer_and_the_head_are_not_there(encoder: PromptEncoder, pipeline: Any) -> None:
    ours = {name for name, _ in encoder.model.named_parameters()}
    theirs = {name.removeprefix("model.") for name, _ in pipeline.text_encoder.named_parameters()}
    unused = {name for name in theirs if name.startswith("layers.2.")} | {"norm.weight", "lm_head.weight"}
    assert ours == theirs - unused
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in encoder.model.parameters())


def test_half_precision_stays_close(files: PipelineFiles, encoder: PromptEncoder) -> None:
    low = load_prompt_encoder(files.text_encoder, files.tokenizer_dir, dtype=torch.bfloat16)
    (exact,), (rounded,) = encoder.encode(["a red circle"]), low.encode(["a red circle"])
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_the_id_changes_with_everything_that_changes_an_embedding(files: PipelineFiles, tmp_path: Path) -> None:
    def of(**changes: Any) -> str:
        settings: dict[str, Any] = {"dtype": torch.float32, **changes}
        return encoder_id(files.text_encoder, settings.pop("tokenizer", files.tokenizer_dir), **settings)

    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in files.tokenizer_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert of() == of() == of(tokenizer=other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("assistant", "helper"), encoding="utf-8")
    assert len({of(), of(dtype=torch.bfloat16), of(max_tokens=256), of(tokenizer=other)}) == 4
