"""The words that our examples have in place of the subject's name."""

from __future__ import annotations

SUBJECT_PLACEHOLDER = "the name of your subject goes here"


def has_placeholder(text: str) -> bool:
    """Whether somebody left the example's words where a name belongs."""
    return SUBJECT_PLACEHOLDER in " ".join(text.lower().split())
