"""How noise levels are drawn, what is done to the noise, and the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from simpletuner.catalog.families import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.fields import Opt, Section

_DEFAULT = FLAVOURS[DEFAULT_FLAVOUR]


class FlowSection(Section):
    flow_schedule_shift: Annotated[float, Gt(0), Le(100), Opt(shown_default="by model_flavour")] = (
        _DEFAULT.flow_schedule_shift
    )
    """Moves training towards high noise (above 1: coarse features) or low noise (below 1: fine detail). Turbo models
    suffer when it is changed."""

    flow_schedule_auto_shift: Annotated[bool, Opt()] = False
    """Take the shift from each image's size in place of flow_schedule_shift."""

    flow_sigmoid_scale: Annotated[float, Gt(0), Le(100), Opt(level="expert")] = 1.0
    """Spread of the noise levels: sigma = sigmoid(scale * normal). FLOW.md shows this and the other laws; so does
    simpletuner plot schedule."""

    flow_use_uniform_schedule: Annotated[bool, Opt(level="expert")] = False
    """Draw sigma evenly from [0, 1] in place of the sigmoid."""

    flow_use_beta_schedule: Annotated[bool, Opt(level="expert")] = False
    """Draw sigma from Beta(flow_beta_schedule_alpha, flow_beta_schedule_beta) in place of the sigmoid."""

    flow_beta_schedule_alpha: Annotated[float, Ge(0.1), Le(100), Opt(level="expert")] = 2.0
    """Above flow_beta_schedule_beta it prefers noise; both above 1 prefer the middle, both below 1 the two ends."""

    flow_beta_schedule_beta: Annotated[float, Ge(0.1), Le(100), Opt(level="expert")] = 2.0
    """Above flow_beta_schedule_alpha it prefers little noise."""

    flow_cubic_schedule_weights: Annotated[str | None, Opt(level="expert", holds="json")] = None
    """How often levels are drawn, as a smooth curve through these weights, evenly spaced from sigma 0 to 1:
    1,3,1 or [1, 3, 1]. In place of the sigmoid."""

    flow_custom_timesteps: Annotated[str | None, Opt(level="expert", holds="json")] = None
    """Train on these levels only, in place of the sigmoid and without a shift: sigmas if none is above 1, else
    timesteps out of 1000."""

    flow_timesteps_mode: Annotated[Literal["fixed-list", "round-robin"], Opt(level="expert")] = "fixed-list"
    """fixed-list draws from flow_custom_timesteps; round-robin takes them one after the other."""

    disable_segmented_timestep_sampling: Annotated[bool, Opt(level="expert")] = False
    """Draw each sample's level by itself. Otherwise the samples of one update share the law out among them, which makes
    the loss and the gradient less noisy."""

    loss_type: Annotated[Literal["l2", "huber", "smooth_l1"], Opt(level="expert")] = "l2"
    """Distance between the predicted and the true velocity. huber and smooth_l1 count large errors less than l2;
    smooth_l1 is huber divided by its c."""

    huber_schedule: Annotated[Literal["snr", "exponential", "constant"], Opt(level="expert")] = "snr"
    """How the c of huber and smooth_l1 goes from 1 without noise to huber_c in pure noise; constant: huber_c
    everywhere."""

    huber_c: Annotated[float, Gt(0), Le(100), Opt(level="expert")] = 0.1
    """Errors well above this count by their size, errors well below by their square."""

    masked_loss_probability: Annotated[float, Ge(0), Le(1), Opt()] = 1.0
    """Share of the pictures whose mask counts, of datasets with conditioning_data; the others train as a whole."""

    input_perturbation: Annotated[float, Ge(0), Le(1), Opt(level="expert")] = 0.0
    """Adds this much more noise to what the model sees, without telling it, so that it learns to put up with its own
    errors; 0.1 is a usual value."""

    input_perturbation_steps: Annotated[int, Ge(0), Opt(level="expert", unit="steps")] = 0
    """Updates over which input_perturbation falls to 0; 0 keeps it."""

    offset_noise: Annotated[bool, Opt(level="expert")] = False
    """Now and then move all the noise of a channel together, so that very dark and very bright pictures are learnt."""

    noise_offset: Annotated[float, Ge(0), Le(1), Opt(level="expert")] = 0.1
    """How far offset_noise moves it, in standard deviations."""

    noise_offset_probability: Annotated[float, Ge(0), Le(1), Opt(level="expert")] = 0.25
    """Share of the pictures that offset_noise touches."""
