"""The captions of an image: from its file name, a text file beside it, a table, or one text for all. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from simpletuner.data.caption_variants import filter_captions, shuffle_captions
from simpletuner.data.spec import CaptionSpec
from simpletuner.data.storage import CAPTION_EXTENSION
from simpletuner.data.tables import TableRow

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class CaptionFault(str, Enum):
    """Why an image has no caption although its dataset wants one."""

    MISSING = "missing"
    EMPTY = "empty"
    ENCODING = "encoding"
    FILTERED = "filtered"
    NO_ROW = "no_row"


@dataclass(frozen=True, kw_only=True, slots=True)
class BadCaption:
    """A caption that cannot be used. `key` is the file to mend."""

    key: str
    fault: CaptionFault


def lacks_instance_prompt(spec: CaptionSpec) -> bool:
    """Whether `spec` uses an instance prompt without giving one."""
    is_used = spec.caption_strategy == "instanceprompt" or spec.prepend_instance_prompt or spec.only_instance_prompt
    return is_used and not _instance_prompts(spec)


def needs_table(spec: CaptionSpec) -> bool:
    """Whether captions come from a table."""
    return spec.caption_strategy in ("parquet", "csv", "huggingface") and not spec.only_instance_prompt


def needs_texts(spec: CaptionSpec) -> bool:
    """Whether captions come from files beside the images."""
    return spec.caption_strategy == "textfile" and not spec.only_instance_prompt


def caption_key(image: str) -> str:
    """The key of the caption file that belongs to an image's."""
    return image[: image.rindex(".")] + CAPTION_EXTENSION


def read_captions(
    image: str, spec: CaptionSpec, texts: Mapping[str, bytes], rows: Mapping[str, TableRow] = MappingProxyType({})
) -> tuple[str, ...] | BadCaption:
    """Return the captions of an image, at least one, none empty, in the order in which they were written.

    `image` is its key; `texts` are the caption files by key, if `needs_texts`; `rows` what a table says, if
    `needs_table`.

    Several lines of a text file are several captions, unless `disable_multiline_split`. They are filtered, and each is
    followed by its variants. With `prepend_instance_prompt` each instance prompt, as it is written, goes before each.
    """
    instance_prompts = _instance_prompts(spec)
    is_prompt = spec.only_instance_prompt or spec.caption_strategy == "instanceprompt"
    captions = instance_prompts if is_prompt else _own_captions(image, spec, texts, rows)
    if isinstance(captions, BadCaption):
        return captions
    if spec.filters:
        captions = filter_captions(captions, spec.filters)
        if not captions:
            return BadCaption(key=image, fault=CaptionFault.FILTERED)
    if spec.shuffle is not None:
        captions = shuffle_captions(captions, spec.shuffle)
    if is_prompt or not spec.prepend_instance_prompt:
        return captions
    return tuple(f"{prompt} {caption}" for prompt in instance_prompts for caption in captions)


def _instance_prompts(spec: CaptionSpec) -> tuple[str, ...]:
    return tuple(prompt.strip() for prompt in spec.instance_prompts if prompt.strip())


def _own_captions(
    image: str, spec: CaptionSpec, texts: Mapping[str, bytes], rows: Mapping[str, TableRow]
) -> tuple[str, ...] | BadCaption:
    if needs_table(spec):
        return _from_table(image, rows)
    return _from_text_file(image, spec, texts) if needs_texts(spec) else _from_file_name(image)


def _from_file_name(image: str) -> tuple[str, ...] | BadCaption:
    name = image[image.rfind("/") + 1 :]
    stem = name[: name.rindex(".")] if "." in name else name  # the images of a table need no ending
    caption = stem.replace("_", " ").strip()
    if not caption:
        return BadCaption(key=image, fault=CaptionFault.EMPTY)
    try:
        caption.encode()
    except UnicodeEncodeError:  # a name that is not text in the file system's encoding
        return BadCaption(key=image, fault=CaptionFault.ENCODING)
    return (caption,)


def _from_table(image: str, rows: Mapping[str, TableRow]) -> tuple[str, ...] | BadCaption:
    row = rows.get(image)
    if row is None:
        return BadCaption(key=image, fault=CaptionFault.NO_ROW)
    return row.captions or BadCaption(key=image, fault=CaptionFault.EMPTY)


def _from_text_file(image: str, spec: CaptionSpec, texts: Mapping[str, bytes]) -> tuple[str, ...] | BadCaption:
    key = caption_key(image)
    data = texts.get(key, texts.get(key.removesuffix(CAPTION_EXTENSION) + CAPTION_EXTENSION.upper()))
    if data is None:
        return BadCaption(key=key, fault=CaptionFault.MISSING)
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError:
        return BadCaption(key=key, fault=CaptionFault.ENCODING)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [text] if spec.disable_multiline_split else text.split("\n")
    captions = tuple(line.strip() for line in lines if line.strip())
    return captions or BadCaption(key=key, fault=CaptionFault.EMPTY)
