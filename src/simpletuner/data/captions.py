"""The captions of an image: from its file name, from a text file beside it, or one text for all. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath

from simpletuner.data.spec import CaptionSpec
from simpletuner.data.storage import CAPTION_EXTENSION

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class CaptionFault(str, Enum):
    """Why an image has no caption although its dataset wants one."""

    MISSING = "missing"
    EMPTY = "empty"
    ENCODING = "encoding"


@dataclass(frozen=True, kw_only=True, slots=True)
class BadCaption:
    """A caption that cannot be used. `key` is the file to mend."""

    key: str
    fault: CaptionFault


def lacks_instance_prompt(spec: CaptionSpec) -> bool:
    """Whether `spec` uses an instance prompt without giving one."""
    is_used = spec.caption_strategy == "instanceprompt" or spec.prepend_instance_prompt or spec.only_instance_prompt
    return is_used and not _instance_prompts(spec)


def needs_texts(spec: CaptionSpec) -> bool:
    """Whether captions come from files beside the images."""
    return spec.caption_strategy == "textfile" and not spec.only_instance_prompt


def caption_key(image: str) -> str:
    """The key of the caption file that belongs to an image's."""
    return str(PurePosixPath(image).with_suffix(CAPTION_EXTENSION))


def read_captions(image: str, spec: CaptionSpec, texts: Mapping[str, bytes]) -> tuple[str, ...] | BadCaption:
    """Return the captions of an image, at least one, none empty, in the order in which they were written.

    `image` is its key; `texts` are the caption files by key, if `needs_texts`.

    Several lines of a text file are several captions, unless `disable_multiline_split`. With
    `prepend_instance_prompt` each instance prompt goes before each caption.
    """
    instance_prompts = _instance_prompts(spec)
    if spec.only_instance_prompt or spec.caption_strategy == "instanceprompt":
        return instance_prompts
    captions = _from_file_name(image) if spec.caption_strategy == "filename" else _from_text_file(image, spec, texts)
    if isinstance(captions, BadCaption) or not spec.prepend_instance_prompt:
        return captions
    return tuple(f"{prompt} {caption}" for prompt in instance_prompts for caption in captions)


def _instance_prompts(spec: CaptionSpec) -> tuple[str, ...]:
    return tuple(prompt.strip() for prompt in spec.instance_prompts if prompt.strip())


def _from_file_name(image: str) -> tuple[str, ...] | BadCaption:
    caption = PurePosixPath(image).stem.replace("_", " ").strip()
    if not caption:
        return BadCaption(key=image, fault=CaptionFault.EMPTY)
    try:
        caption.encode()
    except UnicodeEncodeError:  # a name that is not text in the file system's encoding
        return BadCaption(key=image, fault=CaptionFault.ENCODING)
    return (caption,)


def _from_text_file(image: str, spec: CaptionSpec, texts: Mapping[str, bytes]) -> tuple[str, ...] | BadCaption:
    key = caption_key(image)
    data = texts.get(key)
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
