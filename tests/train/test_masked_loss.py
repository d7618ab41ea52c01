"""Laws of a loss that counts only where a mask lets it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from simpletuner.experimental.reflexflow import ReflexFlow
from simpletuner.experimental.rollout import Ramp, Rollout, RolloutSettings
from simpletuner.train.flow import FlowSettings, LossSettings, flow_errors, flow_loss, weighed
from simpletuner.train.step import MicroBatch, StepSettings, train_step

KINDS = ("l2", "huber", "smooth_l1")


def samples(count: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors of mixed sizes, as a packed batch has them."""
    draws = torch.Generator().manual_seed(seed)
    shapes = [(4, 6 + 2 * i, 4 + 2 * (i % 2)) for i in range(count)]
    return [torch.randn(s, generator=draws) for s in shapes], [torch.randn(s, generator=draws) for s in shapes]


def mask(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Weights [1, h, w] with a mean of 1, about half of them 0."""
    draws = torch.Generator().manual_seed(seed)
    raw = torch.rand((1, *like.shape[-2:]), generator=draws)
    raw = raw * (torch.rand(raw.shape, generator=draws) < 0.5)
    return raw / raw.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_what_counts(kind):
    predicted, target = samples(3)
    sigma_B = torch.tensor([0.1, 0.5, 0.9])
    settings = LossSettings(kind=kind)
    weights = [mask(predicted[0]), None, mask(predicted[2], 1)]
    loss_B = flow_loss(predicted, target, sigma_B, settings, weights)
    for loss, errors, weight in zip(loss_B, flow_errors(predicted, target, sigma_B, settings), weights, strict=True):
        w = torch.ones_like(errors) if weight is None else weight.expand_as(errors)
        assert loss.item() == pytest.approx(((w * errors).double().sum() / w.double().sum()).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, [None, None], [torch.ones(1, 6, 4), torch.ones(1, 8, 6)]])
def test_a_mask_of_ones_is_none_bit_for_bit(kind, weights):
    predicted, target = samples(2)
    sigma_B = torch.tensor([0.3, 0.6])
    plain = flow_loss(predicted, target, sigma_B, LossSettings(kind=kind))
    assert torch.equal(flow_loss(predicted, target, sigma_B, LossSettings(kind=kind), weights), plain)


def rolled(reflexflow: ReflexFlow | None):
    levels = tuple(torch.linspace(1, 0.1, 8).tolist())
    settings = RolloutSettings(levels=levels, max_offset=2, ramp=Ramp(start=1.0, end=1.0), reflexflow=reflexflow)
    rollout = Rollout(settings=settings, predict=lambda x, sigma_B, prompts: [0.3 * s for s in x])
    clean, noise = samples(2)
    sigma_B = torch.tensor([0.4, 0.7])
    noisy = [torch.lerp(x, e, s) for x, e, s in zip(clean, noise, sigma_B, strict=True)]
    found = rollout.roll_out(
        clean, noise, noisy, sigma_B=sigma_B, prompts=["", ""], step=0, draws=torch.Generator().manual_seed(0)
    )
    assert found is not None
    return found, sigma_B


def loss_of(how: str, predicted, weights):
    if how in KINDS:
        return flow_loss(predicted, samples(2)[1], torch.tensor([0.4, 0.7]), LossSettings(kind=how), weights).sum()
    found, sigma_B = rolled(ReflexFlow() if how == "reflexflow" else None)
    return torch.stack(found.losses(predicted, flow_errors(predicted, found.targets, sigma_B), weights)).sum()


@pytest.mark.parametrize("how", [*KINDS, "rollout", "reflexflow"])
def test_nothing_is_learnt_where_the_mask_is_black(how):
    """No gradient there, and some of it wherever it is not black; no other loss, whatever was predicted there."""
    predicted = [x.clone().requires_grad_() for x in samples(2, seed=5)[0]]
    weights = [mask(predicted[0]), mask(predicted[1], 1)]
    loss = loss_of(how, predicted, weights)
    loss.backward()
    elsewhere = []
    for x, w in zip(predicted, weights, strict=True):
        hidden = (w == 0).expand_as(x)
        assert hidden.any()
        assert (x.grad[hidden] == 0).all()
        assert (x.grad[~hidden] != 0).all()
        elsewhere.append(torch.where(hidden, torch.full_like(x, 7.0), x.detach()))
    assert loss_of(how, elsewhere, weights).item() == loss.item()


@pytest.mark.parametrize("reflexflow", [None, ReflexFlow()])
def test_rolled_out_pictures_with_masks_of_ones_are_as_without(reflexflow):
    found, sigma_B = rolled(reflexflow)
    predicted = samples(2, seed=5)[0]
    errors = flow_errors(predicted, found.targets, sigma_B)
    plain = found.losses(predicted, errors)
    assert all(map(torch.equal, found.losses(predicted, errors, [None, None]), plain))
    assert all(map(torch.equal, found.losses(predicted, errors, [torch.ones(1, *x.shape[1:]) for x in errors]), plain))


class Model:
    """A velocity that is a picture of its own: what is learnt where can be read off."""

    def __init__(self) -> None:
        self.velocity = nn.Parameter(torch.zeros(4, 6, 4))

    def step(self, *batches: MicroBatch) -> float:
        return train_step(
            iter(batches),
            num_batches=len(batches),
            predict=lambda latents, sigma_B, prompts: [self.velocity + 0.0 * x for x in latents],
            parent=lambda: nullcontext(),
            params=[self.velocity],
            optimizer=torch.optim.SGD([self.velocity], lr=0.1),
            learning_rate=0.1,
            settings=StepSettings(
                seed=3,
                rank=0,
                flow=FlowSettings(stratified=False),
                max_grad_norm=0.0,
                clip_by_value=False,
                latents_per_token=4,
                uses_dropout=False,
            ),
        ).loss


def micro_batch(index: int, weights, *, regularisation: bool = False) -> MicroBatch:
    draws = torch.Generator().manual_seed(index)
    return MicroBatch(
        index=index,
        latents=[torch.randn(4, 6, 4, generator=draws) for _ in range(2)],
        prompts=["", ""],
        is_regularisation=regularisation,
        names=["a", "b"],
        weights=weights,
    )


LEFT = torch.cat([torch.full((1, 6, 2), 2.0), torch.zeros(1, 6, 2)], dim=-1)


def test_a_step_moves_only_what_the_masks_of_its_batches_show():
    one = Model()
    one.step(micro_batch(0, [LEFT, LEFT]), micro_batch(1, [LEFT, LEFT]))
    assert (one.velocity[..., 2:] == 0).all()
    assert (one.velocity[..., :2] != 0).all()
    some = Model()
    some.step(micro_batch(0, [LEFT, None]), micro_batch(1, [LEFT, LEFT]))
    assert (some.velocity != 0).all(), "a picture without a mask teaches all of it"


def test_masked_micro_batches_accumulate_to_their_mean_gradient():
    moves = []
    for index, weights in enumerate(([LEFT, None], None)):
        model = Model()
        model.step(micro_batch(index, weights))
        moves.append(model.velocity.detach().clone())
    together = Model()
    together.step(micro_batch(0, [LEFT, None]), micro_batch(1, None))
    assert torch.allclose(together.velocity, (moves[0] + moves[1]) / 2, atol=1e-7)


def test_a_regularisation_picture_keeps_the_model_only_where_its_mask_is_white():
    model = Model()
    with torch.no_grad():
        model.velocity.fill_(1.0)
    before = model.velocity.detach().clone()
    batch = micro_batch(0, [LEFT, LEFT], regularisation=True)
    parent = torch.zeros(4, 6, 4)
    outputs = iter([None, parent])

    def predict(latents, sigma_B, prompts):
        known = next(outputs)
        return [model.velocity + 0.0 * x if known is None else known for x in latents]

    train_step(
        iter([batch]),
        num_batches=1,
        predict=predict,
        parent=lambda: nullcontext(),
        params=[model.velocity],
        optimizer=torch.optim.SGD([model.velocity], lr=0.1),
        learning_rate=0.1,
        settings=StepSettings(
            seed=3,
            rank=0,
            flow=FlowSettings(),
            max_grad_norm=0.0,
            clip_by_value=False,
            latents_per_token=4,
            uses_dropout=False,
        ),
    )
    assert torch.equal(model.velocity[..., 2:], before[..., 2:])
    assert (model.velocity[..., :2] < before[..., :2]).all()


def test_weights_that_are_none_leave_the_errors_as_they_are():
    errors = samples(2)[0]
    assert all(map(torch.equal, weighed(errors, None), errors))
