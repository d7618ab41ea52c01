"""What a run would find in its datasets and make of them, for reports; the run itself is not begun. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.catalog.families import FLAVOURS
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.caption_survey import CaptionSurvey, survey_captions
from simpletuner.data.finding import FoundImages, find_images
from simpletuner.data.held_out import HeldOut, trained_warnings
from simpletuner.data.plan import make_plan, plan_datasets, unreadable_warnings
from simpletuner.data.records import DatasetPlan
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.survey import DatasetSurvey, SameContent, find_duplicates, survey_datasets
from simpletuner.events.progress import Reporter
from simpletuner.models.z_image.tokens import find_tokenizer, token_counter
from simpletuner.problems import ConfigError, DatasetError, Problem, Severity
from simpletuner.train.start import (
    dataset_spec,
    fetch_images,
    held_out_spec,
    idle_warnings,
    make_sampler,
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
    held_out: frozenset[str]
    """Ids of those that the loss is measured on; the others are trained on."""
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
    looked = _look(loaded, run)
    config = loaded.config
    problems, outlook = list(looked.problems), None
    if not problems:
        plan = make_plan(looked.training, config.data.data_backend_sampling)
        try:
            sampler = make_sampler(config, plan)
            outlook = _outlook(config, sampler)
            problems += idle_warnings(config, sampler, outlook.total_steps)
        except ConfigError as error:
            problems += error.problems
        measured = make_plan(looked.held_out, plan.sampling)
        problems += trained_warnings(HeldOut(plan=measured), plan)
        problems += _mask_problems(loaded, looked, run)
        problems += unreadable_warnings(make_plan((*looked.training, *looked.held_out), plan.sampling))
    duplicates: tuple[SameContent, ...] = ()
    if with_duplicates:
        with run.phase("contents", unit="images") as progress:
            duplicates = find_duplicates(
                looked.found,
                cache_dir=Path(config.data.cache_dir),
                on_progress=lambda done, total: progress.update(done, total=total),
                max_workers=config.data.max_workers,
            )
    return Survey(
        datasets=survey_datasets(
            looked.specs, looked.found, seed=_seed(loaded), batch_size=config.optimizer.train_batch_size
        ),
        held_out=frozenset(dataset.id for dataset in loaded.datasets.evals),
        duplicates=duplicates,
        run=None if any(problem.severity is Severity.ERROR for problem in problems) else outlook,
        problems=tuple(problems),
    )


def survey_run_captions(loaded: LoadedConfig, *, run: Reporter) -> CaptionReport:
    """Read the captions of the datasets of `loaded`; their tokens are counted if the tokenizer is on this machine.

    Raises: SimpletunerError: the cache directory cannot be written.
    """
    looked = _look(loaded, run)
    model = loaded.config.model
    tokenizer = find_tokenizer(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        companion=FLAVOURS[model.model_flavour].repository,
    )
    of_places = looked.found.problems
    return CaptionReport(
        datasets=survey_captions(
            looked.specs,
            looked.found,
            seed=_seed(loaded),
            count_tokens=None if tokenizer is None else token_counter(tokenizer),
            max_tokens=model.tokenizer_max_length,
        ),
        max_tokens=model.tokenizer_max_length,
        counts_tokens=tokenizer is not None,
        problems=tuple(p for p in looked.problems if p in of_places or p.code.startswith("E-CAPTION-")),
    )


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """The datasets that could be reached, and what a run would use of them."""

    specs: tuple[DatasetSpec, ...]
    found: FoundImages
    training: tuple[DatasetPlan, ...]
    held_out: tuple[DatasetPlan, ...]
    problems: tuple[Problem, ...]


def _look(loaded: LoadedConfig, run: Reporter) -> _Looked:
    """A place that cannot be reached does not hide the others."""
    config, datasets = loaded.config, loaded.datasets
    cache_dir, batch_size = Path(config.data.cache_dir), config.optimizer.train_batch_size
    problems: list[Problem] = []
    reached: list[list[DatasetSpec]] = []
    for declared, change in ((datasets.images, _unchanged), (datasets.evals, held_out_spec)):
        reached.append([])
        for dataset in declared:
            spec = change(dataset_spec(dataset, config, datasets.embeds_of(dataset)))
            try:
                fetch_images([spec], cache_dir, run)
            except DatasetError as error:
                problems += error.problems
            else:
                reached[-1].append(spec)
    training, held_out = reached
    specs = (*training, *held_out)
    with run.phase("scan", unit="images") as progress:
        found = find_images(
            specs,
            cache_dir=cache_dir,
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
        )
    found = replace(found, problems=(*problems, *found.problems))
    trained, refused = plan_datasets(training, found, seed=_seed(loaded), batch_size=batch_size)
    measured: tuple[DatasetPlan, ...] = ()
    if held_out:
        alone = replace(found, problems=())
        measured, more = plan_datasets(held_out, alone, seed=_seed(loaded), batch_size=batch_size)
        refused += [problem for problem in more if problem not in refused]
    return _Looked(specs=specs, found=found, training=trained, held_out=measured, problems=tuple(refused))


def _unchanged(spec: DatasetSpec) -> DatasetSpec:
    return spec


def _mask_problems(loaded: LoadedConfig, looked: _Looked, run: Reporter) -> list[Problem]:
    """What is wrong with the masks of the images."""
    config = loaded.config
    plan = make_plan((*looked.training, *looked.held_out), config.data.data_backend_sampling)
    try:
        scan_masks(config, loaded.datasets, plan, HeldOut(), run)
    except DatasetError as error:
        return list(error.problems)
    return []


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
