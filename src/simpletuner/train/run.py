"""One training run from a parsed configuration to the finished adapter."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.adapters.lora import disabled
from simpletuner.config.datasets import encodes_while_training
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config, options
from simpletuner.data.latents import PlanAgainError
from simpletuner.data.loader import Latents, Masks, iterate_batches
from simpletuner.data.masks import MaskDraw
from simpletuner.data.plan import plan_parts
from simpletuner.data.prompts import PromptStore
from simpletuner.data.records import Plan
from simpletuner.data.sampler import Sampler
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.signals import StopRequest
from simpletuner.events.types import CheckpointDeleted, CheckpointSaved, Event, ProblemReported, RunPlanned
from simpletuner.models.places import public_name
from simpletuner.models.weights import PipelineFiles
from simpletuner.optim.schedules import schedule_problems
from simpletuner.optim.settings import state_layout
from simpletuner.optim.state import averaged_weights, optimizer_state, restore_optimizer_
from simpletuner.planner.estimate import Estimate
from simpletuner.problems import ConfigError, ExitCode, Problem, Severity, SimpletunerError
from simpletuner.train.account import Account
from simpletuner.train.assist import read_assistant
from simpletuner.train.build import (
    Training,
    build_training,
    optimizer_settings,
    schedule_settings,
    step_settings,
    trained_weights,
    trigger_words,
)
from simpletuner.train.checkpoint import (
    delete_old_checkpoints,
    load_average,
    load_optimizer_state,
    save_checkpoint,
    total_bytes,
)
from simpletuner.train.device import Compute, device_name, settle_compute
from simpletuner.train.evaluate import Evaluator, HeldOutData, evaluation_interval
from simpletuner.train.find import find_model
from simpletuner.train.flow_options import deciding_options
from simpletuner.train.images import Validator
from simpletuner.train.loop import Ending, LoopSettings, run_loop
from simpletuner.train.offload import announce_offload
from simpletuner.train.oom import is_out_of_memory, out_of_memory
from simpletuner.train.prepare import (
    Vae,
    fill_latent_cache,
    fill_mask_cache,
    fill_prompt_cache,
    free_memory,
    run_prompts,
)
from simpletuner.train.resume import Checkpoint, Recipe, recipe_problems
from simpletuner.train.rollouts import make_rollout, rollout_cost, rollout_settings
from simpletuner.train.start import Start, plan_again, validation_prompts
from simpletuner.train.step import MicroBatch, StepResult, train_step
from simpletuner.train.trained import Trained


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. `weights` is the finished adapter, `sheet` the before-and-after picture."""

    exit_code: ExitCode
    step: int
    weights: Path | None = None
    sheet: Path | None = None


def train(
    loaded: LoadedConfig,
    start: Start,
    *,
    run: RunRecorder,
    stop: StopRequest,
    headings: Callable[[int], str] = "step {}".format,
    measurements: Path | None = None,
) -> Outcome:
    """Train as `loaded` says from `start` on, in the directory of `run`, and finish `run`.

    Args:
        stop: polled between steps; its signal handlers are installed by the caller.
        headings: step -> heading of its column in the contact sheet; step 0 is the base model.
        measurements: the file to which what the run took is added, see `planner.records`; None: none.
    Raises:
        SimpletunerError: whatever the user can mend.
        KeyboardInterrupt: asked to leave before there was anything to save.
    """
    parts = _Run(loaded, start, run=run, stop=stop, headings=headings, measurements=measurements)
    try:
        with parts.cleanup:
            outcome = parts.carry_out()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise parts.out_of_memory(error) from error
    if outcome.exit_code is ExitCode.OK:
        run.finish(output=outcome.weights.name if outcome.weights else None)
    else:
        reason = "stop-requested" if outcome.exit_code is ExitCode.STOPPED else "interrupted"
        run.finish(state="stopped", exit_code=outcome.exit_code, reason=reason)
    return outcome


