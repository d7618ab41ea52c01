"""From the options of a run to what the arithmetic takes: the one place that knows both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from simpletuner.catalog.lycoris import LycorisSettings
from simpletuner.catalog.modules import LORA_TARGETS
from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.catalog.rollouts import mean_offset
from simpletuner.config.datasets import DatasetsConfig, ImageDataset, encodes_while_training
from simpletuner.config.lycoris import read_lycoris
from simpletuner.config.release import releases_gradients
from simpletuner.config.root import Config
from simpletuner.config.sections.adapter import has_assistant, merges_assistant
from simpletuner.config.sections.memory import MemorySection
from simpletuner.hardware.probe import device_type
from simpletuner.hardware.space import GpuSpace, Space, gpu_memory, main_memory
from simpletuner.planner.inputs import Adapter, DeviceKind, Offload, Picture, PlanInput
from simpletuner.planner.sizes import ModelSizes, lora_rank, read_sizes
from simpletuner.problems import ConfigError

AUTO = 0  # of gradient_checkpointing_interval
_CPUINFO = Path("/proc/cpuinfo")
_USUAL_CAPTION_TOKENS = 96
_USUAL_NUM_CAPTIONS = 100
_TEMPLATE_TOKENS = 10
_TOKENS_PER_WORD = 1.5
_IN_ROWS = ("adamw_bf16", "lion")  # see `optim.bucketed`
_USUAL_STATE_BYTES = 8.0
_ASSISTANT_RANK = 64  # of an adapter that is not here yet
_PX_CALL = 1 << 20  # of images sampled in one call


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run will be. `kind` and `name` of the device; its memory, None where that cannot be told; `host` is
    main memory. `is_fast_bf16`: computes in bfloat16 rather than fall back to float32."""

    kind: DeviceKind
    name: str
    device: Space | None
    host: Space | None
    is_fast_bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What only the datasets themselves can say, where they were looked at.

    picture: the largest batch. is_mixed: captions of different padded lengths share batches.
    """

    picture: Picture
    is_mixed: bool
    num_captions: int
    num_images: int
    total_steps: int


def find_machine(requested: str) -> Machine:
    """The device that the option `device` comes to here, asked of system and driver."""
    kind = device_type(requested)
    host = main_memory()
    if kind == "cuda":
        index = int(requested.partition(":")[2] or 0)
        gpu: GpuSpace | None = gpu_memory(index)
        return Machine(kind="cuda", name=gpu.name if gpu else "CUDA", device=gpu.space if gpu else None, host=host)
    if kind == "mps":
        return Machine(kind="mps", name="Apple GPU", device=host, host=host)
    return Machine(kind="cpu", name="CPU", device=None, host=host, is_fast_bf16=_has_amx())


def plan_input(
    config: Config, datasets: DatasetsConfig, machine: Machine, *, observed: Observed | None = None
) -> PlanInput:
    """What a run of these options needs to be planned; `observed` replaces what is guessed about the data."""
    memory, adapter = config.memory, config.adapter
    weight_bytes, compute_bytes = _number_bytes(config, machine)
    full = config.model.model_type == "full"
    lora = Adapter(
        rank=0 if full else adapter.lora_rank,
        targets=("*",) if full else adapter.peft_lora_target_modules or LORA_TARGETS[adapter.lora_targets],
        weight_bytes=weight_bytes if full else 4,
        dropout=adapter.lora_dropout > 0 and not full,
        dora=adapter.use_dora and not full,
        whole=full,
        lycoris=_lycoris(config),
    )
    seen = observed or _guessed(config, datasets)
    optimizer = OPTIMIZERS.get(config.optimizer.optimizer)
    return PlanInput(
        sizes=model_sizes(config),
        device=machine.kind,
        weight_bytes=weight_bytes,
        compute_bytes=compute_bytes,
        vae_bytes=_vae_bytes(config, machine),
        precision=PRECISIONS[memory.base_model_precision],
        text_precision=PRECISIONS[memory.text_encoder_precision],
        adapter=lora,
        assistant=_assistant(config, weight_bytes),
        state_bytes=optimizer.state_bytes if optimizer is not None else _USUAL_STATE_BYTES,
        updates_in_rows=config.optimizer.optimizer in _IN_ROWS,
        train=seen.picture,
        is_mixed=seen.is_mixed,
        accumulation=config.optimizer.gradient_accumulation_steps,
        releases=releases_gradients(config),
        checkpointing=memory.gradient_checkpointing,
        interval=memory.gradient_checkpointing_interval or 1,  # auto: at least what full recomputation needs
        keep_bytes=_kept_activations(config),
        keeps_product=memory.gradient_checkpointing_interval != AUTO and may_keep_product(memory, machine.kind),
        inputs_on_host=memory.gradient_checkpointing_offload and machine.kind == "cuda",
        offload=offload(config),
        num_contexts=seen.num_captions,
        validation=_validation(config),
        guided=config.validation.validation_guidance > 0,
        keeps_vae=memory.keep_vae_loaded,
        encodes_while_training=any(map(encodes_while_training, datasets.images)),
        vae_batch=config.data.vae_batch_size,
        tile_px=read_tile(config),
        average=_average(config),
        extra_forwards=_extra_forwards(config),
    )


def _average(config: Config) -> Literal["device", "host"] | None:
    optimizer = config.optimizer
    if not optimizer.use_ema:
        return None
    return "host" if optimizer.ema_cpu_only or optimizer.ema_device == "cpu" else "device"


def _extra_forwards(config: Config) -> float:
    """Of scheduled sampling, once its ramp is at its end."""
    options = config.experimental
    if not options.scheduled_sampling_max_step_offset:
        return 0.0
    has_ramp = options.scheduled_sampling_ramp_steps > 0
    share = options.scheduled_sampling_prob_end if has_ramp else options.scheduled_sampling_probability
    return share * mean_offset(options.scheduled_sampling_strategy, options.scheduled_sampling_max_step_offset)


def model_sizes(config: Config) -> ModelSizes:
    """The sizes of the configured model."""
    model = config.model
    subfolder = model.pretrained_transformer_subfolder
    return read_sizes(
        model.pretrained_model_name_or_path,
        transformer=model.pretrained_transformer_model_name_or_path,
        subfolder=subfolder,
        vae=model.pretrained_vae_model_name_or_path,
        text_encoder=model.qwen_text_encoder_model_name_or_path,
    )


def offload(config: Config) -> Offload:
    """The streaming of weights that is asked for, of whatever name."""
    memory, sizes = config.memory, model_sizes(config).transformer
    count = sizes.n_layers + 2 * sizes.n_refiner_layers
    if memory.enable_group_offload:
        return Offload(
            blocks=min(memory.group_offload_blocks or count, count),
            group=memory.group_offload_blocks_per_group,
            by_layer=memory.group_offload_type == "leaf_level",
            overlap=memory.group_offload_use_stream,
            on_disk=memory.group_offload_to_disk_path is not None,
        )
    if memory.ramtorch:
        return Offload(blocks=round(count * memory.ramtorch_transformer_percent / 100), by_layer=True, overlap=True)
    return Offload(blocks=min(memory.musubi_blocks_to_swap, count), overlap=True)


def picture_px(dataset: ImageDataset, alignment_px: int) -> tuple[int, int]:
    """Width and height of the dataset's training pictures, as far as its options tell: the square of their area, or
    for a resolution of the shorter edge and no crop to a square, three to two."""
    if dataset.resolution_type == "pixel":
        edge = _aligned(dataset.resolution, alignment_px)
        is_square = dataset.crop and dataset.crop_aspect == "square"
        return (edge if is_square else _aligned(1.5 * edge, alignment_px)), edge
    area = dataset.resolution * 1e6 if dataset.resolution_type == "area" else dataset.resolution**2
    edge = _aligned(math.sqrt(area), alignment_px)
    return edge, edge


def _guessed(config: Config, datasets: DatasetsConfig) -> Observed:
    pictures = [_picture(dataset, config) for dataset in datasets.images]
    largest = max(pictures, key=lambda picture: picture.count * picture.tokens)
    prompts = {prompt for dataset in datasets.images for prompt in _told_prompts(dataset)}
    return Observed(
        picture=largest,
        is_mixed=largest.count > 1,
        num_captions=len(prompts) or _USUAL_NUM_CAPTIONS,
        num_images=0,
        total_steps=config.run.max_train_steps,
    )


def _picture(dataset: ImageDataset, config: Config) -> Picture:
    width_px, height_px = picture_px(dataset, config.data.aspect_bucket_alignment)
    prompts = _told_prompts(dataset)
    longest = max((len(prompt.split()) for prompt in prompts), default=0)
    tokens = round(longest * _TOKENS_PER_WORD) + _TEMPLATE_TOKENS if prompts else _USUAL_CAPTION_TOKENS
    return Picture(
        width_px=width_px,
        height_px=height_px,
        count=dataset.train_batch_size,
        caption_tokens=min(tokens, config.model.tokenizer_max_length),
    )


def _told_prompts(dataset: ImageDataset) -> tuple[str, ...]:
    """The captions, where the options themselves say them."""
    only = dataset.caption_strategy == "instanceprompt" or dataset.only_instance_prompt
    return dataset.instance_prompt if only else ()


def _number_bytes(config: Config, machine: Machine) -> tuple[int, int]:
    """Bytes of (a frozen weight, an activation), as `train.device.choose_compute` settles it."""
    wanted = config.memory.mixed_precision
    if wanted == "no" or (machine.kind == "cpu" and (wanted == "fp16" or not machine.is_fast_bf16)):
        return 4, 4
    return (4 if config.memory.base_model_default_dtype == "fp32" else 2), 2


def may_keep_product(memory: MemorySection, kind: str) -> bool:
    """Whether recomputed blocks keep a product on a device of that kind; within a budget, if there is one."""
    if memory.gradient_checkpointing_keep == "auto":
        return kind == "cpu" or memory.gradient_checkpointing_interval == AUTO
    return memory.gradient_checkpointing_keep == "product"


def _kept_activations(config: Config) -> int | None:
    """What auto may keep, where that is said; what is free otherwise is used, and not needed."""
    memory = config.memory
    if memory.gradient_checkpointing_interval != AUTO or memory.gradient_checkpointing_budget is None:
        return None
    return round(memory.gradient_checkpointing_budget * 2**30)


def _vae_bytes(config: Config, machine: Machine) -> int:
    default = 4 if machine.kind == "cpu" else 2
    return {"bf16": 2, "fp16": 2, "fp32": 4}.get(config.memory.vae_dtype, default)


def read_tile(config: Config) -> int | None:
    """Side of the VAE's tiles in px, if it works in tiles."""
    return model_sizes(config).vae.sample_size if config.memory.vae_enable_tiling else None


