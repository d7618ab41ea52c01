"""Laws of one update on a model small enough to differentiate by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from simpletuner.experimental.rollout import Ramp, Rollout, RolloutSettings
from simpletuner.i18n import render_problem
from simpletuner.problems import SimpletunerError
from simpletuner.train.flow import FlowSettings
from simpletuner.train.step import MicroBatch, StepSettings, train_step


def settings(**changes) -> StepSettings:
    values = {
        "seed": 3,
        "rank": 0,
        "flow": FlowSettings(),
        "max_grad_norm": 0.0,
        "clip_by_value": False,
        "latents_per_token": 4,
        "uses_dropout": False,
    }
    return StepSettings(**{**values, **changes})


def micro_batch(index: int, count: int = 2, *, regularisation: bool = False) -> MicroBatch:
    draws = torch.Generator().manual_seed(100 + index)
    return MicroBatch(
        index=index,
        latents=[torch.randn(4, 4, 4, generator=draws) for _ in range(count)],
        prompts=[""] * count,
        is_regularisation=regularisation,
        names=[f"image-{index}-{i}.png" for i in range(count)],
        dataset="subject",
    )


class Model:
    """velocity = weight * x + bias, with an adapter that can be taken off."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.tensor(-0.1))
        self.adapted = True
        self.seen: list[torch.Tensor] = []

    def predict(self, latents, sigma_B, prompts):
        self.seen += [x.clone() for x in latents]
        if not self.adapted:
            return [0.5 * x for x in latents]
        return [self.weight * x + self.bias for x in latents]

    @contextmanager
    def parent(self):
        self.adapted = False
        yield
        self.adapted = True

    def step(self, batches, optimizer=None, rollout=None, **changes):
        optimizer = optimizer or torch.optim.SGD([self.weight, self.bias], lr=1.0)
        return train_step(
            iter(batches),
            num_batches=len(batches),
            predict=self.predict,
            parent=self.parent,
            params=[self.weight, self.bias],
            optimizer=optimizer,
            learning_rate=0.1,
            settings=settings(**changes),
            rollout=rollout,
        )


def test_accumulated_micro_batches_equal_their_mean_gradient():
    batches = [micro_batch(0), micro_batch(1), micro_batch(2)]
    moves = []
    for batch in batches:
        model = Model()
        model.step([batch], flow=FlowSettings(stratified=False))
        moves.append(model.weight.item() - 0.3)
    together = Model()
    result = together.step(batches, flow=FlowSettings(stratified=False))
    assert together.weight.item() - 0.3 == pytest.approx(sum(moves) / 3, rel=1e-5)
    assert result.num_samples == 6


def test_the_learning_rate_of_the_step_is_used():
    batch = micro_batch(0)
    model = Model()
    model.step([batch])
    gradient = (0.3 - model.weight.item()) / 0.1
    other = Model()
    result = other.step([batch], max_grad_norm=1e-3)
    moved = math.hypot(other.weight.item() - 0.3, other.bias.item() + 0.1)
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert result.grad_norm >= abs(gradient) > 1e-3, "the norm is reported as it was before clipping"


def test_clipping_by_value_clamps_each_element():
    model = Model()
    model.step([micro_batch(0)], max_grad_norm=1e-4, clip_by_value=True)
    assert abs(model.weight.item() - 0.3) == pytest.approx(1e-5, rel=1e-2)


def test_draws_depend_on_the_index_and_not_on_what_came_before():
    alone, after_others = Model(), Model()
    alone.step([micro_batch(5)])
    after_others.step([micro_batch(4)])
    torch.rand(7)
    after_others.step([micro_batch(5)])
    for a, b in zip(alone.seen, after_others.seen[2:], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(after_others.seen[0], after_others.seen[2])


def test_regularisation_samples_train_towards_the_model_without_its_adapter():
    model = Model()
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.zero_()
    result = model.step([micro_batch(0, regularisation=True)])
    assert result.loss == 0.0 == result.regularisation_loss
    assert result.grad_norm == 0.0
    assert math.isnan(Model().step([micro_batch(0)]).regularisation_loss)


@pytest.mark.parametrize("broken", ["loss", "infinite loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_anything_moves(broken):
    model = Model()

    def predict(latents, sigma_B, prompts):
        factor = torch.tensor({"loss": math.nan, "infinite loss": math.inf}.get(broken, 0.0))
        extra = torch.sqrt(model.weight * 0) if broken == "gradient" else factor
        return [model.weight * x + extra for x in latents]

    model.predict = predict
    with pytest.raises(SimpletunerError) as caught:
        model.step([micro_batch(7)])
    assert (model.weight.item(), model.bias.item()) == (pytest.approx(0.3), pytest.approx(-0.1))
    (problem,) = caught.value.problems
    assert problem.code == "E-NAN-LOSS"
    assert "image-7-0.png" in str(problem.params["files"])
    told = {"batch": 7, "step": 8, "dataset": "subject"}
    assert {name: problem.params[name] for name in told} == told
    assert len(str(problem.params["sigmas"]).split(", ")) == 2
    for language in ("en", "es"):
        words = render_problem(problem, language)[0]
        assert all(str(word) in words for word in (8, "subject", "image-7-1.png", problem.params["sigmas"]))


def test_what_was_not_finite_is_looked_for_in_every_micro_batch_of_the_step():
    model = Model()
    model.predict = lambda latents, sigma_B, prompts: [model.weight * x + torch.sqrt(model.weight * 0) for x in latents]
    with pytest.raises(SimpletunerError) as caught:
        model.step([micro_batch(6), micro_batch(7)])
    params = caught.value.problems[0].params
    assert all(name in str(params["files"]) for name in ("image-6-0.png", "image-7-1.png"))
    assert (params["step"], len(str(params["sigmas"]).split(", "))) == (4, 4)


def rollout(model: Model, **changes) -> Rollout:
    values = {"levels": (1.0, 0.75, 0.5, 0.25), "max_offset": 2, "ramp": Ramp(start=1.0, end=1.0)}
    return Rollout(settings=RolloutSettings(**{**values, **changes}), predict=model.predict)


def test_rollouts_replace_what_the_model_sees_and_are_counted():
    plain, rolled = Model(), Model()
    plain.step([micro_batch(3, 8)])
    result = rolled.step([micro_batch(3, 8)], rollout=rollout(rolled))
    assert 0 < result.rollout_forwards <= 2
    assert not all(torch.equal(a, b) for a, b in zip(plain.seen, rolled.seen[-8:], strict=True))
    assert not torch.equal(plain.weight, rolled.weight)


def test_a_share_of_zero_and_regularisation_leave_the_step_as_it_is_bit_for_bit():
    for batch, ramp in (
        (micro_batch(3, 8), Ramp(start=0.0, end=0.0)),
        (micro_batch(3, 8, regularisation=True), Ramp(start=1.0, end=1.0)),
    ):
        plain, other = Model(), Model()
        one = plain.step([batch])
        another = other.step([batch], rollout=rollout(other, ramp=ramp))
        assert one.loss == another.loss and torch.equal(plain.weight, other.weight)
        assert len(plain.seen) == len(other.seen)