class _Run:
    """The parts of one run; `carry_out` puts them together."""

    def __init__(
        self,
        loaded: LoadedConfig,
        start: Start,
        *,
        run: RunRecorder,
        stop: StopRequest,
        headings: Callable[[int], str],
        measurements: Path | None,
    ) -> None:
        self._measurements = measurements
        self._loaded = loaded
        self._start = start
        self._config = start.config
        self._output_dir = run.directory.path
        self._run = run
        self._stop = stop
        self._headings = headings
        self._account: Account | None = None
        self.cleanup = ExitStack()

    @cached_property
    def _trained(self) -> Trained:
        loaded = self._loaded
        words = trigger_words(loaded.datasets.images)
        return trained_weights(self._config, config_hash=config_hash(loaded.config), trigger_words=words)

    def out_of_memory(self, error: BaseException) -> SimpletunerError:
        """What to tell of a run that found no memory."""
        if self._account is None:
            return out_of_memory(error, None, phase="start")
        return out_of_memory(error, self._account.expected(), phase=self._account.meter.phase)

    def carry_out(self) -> Outcome:
        config, run, checkpoint = self._config, self._run, self._start.checkpoint
        with self._stop.interruptible():
            compute = settle_compute(config, run)
            start_step = self._check_checkpoint(checkpoint, self._recipe(self._start.plan))
            files, assistant_file = find_model(config, run)
            assistant = read_assistant(config, assistant_file, files.transformer)
            key = assistant.key if assistant is not None else ""
            announce_offload(config.memory, files.transformer, compute, run, addition_key=key)
            account = Account(config, self._loaded.datasets, device=compute.device, records=self._measurements)
            self._account = account
            datasets = self._loaded.datasets
            encodes = any(map(encodes_while_training, (*datasets.images, *datasets.evals)))
            vae = Vae(config, files=files, compute=compute, run=run, is_needed_throughout=encodes)
            start, prompts, latents = self._fill_caches(account, files, vae, compute, start_step=start_step)
            masks, held_out = self._fill_masks(start, latents)
            requests, plan, sampler, total_steps = start.requests, start.plan, start.sampler, start.total_steps
            recipe = self._recipe(plan)
            account.look_at(plan, total_steps, lambda prompt: len(prompts.get(prompt)))
            account.before_model()
            account.meter.enter("load")
            training = build_training(
                config,
                files=files,
                assistant=assistant,
                prompts=prompts,
                trained=self._trained,
                compute=compute,
                run=run,
            )
            validator = Validator(
                config,
                requests=requests,
                training=training,
                vae=vae,
                run=run,
                stop=self._stop,
                headings=self._headings,
            )
            evaluator = Evaluator(config.validation, held_out, training=training, run=run, stop=self._stop)
            if checkpoint is not None:
                self._trained.load(checkpoint.path, training.transformer)
                state = load_optimizer_state(checkpoint)
                restore_optimizer_(training.optimizer, state, name=config.optimizer.optimizer)
                self._restore_average(training, checkpoint)
            account.meter.enter("validation")
            if start_step == 0:
                evaluator.evaluate(0)
            validator.show_base()
            if start_step and config.validation.validation_on_startup:
                validator.show(start_step)
        batches = self.cleanup.enter_context(
            closing(
                micro_batches(
                    sampler,
                    latents,
                    start=start_step * config.optimizer.gradient_accumulation_steps,
                    device=compute.device,
                    prefetch=config.data.dataloader_prefetch_qlen if config.data.dataloader_prefetch else 0,
                    sigma_offsets={one.id: one.timestep_sampling_offset for one in self._loaded.datasets.images},
                    masks=masks,
                )
            )
        )

        def validate(step: int) -> None:
            with account.meter.within("validation"):
                validator.show(step)

        def emit(event: Event) -> None:
            account.step_done(event)
            run.emit(event)

        free_memory(compute.device)  # what reading and quantising the model left behind
        account.meter.enter("training")
        ending, step = run_loop(
            batches,
            settings=self._loop_settings(start, start_step=start_step),
            update=self._updater(training),
            save=lambda step: self._save(training, recipe, step),
            validate=validate,
            evaluate=evaluator.evaluate,
            steering=_Steering(run, self._stop),
            emit=emit,
        )
        for measured in account.close():
            run.emit(measured)
        if ending is Ending.STOPPED:
            return Outcome(exit_code=ExitCode.STOPPED, step=step, sheet=validator.sheet)
        if ending is Ending.ABANDONED:
            return Outcome(exit_code=ExitCode.INTERRUPTED, step=step, sheet=validator.sheet)
        self._save(training, recipe, step)
        weights = self._save_result(training, step)
        evaluator.evaluate(step)
        validator.show(step)
        return Outcome(exit_code=ExitCode.OK, step=step, weights=weights, sheet=validator.sheet)

    def _fill_caches(
        self, account: Account, files: PipelineFiles, vae: Vae, compute: Compute, *, start_step: int
    ) -> tuple[Start, PromptStore, Latents]:
        """Announce the run and fill its caches; the start that it has once all images are known to be whole."""
        config, datasets, start = self._config, self._loaded.datasets, self._start
        while True:
            plan, held_out = start.plan, start.data.held_out.plan
            account.look_at(plan, start.total_steps)
            self._announce(start, compute, account.expected(), start_step=start_step)
            account.meter.enter("prompts")
            prompts = fill_prompt_cache(
                run_prompts(plan, held_out, datasets, validation_prompts(config, start.requests)),
                config=config,
                files=files,
                compute=compute,
                run=self._run,
            )
            account.meter.enter("latents")
            try:
                latents = fill_latent_cache(
                    plan,
                    held_out,
                    config=config,
                    datasets=datasets,
                    vae=vae,
                    compute=compute,
                    run=self._run,
                    cleanup=self.cleanup,
                )
            except PlanAgainError:
                start = plan_again(start, datasets, run=self._run)
            else:
                return start, prompts, latents

    def _fill_masks(self, start: Start, latents: Latents) -> tuple[MaskDraw | None, HeldOutData | None]:
        """What is masked in training, and what the loss is measured on."""
        config, datasets, files = self._config, self._loaded.datasets, start.data.masks
        draw = None
        if files and config.flow.masked_loss_probability:
            store = fill_mask_cache(start.plan, files, config=config, datasets=datasets, run=self._run)
            draw = MaskDraw(store=store, probability=config.flow.masked_loss_probability, seed=config.run.seed)
        held_out = start.data.held_out
        if not held_out.sets:
            return draw, None
        store = fill_mask_cache(held_out.plan, files, config=config, datasets=datasets, run=self._run)
        return draw, HeldOutData(sets=held_out.sets, latents=latents, masks=store)

    def _recipe(self, plan: Plan) -> Recipe:
        config, trained = self._config, self._trained.identity
        return Recipe(
            seed=config.run.seed,
            plan=plan.fingerprint,
            parts=plan_parts(plan),
            batch_size=config.optimizer.train_batch_size,
            gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
            world_size=1,
            optimizer=state_layout(config.optimizer.optimizer, optimizer_settings(config).arguments),
            targets=trained.targets,
            rank=trained.rank,
            alpha=trained.alpha,
            adapter=trained.adapter,
            options=deciding_options(config, self._loaded.datasets),
        )

    def _check_checkpoint(self, checkpoint: Checkpoint | None, recipe: Recipe) -> int:
        """The step to start from. Raises ConfigError if the checkpoint is of another adapter."""
        if checkpoint is None:
            return 0
        problems = recipe_problems(checkpoint, recipe)
        if any(problem.severity is Severity.ERROR for problem in problems):
            raise ConfigError(problems)
        for problem in problems:
            self._run.emit(ProblemReported(problem=problem))
        return checkpoint.step

    def _announce(self, start: Start, compute: Compute, expected: Estimate, *, start_step: int) -> None:
        config, plan, requests, total_steps = self._config, start.plan, start.requests, start.total_steps
        for problem in schedule_problems(schedule_settings(config), total_steps):
            self._run.emit(ProblemReported(problem=problem))
        rollout = rollout_settings(config)
        if rollout is not None:
            self._run.emit(ProblemReported(problem=rollout_cost(rollout)))
        device = compute.device
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
        accumulation = config.optimizer.gradient_accumulation_steps
        first_epoch = start.sampler.batches_before(1)
        self._run.emit(
            RunPlanned(
                model=f"{config.model.model_family} {config.model.model_flavour}",
                adapter=self._trained.label,
                precision=compute.name,
                device=str(device),
                device_name=device_name(device),
                total_steps=total_steps,
                start_step=start_step,
                num_epochs=start.sampler.epoch_of(total_steps * accumulation - 1) + 1,
                steps_per_epoch=None if first_epoch is None else math.ceil(first_epoch / accumulation),
                num_datasets=len(plan.datasets),
                num_images=sum(dataset.num_images for dataset in plan.datasets),
                num_buckets=sum(len(dataset.buckets) for dataset in plan.datasets),
                effective_batch_size=config.optimizer.train_batch_size * accumulation,
                validation_step_interval=config.validation.validation_step_interval if requests else None,
                validation_num_inference_steps=config.validation.validation_num_inference_steps if requests else None,
                validation_guidance=config.validation.validation_guidance if requests else None,
                validation_sampling_shift=config.validation.validation_sampling_shift if requests else None,
                evaluation_step_interval=self._evaluation_interval(start),
                checkpoint_step_interval=config.run.checkpoint_step_interval,
                gradient_checkpointing=config.memory.gradient_checkpointing,
                memory_total_bytes=total,
                memory_free_bytes=free,
                estimated_bytes=expected.deciding.num_bytes,
                estimated_seconds=expected.time.total_s,
                estimate_source=expected.deciding.source,
            )
        )

    def _loop_settings(self, start: Start, *, start_step: int) -> LoopSettings:
        config = self._config
        return LoopSettings(
            start_step=start_step,
            total_steps=start.total_steps,
            accumulation_steps=config.optimizer.gradient_accumulation_steps,
            epoch_of=start.sampler.epoch_of,
            schedule=schedule_settings(config),
            checkpoint_interval=config.run.checkpoint_step_interval,
            validation_interval=config.validation.validation_step_interval,
            evaluation_interval=self._evaluation_interval(start) or 0,
        )

    def _evaluation_interval(self, start: Start) -> int | None:
        """Updates from one evaluation to the next; None where nothing is evaluated."""
        if not start.data.held_out.sets:
            return None
        updates_per_epoch = start.sampler.batches_per_epoch / self._config.optimizer.gradient_accumulation_steps
        return evaluation_interval(self._config.validation, updates_per_epoch=updates_per_epoch)

    def _restore_average(self, training: Training, checkpoint: Checkpoint) -> None:
        if training.ema is None:
            return
        average = load_average(checkpoint)
        if average is not None:
            training.ema.load_(average)
            return
        training.ema.begin_(checkpoint.step)
        params = {"checkpoint": checkpoint.path.name, "step": checkpoint.step}
        self._run.emit(ProblemReported(problem=Problem(code="W-EMA-BEGINS", severity=Severity.WARNING, params=params)))

    def _updater(self, training: Training) -> Callable[[Iterator[MicroBatch], float], StepResult]:
        """One optimizer update: (micro-batches, learning rate) -> what it came to."""
        settings = step_settings(self._config, rank=0, uses_dropout=self._trained.uses_dropout)
        rollout = make_rollout(self._config, training.predict_still)

        def update(batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
            result = train_step(
                batches,
                num_batches=self._config.optimizer.gradient_accumulation_steps,
                predict=training.predict,
                parent=lambda: disabled(training.transformer),
                params=training.params,
                optimizer=training.optimizer,
                released=training.released,
                learning_rate=learning_rate,
                settings=settings,
                rollout=rollout,
            )
            if training.ema is not None:
                training.ema.update_()
            return result

        return update

    def _save(self, training: Training, recipe: Recipe, step: int) -> None:
        begun = time.monotonic()
        state = optimizer_state(training.optimizer)
        with self._run.phase("checkpoint"), averaged_weights(training.optimizer):
            checkpoint = save_checkpoint(
                self._output_dir,
                step=step,
                recipe=recipe,
                write=lambda folder: self._write(folder, training, step),
                optimizer_state=state,
                average=None if training.ema is None else training.ema.state(),
            )
        self._run.emit(
            CheckpointSaved(
                step=step,
                path=checkpoint.path.name,
                bytes=total_bytes([checkpoint.path]),
                seconds=time.monotonic() - begun,
            )
        )
        for old in delete_old_checkpoints(self._output_dir, keep=self._config.run.checkpoints_total_limit):
            self._run.emit(CheckpointDeleted(step=old.step, path=old.path.name))

    def _save_result(self, training: Training, step: int) -> Path:
        begun = time.monotonic()
        with averaged_weights(training.optimizer):
            path = self._write(self._output_dir, training, step, exported=True)
        self._run.emit(
            CheckpointSaved(
                step=step,
                path=path.name,
                bytes=total_bytes([path]),
                seconds=time.monotonic() - begun,
                final=True,
            )
        )
        return path

    def _write(self, folder: Path, training: Training, step: int, *, exported: bool = False) -> Path:
        """What is trained, and beside it its moving average if there is one."""
        path = self._trained.save(folder, training.transformer, step=step, exported=exported)
        if training.ema is not None:
            with training.ema.within():
                self._trained.save(folder, training.transformer, step=step, exported=exported, averaged=True)
        return path


class _Steering:
    """What Ctrl-C and `simpletuner runs ...` ask of the loop. The run directory answers the latter by itself."""

    def __init__(self, run: RunRecorder, stop: StopRequest) -> None:
        self._run = run
        self._stop = stop

    def stop_level(self) -> int:
        return self._stop.level

    def wants_checkpoint(self) -> bool:
        return self._run.wants("checkpoint")

    def wants_validation(self) -> bool:
        return self._run.wants("validate")


def micro_batches(
    sampler: Sampler,
    latents: Latents,
    *,
    start: int,
    device: torch.device,
    prefetch: int,
    sigma_offsets: Mapping[str, float],
    masks: Masks | None = None,
) -> Generator[MicroBatch]:
    """This rank's micro-batches from number `start` on, without end, on `device`; `sigma_offsets` by dataset."""
    pins = device.type == "cuda"
    batches = iterate_batches(sampler, latents, start=start, prefetch=prefetch, masks=masks, pins=pins)
    for index, batch in enumerate(batches, start):
        yield MicroBatch(
            index=index,
            latents=[latent.to(device, non_blocking=True) for latent in batch.latents],
            prompts=batch.prompts,
            is_regularisation=batch.is_regularisation,
            names=[sample.record.key for sample in batch.samples],
            dataset=batch.dataset_id,
            sigma_offset=sigma_offsets[batch.dataset_id],
            weights=None if batch.weights is None else [_on(device, weight) for weight in batch.weights],
        )


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def config_hash(config: Config) -> str:
    """16 hex digits that stand for the options, wherever they came from and wherever on this machine the files lie."""
    values = {
        name: public_name(str(value)) if option.opt.holds in ("path", "location") and value else value
        for name, option in options().items()
        for value in [config.option(name)]
    }
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
