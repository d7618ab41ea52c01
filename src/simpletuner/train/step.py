"""One optimizer update: draw noise, predict, differentiate, clip, move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simpletuner.experimental.rollout import Rolled, Rollout
from simpletuner.optim.build import set_learning_rate_
from simpletuner.optim.release import ReleasedUpdates
from simpletuner.problems import ExitCode, Problem, SimpletunerError
from simpletuner.train.flow import (
    FlowSettings,
    LossSettings,
    NoiseSettings,
    Weights,
    Window,
    add_noise,
    draw_noise,
    draw_sigma,
    flow_errors,
    flow_loss,
    flow_targets,
    perturbed,
)
from simpletuner.train.seeds import derive_seed, generator

Predict = Callable[[Sequence[Tensor], Tensor, Sequence[str]], Sequence[Tensor]]
"""(B noisy latents [C, h, w], sigma [B], B prompts) -> B velocities [C, h, w]."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass trains on. `index` counts this rank's micro-batches over the whole run, from 0."""

    index: int
    latents: Sequence[Tensor]  # B tensors [C, h, w], float32
    prompts: Sequence[str]
    is_regularisation: bool
    names: Sequence[str]  # the files, for messages
    dataset: str = ""
    sigma_offset: float = 0.0  # see `flow.draw_sigma`
    weights: Weights | None = None


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Everything that a step needs beside the model, the data and the optimizer."""

    seed: int
    rank: int
    flow: FlowSettings
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    max_grad_norm: float  # 0: no clipping
    clip_by_value: bool
    latents_per_token: int  # patch side squared
    uses_dropout: bool


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Means over the update's samples; `regularisation_loss` is NaN without regularisation samples."""

    loss: float
    regularisation_loss: float
    grad_norm: float  # before clipping
    num_samples: int
    mean_sigma: float
    rollout_forwards: float = 0.0  # per sample, without gradient


def train_step(
    batches: Iterable[MicroBatch],
    *,
    num_batches: int,
    predict: Predict,
    parent: Callable[[], AbstractContextManager[None]],
    params: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    settings: StepSettings,
    rollout: Rollout | None = None,
    released: ReleasedUpdates | None = None,
) -> StepResult:
    """Accumulate the gradients of `num_batches` micro-batches, then move `params` once.

    Within `parent()` the model predicts without the trained adapter: the target of regularisation samples. `rollout`
    replaces what some of the other samples show the model.

    Args:
        released: moves `params` during the backward of the only micro-batch; its optimizer is `optimizer`.
    Raises:
        SimpletunerError: the loss or a gradient is not finite; nothing was moved. With `released`, a gradient that is
            not finite has moved some of them.
    """
    losses: list[Tensor] = []
    regularisation_losses: list[Tensor] = []
    sigmas: list[Tensor] = []
    seen: list[MicroBatch] = []
    num_rollout_forwards = 0
    for batch in batches:
        window = Window.of(batch.index, num_parts=num_batches, seed=settings.seed, rank=settings.rank)
        loss_B, sigma_B, num_forwards = _batch_loss(
            batch, window, predict=predict, parent=parent, settings=settings, rollout=rollout
        )
        num_rollout_forwards += num_forwards
        if released is not None:
            if not torch.isfinite(loss_B).all():
                raise _not_finite([batch], window, sigma_B)
            released.begin(learning_rate)
        (loss_B.mean() / num_batches).backward()
        (regularisation_losses if batch.is_regularisation else losses).append(loss_B.detach())
        sigmas.append(sigma_B)
        if not torch.isfinite(loss_B).all():
            raise _not_finite([batch], window, sigma_B)
        seen.append(batch)
    grad_norm = _clip_(params, settings) if released is None else released.finish().item()
    if not math.isfinite(grad_norm):
        raise _not_finite(seen, window, torch.cat(sigmas))
    if released is None:
        set_learning_rate_(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    everything = torch.cat(losses + regularisation_losses)
    return StepResult(
        loss=everything.mean().item(),
        regularisation_loss=torch.cat(regularisation_losses).mean().item() if regularisation_losses else math.nan,
        grad_norm=grad_norm,
        num_samples=len(everything),
        mean_sigma=torch.cat(sigmas).mean().item(),
        rollout_forwards=num_rollout_forwards / len(everything),
    )


def _batch_loss(
    batch: MicroBatch,
    window: Window,
    *,
    predict: Predict,
    parent: Callable[[], AbstractContextManager[None]],
    settings: StepSettings,
    rollout: Rollout | None,
) -> tuple[Tensor, Tensor, int]:
    """Loss and noise level of each sample, both [B], and how often rollouts looked at the model. All randomness comes
    from (seed, rank, batch.index)."""
    draws = generator(settings.seed, "flow", settings.rank, batch.index)
    num_tokens = [x.shape[-2] * x.shape[-1] // settings.latents_per_token for x in batch.latents]
    sigma_B = draw_sigma(settings.flow, num_tokens, window, offset=batch.sigma_offset)
    noise = draw_noise(batch.latents, draws, settings.noise)
    perturbation = settings.noise.perturbation_at(window.number)
    seen_noise = perturbed(noise, perturbation, draws) if perturbation else noise
    sigma_on_device_B = sigma_B.to(batch.latents[0].device, non_blocking=True)
    noisy = add_noise(batch.latents, seen_noise, sigma_on_device_B)
    rolled: Rolled | None = None
    if rollout is not None and not batch.is_regularisation:
        rolled = rollout.roll_out(
            batch.latents,
            noise,
            noisy,
            sigma_B=sigma_B,
            prompts=batch.prompts,
            step=window.number,
            draws=generator(settings.seed, "rollout", settings.rank, batch.index),
        )
    if rolled is not None:
        noisy = rolled.noisy
    if settings.uses_dropout:
        torch.manual_seed(derive_seed(settings.seed, "dropout", settings.rank, batch.index))
    predicted = predict(noisy, sigma_on_device_B, batch.prompts)
    if batch.is_regularisation:
        with torch.no_grad(), parent():
            target: Sequence[Tensor] = predict(noisy, sigma_on_device_B, batch.prompts)
    else:
        target = flow_targets(batch.latents, noise) if rolled is None else rolled.targets
    if rolled is None:
        return flow_loss(predicted, target, sigma_on_device_B, settings.loss, batch.weights), sigma_B, 0
    errors = flow_errors(predicted, target, sigma_on_device_B, settings.loss)
    return torch.stack(rolled.losses(predicted, errors, batch.weights)), sigma_B, rolled.num_forwards


def _clip_(params: Sequence[nn.Parameter], settings: StepSettings) -> float:
    """Clip the gradients in place as configured; return their norm before that."""
    gradients = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if settings.max_grad_norm > 0:
        if settings.clip_by_value:
            torch.nn.utils.clip_grad_value_(params, settings.max_grad_norm, foreach=True)
        else:
            torch.nn.utils.clip_grads_with_norm_(params, settings.max_grad_norm, norm, foreach=True)
    return norm.item()


def _not_finite(batches: Sequence[MicroBatch], window: Window, sigma_B: Tensor) -> SimpletunerError:
    params = {
        "step": window.number + 1,
        "batch": batches[-1].index,
        "dataset": ", ".join(dict.fromkeys(batch.dataset for batch in batches)),
        "files": ", ".join(name for batch in batches for name in batch.names),
        "sigmas": ", ".join(f"{s:.3f}" for s in sigma_B.tolist()),
    }
    return SimpletunerError(Problem(code="E-NAN-LOSS", params=params), ExitCode.FAILED)
