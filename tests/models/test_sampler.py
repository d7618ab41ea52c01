"""Our sampler draws the images of diffusers' ZImagePipeline."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpletuner.i18n import render_problem
from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.sampler import Guidance, SamplerStep, draw_noise, sample, scheduler_shift, sigmas
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.models.z_image.vae import load_latent_codec
from simpletuner.problems import ModelError

PROMPTS = ("a red circle", "the quick brown fox jumps over the lazy dog " * 4, "")
SIZES = ((64, 64), (96, 48), (32, 80))  # (width, height) px


@pytest.fixture(scope="module")
def files(pipeline_dir: Path) -> PipelineFiles:
    return resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE)


@pytest.fixture(scope="module")
def transformer(files: PipelineFiles) -> ZImageTransformer:
    return load_transformer(files.transformer, dtype=torch.float32)


@pytest.fixture(scope="module")
def contexts(files: PipelineFiles, transformer: ZImageTransformer) -> list[Tensor]:
    encoder = load_prompt_encoder(files.text_encoder, files.tokenizer_dir, dtype=torch.float32)
    with torch.no_grad():
        return transformer.refine_context(encoder.encode(PROMPTS))


def theirs(pipeline: Any, index: int, guidance: Guidance, **changes: Any) -> Any:
    """The image `index` by diffusers' pipeline, from the noise of seed `index`."""
    width_px, height_px = SIZES[index]
    return pipeline(
        prompt=PROMPTS[index],
        negative_prompt="",
        width=width_px,
        height=height_px,
        latents=draw_noise(SIZES[index], seed=index)[None],
        guidance_scale=guidance.scale,
        cfg_normalization=guidance.normalization,
        cfg_truncation=guidance.truncation,
        **{"num_inference_steps": 4, "output_type": "latent", **changes},
    ).images[0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 9, 28, 50])
def test_the_schedule_is_the_pipelines_to_the_bit(pipeline: Any, num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(num_steps), mu=1.0)
    assert torch.equal(sigmas(num_steps, shift), scheduler.sigmas)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(scale=3.0),
        Guidance(scale=5.0, normalization=0.8),
        Guidance(scale=4.0, truncation=0.3),
    ],
    ids=["none", "guided", "normalised", "truncated"],
)
def test_images_of_several_sizes_and_prompts_in_one_call_equal_the_pipelines_one_by_one(
    pipeline: Any, transformer: ZImageTransformer, contexts: list[Tensor], guidance: Guidance
) -> None:
    ours = sample(
        partial(velocity, transformer),
        [draw_noise(size, seed=index) for index, size in enumerate(SIZES)],
        contexts,
        [contexts[PROMPTS.index("")]] * len(SIZES),
        sigmas_N=sigmas(4, 3.0),
        guidance=guidance,
    )
    for index, latents in enumerate(ours):
        expected = theirs(pipeline, index, guidance)
        error = (latents - expected).norm() / expected.norm()
        assert error < 1e-5, f"image {index}: relative error {error:.1e}"


def test_pixels_equal_the_pipelines(
    pipeline: Any, files: PipelineFiles, transformer: ZImageTransformer, contexts: list[Tensor]
) -> None:
    guidance = Guidance(scale=2.0)
    (latents,) = sample(
        partial(velocity, transformer),
        [draw_noise(SIZES[1], seed=1)],
        [contexts[1]],
        [contexts[2]],
        sigmas_N=sigmas(3, scheduler_shift(files.scheduler_config or Path())),
        guidance=guidance,
    )
    pixels_CHW = load_latent_codec(files.vae, dtype=torch.float32).decode(latents[None])[0]
    ours_HWC = ((pixels_CHW + 1) / 2).permute(1, 2, 0).numpy()
    expected_HWC = theirs(pipeline, 1, guidance, num_inference_steps=3, output_type="np")
    np.testing.assert_allclose(ours_HWC, expected_HWC, atol=1e-4)  # a fortieth of an 8-bit level


def test_noise_is_the_pipelines_for_the_same_seed() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    expected = randn_tensor((1, 16, 6, 12), generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    assert torch.equal(draw_noise((96, 48), seed=7)[None], expected)


def test_sampling_a_straight_flow_ends_at_its_clean_end() -> None:
    """With the exact velocity of one clean image every number of steps arrives there."""
    noise, clean = torch.randn(16, 4, 4), torch.randn(16, 4, 4)
    for num_steps in (1, 3, 10):
        (found,) = sample(lambda x, sigma, _: [noise - clean], [noise], [noise], sigmas_N=sigmas(num_steps, 3.0))
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)


def test_every_step_is_reported_and_points_to_the_clean_image() -> None:
    noise, clean = torch.randn(16, 4, 4), torch.randn(16, 4, 4)
    seen: list[SamplerStep] = []
    (found,) = sample(
        lambda x, sigma, _: [noise - clean], [noise], [noise], sigmas_N=sigmas(4, 3.0), on_step=seen.append
    )
    assert [(step.step, step.num_steps) for step in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.sigma for step in seen] == sigmas(4, 3.0)[1:].tolist()
    assert torch.equal(seen[-1].latents[0], found)
    for step in seen:
        torch.testing.assert_close(step.clean[0], clean, rtol=1e-4, atol=1e-5)


def test_without_guidance_the_negative_prompt_is_never_run() -> None:
    sizes: list[int] = []

    def velocity_of(latents: Any, sigma_B: Tensor, context: Any) -> list[Tensor]:
        sizes.append(len(latents))
        assert len(latents) == len(sigma_B) == len(context)
        return [torch.zeros_like(x) for x in latents]

    noise = [torch.zeros(16, 2, 2)]
    sample(velocity_of, noise, noise, noise, sigmas_N=sigmas(4, 3.0))
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    # sigma of the four steps: 1, 0.9, 0.75, 0.5. Guidance ends where 1 - sigma exceeds the truncation.
    sample(velocity_of, noise, noise, noise, sigmas_N=sigmas(4, 3.0), guidance=Guidance(scale=1.0, truncation=0.2))
    assert sizes == [2, 2, 1, 1]


def test_guidance_without_a_negative_prompt_is_our_mistake() -> None:
    noise = [torch.zeros(16, 2, 2)]
    with pytest.raises(AssertionError, match="negative context"):
        sample(lambda *_: noise, noise, noise, sigmas_N=sigmas(1, 1.0), guidance=Guidance(scale=1.0))


def test_sampling_moves_no_global_random_state(transformer: ZImageTransformer, contexts: list[Tensor]) -> None:
    before = torch.get_rng_state()
    noise = [draw_noise((32, 32), seed=0)]
    sample(partial(velocity, transformer), noise, contexts[:1], sigmas_N=sigmas(2, 3.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_that_depends_on_size_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({"use_dynamic_shifting": True}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        scheduler_shift(config)
    title, hint = render_problem(caught.value.problems[0], "en")
    assert "depends on the image size" in title
    assert hint is not None
    assert "validation_sampling_shift" in hint
