"""Updates inside backward leave the weights and states that updates after it do, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.catalog.optimizers import MOVE_ALONE, OPTIMIZERS
from simpletuner.optim.build import build_optimizer, set_learning_rate_
from simpletuner.optim.release import ReleasedUpdates
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.optim.state import optimizer_state, restore_optimizer_

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.01, seed=5)


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(96, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 8), nn.LayerNorm(8))
    return nn.Sequential(*layers).to(dtype)


def batches(dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 96, generator=generator).to(dtype) for _ in range(count)]


def train(name: str, dtype: torch.dtype, *, released: bool, clip: float | None = None, resumed: bool = False):
    """(weights, norms of the gradients) of four updates; `resumed`: the state goes through a checkpoint in between."""
    model, norms = network(dtype), []
    params = list(model.parameters())
    optimizer = build_optimizer(name, params, SETTINGS)
    updates = ReleasedUpdates(params, optimizer, clip_value=clip) if released else None
    for index, x in enumerate(batches(dtype, 4)):
        if resumed and index == 2:
            state = optimizer_state(optimizer)
            model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
            optimizer = build_optimizer(name, params, SETTINGS)
            restore_optimizer_(optimizer, state, name=name)
        rate = 1e-2 / (1 + index)
        if updates is not None:
            updates.begin(rate)
        model(x).float().square().mean().backward()
        if updates is not None:
            norms.append(updates.finish().item())
            assert all(param.grad is None for param in params)
            continue
        norms.append(torch.nn.utils.get_total_norm([p.grad.float() for p in params]).item())
        if clip is not None:
            torch.nn.utils.clip_grad_value_(params, clip)
        set_learning_rate_(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in params], norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MOVE_ALONE))
def test_it_is_the_update_after_backward(name, dtype):
    if OPTIMIZERS[name].matrices_only:
        pytest.skip("moves matrices only")
    (one, norms), (two, other_norms) = (train(name, dtype, released=released) for released in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert norms == pytest.approx(other_norms, rel=1e-5)
    assert not torch.equal(one[0], next(network(dtype).parameters()))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_clamped_gradients_and_a_saved_state_change_nothing_of_that(name):
    one, _ = train(name, torch.bfloat16, released=False, clip=1e-3)
    two, _ = train(name, torch.bfloat16, released=True, clip=1e-3)
    again, _ = train(name, torch.bfloat16, released=False, clip=1e-3, resumed=True)
    for other in (two, again):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_are_never_there_at_once():
    model = network(torch.float32)
    params = list(model.parameters())
    updates = ReleasedUpdates(params, build_optimizer("adamw", params, SETTINGS))
    alive = []

    def look(param: torch.Tensor) -> None:
        alive.append(sum(p.grad is not None for p in params))

    for param in params:
        param.register_post_accumulate_grad_hook(look)
    updates.begin(1e-3)
    model(batches(torch.float32, 1)[0]).mean().backward()
    assert max(alive) == 0 and len(alive) == len(params)
    updates.finish()


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_what_has_no_gradient_stays_and_the_others_move_as_they_would(name):
    results = []
    for released in (False, True):
        model = network(torch.bfloat16)
        params = list(model.parameters())
        before = [p.detach().clone() for p in params]
        optimizer = build_optimizer(name, params, SETTINGS)
        updates = ReleasedUpdates(params, optimizer) if released else None
        for index, x in enumerate(batches(torch.bfloat16, 4)):
            if updates is not None:
                updates.begin(1e-2)
            part = model[2:] if index % 2 else model[:5]  # now without its beginning, now without its end
            given = torch.zeros(16, 300, dtype=torch.bfloat16) + x.mean() if index % 2 else x
            part(given).float().square().mean().backward()
            if updates is not None:
                updates.finish()
            else:
                set_learning_rate_(optimizer, 1e-2)
                optimizer.step()
                optimizer.zero_grad()
            if index == 0:
                moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
                assert moved == [True] * 6 + [False] * 2
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
