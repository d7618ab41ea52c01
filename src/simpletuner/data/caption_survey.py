"""What the captions of datasets say, for a report: how many, how long, how often the same. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from simpletuner.data.captions import BadCaption, lacks_instance_prompt
from simpletuner.data.finding import FoundImages
from simpletuner.data.plan import sort_images
from simpletuner.data.spec import DatasetSpec

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Captions -> how many tokens the text encoder gets for each, before it cuts."""

_NUM_FREQUENT = 20
_NUM_EXAMPLES = 5
_LEAST_COMMAS = 2
"""A caption with so many commas is taken for a list of tags."""
_WORD = re.compile(r"\w[\w'’-]*")
_LEAST_LETTERS = 3


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the distinct captions are, in tokens."""

    least: int
    median: int
    most: int
    histogram: tuple[tuple[int, int, int], ...]
    """(from, to, how many): both ends belong to it."""


@dataclass(frozen=True, kw_only=True)
class Frequent:
    """Something that is in `num_captions` of the captions."""

    text: str
    num_captions: int


@dataclass(frozen=True, kw_only=True)
class CaptionSurvey:
    """The captions of one dataset's images in use."""

    id: str
    caption_strategy: str
    num_images: int
    num_captions: int
    """Several of one image each count."""
    num_distinct: int
    lengths: Lengths | None
    """None if there is no tokenizer on this machine, or no caption."""
    too_long: tuple[str, ...]
    """Captions of more tokens than the text encoder takes: it does not see their ends."""
    bad: tuple[BadCaption, ...]
    repeated: tuple[Frequent, ...]
    """Captions of more than one image, the most frequent first."""
    are_tags: bool
    """Whether most captions are lists of tags; then these are counted, otherwise words."""
    frequent: tuple[Frequent, ...]
    examples: tuple[str, ...]


def survey_captions(
    specs: Sequence[DatasetSpec],
    found: FoundImages,
    *,
    seed: int,
    count_tokens: CountTokens | None,
    max_tokens: int,
) -> tuple[CaptionSurvey, ...]:
    """Read the captions of every dataset whose place can be listed; `seed` as for `plan.build_plan`."""
    return tuple(
        _survey(spec, found, seed=seed, count_tokens=count_tokens, max_tokens=max_tokens)
        for spec in specs
        if found.has(spec) and not lacks_instance_prompt(spec.captions)
    )


def _survey(
    spec: DatasetSpec, found: FoundImages, *, seed: int, count_tokens: CountTokens | None, max_tokens: int
) -> CaptionSurvey:
    in_order = sort_images(spec, found, seed=seed)
    samples = [sample for bucket in in_order.buckets for sample in bucket.samples]
    counts = Counter(caption for sample in samples for caption in sample.captions)
    images = Counter(caption for sample in samples for caption in set(sample.captions))
    distinct = sorted(counts)
    tokens = list(count_tokens(distinct)) if count_tokens is not None else []
    are_tags = 2 * sum(caption.count(",") >= _LEAST_COMMAS for caption in distinct) > len(distinct)
    parts = Counter(part for caption in distinct for part in set(_tags(caption) if are_tags else _words(caption)))
    return CaptionSurvey(
        id=spec.id,
        caption_strategy=spec.captions.caption_strategy,
        num_images=len(samples),
        num_captions=sum(counts.values()),
        num_distinct=len(distinct),
        lengths=_lengths(tokens),
        too_long=tuple(c for c, count in zip(distinct, tokens, strict=False) if count > max_tokens),
        bad=in_order.bad_captions,
        repeated=tuple(item for item in _most_frequent(images, len(images)) if item.num_captions > 1),
        are_tags=are_tags,
        frequent=_most_frequent(parts, _NUM_FREQUENT),
        examples=tuple(distinct[:: max(len(distinct) // _NUM_EXAMPLES, 1)][:_NUM_EXAMPLES]),
    )


def _tags(caption: str) -> Iterable[str]:
    return (tag.strip() for tag in caption.split(",") if tag.strip())


def _words(caption: str) -> Iterable[str]:
    return (word for word in _WORD.findall(caption.casefold()) if len(word) >= _LEAST_LETTERS)


def _most_frequent(counts: Counter[str], limit: int) -> tuple[Frequent, ...]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Frequent(text=text, num_captions=count) for text, count in ordered[:limit])


def _lengths(tokens: Sequence[int]) -> Lengths | None:
    if not tokens:
        return None
    ordered = sorted(tokens)
    width = _round_width(ordered[-1] // 10 + 1)
    counts = Counter(count // width for count in ordered)
    return Lengths(
        least=ordered[0],
        median=ordered[len(ordered) // 2],
        most=ordered[-1],
        histogram=tuple(
            (step * width, (step + 1) * width - 1, counts[step]) for step in range(min(counts), max(counts) + 1)
        ),
    )


def _round_width(least: int) -> int:
    """The smallest of 1, 2, 4, 8, ... that is at least `least`."""
    return 1 << (least - 1).bit_length()