def _lycoris(config: Config) -> LycorisSettings | None:
    """The adapter's settings. The configuration is refused elsewhere where they cannot be read."""
    is_lycoris = config.model.model_type == "lora" and config.adapter.lora_type == "lycoris"
    if not is_lycoris or config.adapter.lycoris_config is None:
        return None
    with suppress(ConfigError):
        return read_lycoris(Path(config.adapter.lycoris_config))
    return None


def _assistant(config: Config, weight_bytes: int) -> Adapter | None:
    adapter = config.adapter
    if not has_assistant(adapter):
        return None
    is_quantised = PRECISIONS[config.memory.base_model_precision].is_quantised
    return Adapter(
        rank=_assistant_rank(config) or _ASSISTANT_RANK,
        targets=LORA_TARGETS["attention+mlp"],
        weight_bytes=weight_bytes,
        only_in_images=merges_assistant(adapter, is_quantised=is_quantised),
    )


def _assistant_rank(config: Config) -> int | None:
    """The largest rank in the assistant's file, if it is on this machine."""
    adapter = config.adapter
    path = Path(adapter.assistant_lora_path or "").expanduser()
    file = path / (adapter.assistant_lora_weight_name or "") if path.is_dir() else path
    if not file.is_file() and adapter.assistant_lora_weight_name:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(str(adapter.assistant_lora_path), adapter.assistant_lora_weight_name)
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return lora_rank(file)


