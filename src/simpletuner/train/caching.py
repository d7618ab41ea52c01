"""Filling the caches of a run without training: `simpletuner dataset cache` and `simpletuner train --cache-only`."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig, ImageDataset, encodes_while_training
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.latents import PlanAgainError
from simpletuner.events import types as t
from simpletuner.events.progress import PhaseProgress, Reporter, in_phase
from simpletuner.train.device import choose_compute, choose_device
from simpletuner.train.find import find_model
from simpletuner.train.oom import is_out_of_memory, out_of_memory
from simpletuner.train.prepare import Vae, fill_latent_cache, fill_mask_cache, fill_prompt_cache, prompt_groups
from simpletuner.train.start import FoundData, find_data, image_prompts, image_requests, with_seed


@dataclass(frozen=True, kw_only=True)
class Filled:
    """One kind of entries: how many the run needs, and how many of them had to be made now."""

    total: int
    made: int


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What filling the caches did."""

    latents: Filled
    prompts: Filled
    latent_folders: tuple[Path, ...]
    prompt_folders: tuple[Path, ...]
    num_unreadable: int
    """Images that are left out because they cannot be read."""
    left_to_training: tuple[str, ...]
    """Datasets that ask for being encoded while training."""


def fill_caches(loaded: LoadedConfig, *, run: Reporter) -> CacheSummary:
    """Make every latent and every embedding that a run of `loaded` needs and that is not there yet.

    What was made stays if this is interrupted.

    Raises:
        SimpletunerError: whatever the user can mend.
    """
    for problem in loaded.warnings:
        run.emit(t.ProblemReported(problem=problem))
    counting = _Counting(run)
    config = with_seed(loaded.config, None, run)
    found = find_data(config, loaded.datasets, run)
    try:
        found = _fill(config, loaded.datasets, found, counting)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, None, phase="latents") from error
    later = _left_to_training(loaded.datasets, found)
    kept = {
        Path(entry.cache_dir)
        for entry in map(loaded.datasets.embeds_of, (*loaded.datasets.images, *loaded.datasets.evals))
        if entry.is_kept
    }
    return CacheSummary(
        latents=counting.filled("latents"),
        prompts=counting.filled("prompts"),
        latent_folders=tuple(
            sorted({Path(one.cache_dir_vae) for one in _trained_or_measured(loaded.datasets) if one.id not in later})
        ),
        prompt_folders=tuple(sorted(kept)),
        num_unreadable=len(
            {(d.storage.id, item.key) for plan in found.plans for d in plan.datasets for item in d.unreadable}
        ),
        left_to_training=later,
    )


def _fill(config: Config, datasets: DatasetsConfig, found: FoundData, run: _Counting) -> FoundData:
    """Fill all caches; what there is without the images that turned out to be unreadable."""
    compute, override = choose_compute(
        choose_device(config.run.device),
        mixed_precision=config.memory.mixed_precision,
        base_model_default_dtype=config.memory.base_model_default_dtype,
    )
    if override is not None:
        run.emit(override)
    files, _ = find_model(config, run)
    requests = image_requests(config)
    vae = Vae(config, files=files, compute=compute, run=run)
    while True:
        run.begin_attempt()
        groups = prompt_groups(found.plans, datasets, image_prompts(config, requests))
        fill_prompt_cache(
            [group for group in groups if group.directory is not None],
            config=config,
            files=files,
            compute=compute,
            run=run,
        )
        later = _left_to_training(datasets, found)
        now = [
            replace(plan, datasets=tuple(dataset for dataset in plan.datasets if dataset.id not in later))
            for plan in found.plans
        ]
        try:
            with ExitStack() as cleanup:
                fill_latent_cache(
                    now, config=config, datasets=datasets, vae=vae, compute=compute, run=run, cleanup=cleanup
                )
        except PlanAgainError:
            found = find_data(config, datasets, run)
            continue
        for plan in found.plans if found.masks else ():
            fill_mask_cache(plan, found.masks, config=config, datasets=datasets, run=run)
        return found


def _trained_or_measured(datasets: DatasetsConfig) -> tuple[ImageDataset, ...]:
    return (*datasets.images, *datasets.evals)


def _left_to_training(datasets: DatasetsConfig, found: FoundData) -> tuple[str, ...]:
    planned = {dataset.id for plan in found.plans for dataset in plan.datasets}
    return tuple(one.id for one in _trained_or_measured(datasets) if one.id in planned and encodes_while_training(one))


class _Counting:
    """Passes everything on, and counts what the phases made, also those that had to be done again."""

    def __init__(self, run: Reporter) -> None:
        self._run = run
        self._ends: list[t.RunPhase] = []  # the last event of each phase
        self._attempt_begins = 0

    def begin_attempt(self) -> None:
        """What is done from here on replaces what was done before."""
        self._attempt_begins = len(self._ends)

    def emit(self, event: t.Event) -> None:
        """See `Reporter`."""
        self._run.emit(event)

    def phase(
        self, key: str, total: int | None = None, *, unit: str | None = None
    ) -> AbstractContextManager[PhaseProgress]:
        """See `Reporter`."""
        number = len(self._ends)
        self._ends.append(t.RunPhase(key=key, total=total, unit=unit))

        def emit(event: t.Event) -> None:
            if isinstance(event, t.RunPhase):
                self._ends[number] = event
            self.emit(event)

        return in_phase(emit, t.RunPhase(key=key, total=total, unit=unit))

    def filled(self, key: str) -> Filled:
        """What the phases `key` came to."""
        wanted = (event.total or 0 for event in self._ends[self._attempt_begins :] if event.key == key)
        return Filled(
            total=sum(wanted), made=sum(event.done - event.before for event in self._ends if event.key == key)
        )
