"""What a run settles before torch is loaded: checkpoint, seed, validation images, the plan of the data, the length.

Most mistakes that are not in the configuration itself show up here, so their message comes within a second.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from simpletuner.config.datasets import CaptionShuffle, DatasetsConfig, ImageDataset, TextEmbeds, takes_fresh_crops
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.data.finding import has_kept_listing
from simpletuner.data.held_out import HeldOut, choose_held_out, trained_warnings
from simpletuner.data.mask_pairs import MaskFiles, pair_masks
from simpletuner.data.plan import build_plan, unreadable_warnings
from simpletuner.data.records import DatasetPlan, DropReason, Plan, Size
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import AspectChoice, CaptionSpec, CropStyle, DatasetSpec, ResizeSpec, Schedule, ShuffleSpec
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.hub import HubStorage
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.events.progress import PhaseProgress, Reporter
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.types import (
    BucketCount,
    DatasetPlanned,
    DropCount,
    ProblemReported,
    RunResumed,
    SettingOverridden,
)
from simpletuner.problems import ConfigError, DatasetError, Problem, Severity
from simpletuner.train.places import storage_of, table_of
from simpletuner.train.resume import Checkpoint, choose_checkpoint, remove_unfinished
from simpletuner.validation.requests import ImageRequest, plan_images, read_prompts


@dataclass(frozen=True, kw_only=True)
class FoundData:
    """What a run trains on and is measured by. `masks`: by dataset."""

    plan: Plan
    held_out: HeldOut
    masks: Mapping[str, MaskFiles]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of the images that are trained on, and of those that are not."""
        return self.plan, self.held_out.plan


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins. `config` has the seed that is used; without a `checkpoint` it starts afresh."""

    config: Config
    requests: tuple[ImageRequest, ...]
    checkpoint: Checkpoint | None
    data: FoundData
    sampler: Sampler
    total_steps: int

    @property
    def plan(self) -> Plan:
        """What is trained on."""
        return self.data.plan


def settle_start(loaded: LoadedConfig, *, run: RunRecorder) -> Start:
    """Clear what a killed run left, choose the checkpoint, scan the datasets.

    Raises:
        ConfigError: the checkpoint or the prompt library cannot be used; there is nothing to train.
        DatasetError: the images or captions cannot be used.
    """
    for problem in loaded.warnings:
        run.emit(ProblemReported(problem=problem))
    output_dir = run.directory.path
    remove_unfinished(output_dir)
    checkpoint = choose_checkpoint(output_dir, loaded.config.run.resume_from_checkpoint)
    if checkpoint is not None:
        run.emit(RunResumed(step=checkpoint.step, path=_shown(checkpoint.path, output_dir)))
    requests = image_requests(loaded.config)
    config = with_seed(loaded.config, checkpoint, run)
    found = find_data(config, loaded.datasets, run)
    sampler = make_sampler(config, found.plan)
    total_steps = total_updates(config, sampler)
    for problem in idle_warnings(config, sampler, total_steps):
        run.emit(ProblemReported(problem=problem))
    return Start(
        config=config,
        requests=requests,
        checkpoint=checkpoint,
        data=found,
        sampler=sampler,
        total_steps=total_steps,
    )


def plan_again(start: Start, datasets: DatasetsConfig, *, run: RunRecorder) -> Start:
    """`start` with the images that can be used now that more is known of them.

    Raises:
        DatasetError: those that are left do not make a run.
    """
    found = find_data(start.config, datasets, run)
    sampler = make_sampler(start.config, found.plan)
    return replace(
        start,
        data=found,
        sampler=sampler,
        total_steps=total_updates(start.config, sampler),
    )


def make_sampler(config: Config, plan: Plan) -> Sampler:
    """The order of training."""
    return Sampler(
        plan,
        seed=config.run.seed,
        batch_size=config.optimizer.train_batch_size,
        accumulation_steps=config.optimizer.gradient_accumulation_steps,
    )


def image_requests(config: Config) -> tuple[ImageRequest, ...]:
    """The images of each validation; none if it is switched off or there is no prompt.

    Raises:
        ConfigError: the prompt library cannot be read.
    """
    options = config.validation
    if options.validation_disable:
        return ()
    library = Path(options.user_prompt_library) if options.user_prompt_library else None
    prompts = read_prompts(options.validation_prompt, library)
    return plan_images(
        prompts,
        sizes=options.sizes,
        seed=options.validation_seed,
        images_per_prompt=options.num_validation_images,
    )


def validation_prompts(config: Config, requests: Sequence[ImageRequest]) -> list[str]:
    """The texts that images are made from: their prompts, and the negative prompt where guidance needs it."""
    prompts = {request.prompt.text for request in requests}
    if requests and config.validation.validation_guidance > 0:
        prompts.add(config.validation.validation_negative_prompt)
    return sorted(prompts)


def find_data(config: Config, datasets: DatasetsConfig, run: Reporter) -> FoundData:
    """Find images, held-out images and masks.

    Raises:
        DatasetError: with every problem of all images; of the masks if there is none of those.
    """
    problems: list[Problem] = []
    plan, held_out = Plan(datasets=(), fingerprint=""), HeldOut()
    try:
        plan = scan_datasets(config, datasets, run)
    except DatasetError as error:
        problems += error.problems
    try:
        held_out = scan_held_out(config, datasets, run)
    except DatasetError as error:
        problems += error.problems
    if problems:
        raise DatasetError(problems)
    for problem in trained_warnings(held_out, plan):
        run.emit(ProblemReported(problem=problem))
    return FoundData(plan=plan, held_out=held_out, masks=scan_masks(config, datasets, plan, held_out, run))


def scan_held_out(config: Config, datasets: DatasetsConfig, run: Reporter) -> HeldOut:
    """Find the images that the loss is measured on; none if it is not measured.

    Raises:
        DatasetError: as of `scan_datasets`.
    """
    options = config.validation
    chosen = [dataset for dataset in datasets.evals if options.eval_dataset_id in (None, dataset.id)]
    if options.eval_loss_disable or not chosen:
        return HeldOut()
    specs = [held_out_spec(dataset_spec(dataset, config, datasets.embeds_of(dataset))) for dataset in chosen]
    plan = _scan(specs, config, run)
    return choose_held_out(plan, num_images=options.num_eval_images, is_pooled=options.eval_dataset_pooling)


def held_out_spec(spec: DatasetSpec) -> DatasetSpec:
    """Without what is about training."""
    return replace(
        spec,
        repeats=0,
        probability=1.0,
        is_regularisation_data=False,
        caption_dropout_probability=0.0,
        train_batch_size=1,
        batch_mixing="bucket",
        takes_fresh_crops=False,
        schedule=Schedule(),
    )


def scan_masks(
    config: Config, datasets: DatasetsConfig, plan: Plan, held_out: HeldOut, run: Reporter
) -> dict[str, MaskFiles]:
    """Find the masks of all images that have one.

    Raises:
        DatasetError: masks that are missing or do not fit.
    """
    named = ((dataset.id, datasets.masks_of(dataset)) for dataset in (*datasets.images, *datasets.evals))
    specs = {name: dataset_spec(masks, config, datasets.text_embeds) for name, masks in named if masks is not None}
    if not specs:
        return {}
    fetch_images(tuple({spec.id: spec for spec in specs.values()}.values()), Path(config.data.cache_dir), run)
    with run.phase("mask_files", unit="files") as progress:
        return pair_masks(
            replace(plan, datasets=(*plan.datasets, *held_out.plan.datasets)),
            specs,
            cache_dir=Path(config.data.cache_dir),
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
        )


def scan_datasets(config: Config, datasets: DatasetsConfig, run: Reporter) -> Plan:
    """Find the images and sort them into buckets.

    Raises:
        DatasetError: no usable image, a damaged file, a missing caption, a bucket that cannot fill a batch.
    """
    specs = [dataset_spec(dataset, config, datasets.embeds_of(dataset)) for dataset in datasets.images]
    return _scan(specs, config, run)


def _scan(specs: Sequence[DatasetSpec], config: Config, run: Reporter) -> Plan:
    fetch_images(specs, Path(config.data.cache_dir), run)
    with run.phase("scan", unit="images") as progress:
        plan = build_plan(
            specs,
            batch_size=config.optimizer.train_batch_size,
            seed=config.run.seed,
            cache_dir=Path(config.data.cache_dir),
            on_progress=lambda done, total: progress.update(done, total=total),
            max_workers=config.data.max_workers,
            sampling=config.data.data_backend_sampling,
        )
    for problem in unreadable_warnings(plan):
        run.emit(ProblemReported(problem=problem))
    for dataset in plan.datasets:
        run.emit(_planned(dataset))
    return plan


def fetch_images(specs: Sequence[DatasetSpec], cache_dir: Path, run: Reporter) -> None:
    """Bring what is not on this machine to where it can be listed.

    Raises:
        DatasetError: something cannot be reached.
    """
    for spec in specs:
        try:
            if isinstance(spec.storage, (UrlStorage, HubStorage)) and not has_kept_listing(spec, cache_dir):
                with run.phase("fetch", unit="images") as progress:
                    spec.storage.prepare(partial(_tell, progress))
        except StorageError as error:
            raise DatasetError(error.problem(spec.id)) from error


def _tell(progress: PhaseProgress, done: int, total: int) -> None:
    progress.update(done, total=total)


def dataset_spec(dataset: ImageDataset, config: Config, embeds: TextEmbeds) -> DatasetSpec:
    """The options of one dataset as the data layer takes them; `embeds` is the entry that caches its captions."""
    storage = storage_of(dataset, cache_dir=Path(config.data.cache_dir))
    has_minimum = dataset.minimum_image_size is not None
    return DatasetSpec(
        id=dataset.id,
        storage=storage,
        table=table_of(dataset, storage),
        takes_sizes=dataset.metadata_backend == "parquet",
        keeps_listing=dataset.preserve_data_backend_cache,
        resize=ResizeSpec(
            resolution=dataset.resolution,
            resolution_type=dataset.resolution_type,
            crop=dataset.crop,
            crop_style=cast("CropStyle", dataset.crop_style),
            crop_aspect=dataset.crop_aspect,
            crop_aspect_buckets=tuple(
                AspectChoice(aspect=bucket.aspect, weight=bucket.weight or 1.0)
                for bucket in dataset.crop_aspect_buckets
            ),
            max_upscale_threshold=dataset.max_upscale_threshold,
            minimum_image_size=dataset.minimum_image_size,
            maximum_image_size=dataset.maximum_image_size,
            target_downsample_size=dataset.target_downsample_size,
            minimum_aspect_ratio=dataset.minimum_aspect_ratio,
            maximum_aspect_ratio=dataset.maximum_aspect_ratio,
            aspect_bucket_rounding=config.data.aspect_bucket_rounding,
            aspect_bucket_alignment=config.data.aspect_bucket_alignment,
        ),
        captions=CaptionSpec(
            caption_strategy=dataset.caption_strategy,
            instance_prompts=dataset.instance_prompt,
            prepend_instance_prompt=dataset.prepend_instance_prompt,
            only_instance_prompt=dataset.only_instance_prompt,
            disable_multiline_split=dataset.disable_multiline_split,
            filters=(*dataset.caption_filter_list, *embeds.caption_filter_list),
            shuffle=_shuffle(dataset.caption_shuffle, seed=config.run.seed),
        ),
        repeats=dataset.repeats,
        probability=dataset.probability,
        is_regularisation_data=dataset.is_regularisation_data,
        caption_dropout_probability=dataset.caption_dropout_probability,
        max_num_samples=dataset.max_num_samples,
        train_batch_size=dataset.train_batch_size,
        batch_mixing=dataset.batch_mixing,
        takes_fresh_crops=takes_fresh_crops(dataset),
        schedule=Schedule(
            start_epoch=dataset.start_epoch,
            start_step=dataset.start_step,
            end_epoch=dataset.end_epoch,
            end_step=dataset.end_step,
            disable_after_epoch_step=dataset.disable_after_epoch_step,
        ),
        fills_short_buckets=config.data.allow_dataset_oversubscription and "repeats" not in dataset.model_fields_set,
        prunes_short_buckets=has_minimum and not config.data.disable_bucket_pruning,
        skips_unreadable=dataset.unreadable_images == "skip",
    )


def total_updates(config: Config, sampler: Sampler) -> int:
    """Length of the run in optimizer updates.

    Raises:
        ConfigError: it has none: fewer micro-batches than one accumulation window; or its datasets end before it does.
    """
    accumulation, epochs = config.optimizer.gradient_accumulation_steps, config.run.num_train_epochs
    if config.run.max_train_steps:
        batches: int | None = config.run.max_train_steps * accumulation
    else:
        batches = sampler.batches_before(epochs)
    end = sampler.num_batches
    if batches is None or (end is not None and batches > end):
        assert end is not None, "only where datasets end is an epoch not whole"
        length = f"max_train_steps {config.run.max_train_steps}" if batches else f"num_train_epochs {epochs}"
        params: dict[str, object] = {"first": end // accumulation + 1, "length": length}
        raise ConfigError(Problem(code="E-DATASETS-END", params=params, path="/data_backend_config"))
    if batches < accumulation:
        params = {"epochs": epochs, "batches": sampler.batches_per_epoch, "accumulation": accumulation}
        raise ConfigError(Problem(code="E-NO-STEPS", params=params, path="/num_train_epochs"))
    return batches // accumulation


def idle_warnings(config: Config, sampler: Sampler, total_steps: int) -> list[Problem]:
    """One warning for each dataset that could be drawn but never is."""
    idle = sampler.idle_datasets(total_steps * config.optimizer.gradient_accumulation_steps)
    return [
        Problem(code="W-DATASET-IDLE", severity=Severity.WARNING, params={"id": name, "steps": total_steps})
        for name in idle
    ]


def _planned(dataset: DatasetPlan) -> DatasetPlanned:
    dropped = [DropCount(reason=r.value, num_images=dataset.count_dropped(r)) for r in DropReason]
    schedule = dataset.schedule
    return DatasetPlanned(
        dataset=dataset.id,
        num_images=dataset.num_images,
        num_samples=dataset.num_images * (dataset.repeats + 1),
        buckets=tuple(_bucket_count(b.size, len(b.samples)) for b in dataset.buckets),
        dropped=tuple(drop for drop in dropped if drop.num_images),
        filled=tuple(_bucket_count(b.size, b.num_images) for b in dataset.filled),
        pruned=tuple(_bucket_count(b.size, b.num_images) for b in dataset.pruned),
        batch_mixing=dataset.batch_mixing,
        start_epoch=schedule.start_epoch,
        start_step=max(schedule.start_step, 1),
        end_epoch=schedule.end_epoch,
        end_step=schedule.end_step,
        steps_of_epoch=schedule.disable_after_epoch_step,
    )


def _bucket_count(size: Size, num_images: int) -> BucketCount:
    return BucketCount(width_px=size[0], height_px=size[1], num_samples=num_images)


def _shuffle(options: CaptionShuffle | None, *, seed: int) -> ShuffleSpec | None:
    if options is None or not options.enable:
        return None
    return ShuffleSpec(
        count=options.count,
        seed=seed if options.seed is None else options.seed,
        split_on=options.split_on,
        position_start=options.position_start,
        include_original=options.include_original,
    )


def with_seed(config: Config, checkpoint: Checkpoint | None, run: Reporter) -> Config:
    """The configuration with the seed -1 replaced by the checkpoint's, or by one drawn now."""
    if config.run.seed >= 0:
        return config
    seed = checkpoint.recipe.seed if checkpoint else secrets.randbelow(2**31)
    run.emit(SettingOverridden(option="seed", requested=-1, used=seed, reason="override.seed"))
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


def _shown(path: Path, output_dir: Path) -> str:
    """Relative to the run where it lies in it, as every path of an event."""
    return path.name if path.parent == output_dir else str(path)
