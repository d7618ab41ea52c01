"""What a run would find in its datasets and make of them, for reports; the run itself is not begun. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.catalog.families import FLAVOURS
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.caption_survey import CaptionSurvey, survey_captions
from simpletuner.data.held_out import trained_warnings
from simpletuner.data.plan import FoundImages, find_images, make_plan, plan_datasets, unreadable_warnings
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.survey import DatasetSurvey, SameContent, find_duplicates, survey_datasets
from simpletuner.events.progress import Reporter
from simpletuner.models.z_image.tokens import find_tokenizer, token_counter
from simpletuner.problems import ConfigError, DatasetError, Problem
from simpletuner.train.start import (
    dataset_spec,
    fetch_images,
    idle_warnings,
    make_sampler,
    scan_held_out,
    scan_masks,
    total_updates,
)

_SEED_WHERE_RANDOM = 42


@dataclass(frozen=True, kw_only=True)
class RunOutlook:
    """What a run would do with the datasets."""

    samples_per_epoch: int
    batches_per_epoch: int
    steps_per_epoch: float
    """Optimizer updates."""
    effective_batch_size: int
    """Samples of an update: batch times accumulation."""
    total_steps: int
    num_epochs: float


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A report of all datasets. `run` is None where a run would refuse; `problems` says why, and what to know."""

    datasets: tuple[DatasetSurvey, ...]
    duplicates: tuple[SameContent, ...]
    run: RunOutlook | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """A report of all captions. `counts_tokens`: the tokenizer of the model is on this machine.

    `problems`: of what a run would refuse, the part that is about captions or about places that cannot be reached.
    """

    datasets: tuple[CaptionSurvey, ...]
    max_tokens: int
    counts_tokens: bool
    problems: tuple[Problem, ...]


def survey_run(loaded: LoadedConfig, *, run: Reporter, with_duplicates: bool = True) -> Survey:
    """Scan the datasets of `loaded`; nothing is written but what the index remembers.

    Raises: SimpletunerError: the cache directory cannot be written.
    """
    specs, found = _find(loaded, run)
    config, seed = loaded.config, _seed(loaded)
    batch_size = config.optimizer.train_batch_size
    plans, problems = plan_datasets(specs, found, seed=seed, batch_size=batch_size)
    outlook = None
    if not problems:
        plan = make_plan(plans, config.data.data_backend_sampling)
        problems = unreadable_warnings(plan)
        try:
            held_out = scan_held_out(config, loaded.datasets, run)
            problems += trained_warnings(held_out, plan) if held_out is not None else []
            scan_masks(config, loaded.datasets, plan, held_out, run)
            sampler = make_sampler(config, plan)
            outlook = _outlook(config, sampler)
            problems += idle_warnings(config, sampler, outlook.total_steps)
        except (ConfigError, DatasetError) as error:
            problems += error.problems
    duplicates: tuple[SameContent, ...] = ()
    if with_duplicates:
        with run.phase("contents", unit="images") as progress:
            duplicates = find_duplicates(
                found,
                cache_dir=Path(config.data.cache_dir),
                on_progress=lambda done, total: progress.update(done, total=total),
                max_workers=config.data.max_workers,
            )
    return Survey(
        datasets=survey_datasets(specs, found, seed=seed, batch_size=batch_size),
        duplicates=duplicates,
        run=outlook,
        problems=tuple(problems),
    )


def survey_run_captions(loaded: LoadedConfig, *, run: Reporter) -> CaptionReport:
    """Read the captions of the datasets of `loaded`; their tokens are counted if the tokenizer is on this machine.

    Raises: SimpletunerError: the cache directory cannot be written.
    """
    specs, found = _find(loaded, run)
    config, seed = loaded.config, _seed(loaded)
    tokenizer = find_tokenizer(
        config.model.pretrained_model_name_or_path,
        revision=config.model.revision,
        companion=FLAVOURS[config.model.model_flavour].repository,
    )
    _, problems = plan_datasets(specs, found, seed=seed, batch_size=config.optimizer.train_batch_size)
    about_captions = [p for p in problems if p in found.problems or p.code.startswith("E-CAPTION-")]
    return CaptionReport(
        datasets=survey_captions(
            specs,
            found,
            seed=seed,
            count_tokens=None if tokenizer is None else token_counter(tokenizer),
            max_tokens=config.model.tokenizer_max_length,
        ),
        max_tokens=config.model.tokenizer_max_length,
        counts_tokens=tokenizer is not None,
        problems=tuple(about_captions),
    )


def _find(loaded: LoadedConfig, run: Reporter) -> tuple[list[DatasetSpec], FoundImages]:
    """The datasets, and what is found of them; a place that cannot be reached does not hide the others."""
    config, datasets = loaded.config, loaded.datasets
    cache_dir = Path(config.data.cache_dir)
    specs: list[DatasetSpec] = []
    problems: list[Problem] = []
    for dataset in datasets.images:
        spec = dataset_spec(dataset, config, datasets.text_embeds)
        try:
            fetch_images([spec], cache_dir, run)
        except DatasetError as error:
            problems += error.problems
        else:
            specs.append(spec)
    with run.phase("scan", unit="images") as progress:
        found = find_images(
            specs,
            cache_dir=cache_dir,
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
        )
    return specs, replace(found, problems=(*problems, *found.problems))


def _seed(loaded: LoadedConfig) -> int:
    """The run's seed; one that is drawn when a run starts is not known yet, and decides no more than crops."""
    seed = loaded.config.run.seed
    return seed if seed >= 0 else _SEED_WHERE_RANDOM


def _outlook(config: Config, sampler: Sampler) -> RunOutlook:
    accumulation = config.optimizer.gradient_accumulation_steps
    steps_per_epoch = sampler.batches_per_epoch / accumulation
    total_steps = total_updates(config, sampler)
    return RunOutlook(
        samples_per_epoch=sampler.samples_per_epoch,
        batches_per_epoch=sampler.batches_per_epoch,
        steps_per_epoch=steps_per_epoch,
        effective_batch_size=config.optimizer.train_batch_size * accumulation,
        total_steps=total_steps,
        num_epochs=total_steps / steps_per_epoch,
    )
