"""Batches in training order, read ahead of the step that needs them."""

# Tensor shape letters: C latent channels, h w latent height and width.

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

from torch import Tensor

from simpletuner.data.records import Sample
from simpletuner.data.sampler import Sampler


class Latents(Protocol):
    """Where the loader reads latents; `latents.LatentStore` is one."""

    def get(self, sample: Sample) -> Tensor:
        """The sample's latent, [C, h, w] float32 on the CPU."""
        ...


class Masks(Protocol):
    """What counts of the pictures; `masks.MaskDraw` is one."""

    def weights(self, samples: Sequence[Sample], index: int, rank: int) -> tuple[Tensor | None, ...] | None:
        """Of `rank`'s micro-batch `index`: one tensor [1, h, w] or None for each sample; None for none at all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. All samples are of one dataset, and of one bucket unless it is packed."""

    latents: tuple[Tensor, ...]
    """One [C, h, w] float32 CPU tensor per sample, scaled as the transformer wants them. Shared: never write to one."""
    prompts: tuple[str, ...]
    """One per sample, "" where the caption was dropped."""
    samples: tuple[Sample, ...]
    dataset_id: str
    is_regularisation: bool
    weights: tuple[Tensor | None, ...] | None = None
    """How much each place of a sample counts, see `masks.MaskStore.weights`; None: all alike."""


def iterate_batches(
    sampler: Sampler,
    latents: Latents,
    *,
    start: int,
    rank: int = 0,
    prefetch: int = 4,
    masks: Masks | None = None,
    pins: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches `start`, `start` + 1, ... without end, or until no dataset takes part any more.

    Up to `prefetch` batches are read ahead in one thread (0: none). What that thread raises is raised here, at the
    batch it belongs to. Closing the iterator, or dropping it, ends the thread. With `pins` latents come in page-locked
    memory, from which an accelerator copies while it computes.
    """
    regularisation = {dataset.id: dataset.is_regularisation for dataset in sampler.plan.datasets}

    def load(index: int) -> Batch:
        picks = sampler.picks(index, rank)
        dataset_id = picks[0].sample.dataset_id
        samples = tuple(pick.sample for pick in picks)
        return Batch(
            latents=tuple(latents.get(sample).pin_memory() if pins else latents.get(sample) for sample in samples),
            prompts=tuple(pick.prompt for pick in picks),
            samples=samples,
            dataset_id=dataset_id,
            is_regularisation=regularisation[dataset_id],
            weights=None if masks is None else masks.weights(samples, index, rank),
        )

    indices = count(start) if sampler.num_batches is None else iter(range(start, sampler.num_batches))
    return map(load, indices) if prefetch == 0 else _ahead(load, indices, prefetch)


def _ahead(load: Callable[[int], Batch], indices: Iterator[int], prefetch: int) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = deque(pool.submit(load, index) for index in islice(indices, prefetch))
        try:
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(load, index) for index in islice(indices, 1))
                yield batch
        finally:
            for future in pending:
                future.cancel()
