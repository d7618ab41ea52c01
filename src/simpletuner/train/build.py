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
from simpletuner.adapters.files import LoraInfo, load_lora
from simpletuner.adapters.lora import (
    LoraReport,
    LoraSettings,
    adapter_state,
    apply_lora,
    load_adapter_state,
    move_adapter_,
    set_scale,
    start_from_,
    trainable_parameters,
)
from simpletuner.adapters.targets import linear_names
from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.optimizer_arguments import read_arguments
from simpletuner.config.root import Config
from simpletuner.data.prompts import PromptStore
from simpletuner.events.progress import Reporter
from simpletuner.events.types import AdapterCreated, ModelLoaded
from simpletuner.models.places import public_name
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.schedules import ScheduleSettings
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.train.assist import Assistant
from simpletuner.train.context import ContextCache
from simpletuner.train.device import Compute
from simpletuner.train.flow import FlowSettings
from simpletuner.train.load import load_trained_model
from simpletuner.train.recompute import apply_recomputation
from simpletuner.train.step import StepSettings


@dataclass(frozen=True, kw_only=True)
class Training:
    """The model with its adapter, and what moves it."""

    transformer: ZImageTransformer
    contexts: ContextCache
    sampling_contexts: ContextCache  # as `contexts`, for the strengths of validation
    adapter: LoraReport
    lora: LoraSettings
    assistant: Assistant | None
    params: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    compute: Compute

    def predict(self, latents: Sequence[Tensor], sigma_B: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Velocities of noisy latents; see `step.Predict`."""
        return self.velocity(latents, sigma_B, self.contexts.get(prompts))

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
        self._set_strengths(strength, assistant.sampling if assistant else 0.0)
        try:
            yield
        finally:
            self._set_strengths(1.0, assistant.training if assistant else 0.0)
            if assistant is not None and assistant.is_merged:
                move_adapter_(self.transformer, "cpu", ASSISTANT_NAME)

    def _set_strengths(self, trained: float, assistant: float) -> None:
        set_scale(self.transformer, trained)
        set_scale(self.transformer, assistant, ASSISTANT_NAME)

    def adapter_state(self) -> dict[str, Tensor]:
        return adapter_state(self.transformer)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        load_adapter_state(self.transformer, state)


def build_training(
    config: Config,
    *,
    files: PipelineFiles,
    assistant: Assistant | None,
    prompts: PromptStore,
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
    lora = lora_settings(config)
    adapter = apply_lora(transformer, lora)
    if assistant is not None:
        activate_with_assistant_(transformer, strength=assistant.training)
        if assistant.is_merged:
            move_adapter_(transformer, "cpu", ASSISTANT_NAME)
    run.emit(
        AdapterCreated(
            num_params=adapter.num_params,
            num_modules=adapter.num_modules,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
        )
    )
    if config.adapter.init_lora:
        start_from_(transformer, load_lora(Path(config.adapter.init_lora), linear_names(transformer)), lora)
    params = trainable_parameters(transformer)
    optimizer = build_optimizer(config.optimizer.optimizer, params, optimizer_settings(config))
    apply_recomputation(
        transformer,
        config.memory,
        device=compute.device,
        params=params,
        optimizer=optimizer,
        uses_dropout=lora.dropout > 0,
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
        lora=lora,
        params=params,
        optimizer=optimizer,
        compute=compute,
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


def step_settings(config: Config, *, rank: int) -> StepSettings:
    """What a step takes from the options."""
    flow = FlowSettings(
        sigmoid_scale=config.flow.flow_sigmoid_scale,
        uniform=config.flow.flow_use_uniform_schedule,
        shift=config.flow.flow_schedule_shift,
        auto_shift=config.flow.flow_schedule_auto_shift,
    )
    return StepSettings(
        seed=config.run.seed,
        rank=rank,
        flow=flow,
        max_grad_norm=config.optimizer.max_grad_norm,
        clip_by_value=config.optimizer.grad_clip_method == "value",
        latents_per_token=Z_IMAGE.latents_per_token,
        uses_dropout=config.adapter.lora_dropout > 0,
    )


def lora_info(config: Config, lora: LoraSettings, *, step: int, config_hash: str) -> LoraInfo:
    """What a saved adapter says about itself."""
    return LoraInfo(
        rank=lora.rank,
        alpha=lora.alpha,
        base_model=public_name(config.model.pretrained_model_name_or_path),
        architecture="z-image",
        targets=lora.targets,
        title=Path(config.run.output_dir).name,
        config_hash=config_hash,
        global_step=step,
    )
