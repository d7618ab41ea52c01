"""How noise levels are drawn, and the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Le

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

    flow_sigmoid_scale: Annotated[float, Gt(0), Opt(level="expert")] = 1.0
    """Spread of the noise levels: sigma = sigmoid(scale * normal)."""

    flow_use_uniform_schedule: Annotated[bool, Opt(level="expert")] = False
    """Draw sigma evenly from [0, 1] in place of the sigmoid."""

    loss_type: Annotated[Literal["l2", "huber", "smooth_l1"], Opt(level="expert")] = "l2"
    """Distance between the predicted and the true velocity."""
