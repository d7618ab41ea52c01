"""What the datasets file (multidatabackend.json) may say about images, masks and the places of caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, ConfigDict

from simpletuner.config.dataset_storages import StorageKeys, storage_options
from simpletuner.config.fields import Opt, Option, Section, describe
from simpletuner.config.sections.data import (
    CAPTION_SPELLINGS,
    BatchMixing,
    CaptionStrategy,
    ResolutionType,
    UnreadableImages,
)

CONDITIONING_TYPES = ("mask",)
OTHER_CONDITIONING_TYPES = ("controlnet", "segmentation", "reference_strict", "reference_loose")
"""Known by name and not offered."""

MetadataBackend = Literal["discovery", "parquet", "huggingface"]

_STORAGE_SPELLINGS = (("s3", "aws"), ("hf", "huggingface"))
_METADATA_SPELLINGS = (("json", "discovery"),)
_CENTER = (("centre", "center"), ("centered", "center"))


def _at_least_one(number: int) -> int:
    return max(number, 1)


def _at_least_zero(number: int) -> int:
    return max(number, 0)


def _none_below_one(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


class AspectBucket(BaseModel):
    """One entry of crop_aspect_buckets: width / height, and the share of images that are given it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aspect: Annotated[float, Gt(0)]
    weight: Annotated[float | None, Gt(0)] = None


class CaptionShuffle(Section):
    """What caption_shuffle may say."""

    enable: Annotated[bool, Opt()] = True
    """Make the variants."""

    count: Annotated[int, Ge(1), Le(100), Opt()] = 1
    """Variants of each caption."""

    seed: Annotated[int | None, Opt(shown_default="seed")] = None
    """Another number gives other orders."""

    split_on: Annotated[Literal["comma", "space", "period"], Opt()] = "comma"
    """What stands between tags."""

    position_start: Annotated[int, Ge(0), Opt(unit="tags")] = 0
    """So many tags stay where they are, at the front."""

    include_original: Annotated[bool, Opt()] = True
    """Train with the caption as it is written, too."""


