"""The caches of a plan; the models that fill them live only as long as they are needed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from simpletuner.config.datasets import DatasetsConfig, TextEmbeds
from simpletuner.config.root import Config
from simpletuner.data.latents import LatentSource, LatentStore, cache_latents
from simpletuner.data.prompts import PromptGroup, PromptSource, PromptStore, cache_prompts
from simpletuner.data.records import Plan
from simpletuner.events.progress import Reporter
from simpletuner.hardware.process_memory import return_free_memory
from simpletuner.memory.module_swap import apply_module_swap
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.text import encoder_id, load_prompt_encoder
from simpletuner.models.z_image.vae import LatentCodec, codec_id, codec_pieces, load_latent_codec
from simpletuner.quant.build import quantiser
from simpletuner.train.device import Compute
from simpletuner.train.offload import TextEncoderStream, vae_is_offloaded

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class _Identified(Generic[_In, _Out]):
    """An encoder under the name that its results are cached by."""

    id: str
    encode: Callable[[_In], _Out]


def prompt_group(prompts: Iterable[str], embeds: TextEmbeds) -> PromptGroup:
    """Prompts that are cached where an entry says."""
    return PromptGroup(
        prompts=prompts,
        directory=Path(embeds.cache_dir) if embeds.is_kept else None,
        batch_size=embeds.text_encoder_batch_size,
        write_batch_size=embeds.write_batch_size,
    )


def prompt_groups(plan: Plan, datasets: DatasetsConfig, more: Iterable[str] = ()) -> list[PromptGroup]:
    """The captions of a plan, those of each dataset where it says. First what the default entry caches, with `more`:
    prompts of no dataset."""
    by_entry: dict[str, set[str]] = {datasets.text_embeds.id: set(more)}
    entries = {entry.id: entry for entry in (datasets.text_embeds, *datasets.other_text_embeds)}
    declared = {dataset.id: dataset for dataset in (*datasets.images, *datasets.evals)}
    for dataset in plan.datasets:
        entry = datasets.embeds_of(declared[dataset.id])
        by_entry.setdefault(entry.id, set()).update(Plan(datasets=(dataset,), fingerprint="").prompts())
    return [prompt_group(prompts, entries[name]) for name, prompts in by_entry.items() if prompts]


def fill_prompt_cache(
    groups: Sequence[PromptGroup],
    *,
    config: Config,
    files: PipelineFiles,
    compute: Compute,
    run: Reporter,
) -> PromptStore:
    """Embeddings of all prompts; the text encoder is loaded only if one is missing."""
    dtype, max_tokens = compute.weights, config.model.tokenizer_max_length
    precision = config.memory.text_encoder_precision

    def open_encoder() -> _Identified[Sequence[str], list[Tensor]]:
        with run.phase("text_encoder"):
            stream = TextEncoderStream(config.memory, files.text_encoder, compute)
            encoder = load_prompt_encoder(
                files.text_encoder,
                files.tokenizer_dir,
                dtype=dtype,
                device=compute.device,
                max_tokens=max_tokens,
                quantise=quantiser(precision, dtype),
                quantise_on_device=config.memory.quantize_via != "cpu",
                convert=stream.convert,
            )
            stream.attach(encoder.model)
        return _Identified(identity, encoder.encode)

    identity = encoder_id(
        files.text_encoder, files.tokenizer_dir, dtype=dtype, max_tokens=max_tokens, precision=precision
    )
    with run.phase("prompts", unit="prompts") as progress:
        store = cache_prompts(
            groups,
            PromptSource(id=identity, open=open_encoder),
            on_progress=lambda done, total: progress.update(done, total=total),
        )
    free_memory(compute.device)
    return store


class Vae:
    """The autoencoder of a run: loaded when it is first needed, for the cache or for images."""

    def __init__(self, config: Config, *, files: PipelineFiles, compute: Compute, run: Reporter) -> None:
        self._config = config
        self._files = files
        self._compute = compute
        self._run = run
        self._codec: LatentCodec | None = None

    def open(self) -> LatentCodec:
        """The autoencoder, on the device."""
        if self._codec is None:
            with self._run.phase("vae"):
                self._codec = load_codec(self._config, self._files, self._compute)
        elif self._codec.device != self._compute.device:
            self._codec.model.to(self._compute.device)
            self._codec = replace(self._codec, device=self._compute.device)
        return self._codec

    def close(self) -> None:
        """Give its memory back, but for `keep_vae_loaded`."""
        if not self._config.memory.keep_vae_loaded:
            self._codec = None

    def park(self) -> None:
        """Leave the device to the training; the next images fetch it from main memory. But for `keep_vae_loaded`."""
        device, memory = self._compute.device, self._config.memory
        if self._codec is None or device.type == "cpu" or memory.keep_vae_loaded or vae_is_offloaded(memory):
            return
        self._codec.model.to("cpu")
        self._codec = replace(self._codec, device=torch.device("cpu"))
        free_memory(device)


def fill_latent_cache(
    plan: Plan,
    *,
    config: Config,
    datasets: DatasetsConfig,
    files: PipelineFiles,
    vae: Vae,
    compute: Compute,
    run: Reporter,
) -> LatentStore:
    """Latents of all samples of the plan; the VAE is loaded only if one is missing."""
    dtype = vae_dtype(config, compute)

    def open_encoder() -> _Identified[Tensor, Tensor]:
        return _Identified(identity, vae.open().encode)

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
    vae.close()
    free_memory(compute.device)
    return store


def load_codec(config: Config, files: PipelineFiles, compute: Compute) -> LatentCodec:
    """The VAE, ready to run on the device; with offload its weights stay in main memory while it does not."""
    memory = config.memory
    is_offloaded = vae_is_offloaded(memory)
    codec = load_latent_codec(
        files.vae,
        dtype=vae_dtype(config, compute),
        device="cpu" if is_offloaded else compute.device,
        tiling=memory.vae_enable_tiling,
        slicing=memory.vae_enable_slicing,
    )
    if not is_offloaded:
        return codec
    apply_module_swap(codec_pieces(codec), device=compute.device)
    return replace(codec, device=compute.device)


def vae_dtype(config: Config, compute: Compute) -> torch.dtype:
    """The VAE's number format: as configured, else bf16 on a GPU and float32 on a CPU."""
    default = torch.float32 if compute.device.type == "cpu" else torch.bfloat16
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return named.get(config.memory.vae_dtype, default)


def free_memory(device: torch.device) -> None:
    """Give back what a model that is gone had taken, on the device and in main memory."""
    gc.collect()  # modules that refer to themselves would otherwise stay for a while
    return_free_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
