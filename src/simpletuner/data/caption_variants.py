"""What is done to a caption once it is read: filters, and variants with their tags in another order. No torch.

A variant is a function of the caption and the options alone, so that it is known before training starts and its
embedding can be cached; images with the same caption share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from simpletuner.catalog.caption_filters import filtered, parse_filter
from simpletuner.data.hashing import draw_many
from simpletuner.data.spec import ShuffleSpec

_JOINTS = {"comma": (",", ", "), "space": (None, " "), "period": (".", ". ")}
_DRAWS_PER_VARIANT = 16


def filter_captions(captions: Iterable[str], filters: Sequence[str]) -> tuple[str, ...]:
    """The captions after `filters`, without those of which nothing is left. Raises: BadFilterError."""
    chain = [parse_filter(entry) for entry in filters]
    changed = (filtered(caption, chain) for caption in captions)
    return tuple(caption for caption in changed if caption)


def shuffle_captions(captions: Iterable[str], spec: ShuffleSpec) -> tuple[str, ...]:
    """The captions and their variants, each once."""
    return tuple(dict.fromkeys(text for caption in captions for text in variants(caption, spec)))


@lru_cache(maxsize=4096)
def variants(caption: str, spec: ShuffleSpec) -> tuple[str, ...]:
    """`spec.count` distinct orders of a caption's tags, as far as there are as many, none of them its own; before them
    the caption itself if it is included. One with fewer than two tags to move stays alone."""
    separator, joint = _JOINTS[spec.split_on]
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    if len(tags) < spec.position_start + 2:
        return (caption,)
    end = "." if spec.split_on == "period" and caption.rstrip().endswith(".") else ""
    kept, free = tags[: spec.position_start], tags[spec.position_start :]
    found: dict[tuple[str, ...], None] = {}
    for attempt in range(spec.count * _DRAWS_PER_VARIANT):
        if len(found) == spec.count:
            break
        keys = draw_many(len(free), spec.seed, "tags", caption, attempt)
        moved = tuple(free[place] for place in sorted(range(len(free)), key=keys.__getitem__))
        if moved != tuple(free):
            found[moved] = None
    shuffled = tuple(joint.join([*kept, *moved]) + end for moved in found)
    return (caption, *shuffled) if spec.include_original or not shuffled else shuffled
