from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from simpletuner.catalog.optimizers import OPTIMIZERS
from simpletuner.optim import bucketed
from simpletuner.optim.adamw_bf16 import AdamWBf16
from simpletuner.optim.build import build_optimizer, set_learning_rate_
from simpletuner.optim.lion import Lion
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.optim.state import restore_optimizer_

SHAPES = ((16, 7), (5, 16), (3,), (2, 3, 4), (1,))
OWN = ("adamw", "adamw_bf16", "lion")


def parameters(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(s, generator=generator) * scale).to(dtype)) for s in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (step % 3 - 2)).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        set_learning_rate_(optimizer, 1e-2 / (1 + step))
        optimizer.step()


def settings(**changes: float) -> OptimizerSettings:
    return OptimizerSettings(**{"learning_rate": 1e-2, "weight_decay": 0.1, "seed": 11, **changes})


def test_with_float32_moments_it_is_adamw():
    ours, theirs = parameters(), parameters()
    run(AdamWBf16(ours, 1e-2, weight_decay=0.1, moment_dtype=torch.float32), ours, range(20))
    run(torch.optim.AdamW(theirs, 1e-2, weight_decay=0.1, foreach=False), theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_moments_give_adamws_steps_on_average(dtype):
    count, steps = 4096, 60
    target = torch.linspace(-1, 1, 4).repeat_interleave(count).view(4, count)

    def train(make: type[torch.optim.Optimizer], dtype: torch.dtype) -> Tensor:
        param = nn.Parameter(torch.zeros(4, count, dtype=dtype))
        optimizer = make([param], 1e-3, weight_decay=0.0)
        for _ in range(steps):
            param.grad = (param.float() - target).to(dtype)
            optimizer.step()
        return param.detach().float().mean(dim=1)

    exact = train(torch.optim.AdamW, torch.float32)
    assert torch.allclose(train(AdamWBf16, dtype), exact, rtol=0.01)


def test_small_changes_arrive_where_rounding_to_nearest_loses_them():
    moved = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    stuck = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    for param, make in ((moved, AdamWBf16), (stuck, torch.optim.AdamW)):
        optimizer = make([param], 1e-4, weight_decay=0.0)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert stuck.eq(1).all()  # one unit in the last place below 1 is 2^-8, forty times the rate
    assert moved.float().mean().item() == pytest.approx(1 - 20e-4, abs=3e-4)


def test_kahan_arrives_where_chance_does_and_takes_none():
    params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    for seed, param in enumerate(params):
        optimizer = AdamWBf16([param], 1e-4, weight_decay=0.0, seed=seed, rounding="kahan")
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert torch.equal(*params)
    exact = params[0].float() + optimizer.state[params[1]]["param_rest"].float()
    assert torch.allclose(exact, torch.full_like(exact, 1 - 20e-4), rtol=0, atol=2e-5)


def test_kahan_follows_adamw_closely():
    ours, theirs = parameters(), parameters()
    run(AdamWBf16(ours, 1e-2, rounding="kahan"), ours, range(40))
    run(torch.optim.AdamW(theirs, 1e-2), theirs, range(40))
    for ours_now, theirs_now, start in zip(ours, theirs, parameters(), strict=True):
        assert (ours_now - theirs_now).norm() < 0.01 * (theirs_now - start).norm()


def test_kahan_keeps_the_second_moment_moving_where_the_nearest_stands_still():
    param = nn.Parameter(torch.zeros(64))
    optimizer = AdamWBf16([param], 1e-3, rounding="kahan")
    for step in range(400):
        param.grad = torch.full_like(param, 1.0 if step < 200 else 2.0)
        optimizer.step()
    wanted = (1 - 0.999**200) * 0.999**200 + 4 * (1 - 0.999**200)
    assert torch.allclose(optimizer.state[param]["exp_avg_sq"].float(), torch.full((64,), wanted), rtol=5e-3)


def test_moments_take_two_bytes_and_float32_parameters_stay_float32():
    params = parameters()
    optimizer = AdamWBf16(params, 1e-2)
    run(optimizer, params, range(2))
    for param in params:
        assert param.dtype == torch.float32
        assert optimizer.state[param]["exp_avg"].dtype == optimizer.state[param]["exp_avg_sq"].dtype == torch.bfloat16
    assert any(not torch.equal(p, p.bfloat16().float()) for p in params)


def test_lion_is_its_papers_algorithm():
    params = parameters()
    reference = [p.detach().clone().double() for p in params]
    momenta = [torch.zeros_like(r) for r in reference]
    optimizer = Lion(params, 1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(12):
        give_gradients(params, step)
        for value, momentum, param in zip(reference, momenta, params, strict=True):
            grad = param.grad.double()
            update = torch.sign(0.9 * momentum + 0.1 * grad) + 0.1 * value
            value -= 1e-2 * update
            momentum.mul_(0.99).add_(0.01 * grad)
        optimizer.step()
    for param, value in zip(params, reference, strict=True):
        assert torch.allclose(param.double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [AdamWBf16, Lion])
def test_bucket_size_does_not_change_the_steps(make, monkeypatch):
    results = []
    for size in (1, 30, 1 << 20):
        monkeypatch.setattr(bucketed, "_MAX_BUCKET_CPU", size)
        params = parameters()
        options = {"moment_dtype": torch.float32} if make is AdamWBf16 else {}
        run(make(params, 1e-2, weight_decay=0.1, **options), params, range(5))
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", OWN)
def test_a_parameter_without_a_gradient_waits(name):
    params = parameters()
    optimizer = build_optimizer(name, params, settings())
    run(optimizer, params, range(2))
    waiting = params[1]
    value, state = waiting.detach().clone(), copy.deepcopy(optimizer.state[waiting])
    give_gradients(params, 2)
    waiting.grad = None
    optimizer.step()
    assert torch.equal(waiting, value)
    assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(v)) for k, v in optimizer.state[waiting].items())
    run(optimizer, params, range(3, 5))
    assert int(optimizer.state[waiting]["step"]) == int(optimizer.state[params[0]]["step"]) - 1


