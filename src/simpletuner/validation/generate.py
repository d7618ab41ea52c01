"""Make the images of one validation and tell of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simpletuner.events.types import Event, ValidationFinished, ValidationImage, ValidationStarted
from simpletuner.models.z_image.sampler import Guidance, draw_noise, sample, sigmas
from simpletuner.validation.gallery import Gallery, GalleryEntry
from simpletuner.validation.requests import ImageRequest

_TOKENS_PER_CALL = 4096  # image tokens sampled together: one image of 1024 x 1024 px, or 64 of 128 x 128


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are sampled. `guidance` is on Z-Image's scale, where 0 is off."""

    num_steps: int
    guidance: float
    shift: float
    negative_prompt: str


@dataclass(frozen=True, kw_only=True)
class ImageEngine:
    """The parts of a model that make images.

    `velocity` takes (B latents [C, h, w], sigma [B], B contexts); `context_of` turns prompts into contexts; `decode`
    turns latents [B, C, h, w] into images [B, 3, H, W] in [-1, 1]; within `strength(x)` the adapter counts x times.
    """

    velocity: Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], Sequence[Tensor]]
    context_of: Callable[[Sequence[str]], list[Tensor]]
    decode: Callable[[Tensor], Tensor]
    strength: Callable[[float], AbstractContextManager[None]]
    latent_channels: int
    px_per_latent: int
    px_per_token: int
    device: torch.device


def validate(
    requests: Sequence[ImageRequest],
    *,
    step: int,
    heading: Callable[[int], str],
    with_adapter: bool,
    engine: ImageEngine,
    settings: SamplingSettings,
    gallery: Gallery,
    all_requests: Sequence[ImageRequest],
    emit: Callable[[Event], None],
    on_progress: Callable[[int], None],
) -> None:
    """Make `requests`, add them to the gallery and draw the sheet base | this step over `all_requests`.

    Args:
        heading: step -> name of its column in the sheet.
        with_adapter: False shows the base model (step 0), whatever the adapter has learned.
        on_progress: told after each sampling step how many images it moved.
    """
    started = time.monotonic()
    emit(ValidationStarted(step=step, num_images=len(requests)))
    for group in grouped(requests, engine.px_per_token):
        group_started = time.monotonic()
        strength = group[0].prompt.strength if with_adapter else 0.0
        with engine.strength(strength):
            images = make_images(group, engine=engine, settings=settings, on_progress=on_progress)
        seconds = (time.monotonic() - group_started) / len(group)
        for request, image in zip(group, images, strict=True):
            entry = _entry(request, step, strength, settings, gallery)
            path = gallery.add(image, entry)
            emit(
                ValidationImage(
                    prompt_id=entry.prompt_id,
                    prompt=entry.prompt,
                    step=step,
                    seed=entry.seed,
                    width_px=entry.width_px,
                    height_px=entry.height_px,
                    guidance=entry.guidance,
                    path=path.relative_to(gallery.folder.parent).as_posix(),
                    seconds=seconds,
                )
            )
    columns = {heading(shown): shown for shown in sorted({0, step})}
    sheet = gallery.write_contact_sheet(columns, all_requests)
    emit(
        ValidationFinished(
            step=step,
            num_images=len(requests),
            seconds=time.monotonic() - started,
            contact_sheet=sheet.relative_to(gallery.folder.parent).as_posix() if sheet else None,
        )
    )


@torch.no_grad()
def make_images(
    requests: Sequence[ImageRequest],
    *,
    engine: ImageEngine,
    settings: SamplingSettings,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Image.Image]:
    """Sample and decode images of any sizes in one packed call; each depends on its own request only.

    `on_progress` is told after each sampling step how many images it moved.
    """
    latents = sample_latents(requests, engine=engine, settings=settings, on_progress=on_progress)
    return [to_image(engine.decode(latent[None])[0]) for latent in latents]


@torch.no_grad()
def sample_latents(
    requests: Sequence[ImageRequest],
    *,
    engine: ImageEngine,
    settings: SamplingSettings,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """The clean latents [C, h, w] of images of any sizes, sampled in one packed call."""
    noise = [
        draw_noise(request.size, request.seed, channels=engine.latent_channels, factor=engine.px_per_latent).to(
            engine.device
        )
        for request in requests
    ]
    context = engine.context_of([request.prompt.text for request in requests])
    negative = engine.context_of([settings.negative_prompt] * len(requests)) if settings.guidance > 0 else None
    return sample(
        engine.velocity,
        noise,
        context,
        negative,
        sigmas_N=sigmas(settings.num_steps, settings.shift),
        guidance=Guidance(scale=settings.guidance),
        on_step=lambda _: on_progress(len(requests)),
    )


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] (clamped) -> an RGB image."""
    bytes_HWC = ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(bytes_HWC.cpu().numpy()))


def grouped(requests: Sequence[ImageRequest], px_per_token: int) -> Iterator[list[ImageRequest]]:
    """Consecutive requests of one adapter strength that fit into one call."""
    group: list[ImageRequest] = []
    tokens = 0
    for request in requests:
        more = request.size[0] * request.size[1] // px_per_token**2
        full = tokens + more > _TOKENS_PER_CALL
        if group and (full or request.prompt.strength != group[0].prompt.strength):
            yield group
            group, tokens = [], 0
        group.append(request)
        tokens += more
    if group:
        yield group


def missing_requests(
    requests: Sequence[ImageRequest], gallery: Gallery, *, step: int, settings: SamplingSettings
) -> list[ImageRequest]:
    """Those of `requests` that the gallery does not show at `step`, sampled with these settings, yet."""
    wanted = (settings.guidance, settings.num_steps, settings.shift, settings.negative_prompt)
    there = [
        entry
        for entry in gallery.entries()
        if entry.step == step
        and (entry.guidance, entry.num_inference_steps, entry.shift, entry.negative_prompt) == wanted
    ]
    return [request for request in requests if not any(entry.shows(request) for entry in there)]


def _entry(
    request: ImageRequest, step: int, strength: float, settings: SamplingSettings, gallery: Gallery
) -> GalleryEntry:
    return GalleryEntry(
        file=gallery.path_for(request, step).name,
        step=step,
        prompt_id=request.prompt.id,
        prompt=request.prompt.text,
        negative_prompt=settings.negative_prompt,
        seed=request.seed,
        width_px=request.size[0],
        height_px=request.size[1],
        guidance=settings.guidance,
        num_inference_steps=settings.num_steps,
        shift=settings.shift,
        adapter_strength=strength,
    )
