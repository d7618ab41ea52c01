"""Scheduled sampling: training on the states that sampling really passes through."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from simpletuner.catalog.rollouts import OFFSET_STRATEGIES
from simpletuner.config.fields import Opt, Section

_REFLEXFLOW = (("true", "on"), ("yes", "on"), ("false", "off"), ("no", "off"), ("none", "off"))


class ExperimentalSection(Section):
    scheduled_sampling_max_step_offset: Annotated[int, Ge(0), Le(1000), Opt(unit="steps")] = 0
    """Scheduled sampling: now and then the model itself samples its way down to the noise level that is trained, over
    up to so many steps of the validation images' schedule. 0 is off. FLOW.md explains it."""

    scheduled_sampling_strategy: Annotated[str, Opt(level="expert", choices=tuple(OFFSET_STRATEGIES))] = "uniform"
    """How many steps: each number as often, many steps more often (biased_early), or few (biased_late)."""

    scheduled_sampling_probability: Annotated[float, Ge(0), Le(1), Opt()] = 0.0
    """Share of the pictures that are rolled out, where there is no ramp."""

    scheduled_sampling_prob_start: Annotated[float, Ge(0), Le(1), Opt(level="expert")] = 0.0
    """That share at the beginning of the ramp."""

    scheduled_sampling_prob_end: Annotated[float, Ge(0), Le(1), Opt(level="expert")] = 0.5
    """That share at the end of the ramp, and from then on."""

    scheduled_sampling_ramp_steps: Annotated[int, Ge(0), Opt(unit="steps")] = 0
    """Updates over which the share goes from scheduled_sampling_prob_start to scheduled_sampling_prob_end; 0: no ramp,
    scheduled_sampling_probability holds."""

    scheduled_sampling_start_step: Annotated[int, Ge(0), Opt(unit="steps")] = 0
    """No rollouts before this update; the ramp begins here."""

    scheduled_sampling_ramp_shape: Annotated[Literal["linear", "cosine"], Opt(level="expert")] = "linear"
    """How the share rises: evenly, or slowly at both ends."""

    scheduled_sampling_sampler: Annotated[Literal["unipc", "euler", "dpm"], Opt(level="expert")] = "unipc"
    """What integrates the flow: UniPC, Euler or DPM-Solver++."""

    scheduled_sampling_order: Annotated[int, Ge(1), Le(3), Opt(level="expert")] = 2
    """Order of UniPC and DPM-Solver++: how many earlier predictions a step uses."""

    scheduled_sampling_reflexflow: Annotated[
        str, Opt(level="expert", choices=("auto", "on", "off"), spellings=_REFLEXFLOW, aliases=("reflexflow",))
    ] = "auto"
    """Weigh the loss of rolled-out pictures as ReflexFlow proposes: more where the drift is, and by direction. auto: on
    with scheduled sampling."""

    scheduled_sampling_reflexflow_alpha: Annotated[
        float, Ge(0), Le(1000), Opt(level="expert", aliases=("reflexflow_alpha",))
    ] = 1.0
    """How much more a place counts whose coarse content has drifted."""

    scheduled_sampling_reflexflow_beta1: Annotated[
        float, Ge(0), Le(1000), Opt(level="expert", aliases=("reflexflow_beta1",))
    ] = 10.0
    """Weight of the direction term."""

    scheduled_sampling_reflexflow_beta2: Annotated[
        float, Ge(0), Le(1000), Opt(level="expert", aliases=("reflexflow_beta2",))
    ] = 1.0
    """Weight of the ordinary loss beside it."""