def test_restoring_keeps_this_runs_hyper_parameters():
    params = parameters()
    old = build_optimizer("adamw_bf16", params, settings(weight_decay=0.3, beta1=0.5, beta2=0.7))
    run(old, params, range(2))
    optimizer = build_optimizer("adamw_bf16", params, settings())
    restore_optimizer_(optimizer, old.state_dict(), name="adamw_bf16")
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", OWN)
def test_betas_are_the_catalogs_unless_given(name):
    build = lambda **changes: build_optimizer(name, parameters(), settings(**changes)).param_groups[0]["betas"]  # noqa: E731
    assert build() == OPTIMIZERS[name].betas
    assert build(beta1=0.8, beta2=0.95) == (0.8, 0.95)


@pytest.mark.parametrize("make", [AdamWBf16, Lion])
def test_a_closures_loss_is_returned(make):
    params = parameters()

    def loss() -> Tensor:
        value = sum((p**2).sum() for p in params)
        value.backward()
        return value

    before = [p.detach().clone() for p in params]
    assert make(params, 1e-2).step(loss).item() == pytest.approx(sum((b**2).sum().item() for b in before), rel=1e-5)
    assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("name", ["adamw_bf16", "lion"])
def test_our_optimizers_do_not_import_the_compiler(name):
    code = f"""
import sys, torch
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.optim.state import optimizer_state, restore_optimizer_
param = torch.nn.Parameter(torch.zeros(3))
param.grad = torch.ones(3)
optimizer = build_optimizer({name!r}, [param], OptimizerSettings(learning_rate=1e-3))
optimizer.step()
optimizer.zero_grad()
restore_optimizer_(optimizer, optimizer_state(optimizer), name={name!r})
print("torch._dynamo" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
