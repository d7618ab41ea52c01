"""Latents and images are those of diffusers' AutoencoderKL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.vae import LatentCodec, codec_id, load_latent_codec


@pytest.fixture(scope="module")
def files(pipeline_dir: Path) -> PipelineFiles:
    return resolve_pipeline(str(pipeline_dir), spec=Z_IMAGE)


@pytest.fixture(scope="module")
def codec(files: PipelineFiles) -> LatentCodec:
    return load_latent_codec(files.vae, dtype=torch.float32)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize(("width_px", "height_px"), [(64, 64), (48, 80), (16, 16)])
def test_latents_equal_the_scaled_mode_of_the_posterior(
    codec: LatentCodec, pipeline: Any, width_px: int, height_px: int
) -> None:
    images_BCHW = images(2, 3, height_px, width_px)
    with torch.no_grad():
        mode = pipeline.vae.encode(images_BCHW).latent_dist.mode()
    ours = codec.encode(images_BCHW)
    assert ours.shape == (2, 16, height_px // codec.factor, width_px // codec.factor)
    torch.testing.assert_close(ours, (mode - 0.1159) * 0.3611, rtol=1e-6, atol=2e-6)


def test_images_equal_the_pipelines_decoding(codec: LatentCodec, pipeline: Any) -> None:
    latents_BCHW = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = pipeline.vae.decode(latents_BCHW / 0.3611 + 0.1159, return_dict=False)[0]
    torch.testing.assert_close(codec.decode(latents_BCHW), theirs.clamp(-1, 1), rtol=1e-6, atol=1e-6)


def test_decoded_images_stay_in_range(codec: LatentCodec) -> None:
    images_BCHW = codec.decode(1000 * torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1)))
    assert images_BCHW.abs().max() <= 1


def test_encoding_draws_nothing(codec: LatentCodec) -> None:
    before = torch.get_rng_state()
    first, second = codec.encode(images(1, 3, 32, 32)), codec.encode(images(1, 3, 32, 32))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_latent_depends_on_nothing_but_its_image(codec: LatentCodec) -> None:
    images_BCHW = images(3, 3, 32, 48)
    together = codec.encode(images_BCHW)
    assert all(torch.equal(codec.encode(images_BCHW[i : i + 1])[0], together[i]) for i in range(3))


def test_slicing_changes_nothing_but_memory(codec: LatentCodec, files: PipelineFiles) -> None:
    sliced = load_latent_codec(files.vae, dtype=torch.float32, slicing=True)
    latents_BCHW = codec.encode(images(3, 3, 32, 48))
    torch.testing.assert_close(sliced.decode(latents_BCHW), codec.decode(latents_BCHW), rtol=1e-5, atol=1e-5)


def test_tiling_is_diffusers_and_changes_nothing_within_one_tile(
    codec: LatentCodec, files: PipelineFiles, pipeline: Any
) -> None:
    tiled = load_latent_codec(files.vae, dtype=torch.float32, tiling=True)
    small, large = images(1, 3, 32, 32), images(1, 3, 48, 48)
    assert torch.equal(tiled.encode(small), codec.encode(small))
    pipeline.vae.enable_tiling()
    with torch.no_grad():
        expected = (pipeline.vae.encode(large).latent_dist.mode() - 0.1159) * 0.3611
    pipeline.vae.disable_tiling()
    torch.testing.assert_close(tiled.encode(large), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(tiled.encode(large), codec.encode(large))


def test_bf16_weights_give_float32_latents(codec: LatentCodec, files: PipelineFiles) -> None:
    low = load_latent_codec(files.vae, dtype=torch.bfloat16)
    latents = low.encode(images(1, 3, 32, 32))
    assert latents.dtype == torch.float32
    assert (latents - codec.encode(images(1, 3, 32, 32))).norm() / latents.norm() < 0.1


def test_sides_that_make_no_whole_token_are_refused(codec: LatentCodec) -> None:
    assert codec.alignment_px == Z_IMAGE.alignment_px == 16
    with pytest.raises(AssertionError, match="not aligned to 16"):
        codec.encode(images(1, 3, 64, 72))


def test_the_id_changes_with_everything_that_changes_a_latent(files: PipelineFiles) -> None:
    ids = {
        codec_id(files.vae, dtype=torch.float32),
        codec_id(files.vae, dtype=torch.bfloat16),
        codec_id(files.vae, dtype=torch.float32, tiling=True),
    }
    assert len(ids) == 3
    assert codec_id(files.vae, dtype=torch.float32) in ids


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest result of an operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("tiling", [False, True])
def test_tiling_bounds_the_memory_of_large_images(tiling: bool, files: PipelineFiles) -> None:
    """Without it intermediate results grow with the image; with it they are those of one tile, but for the image."""
    codec, largest = load_latent_codec(files.vae, dtype=torch.float32, tiling=tiling), []
    for tiles in (1, 4):
        side = codec.model.config.sample_size * tiles
        with LargestTensor() as found:
            image = codec.decode(torch.zeros(1, 16, side // codec.factor, side // codec.factor))
        assert image.shape[-2:] == (side, side)
        largest.append(max(found.numbers, image.numel()))
    bound = max(largest[0], image.numel())
    assert (largest[1] <= bound) == tiling
