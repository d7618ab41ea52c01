"""Reports of datasets for people: a block for each dataset, bars, and what to do about what is short."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.config.paths import shown_path
from simpletuner.data.caption_survey import CaptionSurvey
from simpletuner.data.captions import BadCaption, CaptionFault
from simpletuner.data.records import DropReason
from simpletuner.data.survey import BucketState, BucketSurvey, DatasetSurvey
from simpletuner.events import formats
from simpletuner.events.text import plural
from simpletuner.i18n import text
from simpletuner.train.survey import CaptionReport, RunOutlook, Survey

if TYPE_CHECKING:
    from simpletuner.train.caching import CacheSummary  # loads torch

_NAMES_SHOWN = 5
_WORDS_SHOWN = 12
_QUOTE_LETTERS = 100
_BAR_CELLS = 30
_OTHER_PICTURES = frozenset(
    (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
)
"""Endings of pictures that are not read, but could be converted."""
_SIZE_CELLS = 11


class _Page:
    """What all lines of a page need."""

    def __init__(self, language: str, *, shows_all: bool) -> None:
        self.language = language
        self._shows_all = shows_all
        can_draw = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
        self._block = "█" if can_draw else "#"

    def say(self, key: str, **values: object) -> str:
        return text(f"data_command.{key}", self.language, **values)

    def row(self, key: str, words: str) -> str:
        labels = ("images", "used", "dropped", "unreadable", "captions", "traits", "others", "megapixels")
        width = max(len(self.say(f"label.{label}")) for label in labels)
        return f"  {self.say(f'label.{key}'):{width}}  {words}"

    def few(self, names: Sequence[str], limit: int = _NAMES_SHOWN) -> str:
        """The first names, and how many more there are."""
        shown = names if self._shows_all else names[:limit]
        more = len(names) - len(shown)
        return ", ".join(shown) + (f" {self.say('more', n=more)}" if more else "")

    def items(self, lines: Sequence[str], limit: int = _NAMES_SHOWN) -> Iterator[str]:
        """One line each, and how many more there are."""
        shown = lines if self._shows_all else lines[:limit]
        yield from (f"      {line}" for line in shown)
        if len(shown) < len(lines):
            yield f"      {self.say('more', n=len(lines) - len(shown))}"

    def bar(self, count: int, most: int) -> str:
        cells = max(round(count / most * _BAR_CELLS), 1) if count else 0
        return f"{self._block * cells:{_BAR_CELLS}}"

    def number(self, value: float) -> str:
        """Three digits, without zeros at the end."""
        if float(value).is_integer():
            return str(int(value))
        return f"{value:.3g}".replace(".", "," if self.language == "es" else ".")


def scan_lines(survey: Survey, language: str, *, shows_all: bool) -> Iterator[str]:
    """The page of `simpletuner dataset scan`."""
    page = _Page(language, shows_all=shows_all)
    for dataset in survey.datasets:
        yield from _scanned(dataset, page, is_held_out=dataset.id in survey.held_out)
        yield ""
    if survey.duplicates:
        yield page.say("duplicates", n=sum(len(group.files) - 1 for group in survey.duplicates))
        yield from page.items([" = ".join(group.files) for group in survey.duplicates])
        yield ""
    yield _outlook(survey.run, page)


def bucket_lines(survey: Survey, language: str, *, shows_all: bool) -> Iterator[str]:
    """The page of `simpletuner dataset buckets`."""
    page = _Page(language, shows_all=shows_all)
    for dataset in survey.datasets:
        yield page.say(
            "buckets.head",
            id=dataset.id,
            buckets=plural("buckets", len(dataset.buckets), language),
            images=plural("images", dataset.num_used, language),
            batches=dataset.num_batches,
            batch=dataset.batch_size,
            repeats=dataset.repeats,
        )
        most = max((bucket.num_images for bucket in dataset.buckets), default=0)
        yield from (_bucket(bucket, most, page) for bucket in dataset.buckets)
        yield from _left_out(dataset, page)
        yield ""
    yield _outlook(survey.run, page)


def caption_lines(report: CaptionReport, language: str, *, shows_all: bool) -> Iterator[str]:
    """The page of `simpletuner dataset captions`."""
    page = _Page(language, shows_all=shows_all)
    for dataset in report.datasets:
        yield from _caption_block(dataset, report.max_tokens, page)
        yield ""
    if not report.counts_tokens:
        yield page.say("captions.no_tokenizer")


def cached_lines(summary: CacheSummary, language: str) -> Iterator[str]:
    """The page of `simpletuner dataset cache`."""
    page = _Page(language, shows_all=True)
    for kind, filled, folders in (
        ("latents", summary.latents, summary.latent_folders),
        ("prompts", summary.prompts, summary.prompt_folders),
    ):
        where = ", ".join(shown_path(folder, Path.cwd()) for folder in folders)
        yield page.say(f"cached.{kind}", total=filled.total, made=filled.made, folders=where)
    if summary.num_unreadable:
        yield page.say("cached.unreadable", n=summary.num_unreadable)
    if summary.left_to_training:
        yield page.say("cached.later", ids=", ".join(summary.left_to_training))


def _scanned(dataset: DatasetSurvey, page: _Page, *, is_held_out: bool) -> Iterator[str]:
    language = page.language
    yield f"{dataset.id}  {dataset.place}" + (f"  ({page.say('held_out')})" if is_held_out else "")
    if dataset.smallest is None or dataset.largest is None:
        yield page.row("images", page.say("images.none", files=dataset.num_files))
    else:
        yield page.row(
            "images",
            page.say(
                "images",
                readable=dataset.num_readable,
                files=dataset.num_files,
                bytes=formats.size(dataset.num_bytes, language),
                smallest=f"{dataset.smallest[0]}x{dataset.smallest[1]}",
                largest=f"{dataset.largest[0]}x{dataset.largest[1]}",
            ),
        )
    used = page.say(
        "used",
        images=plural("images", dataset.num_used, language),
        buckets=plural("buckets", len(dataset.buckets), language),
        passes=dataset.repeats + 1,
        samples=sum(bucket.num_samples for bucket in dataset.buckets),
        batches=dataset.num_batches,
        batch=dataset.batch_size,
    )
    yield page.row("used", used)
    yield from _left_out(dataset, page)
    if dataset.unreadable:
        yield page.row("unreadable", str(len(dataset.unreadable)))
        yield from page.items([f"{item.key}: {item.reason}" for item in dataset.unreadable])
    if dataset.lacks_instance_prompt:
        yield page.row("captions", page.say("captions.no_instance_prompt"))
    for line in _faults(dataset.bad_captions, page):
        yield page.row("captions", line)
    if dataset.traits:
        told = (f"{page.say(f'trait.{trait}')} {count}" for trait, count in dataset.traits.items())
        yield page.row("traits", ", ".join(told))
    if dataset.others:
        told = (f"{other.count} {other.extension or page.say('no_extension')}" for other in dataset.others)
        yield page.row("others", ", ".join(told))
        pictures = [other.extension for other in dataset.others if other.extension in _OTHER_PICTURES]
        if pictures:
            yield page.row("others", page.say("others.convert", extensions=", ".join(pictures)))
    most = max((size.num_images for size in dataset.sizes), default=0)
    for size in dataset.sizes:
        if size.num_images:
            least, below = page.number(size.least), size.below
            span = f"≥ {least}" if below is None else f"{least}-{page.number(below)}"
            yield page.row("megapixels", f"{span:>{_SIZE_CELLS}}  {page.bar(size.num_images, most)} {size.num_images}")


def _left_out(dataset: DatasetSurvey, page: _Page) -> Iterator[str]:
    counts = Counter(item.reason for item in dataset.dropped)
    for reason in DropReason:
        if counts[reason]:
            names = [item.key for item in dataset.dropped if item.reason is reason]
            why = text(f"dropped.{reason.value}", page.language)
            yield page.row("dropped", f"{counts[reason]}: {why} ({page.few(names)})")


def _bucket(bucket: BucketSurvey, most: int, page: _Page) -> str:
    size = f"{bucket.size[0]}x{bucket.size[1]}"
    images = plural("images", bucket.num_images, page.language)
    line = f"  {size:>{_SIZE_CELLS}}  {page.bar(bucket.num_images, most)} {images}"
    if bucket.state is BucketState.OK:
        return line
    return f"{line}  {page.say(f'buckets.{bucket.state.value}', repeats=bucket.minimum_repeats)}"


def _outlook(run: RunOutlook | None, page: _Page) -> str:
    if run is None:
        return page.say("run.none")
    return page.say(
        "run",
        samples=run.samples_per_epoch,
        batches=run.batches_per_epoch,
        steps=page.number(run.steps_per_epoch),
        effective=run.effective_batch_size,
        total=run.total_steps,
        epochs=page.number(run.num_epochs),
    )


def _caption_block(dataset: CaptionSurvey, max_tokens: int, page: _Page) -> Iterator[str]:
    yield page.say(
        "captions.head",
        id=dataset.id,
        strategy=dataset.caption_strategy,
        captions=dataset.num_captions,
        images=plural("images", dataset.num_images, page.language),
        distinct=dataset.num_distinct,
    )
    lengths = dataset.lengths
    if lengths is not None:
        yield f"  {page.say('captions.tokens', least=lengths.least, most=lengths.most, median=lengths.median)}"
        most = max(count for _, _, count in lengths.histogram)
        for first, last, count in lengths.histogram:
            span = f"{first}-{last}"
            yield f"    {span:>{_SIZE_CELLS}}  {page.bar(count, most)} {count}".rstrip()
    if dataset.too_long:
        yield f"  {page.say('captions.too_long', n=len(dataset.too_long), limit=max_tokens)}"
        yield from page.items([_quoted(caption) for caption in dataset.too_long])
    yield from (f"  {line}" for line in _faults(dataset.bad, page))
    if dataset.repeated:
        yield f"  {page.say('captions.repeated', n=len(dataset.repeated))}"
        yield from page.items([f"{item.num_captions} × {_quoted(item.text)}" for item in dataset.repeated])
    if dataset.frequent:
        kind = page.say("captions.tags" if dataset.are_tags else "captions.words")
        yield f"  {kind} {page.few([f'{item.text} {item.num_captions}' for item in dataset.frequent], _WORDS_SHOWN)}"
    if dataset.examples:
        yield f"  {page.say('captions.examples')}"
        yield from page.items([_quoted(caption) for caption in dataset.examples])


def _faults(bad: Sequence[BadCaption], page: _Page) -> Iterator[str]:
    for fault in CaptionFault:
        names = [item.key for item in bad if item.fault is fault]
        if names:
            yield f"{page.say(f'fault.{fault.value}', n=len(names))}: {page.few(names)}"


def _quoted(caption: str) -> str:
    words = " ".join(caption.split())
    return f"“{words if len(words) <= _QUOTE_LETTERS else words[: _QUOTE_LETTERS - 1] + '…'}”"
