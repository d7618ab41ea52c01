"""What scheduled sampling takes from the options, and what it costs."""

from __future__ import annotations

from simpletuner.catalog.rollouts import mean_offset
from simpletuner.config.root import Config
from simpletuner.experimental.reflexflow import ReflexFlow
from simpletuner.experimental.rollout import Predict, Ramp, Rollout, RolloutSettings
from simpletuner.models.z_image.sampler import sigmas
from simpletuner.problems import Problem, Severity


def make_rollout(config: Config, predict: Predict) -> Rollout | None:
    """The hook of the training step, if there is to be one. `predict`: without gradient and dropout."""
    settings = rollout_settings(config)
    return None if settings is None else Rollout(settings=settings, predict=predict)


def rollout_settings(config: Config) -> RolloutSettings | None:
    """None where nothing is ever rolled out."""
    options = config.experimental
    if not options.scheduled_sampling_max_step_offset:
        return None
    has_ramp = options.scheduled_sampling_ramp_steps > 0
    ramp = Ramp(
        start=options.scheduled_sampling_prob_start if has_ramp else options.scheduled_sampling_probability,
        end=options.scheduled_sampling_prob_end if has_ramp else options.scheduled_sampling_probability,
        steps=options.scheduled_sampling_ramp_steps,
        first_step=options.scheduled_sampling_start_step,
        shape=options.scheduled_sampling_ramp_shape,
    )
    if not max(ramp.start, ramp.end):
        return None
    reflexflow = ReflexFlow(
        alpha=options.scheduled_sampling_reflexflow_alpha,
        beta1=options.scheduled_sampling_reflexflow_beta1,
        beta2=options.scheduled_sampling_reflexflow_beta2,
    )
    levels = sigmas(config.validation.validation_num_inference_steps, config.validation.validation_sampling_shift)
    return RolloutSettings(
        levels=tuple(levels[:-1].double().tolist()),
        max_offset=options.scheduled_sampling_max_step_offset,
        ramp=ramp,
        strategy=options.scheduled_sampling_strategy,
        sampler=options.scheduled_sampling_sampler,
        order=options.scheduled_sampling_order,
        reflexflow=None if options.scheduled_sampling_reflexflow == "off" else reflexflow,
    )


def rollout_cost(settings: RolloutSettings) -> Problem:
    """A notice of the extra forward passes."""
    mean = mean_offset(settings.strategy, settings.max_offset)
    share = max(settings.ramp.start, settings.ramp.end)
    params = {
        "share": f"{share:.0%}",
        "most": settings.max_offset,
        "extra": f"{share * mean:.2g}",
        "sampler": settings.sampler,
        "steps": len(settings.levels),
    }
    return Problem(code="I-ROLLOUT", severity=Severity.INFO, params=params)
