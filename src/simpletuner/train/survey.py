"""What a run would find in its datasets and make of them, for reports; the run itself is not begun. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpletuner.catalog.families import FLAVOURS
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.caption_survey import CaptionSurvey, survey_captions
from simpletuner.data.discovery import Progress
from simpletuner.data.plan import FoundImages, find_images, make_plan, plan_datasets, unreadable_warnings
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.survey import DatasetSurvey, SameContent, find_duplicates, survey_datasets
from simpletuner.models.z_image.tokens import find_tokenizer, token_counter
from simpletuner.problems import ConfigError, Problem
from simpletuner.train.start import dataset_spec, make_sampler, total_updates

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
    """A report of all captions. `counts_tokens`: the tokenizer of the model is on this machine."""

    datasets: tuple[CaptionSurvey, ...]
    max_tokens: int
    counts_tokens: bool
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How far the looking is: callables that take (done, total)."""

    images: Progress
    contents: Progress


def survey_run(loaded: LoadedConfig, looking: Looking, *, with_duplicates: bool = True) -> Survey:
    """Scan the datasets of `loaded`; nothing is written but what the index remembers.

    Raises: SimpletunerError: the cache directory cannot be written.
    """
    specs, found = _find(loaded, looking.images)
    config, seed = loaded.config, _seed(loaded)
    batch_size = config.optimizer.train_batch_size
    plans, problems = plan_datasets(specs, found, seed=seed, batch_size=batch_size)
    run = None
    if not problems:
        plan = make_plan(plans)
        problems = unreadable_warnings(plan)
        try:
            run = _outlook(config, make_sampler(config, plan))
        except ConfigError as error:
            problems += error.problems
    cache_dir, max_workers = Path(config.data.cache_dir), config.data.max_workers
    duplicates: tuple[SameContent, ...] = ()
    if with_duplicates:
        duplicates = find_duplicates(found, cache_dir=cache_dir, on_progress=looking.contents, max_workers=max_workers)
    return Survey(
        datasets=survey_datasets(specs, found, seed=seed, batch_size=batch_size),
        duplicates=duplicates,
        run=run,
        problems=tuple(problems),
    )


def survey_run_captions(loaded: LoadedConfig, looking: Looking) -> CaptionReport:
    """Read the captions of the datasets of `loaded`; their tokens are counted if the tokenizer is on this machine.

    Raises: SimpletunerError: the cache directory cannot be written.
    """
    specs, found = _find(loaded, looking.images)
    config, seed = loaded.config, _seed(loaded)
    tokenizer = find_tokenizer(
        config.model.pretrained_model_name_or_path,
        revision=config.model.revision,
        companion=FLAVOURS[config.model.model_flavour].repository,
    )
    _, problems = plan_datasets(specs, found, seed=seed, batch_size=config.optimizer.train_batch_size)
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
        problems=tuple(problems),
    )


def _find(loaded: LoadedConfig, on_progress: Progress) -> tuple[list[DatasetSpec], FoundImages]:
    config = loaded.config
    specs = [dataset_spec(dataset, config) for dataset in loaded.datasets.images]
    found = find_images(
        specs, cache_dir=Path(config.data.cache_dir), on_progress=on_progress, max_workers=config.data.max_workers
    )
    return specs, found


def _seed(loaded: LoadedConfig) -> int:
    """The run's seed; one that is drawn when a run starts is not known yet, and decides no more than crops."""
    seed = loaded.config.run.seed
    return seed if seed >= 0 else _SEED_WHERE_RANDOM


def _outlook(config: Config, sampler: Sampler) -> RunOutlook:
    accumulation = config.optimizer.gradient_accumulation_steps
    steps_per_epoch = sampler.batches_per_epoch / accumulation
    total_steps = total_updates(config, sampler.batches_per_epoch)
    return RunOutlook(
        samples_per_epoch=sampler.samples_per_epoch,
        batches_per_epoch=sampler.batches_per_epoch,
        steps_per_epoch=steps_per_epoch,
        effective_batch_size=config.optimizer.train_batch_size * accumulation,
        total_steps=total_steps,
        num_epochs=total_steps / steps_per_epoch,
    )
