"""The loss of held-out images, measured at the same noise and the same noise levels every time.

What training reports is noise for the most part: other images, other levels, other noise at every step. Here nothing
differs between two measurements but the model, so a curve of them shows whether it still learns what it was not shown,
and when it begins to learn by heart. The loss is the mean squared error of the velocity, whatever is trained with; the
levels are the midpoints of equal parts of [0, 1], whatever is trained at: runs with other settings can be compared.

Nothing here touches what training draws or moves.
"""

# Tensor shape letters: C latent channels, h w latent height and width.

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from simpletuner.config.sections.validation import ValidationSection
from simpletuner.data.held_out import HeldOutSet
from simpletuner.data.loader import Latents
from simpletuner.data.masks import MaskStore
from simpletuner.data.records import Sample
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.signals import StopRequest
from simpletuner.events.types import EvaluationFinished, HeldOutLoss
from simpletuner.optim.state import averaged_weights
from simpletuner.train.build import Training
from simpletuner.train.flow import add_noise, draw_noise, flow_loss, flow_targets
from simpletuner.train.seeds import generator
from simpletuner.train.step import Predict


class _StoppedError(Exception):
    """The run is asked to stop while it evaluates."""


@dataclass(frozen=True, kw_only=True)
class HeldOutData:
    """What the loss is measured on; no sets: there is nothing to measure."""

    sets: tuple[HeldOutSet, ...]
    latents: Latents
    masks: MaskStore


class Evaluator:
    """Measures the held-out loss of a run. A request to stop ends it, and nothing is told."""

    def __init__(
        self,
        options: ValidationSection,
        data: HeldOutData | None,
        *,
        training: Training,
        run: RunRecorder,
        stop: StopRequest,
    ) -> None:
        """`data` is None where there is nothing to measure."""
        self._options = options
        self._data = data
        self._training = training
        self._run = run
        self._stop = stop

    def evaluate(self, step: int) -> None:
        """Measure the model after `step` updates, and its averaged weights as `ema_validation` says."""
        ema, wanted = self._training.ema, self._options.ema_validation
        with suppress(_StoppedError):
            if ema is None or wanted != "ema_only":
                self._measure(step, is_averaged=False)
            if ema is not None and wanted != "none":
                with ema.within():
                    self._measure(step, is_averaged=True)

    def _measure(self, step: int, *, is_averaged: bool) -> None:
        data = self._data
        if data is None:
            return
        begun = time.monotonic()
        levels = even_levels(self._options.eval_timesteps)
        total = len(levels) * sum(len(one.samples) for one in data.sets)
        keeps_weights = nullcontext() if is_averaged else averaged_weights(self._training.optimizer)
        with self._run.phase("evaluation", total=total, unit="forwards") as progress, keeps_weights:

            def advance() -> None:
                progress.advance(1)
                if self._stop.level:
                    raise _StoppedError

            losses = tuple(
                held_out_loss(
                    one,
                    levels,
                    latents=data.latents,
                    masks=data.masks,
                    predict=self._training.predict_still,
                    seed=self._options.validation_seed,
                    device=self._training.compute.device,
                    on_forward=advance,
                )
                for one in data.sets
            )
        self._run.emit(
            EvaluationFinished(
                step=step,
                loss=sum(one.loss * one.num_images for one in losses) / sum(one.num_images for one in losses),
                losses=losses,
                sigmas=levels,
                is_averaged=is_averaged,
                seconds=time.monotonic() - begun,
            )
        )


def evaluation_interval(options: ValidationSection, *, updates_per_epoch: float) -> int:
    """Updates from one evaluation to the next; 0: none but the first and the last."""
    if options.eval_steps_interval is not None:
        return options.eval_steps_interval
    if options.eval_epoch_interval is not None:
        return max(round(options.eval_epoch_interval * updates_per_epoch), 1)
    return options.validation_step_interval


def even_levels(count: int) -> tuple[float, ...]:
    """The midpoints of `count` equal parts of [0, 1]."""
    return tuple((place + 0.5) / count for place in range(count))


def held_out_loss(
    chosen: HeldOutSet,
    levels: Sequence[float],
    *,
    latents: Latents,
    masks: MaskStore,
    predict: Predict,
    seed: int,
    device: torch.device,
    on_forward: Callable[[], None],
) -> HeldOutLoss:
    """The loss of a set at every noise level.

    Args:
        predict: without gradient and dropout.
        seed: of the noise, which is a function of it, the image and the number of the level alone.
        on_forward: called after each look at the model, which sees one noised picture at a time.
    """
    by_level = [0.0] * len(levels)
    for sample in chosen.samples:
        latent = latents.get(sample).to(device)
        weights = masks.weights(sample)
        shown = None if weights is None else [weights.to(device)]
        for number, level in enumerate(levels):
            noise = draw_noise([latent], _draws(seed, sample, number))
            sigma_B = torch.tensor([level], device=device)
            predicted = predict(add_noise([latent], noise, sigma_B), sigma_B, [sample.captions[0]])
            loss = flow_loss(predicted, flow_targets([latent], noise), sigma_B, weights=shown)
            by_level[number] += loss.item() / len(chosen.samples)
            on_forward()
    return HeldOutLoss(
        dataset=chosen.name,
        loss=sum(by_level) / len(by_level),
        num_images=len(chosen.samples),
        by_sigma=tuple(by_level),
    )


def _draws(seed: int, sample: Sample, number: int) -> torch.Generator:
    return generator(seed, "held out", sample.record.key, number)
