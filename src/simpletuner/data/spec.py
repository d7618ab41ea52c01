"""What the data layer needs to know about a dataset. Field names are the option names of multidatabackend.json.

`train/build.py` fills these from the configuration; nothing here parses or validates what a user wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simpletuner.data.storage import Storage
from simpletuner.data.tables import Table

ResolutionType = Literal["pixel", "area", "pixel_area"]
CropStyle = Literal["random", "center", "corner"]
CropAspect = Literal["square", "preserve", "closest", "random"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"]
Sampling = Literal["auto-weighting", "uniform"]
"""What a dataset's share of the batches follows: its length times its probability, or its probability alone."""
BatchMixing = Literal["bucket", "packed"]
"""What the images of a batch have in common: dataset and bucket, or only the dataset."""
SplitOn = Literal["comma", "space", "period"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When a dataset takes part. Epochs and steps (optimizer updates) are counted from 1; both ends belong to it.

    start_step: 0 and 1 are the first update. disable_after_epoch_step: in every epoch only so many of its updates.
    """

    start_epoch: int = 1
    start_step: int = 0
    end_epoch: int | None = None
    end_step: int | None = None
    disable_after_epoch_step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleSpec:
    """The option `caption_shuffle`: variants of a caption with its tags in another order.

    count: variants per caption. position_start: so many tags keep their place at the front. include_original: the
    caption as written is one of those that are drawn.
    """

    count: int = 1
    seed: int = 0
    split_on: SplitOn = "comma"
    position_start: int = 0
    include_original: bool = True


@dataclass(frozen=True, kw_only=True)
class CaptionSpec:
    """Where captions come from, and what is done to them."""

    caption_strategy: CaptionStrategy = "filename"
    instance_prompts: tuple[str, ...] = ()
    """The option `instance_prompt`, which may be one text or several."""
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    filters: tuple[str, ...] = ()
    """The option `caption_filter_list`, see `catalog.caption_filters`."""
    shuffle: ShuffleSpec | None = None


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
    batch_mixing: BatchMixing = "bucket"
    takes_fresh_crops: bool = False
    """Its random crops are others in every pass through it."""
    schedule: Schedule = field(default_factory=Schedule)
    fills_short_buckets: bool = False
    """A bucket that cannot fill a batch is shown more often; `allow_dataset_oversubscription` without `repeats`."""
    prunes_short_buckets: bool = False
    """A bucket that cannot fill a batch is left out; with a minimum size, but for `disable_bucket_pruning`."""
    skips_unreadable: bool = True
    """Leave out images that cannot be read; otherwise they are an error."""
    table: Table | None = None
    """Where captions come from, with caption_strategy parquet, csv and huggingface."""
    takes_sizes: bool = False
    """Believe the sizes that `table` tells instead of reading the images' headers."""
    keeps_listing: bool = False
    """Use the listing of the first start as long as it is there, and do not list the storage again."""
