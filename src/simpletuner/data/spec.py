"""What the data layer needs to know about a dataset. Field names are the option names of multidatabackend.json.

`train/build.py` fills these from the configuration; nothing here parses or validates what a user wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simpletuner.data.storage import Storage

ResolutionType = Literal["pixel", "area", "pixel_area"]
CropStyle = Literal["random", "center", "corner"]
CropAspect = Literal["square", "preserve", "closest", "random"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AspectChoice:
    """One entry of `crop_aspect_buckets`: width / height and how often it is drawn (any positive weight)."""

    aspect: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ResizeSpec:
    """Which images are used, and at what size. Sizes are in the unit of `resolution_type`:

    pixel: length of the shorter edge; area: megapixels; pixel_area: edge of the square with the same area.
    """

    resolution: float = 1024
    resolution_type: ResolutionType = "pixel_area"
    crop: bool = False
    crop_style: CropStyle = "random"
    crop_aspect: CropAspect = "square"
    crop_aspect_buckets: tuple[AspectChoice, ...] = ()
    max_upscale_threshold: float | None = None
    """For `closest` and `random`: aspects that need more enlargement than 1 + this are not offered."""
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    minimum_aspect_ratio: float | None = None
    maximum_aspect_ratio: float | None = None
    aspect_bucket_rounding: int = 2
    aspect_bucket_alignment: int = 64


@dataclass(frozen=True, kw_only=True)
class CaptionSpec:
    """Where captions come from."""

    caption_strategy: CaptionStrategy = "filename"
    instance_prompts: tuple[str, ...] = ()
    """The option `instance_prompt`, which may be one text or several."""
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One image dataset of the run."""

    id: str
    storage: Storage
    resize: ResizeSpec = field(default_factory=ResizeSpec)
    captions: CaptionSpec = field(default_factory=CaptionSpec)
    repeats: int = 0
    probability: float = 1.0
    is_regularisation_data: bool = False
    caption_dropout_probability: float = 0.0
    max_num_samples: int | None = None
    train_batch_size: int | None = None
    """Samples of one micro-batch of this dataset; None: the run's."""
    skips_unreadable: bool = True
    """Leave out images that cannot be read; otherwise they are an error."""
