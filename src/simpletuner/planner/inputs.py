"""What the arithmetic of the planner takes: plain values, so that nothing in it depends on how options are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simpletuner.catalog.lycoris import LycorisSettings
from simpletuner.catalog.precisions import PRECISIONS, Precision
from simpletuner.planner.sizes import ModelSizes

TOKEN_MULTIPLE = 32  # image and caption tokens are each padded to a multiple of it
PX_PER_TOKEN = 16

DeviceKind = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA: its rank and the patterns of what it adapts; or what `lycoris` says; or, with `whole`, all weights of the
    model, in place of an adapter. `weight_bytes` of one element.

    `only_in_images`: it is merged into the weights, and its own wait in main memory for the images.
    """

    rank: int
    targets: tuple[str, ...]
    weight_bytes: int = 4
    dropout: bool = False
    dora: bool = False
    whole: bool = False
    lycoris: LycorisSettings | None = None
    only_in_images: bool = False


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Streaming of the blocks' weights: `blocks` of them leave the device, in groups of `group`, or layer by layer.

    With `overlap` the next group arrives while one computes, so that two are on the device. `on_disk`: what left lies
    on disk, not in main memory.
    """

    blocks: int = 0
    group: int = 1
    by_layer: bool = False
    overlap: bool = False
    on_disk: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Images of one call: size in px, how many, and the tokens of the longest caption."""

    width_px: int
    height_px: int
    count: int
    caption_tokens: int

    @property
    def image_tokens(self) -> int:
        """Of one image, padded."""
        return padded((self.width_px // PX_PER_TOKEN) * (self.height_px // PX_PER_TOKEN))

    @property
    def tokens(self) -> int:
        """Of one image with its caption, both padded."""
        return self.image_tokens + padded(self.caption_tokens)


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """Everything about a run that decides its memory and time.

    weight_bytes: of one element of the base that is not quantised. compute_bytes: of one activation. vae_bytes: of
    one element of the VAE. state_bytes: what the optimizer keeps per trained element. updates_in_rows: of some
    parameters at a time; otherwise an update makes a float32 copy of all that is trained. train: the largest batch.
    releases: gradients are used and freed one after the other. is_mixed: the captions of a batch may have different
    lengths. num_contexts: captions that are kept refined. validation: the largest call that makes images, None without
    any. vae_batch: images decoded ahead of the VAE.
    interval: one block in so many is recomputed. keep_bytes: what activations may take where the number of recomputed
    blocks follows from that; None: it follows from `interval`. keeps_product: recomputed blocks keep two products
    beside their input. inputs_on_host: those of recomputed blocks wait in main
    memory. tile_px: side of the VAE's tiles, None: whole images. average: where a moving average of the trained weights
    is kept, None: there is none. extra_forwards: of rollouts, per picture.
    """

    sizes: ModelSizes = field(default_factory=ModelSizes)
    device: DeviceKind = "cuda"
    weight_bytes: int = 2
    compute_bytes: int = 2
    vae_bytes: int = 2
    precision: Precision = field(default_factory=lambda: PRECISIONS["no_change"])
    text_precision: Precision = field(default_factory=lambda: PRECISIONS["no_change"])
    adapter: Adapter
    assistant: Adapter | None = None
    state_bytes: float = 4.0
    updates_in_rows: bool = True
    train: Picture
    is_mixed: bool = False
    accumulation: int = 1
    releases: bool = False
    checkpointing: bool = True
    interval: int = 1
    keep_bytes: int | None = None
    keeps_product: bool = False
    inputs_on_host: bool = False
    offload: Offload = Offload()
    num_contexts: int = 0
    validation: Picture | None = None
    guided: bool = False
    keeps_vae: bool = False
    encodes_while_training: bool = False
    vae_batch: int = 4
    tile_px: int | None = None
    average: Literal["device", "host"] | None = None
    extra_forwards: float = 0.0


def padded(tokens: int) -> int:
    """Rounded up to whole groups of tokens."""
    return -(-max(tokens, 1) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
