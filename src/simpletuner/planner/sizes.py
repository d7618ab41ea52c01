"""The sizes of a model's parts, from their config.json; the released ones where there is none on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.catalog.modules import ATTENTION_LINEARS, MODULATION, NEVER_QUANTISED
from simpletuner.catalog.precisions import Precision

MODULATION_WIDTH = 256
TIME_HIDDEN = 1024
_DOWN_SUFFIXES = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
_MOST_HEADER_BYTES = 100 << 20
PATCH_VALUES = 4  # latents of a channel in one token

_S = TypeVar("_S")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of the transformer by its name there; weight [rows, columns]."""

    name: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def is_quantisable(self) -> bool:
        return not any(fnmatchcase(self.name, pattern) for pattern in NEVER_QUANTISED)


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """As in the checkpoint's config.json. The defaults are the released 6.15 B parameters."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def num_params(self) -> int:
        """All parameters."""
        linears = sum(layer.rows * (layer.columns + layer.bias) for layer in self.linears())
        return linears + self.num_other_params

    @property
    def num_other_params(self) -> int:
        """Those of no linear layer: norms and pad tokens."""
        num_blocks = self.n_layers + 2 * self.n_refiner_layers
        return num_blocks * (4 * self.dim + 2 * self.head_dim) + self.cap_feat_dim + 2 * self.dim

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, in the model's order."""
        width = min(self.dim, MODULATION_WIDTH)
        token_width = PATCH_VALUES * self.in_channels
        yield Linear(name="all_x_embedder.2-1", rows=self.dim, columns=token_width, bias=True)
        yield Linear(name="all_final_layer.2-1.linear", rows=token_width, columns=self.dim, bias=True)
        yield Linear(name="all_final_layer.2-1.adaLN_modulation.1", rows=self.dim, columns=width, bias=True)
        for stack in ("noise_refiner", "context_refiner"):
            for index in range(self.n_refiner_layers):
                yield from self.block_linears(f"{stack}.{index}", modulated=stack == "noise_refiner")
        yield Linear(name="t_embedder.mlp.0", rows=TIME_HIDDEN, columns=256, bias=True)
        yield Linear(name="t_embedder.mlp.2", rows=width, columns=TIME_HIDDEN, bias=True)
        yield Linear(name="cap_embedder.1", rows=self.dim, columns=self.cap_feat_dim, bias=True)
        for index in range(self.n_layers):
            yield from self.block_linears(f"layers.{index}", modulated=True)

    def block_linears(self, prefix: str, *, modulated: bool) -> Iterator[Linear]:
        """Those of one block."""
        for name in ATTENTION_LINEARS:
            yield Linear(name=f"{prefix}.{name}", rows=self.dim, columns=self.dim)
        for name, (rows, columns) in {
            "w1": (self.ffn_dim, self.dim),
            "w2": (self.dim, self.ffn_dim),
            "w3": (self.ffn_dim, self.dim),
        }.items():
            yield Linear(name=f"{prefix}.feed_forward.{name}", rows=rows, columns=columns)
        if modulated:
            width = min(self.dim, MODULATION_WIDTH)
            yield Linear(name=f"{prefix}.{MODULATION}", rows=4 * self.dim, columns=width, bias=True)

    def weight_bytes(self, precision: Precision, *, default_bytes: int) -> int:
        """Memory of all weights; `default_bytes` for each that is not quantised."""
        total = self.num_other_params * default_bytes
        for layer in self.linears():
            quantised = layer.is_quantisable
            total += precision.weight_bytes(layer.rows, layer.columns, default_bytes=default_bytes) * quantised
            total += (
                layer.rows * layer.columns * default_bytes * (not quantised) + layer.rows * layer.bias * default_bytes
            )
        return total

    def block_bytes(self, precision: Precision, *, default_bytes: int) -> int:
        """Memory of the quantisable weights of one main block: what streaming moves."""
        layers = (layer for layer in self.block_linears("layers.0", modulated=True) if layer.is_quantisable)
        return sum(precision.weight_bytes(x.rows, x.columns, default_bytes=default_bytes) for x in layers)


