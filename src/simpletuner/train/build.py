"""The trained model: load, attach the adapter, checkpoint the blocks, in this order and in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.assistant import ASSISTANT_NAME, activate_with_assistant_, attach_assistant
from simpletuner.adapters.files import LoraInfo
from simpletuner.adapters.lora import LoraReport, LoraSettings, move_adapter_, set_scale, trainable_parameters
from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.lycoris import canonical_lycoris, read_lycoris
from simpletuner.config.optimizer_arguments import read_arguments
from simpletuner.config.release import releases_gradients
from simpletuner.config.root import Config
from simpletuner.data.prompts import PromptStore
from simpletuner.events.progress import Reporter
from simpletuner.events.types import ModelLoaded
from simpletuner.models.places import public_name
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.ema import EmaSettings, WeightAverage
from simpletuner.optim.release import ReleasedUpdates
from simpletuner.optim.schedules import ScheduleSettings
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.train.assist import Assistant
from simpletuner.train.context import ContextCache
from simpletuner.train.device import Compute
from simpletuner.train.flow_options import flow_settings, loss_settings, noise_settings
from simpletuner.train.load import load_trained_model
from simpletuner.train.recompute import apply_recomputation
from simpletuner.train.step import StepSettings
from simpletuner.train.trained import Trained, TrainedLora, TrainedLycoris, TrainedModel


@dataclass(frozen=True, kw_only=True)
class Training:
    """The model with its adapter, and what moves it."""

    transformer: ZImageTransformer
    contexts: ContextCache
    sampling_contexts: ContextCache  # as `contexts`, for the strengths of validation
    adapter: LoraReport
    trained: Trained
    multiplier: float  # of the trained adapter, in training steps
    sampling_multiplier: float  # and in images
    assistant: Assistant | None
    params: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    released: ReleasedUpdates | None  # where parameters move during backward
    compute: Compute

    def predict(self, latents: Sequence[Tensor], sigma_B: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Velocities of noisy latents; see `step.Predict`."""
        return self.velocity(latents, sigma_B, self.contexts.get(prompts))

    def predict_still(self, latents: Sequence[Tensor], sigma_B: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """As `predict`, as for an image: without gradient and dropout."""
        was_training = self.transformer.training
        self.transformer.eval()
        try:
            with torch.no_grad():
                return self.predict(latents, sigma_B, prompts)
        finally:
            self.transformer.train(was_training)

    def velocity(self, latents: Sequence[Tensor], sigma_B: Tensor, context: Sequence[Tensor]) -> list[Tensor]:
        """Velocities for refined contexts."""
        with self.compute.autocasting():
            return velocity(self.transformer, latents, sigma_B, context)

    @contextmanager
    def sampling(self, strength: float) -> Iterator[None]:
        """For images: the trained adapter counts `strength` times, the assistant as little as it shall there."""
        assistant = self.assistant
        if assistant is not None and assistant.is_merged and assistant.sampling:
            move_adapter_(self.transformer, self.compute.device, ASSISTANT_NAME)
        self._set_strengths(strength * self.sampling_multiplier, assistant.sampling if assistant else 0.0)
        try:
            yield
        finally:
            self._set_strengths(self.multiplier, assistant.training if assistant else 0.0)
            if assistant is not None and assistant.is_merged:
                move_adapter_(self.transformer, "cpu", ASSISTANT_NAME)

    def _set_strengths(self, trained: float, assistant: float) -> None:
        set_scale(self.transformer, trained)
        set_scale(self.transformer, assistant, ASSISTANT_NAME)


def build_training(
    config: Config,
    *,
    files: PipelineFiles,
    assistant: Assistant | None,
    prompts: PromptStore,
    trained: Trained,
    compute: Compute,
    run: Reporter,
) -> Training:
    """Load the transformer, then attach the assistant adapter, if there is one, and what is trained."""
    begun = time.monotonic()
    transformer = load_trained_model(
        config,
        files=files.transformer,
        compute=compute,
        run=run,
        addition=assistant.addition if assistant is not None else None,
    )
    precision = config.memory.base_model_precision
    run.emit(
        ModelLoaded(
            component="transformer",
            num_params=transformer.num_params,
            dtype=precision if PRECISIONS[precision].is_quantised else str(compute.weights).removeprefix("torch."),
            seconds=time.monotonic() - begun,
        )
    )
    if assistant is not None:
        attach_assistant(transformer, assistant.lora, dtype=compute.weights)
    start = config.adapter.init_lora
    adapter = trained.attach(transformer, start=Path(start) if start else None)
    if assistant is not None:
        activate_with_assistant_(transformer, strength=assistant.training)
        if assistant.is_merged:
            move_adapter_(transformer, "cpu", ASSISTANT_NAME)
    run.emit(trained.created(adapter))
    params = trainable_parameters(transformer)
    optimizer = build_optimizer(config.optimizer.optimizer, params, optimizer_settings(config))
    released = None
    if releases_gradients(config):
        by_value = config.optimizer.max_grad_norm > 0
        released = ReleasedUpdates(params, optimizer, clip_value=config.optimizer.max_grad_norm if by_value else None)
    apply_recomputation(
        transformer,
        config.memory,
        device=compute.device,
        params=params,
        optimizer=optimizer,
        uses_dropout=trained.uses_dropout,
        emit=run.emit,
    )
    transformer.train()
    contexts, sampling_contexts = (
        ContextCache(
            transformer.refine_context,
            prompts.get,
            device=compute.device,
            keep=not transformer.is_context_trained(),
        )
        for _ in range(2)
    )
    return Training(
        transformer=transformer,
        contexts=contexts,
        sampling_contexts=contexts if assistant is None else sampling_contexts,
        assistant=assistant,
        adapter=adapter,
        trained=trained,
        multiplier=trained.multiplier,
        sampling_multiplier=trained.sampling_multiplier,
        params=params,
        optimizer=optimizer,
        ema=weight_average(config, params, compute),
        released=released,
        compute=compute,
    )


def weight_average(config: Config, params: Sequence[nn.Parameter], compute: Compute) -> WeightAverage | None:
    """The moving average of what is trained, if there is to be one."""
    options = config.optimizer
    if not options.use_ema:
        return None
    on_cpu = options.ema_cpu_only or options.ema_device == "cpu"
    settings = EmaSettings(
        decay=options.ema_decay,
        interval=options.ema_update_interval,
        warmup_steps=options.ema_warmup_steps,
        foreach=not options.ema_foreach_disable,
    )
    return WeightAverage(params, settings, device=torch.device("cpu") if on_cpu else compute.device)


def trained_weights(config: Config, *, config_hash: str, trigger_words: tuple[str, ...] = ()) -> Trained:
    """What the options say is trained; `config_hash` stands for the options in its files.

    Raises:
        ConfigError: the LyCORIS file cannot be read.
    """
    if config.model.model_type == "full":
        return TrainedModel()
    if config.adapter.lora_type == "standard":
        lora = lora_settings(config)

        def info(step: int) -> LoraInfo:
            return lora_info(config, lora, step=step, config_hash=config_hash, trigger_words=trigger_words)

        return TrainedLora(lora, info, layout=config.adapter.lora_format)
    path = Path(config.adapter.lycoris_config or "")
    return TrainedLycoris(
        read_lycoris(path),
        config=canonical_lycoris(path),
        seed=config.run.seed,
        first_norm=config.adapter.init_lokr_norm,
        sampling_multiplier=config.validation.validation_lycoris_strength,
        metadata=lambda step: lycoris_metadata(config, step=step, config_hash=config_hash),
    )


def lora_settings(config: Config) -> LoraSettings:
    """The adapter that the options ask for."""
    adapter = config.adapter
    return LoraSettings(
        rank=adapter.lora_rank,
        alpha=adapter.lora_alpha if adapter.lora_alpha is not None else float(adapter.lora_rank),
        dropout=adapter.lora_dropout,
        targets=adapter.peft_lora_target_modules or Z_IMAGE.lora_targets(adapter.lora_targets),
        seed=config.run.seed,
        start=adapter.lora_init_type,
        dora=adapter.use_dora,
    )


def optimizer_settings(config: Config) -> OptimizerSettings:
    """What the optimizer takes from the options."""
    optimizer = config.optimizer
    arguments, problems = read_arguments(optimizer.optimizer_config, OPTIMIZERS[optimizer.optimizer])
    assert not problems, problems
    return OptimizerSettings(
        learning_rate=optimizer.learning_rate,
        beta1=optimizer.optimizer_beta1,
        beta2=optimizer.optimizer_beta2,
        weight_decay=optimizer.adam_weight_decay,
        epsilon=optimizer.adam_epsilon,
        seed=config.run.seed,
        arguments=arguments,
    )


def schedule_settings(config: Config) -> ScheduleSettings:
    """The learning rate over the run."""
    optimizer = config.optimizer
    return ScheduleSettings(
        kind=optimizer.lr_scheduler,
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.lr_warmup_steps,
        num_cycles=optimizer.lr_num_cycles,
        power=optimizer.lr_power,
        end=optimizer.lr_end,
    )


def step_settings(config: Config, *, rank: int, uses_dropout: bool) -> StepSettings:
    """What a step takes from the options."""
    return StepSettings(
        seed=config.run.seed,
        rank=rank,
        flow=flow_settings(config.flow),
        noise=noise_settings(config.flow),
        loss=loss_settings(config.flow),
        max_grad_norm=config.optimizer.max_grad_norm,
        clip_by_value=config.optimizer.grad_clip_method == "value",
        latents_per_token=Z_IMAGE.latents_per_token,
        uses_dropout=uses_dropout,
    )


def trigger_words(datasets: Sequence[ImageDataset]) -> tuple[str, ...]:
    """The instance prompts that captions were made of, each once; those of regularisation images are none."""
    used = (
        dataset.instance_prompt
        for dataset in datasets
        if not dataset.is_regularisation_data
        and (
            dataset.caption_strategy == "instanceprompt"
            or dataset.only_instance_prompt
            or dataset.prepend_instance_prompt
        )
    )
    return tuple(dict.fromkeys(word for words in used for word in words))


def lora_info(
    config: Config, lora: LoraSettings, *, step: int, config_hash: str, trigger_words: Sequence[str] = ()
) -> LoraInfo:
    """What a saved adapter says about itself."""
    return LoraInfo(
        rank=lora.rank,
        alpha=lora.alpha,
        base_model=public_name(config.model.pretrained_model_name_or_path),
        architecture="z-image",
        targets=lora.targets,
        title=Path(config.run.output_dir).name,
        trigger_words=tuple(trigger_words),
        config_hash=config_hash,
        global_step=step,
    )


def lycoris_metadata(config: Config, *, step: int, config_hash: str) -> dict[str, str]:
    """What a saved LyCORIS adapter says about itself."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "z-image/lycoris",
        "modelspec.title": Path(config.run.output_dir).name,
        "ss_base_model_version": public_name(config.model.pretrained_model_name_or_path),
        "ss_network_module": "lycoris.kohya",
        "global_step": str(step),
        "config_hash": config_hash,
    }
