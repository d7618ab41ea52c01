"""What the flow takes from the options."""

from __future__ import annotations

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.config.sections.flow import FlowSection
from simpletuner.train.flow import FlowSettings, LossSettings, NoiseSettings
from simpletuner.train.sigma_law import law_of


def flow_settings(options: FlowSection) -> FlowSettings:
    """Which noise levels."""
    return FlowSettings(
        law=law_of(options),
        shift=options.flow_schedule_shift,
        auto_shift=options.flow_schedule_auto_shift,
        stratified=not options.disable_segmented_timestep_sampling,
        in_turn=options.flow_timesteps_mode == "round-robin",
    )


def noise_settings(options: FlowSection) -> NoiseSettings:
    """What is done to the noise."""
    return NoiseSettings(
        offset=options.noise_offset if options.offset_noise else 0.0,
        offset_probability=options.noise_offset_probability,
        perturbation=options.input_perturbation,
        perturbation_steps=options.input_perturbation_steps,
    )


def loss_settings(options: FlowSection) -> LossSettings:
    """How far a prediction is from its target."""
    return LossSettings(kind=options.loss_type, schedule=options.huber_schedule, huber_c=options.huber_c)


def deciding_options(config: Config, datasets: DatasetsConfig) -> dict[str, object]:
    """Every option that decides which levels, noise, states and loss a step has; a checkpoint remembers them."""
    found: dict[str, object] = {**config.flow.model_dump(), **config.experimental.model_dump()}
    if config.experimental.scheduled_sampling_max_step_offset:
        found["validation_num_inference_steps"] = config.validation.validation_num_inference_steps
        found["validation_sampling_shift"] = config.validation.validation_sampling_shift
    for dataset in datasets.images:
        found[f"{dataset.id}.timestep_sampling_offset"] = dataset.timestep_sampling_offset
        found[f"{dataset.id}.conditioning_data"] = ", ".join(dataset.conditioning_data)
    return found