@dataclass(frozen=True, kw_only=True)
class TextEncoderSizes:
    """Qwen3 as in its config.json; the defaults are Qwen3-4B."""

    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151_936

    @property
    def num_used_layers(self) -> int:
        """The last one is neither loaded nor run."""
        return self.num_hidden_layers - 1

    def weight_bytes(self, precision: Precision, *, default_bytes: int) -> int:
        """Memory of what is loaded: the embeddings and all layers but the last."""
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = (
            (heads, self.hidden_size), (groups, self.hidden_size), (groups, self.hidden_size),
            (self.hidden_size, heads), (self.intermediate_size, self.hidden_size),
            (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size),
        )  # fmt: skip
        layer = sum(precision.weight_bytes(rows, columns, default_bytes=default_bytes) for rows, columns in shapes)
        norms = (2 * self.hidden_size + 2 * self.head_dim) * default_bytes
        return self.num_used_layers * (layer + norms) + self.vocab_size * self.hidden_size * default_bytes

    @property
    def num_params(self) -> int:
        """Of what is loaded."""
        return self.weight_bytes(Precision(name="one byte"), default_bytes=1)


@dataclass(frozen=True, kw_only=True)
class VaeSizes:
    """diffusers' AutoencoderKL; the defaults are the released one."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    mid_block_add_attention: bool = True
    sample_size: int = 1024

    @property
    def num_params(self) -> int:
        """Encoder and decoder, from the shapes of their convolutions, norms and attention."""
        channels = self.block_out_channels
        encoder = _conv(3, channels[0]) + _norm(channels[-1]) + _conv(channels[-1], 2 * self.latent_channels)
        before = channels[0]
        for index, width in enumerate(channels):
            encoder += _resnets(before, width, self.layers_per_block)
            encoder += _conv(width, width) if index < len(channels) - 1 else 0
            before = width
        decoder = _conv(self.latent_channels, channels[-1]) + _norm(channels[0]) + _conv(channels[0], 3)
        before = channels[-1]
        for index, width in enumerate(reversed(channels)):
            decoder += _resnets(before, width, self.layers_per_block + 1)
            decoder += _conv(width, width) if index < len(channels) - 1 else 0
            before = width
        middle = _resnets(channels[-1], channels[-1], 2)
        if self.mid_block_add_attention:
            middle += _norm(channels[-1]) + 4 * (channels[-1] ** 2 + channels[-1])
        return encoder + decoder + 2 * middle


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The parts of a pipeline. `is_read`: from the files of this machine, not the released sizes."""

    transformer: TransformerSizes = TransformerSizes()
    text_encoder: TextEncoderSizes = TextEncoderSizes()
    vae: VaeSizes = VaeSizes()
    is_read: bool = False


def read_sizes(
    folder: str | None,
    *,
    transformer: str | None = None,
    subfolder: str = "transformer",
    vae: str | None = None,
    text_encoder: str | None = None,
) -> ModelSizes:
    """The sizes of a pipeline in the diffusers layout at `folder`, its parts perhaps from elsewhere.

    What is not a folder of this machine (a hub id, a single file) has the released sizes.
    """
    root = Path(folder).expanduser() if folder else Path("-")
    own = Path(transformer).expanduser() if transformer else root
    place = own if subfolder in ("", "none") else own / subfolder
    found = _read_json(place / "config.json")
    return ModelSizes(
        transformer=_known(TransformerSizes, found or {}),
        text_encoder=_known(TextEncoderSizes, _part_config(root, text_encoder, "text_encoder")),
        vae=_known(VaeSizes, _part_config(root, vae, "vae")),
        is_read=found is not None,
    )


def _part_config(root: Path, elsewhere: str | None, name: str) -> Mapping[str, Any]:
    """The config of a part: of the folder that gives it, there under its name or in the root, else of the pipeline."""
    places = [root / name]
    if elsewhere:
        own = Path(elsewhere).expanduser()
        places = [own / name, own, root / name]
    return next((found for place in places if (found := _read_json(place / "config.json"))), {})


def lora_rank(file: Path) -> int | None:
    """The largest rank of a LoRA in safetensors format, from the shapes in its header; None if it cannot be told."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MOST_HEADER_BYTES)))
        downs = [entry["shape"] for key, entry in header.items() if key.endswith(_DOWN_SUFFIXES)]
        return max((int(shape[0]) for shape in downs), default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _known(kind: type[_S], config: Mapping[str, Any]) -> _S:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {name: config[name] for name in names if config.get(name) is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _conv(inner: int, outer: int, side: int = 3) -> int:
    return inner * outer * side * side + outer


def _norm(width: int) -> int:
    return 2 * width


def _resnets(before: int, width: int, count: int) -> int:
    first = _norm(before) + _conv(before, width) + _norm(width) + _conv(width, width)
    first += _conv(before, width, 1) if before != width else 0
    return first + (count - 1) * (2 * _norm(width) + 2 * _conv(width, width))
