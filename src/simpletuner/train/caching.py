"""Filling the caches of a run without training: `simpletuner dataset cache` and `simpletuner train --cache-only`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig, encodes_while_training
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.latents import PlanAgainError
from simpletuner.data.records import DatasetPlan, Plan
from simpletuner.events import types as t
from simpletuner.events.progress import PhaseProgress, Reporter, in_phase
from simpletuner.train.device import choose_compute, choose_device
from simpletuner.train.find import find_model
from simpletuner.train.oom import is_out_of_memory, out_of_memory
from simpletuner.train.prepare import Vae, fill_latent_cache, fill_mask_cache, fill_prompt_cache, run_prompts
from simpletuner.train.start import FoundData, find_data, image_requests, validation_prompts, with_seed


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
    plan, datasets = found.plan, loaded.datasets
    planned = (*plan.datasets, *found.held_out.plan.datasets)
    later = _left_to_training(datasets, planned)
    caching = {one.id: one for one in (*datasets.images, *datasets.evals) if one.id not in later}
    embeds = (datasets.text_embeds, *(datasets.embeds_of(one) for one in (*datasets.images, *datasets.evals)))
    return CacheSummary(
        latents=counting.filled("latents", "held_out"),
        prompts=counting.filled("prompts"),
        latent_folders=tuple(sorted({Path(caching[d.id].cache_dir_vae) for d in planned if d.id in caching})),
        prompt_folders=tuple(sorted({Path(entry.cache_dir) for entry in embeds if entry.is_kept})),
        num_unreadable=len({(d.storage.id, item.key) for d in plan.datasets for item in d.unreadable}),
        left_to_training=later,
    )


def _fill(config: Config, datasets: DatasetsConfig, found: FoundData, run: Reporter) -> FoundData:
    """Fill the caches; what is found without the images that turned out to be unreadable."""
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
        plan, held_out = found.plan, found.held_out.plan
        fill_prompt_cache(
            run_prompts(plan, held_out, datasets, validation_prompts(config, requests)),
            config=config,
            files=files,
            compute=compute,
            run=run,
        )
        later = _left_to_training(datasets, (*plan.datasets, *held_out.datasets))
        try:
            with ExitStack() as cleanup:
                fill_latent_cache(
                    _without(plan, later),
                    _without(held_out, later),
                    config=config,
                    datasets=datasets,
                    vae=vae,
                    compute=compute,
                    run=run,
                    cleanup=cleanup,
                )
        except PlanAgainError:
            found = find_data(config, datasets, run)
            continue
        for one in (plan, held_out):
            fill_mask_cache(one, found.masks, config=config, datasets=datasets, run=run)
        return found


def _without(plan: Plan, ids: Sequence[str]) -> Plan:
    return replace(plan, datasets=tuple(dataset for dataset in plan.datasets if dataset.id not in ids))


def _left_to_training(datasets: DatasetsConfig, planned: Sequence[DatasetPlan]) -> tuple[str, ...]:
    ids = {dataset.id for dataset in planned}
    every = (*datasets.images, *datasets.evals)
    return tuple(one.id for one in every if one.id in ids and encodes_while_training(one))


class _Counting:
    """Passes everything on, and counts what the phases made, also those that had to be done again."""

    def __init__(self, run: Reporter) -> None:
        self._run = run
        self._first: dict[str, t.RunPhase] = {}
        self._last: dict[str, t.RunPhase] = {}

    def emit(self, event: t.Event) -> None:
        """See `Reporter`."""
        self._run.emit(event)
        if isinstance(event, t.RunPhase) and event.total is not None:
            self._first.setdefault(event.key, event)
            self._last[event.key] = event

    def phase(
        self, key: str, total: int | None = None, *, unit: str | None = None
    ) -> AbstractContextManager[PhaseProgress]:
        """See `Reporter`."""
        return in_phase(self.emit, t.RunPhase(key=key, total=total, unit=unit))

    def filled(self, *keys: str) -> Filled:
        """What the phases `keys` came to together."""
        done = {key: self._last[key].done for key in keys if key in self._last}
        return Filled(total=sum(done.values()), made=sum(done[key] - self._first[key].before for key in done))