def _validation(config: Config) -> Picture | None:
    options = config.validation
    if options.validation_disable or not (options.validation_prompt or options.user_prompt_library):
        return None
    pictures = []
    for width_px, height_px in options.sizes:
        count = max(_PX_CALL // (width_px * height_px), 1)
        picture = Picture(width_px=width_px, height_px=height_px, count=count, caption_tokens=_USUAL_CAPTION_TOKENS)
        pictures.append(replace(picture, count=min(count, options.num_validation_images * _num_prompts(config))))
    return max(pictures, key=lambda picture: picture.count * picture.tokens)


def _num_prompts(config: Config) -> int:
    library = config.validation.user_prompt_library
    try:
        found = json.loads(Path(library).read_text(encoding="utf-8")) if library else {}
    except (OSError, ValueError):
        found = {}
    return len(found) + bool(config.validation.validation_prompt)


def _has_amx() -> bool:
    """Matrix units for bfloat16; without them a CPU computes in float32."""
    try:
        return any("amx_bf16" in line for line in _flag_lines())
    except OSError:
        return False


def _flag_lines() -> Iterator[str]:
    with _CPUINFO.open(encoding="ascii", errors="replace") as lines:
        yield next((line for line in lines if line.startswith("flags")), "")


def _aligned(length: float, alignment_px: int) -> int:
    return max(round(length / alignment_px), 1) * alignment_px
