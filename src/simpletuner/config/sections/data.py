"""Datasets: defaults that a dataset inherits, buckets, captions and caches."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MultipleOf
from pydantic import Field

from simpletuner.catalog.families import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.fields import Opt, Section

_DEFAULT = FLAVOURS[DEFAULT_FLAVOUR]

ResolutionType = Literal["pixel", "area", "pixel_area"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"]
BatchMixing = Literal["bucket", "packed"]
UnreadableImages = Literal["skip", "stop"]
CAPTION_SPELLINGS = (("instance_prompt", "instanceprompt"), ("text_file", "textfile"))


class DataSection(Section):
    data_backend_config: Annotated[
        str, Opt(level="basic", holds="path", shown_default="multidatabackend.json beside the configuration")
    ] = "config/multidatabackend.json"
    """The JSON file that lists the datasets."""

    resolution: Annotated[float, Gt(0), Opt(level="basic")] = _DEFAULT.resolution
    """Training resolution of datasets that name none, in the unit of resolution_type."""

    resolution_type: Annotated[ResolutionType, Opt()] = _DEFAULT.resolution_type
    """pixel: the shorter edge in px. area: megapixels. pixel_area: the edge in px of the square of the same area."""

    aspect_bucket_rounding: Annotated[int, Ge(1), Le(9), Opt(level="expert", unit="decimals")] = 2
    """Decimals of the aspect ratio that names a bucket."""

    aspect_bucket_alignment: Annotated[
        int, Ge(16), Le(256), MultipleOf(16), Opt(unit="px", shown_default="by model_flavour")
    ] = _DEFAULT.aspect_bucket_alignment
    """Both edges of every training size are multiples of this; it must itself be a multiple of 16."""

    minimum_image_size: Annotated[float | None, Gt(0), Opt()] = None
    """Smaller images are left out, in the unit of resolution_type."""

    maximum_image_size: Annotated[float | None, Gt(0), Opt()] = None
    """Larger images are shrunk to target_downsample_size before they are cropped, in the unit of resolution_type."""

    target_downsample_size: Annotated[float | None, Gt(0), Opt()] = None
    """What images above maximum_image_size are shrunk to, in the unit of resolution_type."""

    max_upscale_threshold: Annotated[float | None, Ge(0), Opt()] = None
    """With crop_aspect closest or random: leave out shapes that need more enlargement than 1 plus this."""

    batch_mixing: Annotated[BatchMixing, Opt()] = "bucket"
    """What may share a batch. bucket: images of one size. packed: all images of a dataset, whatever their size."""

    data_backend_sampling: Annotated[Literal["auto-weighting", "uniform"], Opt()] = "auto-weighting"
    """What a dataset's share of the batches follows: length times probability, or (uniform) probability alone."""

    allow_dataset_oversubscription: Annotated[bool, Opt()] = False
    """Show images more often where too few share a size to fill a batch, in datasets that do not say repeats."""

    disable_bucket_pruning: Annotated[bool, Opt(level="expert")] = False
    """With a minimum_image_size, sizes with too few images for a batch are left out; with this the run is refused."""

    override_dataset_config: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: a run always follows the datasets file as it is now."""

    caption_strategy: Annotated[CaptionStrategy, Opt(spellings=CAPTION_SPELLINGS)] = "filename"
    """Where captions come from: the file name, a .txt file beside the image, instance_prompt, or a table: a parquet or
    CSV file, or the rows of a Hugging Face dataset."""

    instance_prompt: Annotated[str | None, Opt()] = None
    """The caption of every image with caption_strategy instanceprompt."""

    disable_multiline_split: Annotated[bool, Opt()] = False
    """Take a caption file as one caption. Otherwise every line is one, and one is drawn per visit."""

    caption_dropout_probability: Annotated[float, Ge(0), Le(1), Opt()] = 0.1
    """Share of the steps that train with an empty caption."""

    unreadable_images: Annotated[UnreadableImages, Opt()] = "skip"
    """What to do with images that cannot be read: skip leaves them out and names them, stop ends the run."""

    preserve_data_backend_cache: Annotated[bool, Opt()] = False
    """List each dataset's files once and keep that listing. Later starts do not look for new or changed files."""

    cache_dir: Annotated[str, Opt(holds="path", shown_default="<output_dir>/cache")] = ""
    """Folder of the caches of latents and prompt embeddings."""

    cache_dir_text: Annotated[str, Opt(level="expert", holds="path", shown_default="<cache_dir>/text")] = ""
    """Folder of the cached prompt embeddings of text_embeds entries that name none."""

    text_encoder_batch_size: Annotated[int, Ge(1), Opt(level="expert", unit="prompts")] = 4
    """Prompts that the text encoder encodes at once while it fills the cache."""

    text_cache_disable: Annotated[bool, Opt()] = False
    """Write no prompt embeddings to disk: they live in the memory of the run, and every start encodes them anew."""

    text_cache_ondemand: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: embeddings are always made before training, each once, so that the text encoder
    and the model need not be in memory together."""

    compress_disk_cache: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: caches are never compressed, so that every entry can be read by itself."""

    vae_batch_size: Annotated[int, Ge(1), Opt(unit="images")] = 4
    """Images that the VAE encodes at once while it fills the cache."""

    vae_cache_ondemand: Annotated[bool, Opt()] = False
    """Encode an image when a batch first asks for it, not all before training. The VAE stays loaded."""

    vae_cache_disable: Annotated[bool, Opt()] = False
    """Write no latents to disk: encode while training, and keep them in memory as far as 1 GiB goes."""

    write_batch_size: Annotated[int, Ge(1), Opt(level="expert")] = 128
    """Cache entries that are written at once."""

    max_workers: Annotated[int, Ge(1), Opt(level="expert", shown_default="number of CPU cores")] = Field(
        default_factory=lambda: os.cpu_count() or 1
    )
    """Processes and threads that read and decode local images; what is remote is waited for in more."""

    dataloader_prefetch: Annotated[bool, Opt(level="expert")] = True
    """Read the next batches while the current one trains."""

    dataloader_prefetch_qlen: Annotated[int, Ge(1), Opt(level="expert", unit="batches")] = 4
    """How many batches are read ahead."""
