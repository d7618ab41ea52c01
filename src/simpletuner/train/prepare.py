"""The caches of a plan; the models that fill them live only as long as they are needed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from simpletuner.config.datasets import (
    DatasetsConfig,
    TextEmbeds,
    encodes_while_training,
    keeps_latents,
    takes_fresh_crops,
)
from simpletuner.config.root import Config
from simpletuner.data.latents import LatentSource, cache_latents, learn_latent_keys
from simpletuner.data.loader import Latents
from simpletuner.data.mask_pairs import MaskFiles
from simpletuner.data.masks import MaskStore, cache_masks
from simpletuner.data.on_demand import OnDemandLatents
from simpletuner.data.prompts import PromptGroup, PromptSource, PromptStore, cache_prompts
from simpletuner.data.records import Plan, Sample
from simpletuner.events.progress import PhaseProgress, Reporter
from simpletuner.events.types import ProblemReported
from simpletuner.hardware.process_memory import return_free_memory
from simpletuner.memory.module_swap import apply_module_swap
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.spec import Z_IMAGE
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


def run_prompts(plan: Plan, held_out: Plan, datasets: DatasetsConfig, validation: Iterable[str]) -> list[PromptGroup]:
    """Every text that a run embeds. Captions of held-out images never share a call of the encoder with others."""
    return [*prompt_groups(plan, datasets, validation), *prompt_groups(held_out, datasets)]


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
    """The autoencoder of a run: loaded when it is first needed, for latents or for images. Threads may share it."""

    def __init__(
        self,
        config: Config,
        *,
        files: PipelineFiles,
        compute: Compute,
        run: Reporter,
        is_needed_throughout: bool = False,
    ) -> None:
        """Args: is_needed_throughout: it encodes while the model trains, so it never leaves the device."""
        self._config = config
        self._files = files
        self._compute = compute
        self._run = run
        self._stays = config.memory.keep_vae_loaded or is_needed_throughout
        self._lock = threading.RLock()
        self._codec: LatentCodec | None = None
        dtype = vae_dtype(config, compute)
        self.id = codec_id(files.vae, dtype=dtype, tiling=config.memory.vae_enable_tiling)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """See `LatentCodec.encode`."""
        with self._lock:
            return self.open().encode(images_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """See `LatentCodec.decode`."""
        with self._lock:
            return self.open().decode(latents_BCHW)

    def open(self) -> LatentCodec:
        """The autoencoder, on the device."""
        with self._lock:
            if self._codec is None:
                with self._run.phase("vae"):
                    self._codec = load_codec(self._config, self._files, self._compute)
            elif self._codec.device != self._compute.device:
                self._codec.model.to(self._compute.device)
                self._codec = replace(self._codec, device=self._compute.device)
            return self._codec

    def close(self) -> None:
        """Give its memory back, unless it stays."""
        if not self._stays:
            self._codec = None

    def park(self) -> None:
        """Leave the device to the training; the next images fetch it from main memory. Unless it stays."""
        device, memory = self._compute.device, self._config.memory
        with self._lock:
            if self._codec is None or device.type == "cpu" or self._stays or vae_is_offloaded(memory):
                return
            self._codec.model.to("cpu")
            self._codec = replace(self._codec, device=torch.device("cpu"))
        free_memory(device)


@dataclass(frozen=True)
class LatentsByDataset:
    """The latents of a run, whatever way each dataset gets them."""

    by_id: Mapping[str, Latents]

    def get(self, sample: Sample) -> Tensor:
        """See `Latents`."""
        return self.by_id[sample.dataset_id].get(sample)


def fill_latent_cache(
    plan: Plan,
    held_out: Plan,
    *,
    config: Config,
    datasets: DatasetsConfig,
    vae: Vae,
    compute: Compute,
    run: Reporter,
    cleanup: ExitStack,
) -> Latents:
    """Latents of all samples of a plan, but for those that are encoded while training; the VAE is loaded only if one
    is missing. Held-out images never share a call of it with others.

    Args: cleanup: outlives the training.
    Raises:
        PlanAgainError: images turned out to be unreadable; a new plan leaves them out.
    """
    fill = partial(_fill_latents, config=config, datasets=datasets, vae=vae, run=run, cleanup=cleanup)
    latents = {**fill(plan, phase="latents"), **fill(held_out, phase="held_out")}
    vae.close()
    free_memory(compute.device)
    return LatentsByDataset(latents)


def fill_mask_cache(
    plan: Plan, masks: Mapping[str, MaskFiles], *, config: Config, datasets: DatasetsConfig, run: Reporter
) -> MaskStore:
    """The masks of a plan, but for those of crops that change while training."""
    fresh = {dataset.id for dataset in (*datasets.images, *datasets.evals) if takes_fresh_crops(dataset)}
    now = replace(plan, datasets=tuple(d for d in plan.datasets if d.id in masks and d.id not in fresh))
    if not now.datasets:
        return MaskStore(masks, px_per_latent=Z_IMAGE.vae_factor)
    cache_dir = Path(config.data.cache_dir)
    with run.phase("masks", unit="images") as progress:
        store, warnings = cache_masks(
            now,
            masks,
            directory=cache_dir / "masks",
            cache_dir=cache_dir,
            px_per_latent=Z_IMAGE.vae_factor,
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
        )
    for problem in warnings:
        run.emit(ProblemReported(problem=problem))
    return store


def _fill_latents(
    plan: Plan, *, phase: str, config: Config, datasets: DatasetsConfig, vae: Vae, run: Reporter, cleanup: ExitStack
) -> dict[str, Latents]:
    by_id = {dataset.id: dataset for dataset in (*datasets.images, *datasets.evals)}
    directories = {name: Path(dataset.cache_dir_vae) for name, dataset in by_id.items()}
    group_sizes = {Path(entry.cache_dir): entry.write_batch_size for entry in datasets.image_embeds}
    later = [dataset for dataset in plan.datasets if encodes_while_training(by_id[dataset.id])]
    now = replace(plan, datasets=tuple(dataset for dataset in plan.datasets if dataset not in later))
    source = LatentSource(id=vae.id, open=lambda: vae)
    cache_dir = Path(config.data.cache_dir)
    with ExitStack() as stack:
        keys = learn_latent_keys(
            now,
            vae.id,
            cache_dir=cache_dir,
            on_progress=_LatePhase(run, "contents", stack).update,
            max_workers=config.data.max_workers,
        )
    latents: dict[str, Latents] = {}
    if now.datasets:
        with run.phase(phase, unit="images") as progress:
            store = cache_latents(
                now,
                source,
                keys,
                directory_of=directories.__getitem__,
                cache_dir=cache_dir,
                batch_size=config.data.vae_batch_size,
                on_progress=lambda done, total: progress.update(done, total=total),
                write_batch_size=config.data.write_batch_size,
                write_batch_sizes=group_sizes,
                max_workers=config.data.max_workers,
            )
        latents |= {dataset.id: store for dataset in now.datasets}
    if later:
        vae.open()
        on_demand = OnDemandLatents(
            later,
            source,
            directories={d.id: directories[d.id] for d in later if keeps_latents(by_id[d.id])},
            cache_dir=cache_dir,
            write_batch_size=config.data.write_batch_size,
        )
        cleanup.enter_context(on_demand)
        latents |= {dataset.id: on_demand for dataset in later}
    return latents


class _LatePhase:
    """A phase that begins when there turns out to be something to do in it, and ends with `stack`."""

    def __init__(self, run: Reporter, key: str, stack: ExitStack) -> None:
        self._run, self._key, self._stack = run, key, stack
        self._progress: PhaseProgress | None = None

    def update(self, done: int, total: int) -> None:
        if self._progress is None and done < total:
            self._progress = self._stack.enter_context(self._run.phase(self._key, unit="images"))
        if self._progress is not None:
            self._progress.update(done, total=total)


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
