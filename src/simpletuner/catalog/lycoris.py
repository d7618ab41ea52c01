"""LyCORIS: which tensors each algorithm trains on a linear layer, and which layers a preset stands for.

The names and sizes are those of lycoris-lora 4 (Yeh et al. 2023, https://arxiv.org/abs/2309.14859), so files go both
ways. Standard library only: rules and planner ask here, `adapters.algorithms` computes.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ALGOS = ("lokr", "loha", "lora", "glora", "ia3", "diag-oft", "boft", "full")
ALGO_SPELLINGS: Mapping[str, str] = MappingProxyType({"locon": "lora"})
REFUSED_ALGOS = ("dylora", "tlora")
NEEDS_DIM = frozenset(("lokr", "loha", "lora", "glora", "diag-oft", "boft"))

CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Attention": (".attention.",),
        "FeedForward": (".feed_forward.",),
        "ZImageTransformerBlock": (".layers.", ".noise_refiner.", ".context_refiner."),
        "FinalLayer": (".all_final_layer.",),
        "TimestepEmbedder": (".t_embedder.",),
        "Linear": (".",),
    }
)
"""Class of a module -> what the names of the linear layers inside it contain, most special first."""

USUAL_CLASSES = ("Attention", "FeedForward")
"""What is adapted where a configuration has no preset."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """How one linear layer is adapted.

    The update is scaled by `alpha / dim`. lokr: W is cut into `factor` x `factor` blocks, of which `full_matrix` keeps
    the pattern of one whole; otherwise it is a product of rank `dim` where that is smaller, and with `decompose_both`
    so are the blocks' weights; `unbalanced` swaps the two parts of the outputs. diag-oft, boft: a rotation has at most
    the angle `constraint`, 0: any; `rescaled` adds a factor for each output. ia3: `on_input` scales inputs in place of
    outputs. Of an update, `dropout` zeroes outputs, `rank_dropout` rows of the weight and `module_dropout` all of it,
    each with that probability while training; `rank_dropout_scale` divides by what is left.
    """

    algo: str
    dim: int = 1
    alpha: float = 1.0
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    unbalanced: bool = False
    constraint: float = 0.0
    rescaled: bool = False
    on_input: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_dropout_scale: bool = False

    @property
    def drops(self) -> bool:
        return self.dropout > 0 or self.rank_dropout > 0 or self.module_dropout > 0


@dataclass(frozen=True, kw_only=True)
class LycorisSettings:
    """What a run trains. An update by a layer's name goes before one by the class that it lies in, and that before
    `update`. Names are full ones or patterns: of fnmatch with `wildcards`, else beginnings as regular expressions."""

    update: Update
    multiplier: float = 1.0
    classes: tuple[str, ...] = USUAL_CLASSES
    names: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    wildcards: bool = False
    by_class: Mapping[str, Update] = field(default_factory=dict)
    by_name: Mapping[str, Update] = field(default_factory=dict)

    @property
    def updates(self) -> tuple[Update, ...]:
        """Every update that some layer may get."""
        return (self.update, *self.by_class.values(), *self.by_name.values())


def chosen_updates(settings: LycorisSettings, layers: Iterable[str]) -> dict[str, Update]:
    """Layer -> its update, of the linear `layers` that the settings choose, in their order."""
    chosen = {}
    for name in layers:
        update = _update_of(settings, name)
        if update is not None and not any(_matches(pattern, name, settings) for pattern in settings.excluded):
            chosen[name] = update
    return chosen


def unmatched(settings: LycorisSettings, layers: Iterable[str]) -> tuple[str, ...]:
    """Classes and names of the settings that stand for no layer."""
    names = tuple(layers)
    classes = (*settings.classes, *settings.by_class)
    patterns = (*settings.names, *settings.by_name)
    return (
        *(known for known in dict.fromkeys(classes) if not any(_lies_in(name, known) for name in names)),
        *(p for p in dict.fromkeys(patterns) if not any(_matches(p, name, settings) for name in names)),
    )


def shapes(update: Update, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Trained tensor -> its size, for a weight [rows, columns].

    Raises:
        ValueError: boft, and `rows` has no even divisor of at most `dim` that leaves a power of two.
    """
    dim = update.dim
    match update.algo:
        case "lokr":
            return _lokr_shapes(update, rows, columns)
        case "loha":
            return {
                "hada_w1_a": (rows, dim),
                "hada_w1_b": (dim, columns),
                "hada_w2_a": (rows, dim),
                "hada_w2_b": (dim, columns),
            }
        case "lora":
            return {"lora_up": (rows, dim), "lora_down": (dim, columns)}
        case "glora":
            return {"a1": (columns, dim), "a2": (dim, columns), "b1": (rows, dim), "b2": (dim, columns)}
        case "ia3":
            return {"weight": (columns if update.on_input else rows,)}
        case "diag-oft":
            size, count = factorised(rows, dim)
            return {"oft_blocks": (count, size, size), **_rescale(update, rows)}
        case "boft":
            size = butterfly_size(rows, dim)
            count = rows // size
            return {"oft_blocks": (count.bit_length(), count, size, size), **_rescale(update, rows)}
        case "full":
            return {"diff": (rows, columns)}
    raise AssertionError(update.algo)


