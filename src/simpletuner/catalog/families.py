"""Model families and their flavours: where the weights are, and the defaults that suit them. Standard library only.

A field of `Flavour` that has the name of an option is that option's default for the flavour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DEFAULT_FLAVOUR = "turbo-ostris-v2"
CUSTOM_FLAVOUR = "base"
"""What an unknown model is taken for when no flavour is named."""

TURBO_REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
BASE_REPOSITORY = "Tongyi-MAI/Z-Image"
ASSISTANT_REPOSITORY = "ostris/zimage_turbo_training_adapter"


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One checkpoint of a family.

    `repository` is a hub id, or "{package}/..." for what the package ships. `guidance` and `steps` are the ranges in
    which the model samples well; outside of them a warning is due. `distilled`: samples in few steps, and training
    loses that ability without an assistant adapter.
    """

    name: str
    repository: str
    pretrained_transformer_model_name_or_path: str | None = None
    pretrained_transformer_subfolder: str = "transformer"
    assistant_lora_path: str | None = None
    assistant_lora_weight_name: str | None = None
    flow_schedule_shift: float
    validation_sampling_shift: float
    validation_num_inference_steps: int
    validation_guidance: float
    validation_resolution: str = "1024x1024"
    validation_turbo_drift: int = 0
    resolution: float = 1024
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    aspect_bucket_alignment: int = 64
    guidance: tuple[float, float]
    steps: tuple[int, int]
    distilled: bool = False


FLAVOURS: Mapping[str, Flavour] = MappingProxyType(
    {
        flavour.name: flavour
        for flavour in (
            Flavour(
                name="turbo-ostris-v2",
                repository=TURBO_REPOSITORY,
                assistant_lora_path=ASSISTANT_REPOSITORY,
                assistant_lora_weight_name="zimage_turbo_training_adapter_v2.safetensors",
                flow_schedule_shift=3.0,
                validation_sampling_shift=3.0,
                validation_num_inference_steps=8,
                validation_guidance=0.0,
                guidance=(0.0, 1.0),
                steps=(8, 28),
                distilled=True,
                validation_turbo_drift=2,
            ),
            Flavour(
                name="turbo",
                repository=TURBO_REPOSITORY,
                assistant_lora_path=ASSISTANT_REPOSITORY,
                assistant_lora_weight_name="zimage_turbo_training_adapter_v1.safetensors",
                flow_schedule_shift=3.0,
                validation_sampling_shift=3.0,
                validation_num_inference_steps=8,
                validation_guidance=0.0,
                guidance=(0.0, 1.0),
                steps=(8, 28),
                distilled=True,
                validation_turbo_drift=2,
            ),
            Flavour(
                name="base",
                repository=BASE_REPOSITORY,
                flow_schedule_shift=1.0,
                validation_sampling_shift=6.0,
                validation_num_inference_steps=50,
                validation_guidance=4.0,
                guidance=(3.0, 6.0),
                steps=(28, 100),
            ),
            Flavour(
                name="ostris-de-turbo",
                repository=TURBO_REPOSITORY,
                pretrained_transformer_model_name_or_path="ostris/Z-Image-De-Turbo",
                flow_schedule_shift=3.0,
                validation_sampling_shift=3.0,
                validation_num_inference_steps=25,
                validation_guidance=2.0,
                guidance=(1.0, 5.0),
                steps=(20, 50),
            ),
            Flavour(
                name="demo",
                repository="{package}/assets/demo_base",
                flow_schedule_shift=3.0,
                validation_sampling_shift=3.0,
                validation_num_inference_steps=20,
                validation_guidance=2.0,
                validation_resolution="128x128",
                resolution=128,
                aspect_bucket_alignment=16,
                guidance=(0.0, 6.0),
                steps=(8, 100),
            ),
        )
    }
)

REPOSITORY_SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "tongyi-mai/z-image-turbo": TURBO_REPOSITORY,
        "tongyi-mai/z-image": BASE_REPOSITORY,
        "tongyi-mai/z-image-base": BASE_REPOSITORY,
    }
)
"""Lower-case hub id -> the id that exists. The Base name was announced but never published under it."""


def flavour_of_model(location: str) -> str | None:
    """The flavour that a hub id or path stands for, or None if it is not known."""
    known = {BASE_REPOSITORY: "base", TURBO_REPOSITORY: DEFAULT_FLAVOUR, FLAVOURS["demo"].repository: "demo"}
    return known.get(location)
