"""From folders of images to a plan and its caches; the models that fill them live only as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from simpletuner.config.datasets import DatasetsConfig, ImageDataset
from simpletuner.config.root import Config
from simpletuner.data.latents import LatentSource, LatentStore, cache_latents
from simpletuner.data.plan import build_plan
from simpletuner.data.prompts import PromptSource, PromptStore, cache_prompts
from simpletuner.data.records import DropReason, Plan
from simpletuner.data.spec import AspectChoice, CaptionSpec, DatasetSpec, ResizeSpec
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.types import BucketCount, DatasetPlanned, DropCount
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.text import encoder_id, load_prompt_encoder
from simpletuner.models.z_image.vae import codec_id, load_latent_codec
from simpletuner.quant.build import quantiser
from simpletuner.train.device import Compute

_PROMPTS_PER_CALL = 4

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class _Identified(Generic[_In, _Out]):
    """An encoder under the name that its results are cached by."""

    id: str
    encode: Callable[[_In], _Out]


def scan_datasets(config: Config, datasets: DatasetsConfig, run: RunRecorder) -> Plan:
    """Find the images and sort them into buckets.

    Raises:
        DatasetError: no usable image, a damaged file, a missing caption, a bucket that cannot fill a batch.
    """
    specs = [dataset_spec(dataset, config) for dataset in datasets.images]
    with run.phase("scan", unit="images") as progress:
        plan = build_plan(
            specs,
            batch_size=config.optimizer.train_batch_size,
            seed=config.run.seed,
            cache_dir=Path(config.data.cache_dir),
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
        )
    for dataset in plan.datasets:
        buckets = [
            BucketCount(width_px=b.size[0], height_px=b.size[1], num_samples=len(b.samples)) for b in dataset.buckets
        ]
        dropped = [DropCount(reason=r.value, num_images=dataset.count_dropped(r)) for r in DropReason]
        run.emit(
            DatasetPlanned(
                dataset=dataset.id,
                num_images=dataset.num_images,
                num_samples=dataset.num_images * (dataset.repeats + 1),
                buckets=tuple(buckets),
                dropped=tuple(drop for drop in dropped if drop.num_images),
            )
        )
    return plan


def fill_prompt_cache(
    prompts: Iterable[str],
    *,
    config: Config,
    datasets: DatasetsConfig,
    files: PipelineFiles,
    compute: Compute,
    run: RunRecorder,
) -> PromptStore:
    """Embeddings of all `prompts`; the text encoder is loaded only if one is missing."""
    dtype, max_tokens = compute.weights, config.model.tokenizer_max_length
    precision = config.memory.text_encoder_precision

    def open_encoder() -> _Identified[Sequence[str], list[Tensor]]:
        with run.phase("text_encoder"):
            encoder = load_prompt_encoder(
                files.text_encoder,
                files.tokenizer_dir,
                dtype=dtype,
                device=compute.device,
                max_tokens=max_tokens,
                quantise=quantiser(precision, dtype),
                quantise_on_device=config.memory.quantize_via != "cpu",
            )
        return _Identified(identity, encoder.encode)

    identity = encoder_id(
        files.text_encoder, files.tokenizer_dir, dtype=dtype, max_tokens=max_tokens, precision=precision
    )
    with run.phase("prompts", unit="prompts") as progress:
        store = cache_prompts(
            prompts,
            PromptSource(id=identity, open=open_encoder),
            directory=Path(datasets.text_embeds.cache_dir),
            batch_size=_PROMPTS_PER_CALL,
            on_progress=lambda done, total: progress.update(done, total=total),
            write_batch_size=datasets.text_embeds.write_batch_size,
        )
    free_memory(compute.device)
    return store


def fill_latent_cache(
    plan: Plan,
    *,
    config: Config,
    datasets: DatasetsConfig,
    files: PipelineFiles,
    compute: Compute,
    run: RunRecorder,
) -> LatentStore:
    """Latents of all samples of the plan; the VAE is loaded only if one is missing."""
    dtype = vae_dtype(config, compute)

    def open_encoder() -> _Identified[Tensor, Tensor]:
        with run.phase("vae"):
            codec = load_latent_codec(
                files.vae,
                dtype=dtype,
                device=compute.device,
                tiling=config.memory.vae_enable_tiling,
                slicing=config.memory.vae_enable_slicing,
            )
        return _Identified(identity, codec.encode)

    directories = {dataset.id: Path(dataset.cache_dir_vae) for dataset in datasets.images}
    identity = codec_id(files.vae, dtype=dtype, tiling=config.memory.vae_enable_tiling)
    with run.phase("latents", unit="images") as progress:
        store = cache_latents(
            plan,
            LatentSource(id=identity, open=open_encoder),
            directory_of=directories.__getitem__,
            batch_size=config.data.vae_batch_size,
            on_progress=lambda done, total: progress.update(done, total=total),
            write_batch_size=config.data.write_batch_size,
            max_workers=config.data.max_workers,
        )
    free_memory(compute.device)
    return store


def dataset_spec(dataset: ImageDataset, config: Config) -> DatasetSpec:
    """The options of one dataset as the data layer takes them."""
    return DatasetSpec(
        id=dataset.id,
        instance_data_dir=Path(dataset.instance_data_dir),
        resize=ResizeSpec(
            resolution=dataset.resolution,
            resolution_type=dataset.resolution_type,
            crop=dataset.crop,
            crop_style=dataset.crop_style,
            crop_aspect=dataset.crop_aspect,
            crop_aspect_buckets=tuple(
                AspectChoice(aspect=bucket.aspect, weight=bucket.weight) for bucket in dataset.crop_aspect_buckets
            ),
            max_upscale_threshold=dataset.max_upscale_threshold,
            minimum_image_size=dataset.minimum_image_size,
            maximum_image_size=dataset.maximum_image_size,
            target_downsample_size=dataset.target_downsample_size,
            minimum_aspect_ratio=dataset.minimum_aspect_ratio,
            maximum_aspect_ratio=dataset.maximum_aspect_ratio,
            aspect_bucket_rounding=config.data.aspect_bucket_rounding,
            aspect_bucket_alignment=config.data.aspect_bucket_alignment,
        ),
        captions=CaptionSpec(
            caption_strategy=dataset.caption_strategy,
            instance_prompts=dataset.instance_prompt,
            prepend_instance_prompt=dataset.prepend_instance_prompt,
            only_instance_prompt=dataset.only_instance_prompt,
            disable_multiline_split=dataset.disable_multiline_split,
        ),
        repeats=dataset.repeats,
        probability=dataset.probability,
        is_regularisation_data=dataset.is_regularisation_data,
        caption_dropout_probability=dataset.caption_dropout_probability,
        max_num_samples=dataset.max_num_samples,
        train_batch_size=dataset.train_batch_size,
    )


def vae_dtype(config: Config, compute: Compute) -> torch.dtype:
    """The VAE's number format: as configured, else bf16 on a GPU and float32 on a CPU."""
    default = torch.float32 if compute.device.type == "cpu" else torch.bfloat16
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return named.get(config.memory.vae_dtype, default)


def free_memory(device: torch.device) -> None:
    """Give back what a model that is gone had taken on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