class ImageDataset(Section):
    """One folder of images: to train on, to evaluate with (`eval`), or masks of another one's (`conditioning`).

    Values it does not name come from the run's configuration."""

    id: Annotated[str, Opt(level="basic")]
    """Unique name of the dataset."""

    type: Annotated[Literal["local", "aws", "csv", "huggingface"], Opt(spellings=_STORAGE_SPELLINGS)] = "local"
    """Where the images are: in a folder, in a bucket of an S3-compatible server, at the URLs of a CSV file, or in the
    rows of a Hugging Face dataset."""

    dataset_type: Annotated[Literal["image", "eval", "conditioning"], Opt()] = "image"
    """What the entry is. image: trained on. eval: held out, to measure the loss on. conditioning: masks of another
    dataset. Other entries are text_embeds and image_embeds."""

    disabled: Annotated[bool, Opt(aliases=("disable",))] = False
    """Leave the dataset out."""

    instance_data_dir: Annotated[str, Opt(level="basic", holds="path", shown_default="required with type local")] = ""
    """With type local: folder of the images; its subfolders are read too."""

    resolution: Annotated[float, Gt(0), Opt(level="basic")] = 1024
    """Training resolution, in the unit of resolution_type."""

    resolution_type: Annotated[ResolutionType, Opt()] = "pixel_area"
    """pixel: the shorter edge in px. area: megapixels. pixel_area: the edge in px of the square of the same area."""

    minimum_image_size: Annotated[float | None, Gt(0), Opt()] = None
    """Smaller images are left out, in the unit of resolution_type."""

    maximum_image_size: Annotated[float | None, Gt(0), Opt()] = None
    """Larger images are shrunk to target_downsample_size before they are cropped."""

    target_downsample_size: Annotated[float | None, Gt(0), Opt()] = None
    """What images above maximum_image_size are shrunk to."""

    minimum_aspect_ratio: Annotated[float | None, Gt(0), Opt()] = None
    """Images with a smaller width / height are left out."""

    maximum_aspect_ratio: Annotated[float | None, Gt(0), Opt()] = None
    """Images with a larger width / height are left out."""

    crop: Annotated[bool, Opt(level="basic")] = False
    """Crop to crop_aspect. Without it every image keeps its aspect, up to the rounding of its bucket."""

    crop_style: Annotated[str, Opt(choices=("random", "center", "corner"), foreign=("face",), spellings=_CENTER)] = (
        "random"
    )
    """Which part of the image a crop keeps."""

    crop_aspect: Annotated[Literal["square", "preserve", "closest", "random"], Opt()] = "square"
    """Shape of a crop. closest and random choose from crop_aspect_buckets."""

    crop_aspect_buckets: Annotated[tuple[AspectBucket, ...], Opt(holds="aspects")] = ()
    """Shapes for crop_aspect closest and random: numbers, or objects with aspect and weight; weights add up to 1."""

    max_upscale_threshold: Annotated[float | None, Ge(0), Opt()] = None
    """With crop_aspect closest or random: leave out shapes that need more enlargement than 1 plus this."""

    caption_strategy: Annotated[CaptionStrategy, Opt(level="basic", spellings=CAPTION_SPELLINGS)] = "filename"
    """Where captions come from: the file name, a .txt file beside the image, instance_prompt, or a table: a parquet or
    CSV file, or the rows of a Hugging Face dataset."""

    instance_prompt: Annotated[tuple[str, ...], Opt(level="basic", holds="prompts")] = ()
    """The caption of every image with caption_strategy instanceprompt. Of a list, one is drawn per visit."""

    prepend_instance_prompt: Annotated[bool, Opt()] = False
    """Put instance_prompt before captions of another strategy."""

    only_instance_prompt: Annotated[bool, Opt()] = False
    """Use instance_prompt whatever caption_strategy says."""

    disable_multiline_split: Annotated[bool, Opt()] = False
    """Take a caption file as one caption. Otherwise every line is one, and one is drawn per visit."""

    caption_filter_list: Annotated[tuple[str, ...], Opt(holds="prompts")] = ()
    """What is taken out of captions: words, s/search/replacement/, regular expressions; or a file of such lines."""

    caption_shuffle: Annotated[CaptionShuffle | None, Opt()] = None
    """Variants of each caption with its tags in another order. Its keys follow; true stands for their defaults."""

    caption_dropout_probability: Annotated[float, Ge(0), Le(1), Opt()] = 0.1
    """Share of the visits that train with an empty caption."""

    repeats: Annotated[int, Ge(0), Opt(level="basic")] = 0
    """Extra passes per epoch: with 0 an image is seen once, with 9 ten times."""

    probability: Annotated[float, Ge(0), Opt()] = 1.0
    """How often the dataset is drawn, relative to its share of the images. 0: never."""

    batch_mixing: Annotated[BatchMixing, Opt()] = "bucket"
    """What may share a batch. bucket: images of one size. packed: all images of the dataset, whatever their size."""

    start_epoch: Annotated[int, AfterValidator(_at_least_one), Opt(unit="epochs")] = 1
    """The first epoch with the dataset, counted from 1."""

    start_step: Annotated[int, AfterValidator(_at_least_zero), Opt(unit="steps")] = 0
    """The first step (optimizer update) with the dataset, counted from 1; 0 is from the start, too."""

    end_epoch: Annotated[int | None, AfterValidator(_none_below_one), Opt(unit="epochs")] = None
    """The last epoch with the dataset. 0: it stays to the end."""

    end_step: Annotated[int | None, AfterValidator(_none_below_one), Opt(unit="steps")] = None
    """The last step with the dataset. 0: it stays to the end."""

    disable_after_epoch_step: Annotated[int | None, AfterValidator(_none_below_one), Opt(unit="steps")] = None
    """In every epoch the dataset takes part in so many steps only, the first ones. 0: in all of them."""

    max_num_samples: Annotated[int | None, Ge(1), Opt(unit="images")] = None
    """Use only so many images, always the same ones."""

    unreadable_images: Annotated[UnreadableImages, Opt()] = "skip"
    """What to do with images that cannot be read: skip leaves them out and names them, stop ends the run."""

    is_regularisation_data: Annotated[bool, Opt(aliases=("is_regularization_data",))] = False
    """Images that keep the model as it was: it trains towards what it predicts without the adapter."""

    train_batch_size: Annotated[int, Ge(1), Le(1024), Opt(unit="images")] = 1
    """Images in one forward pass."""

    timestep_sampling_offset: Annotated[float, Ge(-10), Le(10), Opt(level="expert")] = 0.0
    """Moves these images towards high noise (above 0) or low noise (below 0): it is added to the logit of sigma."""

    cache_dir_vae: Annotated[str, Opt(holds="path", shown_default="<cache_dir>/vae/<id>")] = ""
    """Folder of the cached latents. {id}, {output_dir} and {model_family} are filled in."""

    vae_cache_ondemand: Annotated[bool, Opt()] = False
    """Encode an image when a batch first asks for it, not all before training. The VAE stays loaded."""

    vae_cache_disable: Annotated[bool, Opt()] = False
    """Write no latents to disk: encode while training, and keep them in memory as far as 1 GiB goes."""

    vae_cache_clear_each_epoch: Annotated[bool, Opt()] = False
    """With crop_style random: another crop of each image in every epoch, encoded while training and not kept."""

    text_embeds: Annotated[str | None, Opt(level="expert")] = None
    """Id of the text_embeds entry that caches the captions."""

    image_embeds: Annotated[str | None, Opt(level="expert")] = None
    """Id of the image_embeds entry that caches the latents."""

    conditioning_data: Annotated[tuple[str, ...], Opt()] = ()
    """Id of the conditioning entry that holds a mask of every image: the loss counts only where it is white."""

    conditioning_type: Annotated[str | None, Opt(choices=CONDITIONING_TYPES, foreign=OTHER_CONDITIONING_TYPES)] = None
    """What the images of a conditioning entry are. mask: grey images, white where to learn and black where not."""

    source_dataset_id: Annotated[str | None, Opt(level="expert")] = None
    """Id of the dataset that a conditioning entry belongs to: a check of that dataset's conditioning_data."""

    compress_cache: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: caches are never compressed, so that every entry can be read by itself."""

    metadata_backend: Annotated[MetadataBackend, Opt(spellings=_METADATA_SPELLINGS)] = "discovery"
    """How sizes are found: by looking at the files, in a parquet file, or, with type huggingface, in the rows."""

    preserve_data_backend_cache: Annotated[bool, Opt()] = False
    """List the files once and keep that listing. Later starts do not look for new or changed files."""

    skip_file_discovery: Annotated[str | None, Opt()] = None
    """Accepted for compatibility: only what has changed is looked at anyway."""

    storage: StorageKeys = StorageKeys()


def encodes_while_training(dataset: ImageDataset) -> bool:
    """Whether the VAE has to stay loaded for its images."""
    return dataset.vae_cache_ondemand or dataset.vae_cache_disable or takes_fresh_crops(dataset)


def takes_fresh_crops(dataset: ImageDataset) -> bool:
    """Whether its images are cropped anew in every epoch."""
    return dataset.vae_cache_clear_each_epoch and dataset.crop_style == "random"


def keeps_latents(dataset: ImageDataset) -> bool:
    """Whether its latents are written to disk."""
    return not dataset.vae_cache_disable and not takes_fresh_crops(dataset)


class TextEmbeds(Section):
    """Where prompt embeddings are cached."""

    id: Annotated[str, Opt(level="basic")] = "text-embeds"
    """Unique name of the entry."""

    type: Annotated[Literal["local", "memory"], Opt()] = "local"
    """Where the cache is: a local folder, or the memory of the run, as with text_cache_disable."""

    dataset_type: Annotated[Literal["text_embeds"], Opt(spellings=(("text_embed", "text_embeds"),))] = "text_embeds"
    """What the entry is."""

    disabled: Annotated[bool, Opt(aliases=("disable",))] = False
    """Leave the entry out."""

    default: Annotated[bool, Opt()] = False
    """Use this entry for datasets that name none, and for validation prompts."""

    caption_filter_list: Annotated[tuple[str, ...], Opt(holds="prompts")] = ()
    """What is taken out of all captions that the entry caches, as the key of a dataset does for its own."""

    cache_dir: Annotated[str, Opt(holds="path", shown_default="<cache_dir>/text")] = ""
    """Folder of the cached embeddings. {id}, {output_dir} and {model_family} are filled in."""

    write_batch_size: Annotated[int, Ge(1), Opt(level="expert")] = 128
    """Cache entries that are written at once."""

    text_encoder_batch_size: Annotated[int, Ge(1), Opt(level="expert", unit="prompts")] = 4
    """Prompts that the text encoder encodes at once."""

    text_cache_disable: Annotated[bool, Opt()] = False
    """Write no embeddings to disk: they live in the memory of the run, and every start encodes them anew."""

    text_cache_ondemand: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: embeddings are always made before training, each once, so that the text encoder
    and the model need not be in memory together."""

    compress_cache: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: caches are never compressed, so that every entry can be read by itself."""

    @property
    def is_kept(self) -> bool:
        """Whether the embeddings go to disk."""
        return self.type == "local" and not self.text_cache_disable


class ImageEmbeds(Section):
    """Where latents are cached."""

    id: Annotated[str, Opt(level="basic")]
    """Unique name of the entry, which datasets write in image_embeds."""

    type: Annotated[Literal["local"], Opt()] = "local"
    """Where the cache is: a local folder."""

    dataset_type: Annotated[Literal["image_embeds"], Opt(spellings=(("image_embed", "image_embeds"),))] = "image_embeds"
    """What the entry is."""

    disabled: Annotated[bool, Opt(aliases=("disable",))] = False
    """Leave the entry out."""

    default: Annotated[bool, Opt()] = False
    """Use this entry for datasets that name neither image_embeds nor cache_dir_vae."""

    cache_dir: Annotated[str, Opt(holds="path", shown_default="<cache_dir>/vae/<id>")] = ""
    """Folder of the cached latents. {id}, {output_dir} and {model_family} are filled in."""

    write_batch_size: Annotated[int, Ge(1), Opt(level="expert")] = 128
    """Cache entries that are written at once."""

    compress_cache: Annotated[bool, Opt(level="expert")] = False
    """Accepted for compatibility: caches are never compressed, so that every entry can be read by itself."""


EntryKind = Literal["image", "text_embeds", "image_embeds"]
Entry = ImageDataset | TextEmbeds | ImageEmbeds

ENTRY_MODELS: Mapping[EntryKind, type[Entry]] = MappingProxyType(
    {"image": ImageDataset, "text_embeds": TextEmbeds, "image_embeds": ImageEmbeds}
)
"""Kind of an entry -> the keys that it may have."""

ENTRY_KINDS: Mapping[str, EntryKind] = MappingProxyType(
    {
        "image": "image",
        "eval": "image",
        "conditioning": "image",
        "text_embeds": "text_embeds",
        "text_embed": "text_embeds",
        "image_embeds": "image_embeds",
        "image_embed": "image_embeds",
    }
)
"""dataset_type -> kind of the entry."""


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig:
    """The enabled datasets of a run, in the order of the file: `images` to train on, `evals` held out, `masks` of
    either. `text_embeds` caches what no entry of `other_text_embeds` does."""

    images: tuple[ImageDataset, ...]
    evals: tuple[ImageDataset, ...] = ()
    masks: tuple[ImageDataset, ...] = ()
    text_embeds: TextEmbeds
    other_text_embeds: tuple[TextEmbeds, ...] = ()
    image_embeds: tuple[ImageEmbeds, ...] = ()
    path: Path

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything."""
        caches: tuple[Entry, ...] = (self.text_embeds, *self.other_text_embeds, *self.image_embeds)
        return (*self.images, *self.evals, *self.masks, *caches)

    def embeds_of(self, dataset: ImageDataset) -> TextEmbeds:
        """Where the captions of a dataset are cached."""
        return next((entry for entry in self.other_text_embeds if entry.id == dataset.text_embeds), self.text_embeds)

    def masks_of(self, dataset: ImageDataset) -> ImageDataset | None:
        """The masks of a dataset's images."""
        return next((entry for entry in self.masks if entry.id in dataset.conditioning_data), None)


@cache
def dataset_options(kind: EntryKind) -> Mapping[str, Option]:
    """Key -> its declaration, for the entries of one kind."""
    options = {option.name: option for option in describe(ENTRY_MODELS[kind], kind)}
    return MappingProxyType({**options, **storage_options()} if kind == "image" else options)


def every_dataset_key() -> frozenset[str]:
    """The keys of all kinds of entries."""
    return frozenset(key for kind in ENTRY_MODELS for key in dataset_options(kind))
