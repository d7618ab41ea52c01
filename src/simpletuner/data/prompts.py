"""The embedding of every prompt, computed once and kept on disk.

An entry's key is a hash of the text and the encoder. The text encoder is loaded only if an entry is missing.
"""

# Tensor shape letters: S tokens of one prompt, D width of an embedding.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.data.discovery import Progress
from simpletuner.data.hashing import stable_hash
from simpletuner.data.store import TensorStore, Writer
from simpletuner.problems import DatasetError, Problem


class PromptEncoder(Protocol):
    """A text encoder with its tokenizer, ready to encode."""

    @property
    def id(self) -> str:
        """Identity of weights, precision, prompt template and maximum length."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one [S, D] tensor per prompt without padding, float32 or bfloat16, on any device."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """An encoder that is loaded when it is needed."""

    id: str
    """The `id` of what `open` returns, known without loading it."""
    open: Callable[[], PromptEncoder]


class PromptStore:
    """The embeddings of a run's prompts."""

    def __init__(self, encoder_id: str, store: TensorStore) -> None:
        self._encoder_id = encoder_id
        self._store = store

    def get(self, prompt: str) -> Tensor:
        """Return a fresh [S, D] CPU tensor in the encoder's precision.

        Raises: KeyError: the prompt was not among those cached. DatasetError: the cache file was damaged.
        """
        return self._store.get(prompt_key(prompt, self._encoder_id))


def prompt_key(prompt: str, encoder_id: str) -> str:
    """The name of a prompt's embedding in a cache: 32 hex digits."""
    return stable_hash("prompt 1", prompt, encoder_id)


def cache_prompts(
    prompts: Iterable[str],
    source: PromptSource,
    *,
    directory: Path,
    batch_size: int,
    on_progress: Progress,
    write_batch_size: int = 128,
) -> PromptStore:
    """Encode what is missing and return the embeddings of `prompts`; each distinct text once, "" is one like any other.

    Args:
        batch_size: prompts per call of the encoder.
        on_progress: called with (embeddings there, embeddings wanted), first before anything is encoded.
        write_batch_size: embeddings per file of the cache.
    Raises: DatasetError: an embedding is not finite, or the cache cannot be written.
    """
    # Similar lengths share a call, so that the encoder pads little. As with latents, who shares a call does not
    # depend on what is missing.
    ordered = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    store = TensorStore(directory)
    keys = {prompt: prompt_key(prompt, source.id) for prompt in ordered}
    store.discard_damaged(keys.values())
    groups = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    missing = [group for group in groups if not all(keys[prompt] in store for prompt in group)]
    done = sum(key in store for key in keys.values())
    on_progress(done, len(ordered))
    if missing:
        encoder = source.open()
        assert encoder.id == source.id, "the cache would be filled under another encoder's name"
        with store.writer(group_entries=write_batch_size) as writer:
            for group in missing:
                num_new = sum(keys[prompt] not in store for prompt in group)
                _encode_group(group, keys, encoder, writer)
                done += num_new
                on_progress(done, len(ordered))
    return PromptStore(source.id, store)


def _encode_group(group: Sequence[str], keys: dict[str, str], encoder: PromptEncoder, writer: Writer) -> None:
    with torch.no_grad():
        embeddings_SD = encoder.encode(group)
    for prompt, embedding_SD in zip(group, embeddings_SD, strict=True):
        if not bool(torch.isfinite(embedding_SD).all()):
            raise DatasetError(Problem(code="E-PROMPT-NOT-FINITE", params={"prompt": prompt}))
        writer.put(keys[prompt], embedding_SD)
