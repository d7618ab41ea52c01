"""How many tokens the text encoder gets for a prompt, counted without it: the tokenizer's file alone, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from simpletuner.models.hub import Hub, cached_snapshot
from simpletuner.models.places import find_place
from simpletuner.models.weights import MODEL_OPTION
from simpletuner.problems import ModelError

_FILE = "tokenizer.json"
_BEFORE, _AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's chat template puts around a message, thinking enabled."""
_PROMPTS_AT_ONCE = 1024


def find_tokenizer(name_or_path: str, *, revision: str | None = None, companion: str | None = None) -> Path | None:
    """The tokenizer's file of a pipeline, see `models.weights.resolve_pipeline`; None if it is not on this machine."""
    try:
        place = find_place(name_or_path, option=MODEL_OPTION, revision=revision)
        if place.is_single_file:
            if companion is None:
                return None
            place = find_place(companion, option=MODEL_OPTION)
        root = place.path
        if place.repo is not None:
            root = cached_snapshot(Hub(), place.repo, (f"tokenizer/{_FILE}",))
    except ModelError:
        return None
    file = None if root is None else root / "tokenizer" / _FILE
    return file if file is not None and file.is_file() else None


def token_counter(tokenizer_file: Path) -> Callable[[Sequence[str]], list[int]]:
    """Prompts -> how many tokens each is with the template around it, before any is cut off."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(prompts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
            messages = [f"{_BEFORE}{prompt}{_AFTER}" for prompt in prompts[first : first + _PROMPTS_AT_ONCE]]
            counts += [len(encoding.ids) for encoding in tokenizer.encode_batch(messages)]
        return counts

    return count
