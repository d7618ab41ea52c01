"""One optimizer update: draw noise, predict, differentiate, clip, move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.optim.build import set_learning_rate_
from simpletuner.optim.release import ReleasedUpdates
from simpletuner.problems import ExitCode, Problem, SimpletunerError
from simpletuner.train.flow import FlowSettings, add_noise, draw_noise, draw_sigma, flow_loss, flow_targets
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


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Everything that a step needs beside the model, the data and the optimizer."""

    seed: int
    rank: int
    flow: FlowSettings
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
    released: ReleasedUpdates | None = None,
) -> StepResult:
    """Accumulate the gradients of `num_batches` micro-batches, then move `params` once.

    Within `parent()` the model predicts without the trained adapter: the target of regularisation samples.

    Args:
        released: moves `params` during the backward of the only micro-batch; its optimizer is `optimizer`.
    Raises:
        SimpletunerError: the loss or a gradient is not finite; nothing was moved. With `released`, a gradient that is
            not finite has moved some of them.
    """
    losses: list[Tensor] = []
    regularisation_losses: list[Tensor] = []
    sigmas: list[Tensor] = []
    for batch in batches:
        loss_B, sigma_B = _batch_loss(batch, predict=predict, parent=parent, settings=settings)
        if released is not None:
            if not torch.isfinite(loss_B).all():
                raise _not_finite(batch, sigma_B)
            released.begin(learning_rate)
        (loss_B.mean() / num_batches).backward()
        (regularisation_losses if batch.is_regularisation else losses).append(loss_B.detach())
        sigmas.append(sigma_B)
        if not torch.isfinite(loss_B).all():
            raise _not_finite(batch, sigma_B)
    grad_norm = _clip_(params, settings) if released is None else released.finish().item()
    if not math.isfinite(grad_norm):
        raise _not_finite(batch, torch.cat(sigmas))
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
    )


def _batch_loss(
    batch: MicroBatch, *, predict: Predict, parent: Callable[[], AbstractContextManager[None]], settings: StepSettings
) -> tuple[Tensor, Tensor]:
    """Loss and noise level of each sample, both [B]. All randomness comes from (seed, rank, batch.index)."""
    draws = generator(settings.seed, "flow", settings.rank, batch.index)
    num_tokens = [x.shape[-2] * x.shape[-1] // settings.latents_per_token for x in batch.latents]
    sigma_B = draw_sigma(settings.flow, num_tokens, draws)
    noise = draw_noise(batch.latents, draws)
    sigma_on_device_B = sigma_B.to(batch.latents[0].device, non_blocking=True)
    noisy = add_noise(batch.latents, noise, sigma_on_device_B)
    if settings.uses_dropout:
        torch.manual_seed(derive_seed(settings.seed, "dropout", settings.rank, batch.index))
    predicted = predict(noisy, sigma_on_device_B, batch.prompts)
    if batch.is_regularisation:
        with torch.no_grad(), parent():
            target: Sequence[Tensor] = predict(noisy, sigma_on_device_B, batch.prompts)
    else:
        target = flow_targets(batch.latents, noise)
    return flow_loss(predicted, target), sigma_B


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


def _not_finite(batch: MicroBatch, sigma_B: Tensor) -> SimpletunerError:
    params = {
        "batch": batch.index,
        "files": ", ".join(batch.names),
        "sigmas": ", ".join(f"{s:.3f}" for s in sigma_B.tolist()),
    }
    return SimpletunerError(Problem(code="E-NAN-LOSS", params=params), ExitCode.FAILED)
