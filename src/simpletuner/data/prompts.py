"""The embedding of every prompt, computed once and kept on disk.

An entry's key is a hash of the text and the encoder. The text encoder is loaded only if an entry is missing.
"""

# Tensor shape letters: S tokens of one prompt, D width of an embedding.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.data.discovery import Progress
from simpletuner.data.hashing import stable_hash
from simpletuner.data.memory_store import MemoryStore
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


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Prompts that are encoded and cached together.

    directory: of the cache; None: the memory of the run. batch_size: prompts per call of the encoder.
    write_batch_size: embeddings per file of the cache.
    """

    prompts: Iterable[str]
    directory: Path | None
    batch_size: int
    write_batch_size: int = 128


class PromptStore:
    """The embeddings of a run's prompts."""

    def __init__(self, encoder_id: str, stores: Sequence[TensorStore | MemoryStore]) -> None:
        self._encoder_id = encoder_id
        self._stores = tuple(stores)

    def get(self, prompt: str) -> Tensor:
        """Return a fresh [S, D] CPU tensor in the encoder's precision; of several caches that have it, the first's.

        Raises: KeyError: the prompt was not among those cached. DatasetError: the cache file was damaged.
        """
        key = prompt_key(prompt, self._encoder_id)
        for store in self._stores:
            if key in store:
                return store.get(key)
        raise KeyError(prompt)


def prompt_key(prompt: str, encoder_id: str) -> str:
    """The name of a prompt's embedding in a cache: 32 hex digits."""
    return stable_hash("prompt 1", prompt, encoder_id)


def cache_prompts(groups: Sequence[PromptGroup], source: PromptSource, *, on_progress: Progress) -> PromptStore:
    """Encode what is missing and return the embeddings of all prompts. In a group each distinct text is encoded once;
    "" is one like any other.

    Args:
        on_progress: called with (embeddings there, embeddings wanted), first before anything is encoded.
    Raises: DatasetError: an embedding is not finite, or the cache cannot be written.
    """
    stores: dict[Path | None, TensorStore | MemoryStore] = {}
    for group in groups:
        if group.directory not in stores:
            stores[group.directory] = MemoryStore() if group.directory is None else TensorStore(group.directory)
    wanted: dict[Path | None, set[str]] = {directory: set() for directory in stores}
    calls: list[_Calls] = []
    for group in groups:
        # Similar lengths share a call, so that the encoder pads little. As with latents, who shares a call does not
        # depend on what is missing.
        ordered = sorted(set(group.prompts), key=lambda prompt: (len(prompt), prompt))
        keys = {prompt: prompt_key(prompt, source.id) for prompt in ordered}
        wanted[group.directory].update(keys.values())
        shared = tuple(
            tuple(ordered[first : first + group.batch_size]) for first in range(0, len(ordered), group.batch_size)
        )
        store = stores[group.directory]
        calls.append(_Calls(store=store, prompts=shared, keys=keys, write_batch_size=group.write_batch_size))
    for directory, store in stores.items():
        store.discard_damaged(wanted[directory])
    total = sum(map(len, wanted.values()))
    done = sum(key in stores[directory] for directory, names in wanted.items() for key in names)
    on_progress(done, total)
    encoder: PromptEncoder | None = None
    for group_calls in calls:
        missing = group_calls.missing()
        if not missing:
            continue
        encoder = encoder or source.open()
        assert encoder.id == source.id, "the cache would be filled under another encoder's name"
        with group_calls.store.writer(group_entries=group_calls.write_batch_size) as writer:
            for prompts in missing:
                num_new = sum(group_calls.keys[prompt] not in group_calls.store for prompt in prompts)
                _encode_group(prompts, group_calls.keys, encoder, writer)
                done += num_new
                on_progress(done, total)
    return PromptStore(source.id, tuple(stores.values()))


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """The calls of the encoder for one group."""

    store: TensorStore | MemoryStore
    prompts: tuple[tuple[str, ...], ...]
    keys: Mapping[str, str]
    write_batch_size: int

    def missing(self) -> list[tuple[str, ...]]:
        """Those of which something is not there."""
        return [prompts for prompts in self.prompts if not all(self.keys[prompt] in self.store for prompt in prompts)]


def _encode_group(
    group: Sequence[str], keys: Mapping[str, str], encoder: PromptEncoder, writer: Writer | MemoryStore
) -> None:
    with torch.no_grad():
        embeddings_SD = encoder.encode(group)
    for prompt, embedding_SD in zip(group, embeddings_SD, strict=True):
        if not bool(torch.isfinite(embedding_SD).all()):
            raise DatasetError(Problem(code="E-PROMPT-NOT-FINITE", params={"prompt": prompt}))
        writer.put(keys[prompt], embedding_SD)
