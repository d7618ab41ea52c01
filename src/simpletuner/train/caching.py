"""Filling the caches of a run without training: `simpletuner dataset cache` and `simpletuner train --cache-only`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig, encodes_while_training
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.latents import PlanAgainError
from simpletuner.data.records import Plan
from simpletuner.events import types as t
from simpletuner.events.progress import PhaseProgress, Reporter
from simpletuner.train.device import settle_compute
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
    try:
        found = _fill(config, loaded.datasets, counting)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, None, phase="latents") from error
    plans, datasets = found.plans, loaded.datasets
    planned = {dataset.id for plan in plans for dataset in plan.datasets}
    later = _left_to_training(datasets)
    cached = [one for one in (*datasets.images, *datasets.evals) if one.id in planned - set(later)]
    embeds = [datasets.embeds_of(one) for one in (*datasets.images, *datasets.evals) if one.id in planned]
    return CacheSummary(
        latents=counting.filled("latents", "held_out"),
        prompts=counting.filled("prompts"),
        latent_folders=tuple(sorted({Path(one.cache_dir_vae) for one in cached})),
        prompt_folders=tuple(sorted({Path(one.cache_dir) for one in (datasets.text_embeds, *embeds) if one.is_kept})),
        num_unreadable=len({(d.storage.id, item.key) for p in plans for d in p.datasets for item in d.unreadable}),
        left_to_training=tuple(one for one in later if one in planned),
    )


def _fill(config: Config, datasets: DatasetsConfig, run: _Counting) -> FoundData:
    """Fill the caches; what is left once the images that turned out to be unreadable are out."""
    found = find_data(config, datasets, run)
    compute = settle_compute(config, run)
    files, _ = find_model(config, run)
    more = validation_prompts(config, image_requests(config))
    vae = Vae(config, files=files, compute=compute, run=run)
    later = _left_to_training(datasets)
    while True:
        groups = run_prompts(found.plan, found.held_out.plan, datasets, more)
        kept = [group for group in groups if group.directory is not None]
        fill_prompt_cache(kept, config=config, files=files, compute=compute, run=run)
        try:
            with ExitStack() as cleanup:
                fill_latent_cache(
                    _without(found.plan, later),
                    _without(found.held_out.plan, later),
                    config=config,
                    datasets=datasets,
                    vae=vae,
                    compute=compute,
                    run=run,
                    cleanup=cleanup,
                )
        except PlanAgainError:
            run.begin_again()
            found = find_data(config, datasets, run)
        else:
            break
    for plan in found.plans:
        fill_mask_cache(plan, found.masks, config=config, datasets=datasets, run=run)
    return found


def _without(plan: Plan, names: Collection[str]) -> Plan:
    return replace(plan, datasets=tuple(dataset for dataset in plan.datasets if dataset.id not in names))


def _left_to_training(datasets: DatasetsConfig) -> tuple[str, ...]:
    return tuple(one.id for one in (*datasets.images, *datasets.evals) if encodes_while_training(one))


class _Counting:
    """Passes everything on, and counts what the phases made."""

    def __init__(self, run: Reporter) -> None:
        self._run = run
        self._made: Counter[str] = Counter()
        self._done: Counter[str] = Counter()

    def emit(self, event: t.Event) -> None:
        """See `Reporter`."""
        self._run.emit(event)

    @contextmanager
    def phase(self, key: str, total: int | None = None, *, unit: str | None = None) -> Iterator[PhaseProgress]:
        """See `Reporter`. What a phase made counts, whether or not it comes to its end."""
        with self._run.phase(key, total, unit=unit) as progress:
            try:
                yield progress
            finally:
                self._made[key] += progress.made
                self._done[key] += progress.done

    def begin_again(self) -> None:
        """All phases come once more; what was made stays made."""
        self._done.clear()

    def filled(self, *keys: str) -> Filled:
        """What the phases `keys` came to together."""
        return Filled(total=sum(self._done[key] for key in keys), made=sum(self._made[key] for key in keys))
