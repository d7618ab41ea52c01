"""Filling the caches of a run without training: `simpletuner dataset cache` and `simpletuner train --cache-only`."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig, encodes_while_training
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.latents import PlanAgainError
from simpletuner.data.records import Plan
from simpletuner.events import types as t
from simpletuner.events.progress import PhaseProgress, Reporter, in_phase
from simpletuner.train.device import choose_compute, choose_device
from simpletuner.train.find import find_model
from simpletuner.train.oom import is_out_of_memory, out_of_memory
from simpletuner.train.prepare import Vae, fill_latent_cache, fill_prompt_cache
from simpletuner.train.start import all_prompts, image_requests, scan_datasets, with_seed


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
    prompt_folder: Path
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
    plan = scan_datasets(config, loaded.datasets, run)
    try:
        plan = _fill(config, loaded.datasets, plan, counting)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, None, phase="latents") from error
    later = _left_to_training(loaded.datasets, plan)
    return CacheSummary(
        latents=counting.filled("latents"),
        prompts=counting.filled("prompts"),
        latent_folders=tuple(
            sorted({Path(one.cache_dir_vae) for one in loaded.datasets.images if one.id not in later})
        ),
        prompt_folder=Path(loaded.datasets.text_embeds.cache_dir),
        num_unreadable=len({(d.storage.id, item.key) for d in plan.datasets for item in d.unreadable}),
        left_to_training=later,
    )


def _fill(config: Config, datasets: DatasetsConfig, plan: Plan, run: Reporter) -> Plan:
    """Fill both caches; the plan without the images that turned out to be unreadable."""
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
        fill_prompt_cache(
            all_prompts(config, plan, requests),
            config=config,
            datasets=datasets,
            files=files,
            compute=compute,
            run=run,
        )
        later = _left_to_training(datasets, plan)
        now = replace(plan, datasets=tuple(dataset for dataset in plan.datasets if dataset.id not in later))
        try:
            with ExitStack() as cleanup:
                fill_latent_cache(
                    now, config=config, datasets=datasets, vae=vae, compute=compute, run=run, cleanup=cleanup
                )
        except PlanAgainError:
            plan = scan_datasets(config, datasets, run)
        else:
            return plan


def _left_to_training(datasets: DatasetsConfig, plan: Plan) -> tuple[str, ...]:
    planned = {dataset.id for dataset in plan.datasets}
    return tuple(one.id for one in datasets.images if one.id in planned and encodes_while_training(one))


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

    def filled(self, key: str) -> Filled:
        """What the phase `key` came to."""
        if key not in self._last:
            return Filled(total=0, made=0)
        return Filled(total=self._last[key].done, made=self._last[key].done - self._first[key].before)
