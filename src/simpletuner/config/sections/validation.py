"""Images that show what the adapter has learned."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator

from simpletuner.catalog.families import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.fields import Opt, Section
from simpletuner.config.sizes import check_resolutions, parse_resolutions

_DEFAULT = FLAVOURS[DEFAULT_FLAVOUR]


class ValidationSection(Section):
    validation_prompt: Annotated[str | None, Opt(level="basic")] = None
    """The main prompt; mostly the caption of the subject or style."""

    user_prompt_library: Annotated[str | None, Opt(level="basic", holds="path")] = None
    """JSON file of further prompts: nickname -> prompt. The nickname becomes part of the image's file name."""

    validation_negative_prompt: Annotated[str, Opt(keeps_empty=True)] = ""
    """What guidance moves away from."""

    validation_step_interval: Annotated[int, Ge(0), Opt(level="basic", unit="steps", aliases=("validation_steps",))] = (
        100
    )
    """Make validation images every so many updates. 0 makes them only at the end."""

    validation_resolution: Annotated[
        str, Opt(level="basic", unit="px", shown_default="by model_flavour"), AfterValidator(check_resolutions)
    ] = _DEFAULT.validation_resolution
    """Size of the images: 1024x1024, one edge, or a list such as 1024x1024,1280x768. Numbers below 128 without an x
    are megapixels."""

    validation_guidance: Annotated[float, Ge(0), Le(30), Opt(shown_default="by model_flavour")] = (
        _DEFAULT.validation_guidance
    )
    """Guidance scale on Z-Image's scale, where 0 is off; other programs' CFG is this plus 1. Turbo models want 0 to 1
    (CFG 1 to 2), base 4 to 6 (CFG 5 to 7)."""

    validation_num_inference_steps: Annotated[
        int, Ge(1), Le(1000), Opt(unit="steps", shown_default="by model_flavour")
    ] = _DEFAULT.validation_num_inference_steps
    """Sampling steps. Turbo models need 8, base 50 to 100."""

    validation_sampling_shift: Annotated[float, Gt(0), Le(100), Opt(shown_default="by model_flavour")] = (
        _DEFAULT.validation_sampling_shift
    )
    """Shift of the sampling schedule; independent of flow_schedule_shift, which is for training."""

    validation_turbo_drift: Annotated[int, Ge(0), Le(64), Opt(unit="images", shown_default="by model_flavour")] = (
        _DEFAULT.validation_turbo_drift
    )
    """With each validation, measure on so many images of at most 512 x 512 px how far 8 sampling steps are from 30, of
    the base and with the adapter: a model that loses its few-step ability drifts away. Each image costs 38 steps; 0
    measures nothing."""

    validation_seed: Annotated[int, Ge(0), Le(2**31 - 1), Opt()] = 42
    """Seed of the validation images; fixed, so that images of different steps can be compared."""

    num_validation_images: Annotated[int, Ge(1), Le(64), Opt()] = 1
    """Images per prompt and size, each with its own seed."""

    validation_disable: Annotated[bool, Opt()] = False
    """Make no validation images at all."""

    validation_on_startup: Annotated[bool, Opt()] = False
    """Validate before the first step of a resumed run too."""

    disable_benchmark: Annotated[bool, Opt()] = False
    """Leave out the images of the untrained base model, which later ones are compared with."""

    validation_lycoris_strength: Annotated[float, Ge(0), Le(10), Opt(level="expert")] = 1.0
    """How often a LyCORIS adapter counts in validation images, in place of its multiplier."""

    validation_image_format: Annotated[Literal["png", "webp", "jpeg"], Opt(spellings=(("jpg", "jpeg"),))] = "png"
    """File format of the images."""

    ema_validation: Annotated[Literal["comparison", "ema_only", "none"], Opt()] = "comparison"
    """With use_ema: images of the trained weights and of their average side by side, of the average only, or of the
    trained weights only."""

    eval_steps_interval: Annotated[int | None, Ge(0), Opt(unit="steps", shown_default="validation_step_interval")] = (
        None
    )
    """With an eval dataset, measure its loss every so many updates, besides before the first and after the last.
    0 leaves it at these two."""

    eval_epoch_interval: Annotated[float | None, Gt(0), Opt(unit="epochs")] = None
    """The same, every so many epochs; 0.5 is twice an epoch. In place of eval_steps_interval if that is not set."""

    num_eval_images: Annotated[int, Ge(1), Opt(unit="images")] = 4
    """Images of an eval dataset that are measured, always the same ones."""

    eval_timesteps: Annotated[int, Ge(1), Le(1000), Opt(unit="sigmas")] = 28
    """Noise levels at which each of them is measured, evenly spaced between 0 and 1. Each costs one forward pass."""

    eval_dataset_id: Annotated[str | None, Opt()] = None
    """Measure this eval dataset only."""

    eval_dataset_pooling: Annotated[bool, Opt(level="expert")] = False
    """Take num_eval_images from all eval datasets together and tell one loss. Otherwise each has its own."""

    eval_loss_disable: Annotated[bool, Opt()] = False
    """Leave eval datasets out."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes of `validation_resolution`, each (width, height) px."""
        return parse_resolutions(self.validation_resolution)