def num_params(update: Update, rows: int, columns: int) -> int:
    """Trained elements of one layer."""
    return sum(math.prod(shape) for shape in shapes(update, rows, columns).values())


def factorised(length: int, factor: int) -> tuple[int, int]:
    """`length` as a product of two, the smaller first: of `factor` where that divides it; else of its largest divisor
    up to `factor` and its square root, for -1 up to its square root."""
    if factor > 0 and length % factor == 0:
        small, large = sorted((factor, length // factor))
        return small, large
    limit = math.isqrt(length) if factor < 0 else min(factor, math.isqrt(length))
    divisor = next((d for d in range(limit, 0, -1) if length % d == 0), 1)
    return divisor, length // divisor


def butterfly_size(length: int, largest: int) -> int:
    """The largest even divisor of `length` up to `largest` (-1: any) that leaves a power of two.

    Raises:
        ValueError: there is none.
    """
    limit = length if largest == -1 else min(largest, length)
    for size in range(limit - limit % 2, 0, -2):
        if length % size == 0 and (length // size).bit_count() == 1:
            return size
    raise ValueError(f"{length} has no even divisor of at most {limit} that leaves a power of two")


def kronecker_blocks(update: Update, rows: int, columns: int) -> tuple[int, int]:
    """How many blocks a LoKr cuts a weight [rows, columns] into, down and across: the size of its first part."""
    down = factorised(rows, update.factor)[1 if update.unbalanced else 0]
    return down, factorised(columns, update.factor)[0]


def _lokr_shapes(update: Update, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    out_small, in_small = kronecker_blocks(update, rows, columns)
    out_large, in_large = rows // out_small, columns // in_small
    dim = update.dim
    found: dict[str, tuple[int, ...]] = {}
    if update.decompose_both and not update.full_matrix and dim < max(out_small, in_small) / 2:
        found |= {"lokr_w1_a": (out_small, dim), "lokr_w1_b": (dim, in_small)}
    else:
        found |= {"lokr_w1": (out_small, in_small)}
    if not update.full_matrix and dim < max(out_large, in_large) / 2:
        found |= {"lokr_w2_a": (out_large, dim), "lokr_w2_b": (dim, in_large)}
    else:
        found |= {"lokr_w2": (out_large, in_large)}
    return found


def _rescale(update: Update, rows: int) -> dict[str, tuple[int, ...]]:
    return {"rescale": (rows, 1)} if update.rescaled else {}


def _update_of(settings: LycorisSettings, name: str) -> Update | None:
    for pattern, update in settings.by_name.items():
        if _matches(pattern, name, settings):
            return update
    for known in CLASSES:
        if known in settings.by_class and _lies_in(name, known):
            return settings.by_class[known]
    is_chosen = any(_lies_in(name, known) for known in settings.classes)
    return settings.update if is_chosen or any(_matches(p, name, settings) for p in settings.names) else None


def _lies_in(name: str, known: str) -> bool:
    return any(part in f".{name}" for part in CLASSES.get(known, ()))


def _matches(pattern: str, name: str, settings: LycorisSettings) -> bool:
    if name == pattern:
        return True
    if settings.wildcards:
        return fnmatch.fnmatchcase(name, pattern)
    return re.match(pattern, name) is not None
