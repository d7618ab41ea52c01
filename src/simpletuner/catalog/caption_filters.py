"""The entries of `caption_filter_list`: what each takes out of a caption, or puts in its place. Standard library only.

`s/search/replacement/` replaces what the regular expression `search` finds; the last slash may be left out, `\\/` is a
slash, and the flags `g` and `i` may follow, of which `g` says what happens anyway. An entry with any of the characters
`\\ ^ $ * + ? [ ] ( ) { } |` is a regular expression whose matches are removed. Any other is removed as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_OF_EXPRESSIONS = frozenset(r"\^$*+?[](){}|")
_UNESCAPED_SLASH = re.compile(r"(?<!\\)(?:\\\\)*/")
_FLAGS = {"g": 0, "i": re.IGNORECASE}


class BadFilterError(ValueError):
    """An entry that is no filter; the text says why, in the words of Python's `re`."""


@dataclass(frozen=True, kw_only=True)
class CaptionFilter:
    """What is searched for, and what takes its place."""

    search: re.Pattern[str]
    replacement: str = ""


@lru_cache(maxsize=4096)
def parse_filter(entry: str) -> CaptionFilter:
    """What an entry means. Raises: BadFilterError."""
    try:
        if entry.startswith("s/") and (parts := _split_at_slashes(entry[2:])) and len(parts) in (2, 3):
            flags = 0
            for letter in parts[2] if len(parts) == 3 else "":
                if letter not in _FLAGS:
                    raise BadFilterError(f"unknown flag {letter}")
                flags |= _FLAGS[letter]
            found = CaptionFilter(search=re.compile(parts[0], flags), replacement=parts[1])
            re.compile(f"{parts[0]}|", flags).sub(found.replacement, "")  # finds groups that are not there
            return found
        is_expression = not _OF_EXPRESSIONS.isdisjoint(entry)
        return CaptionFilter(search=re.compile(entry if is_expression else re.escape(entry)))
    except (re.error, IndexError) as error:
        raise BadFilterError(str(error)) from error


def filtered(caption: str, filters: Iterable[CaptionFilter]) -> str:
    """The caption after every filter in turn. Where one changed it, the gaps that are left close: doubled spaces, and
    commas with nothing between them or at an end."""
    changed = caption
    for one in filters:
        changed = one.search.sub(one.replacement, changed)
    if changed == caption:
        return caption
    changed = re.sub(r"[ \t]{2,}", " ", changed)
    changed = re.sub(r" ?,(?:[ \t]*,)+", ",", changed)
    return re.sub(r" ,", ",", changed).strip(" \t,").strip()


def _split_at_slashes(text: str) -> list[str]:
    """At every slash that no backslash precedes."""
    parts, begin = [], 0
    for found in _UNESCAPED_SLASH.finditer(text):
        parts.append(text[begin : found.end() - 1])
        begin = found.end()
    parts.append(text[begin:])
    return [part.replace(r"\/", "/") for part in parts]
