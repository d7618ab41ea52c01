"""What holds for every optimizer of the catalog that runs on a CPU, whichever library it comes from."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.catalog.optimizers import OPTIMIZERS, REFUSED_OPTIMIZERS, Argument
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.optim.build import build_optimizer, set_learning_rate_
from simpletuner.optim.libraries import MAKERS
from simpletuner.optim.settings import OptimizerSettings, state_layout
from simpletuner.optim.state import averaged_weights, optimizer_state, restore_optimizer_
from simpletuner.problems import ConfigError
from simpletuner.train.checkpoint import load_optimizer_state, save_checkpoint
from simpletuner.train.resume import Recipe, read_checkpoint

# What is for GPUs alone runs unpaged on a CPU, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

# A LoRA's pair and a small matrix; the pair is large enough for the libraries to quantise its states (from 4096
# elements, in blocks of 256).
SHAPES = ((16, 320), (320, 16), (5, 16))


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The second matrix is zero, as in a LoRA at its start."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
    values[1].zero_()
    return [nn.Parameter(value.to(dtype)) for value in values]


def build(name: str, params: list[nn.Parameter], **changes: object) -> torch.optim.Optimizer:
    settings = {"learning_rate": OPTIMIZERS[name].rates.usual, "seed": 11, **changes}
    return build_optimizer(name, params, OptimizerSettings(**settings))


def run(name: str, optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Updates with gradients that depend on the step alone, at a falling rate."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (step % 3 - 2)).to(param.dtype)
        set_learning_rate_(optimizer, OPTIMIZERS[name].rates.usual / (1 + step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def through_a_checkpoint(folder: Path, name: str, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    recipe = Recipe(
        seed=1,
        plan="",
        batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        optimizer=name,
        targets=("to_q",),
        rank=16,
        alpha=16.0,
    )
    state = optimizer_state(optimizer)
    saved = save_checkpoint(folder, step=4, recipe=recipe, write=lambda folder: None, optimizer_state=state)
    checkpoint = read_checkpoint(saved.path)
    assert checkpoint is not None
    return load_optimizer_state(checkpoint)


def tensors(state: object) -> list[Tensor]:
    """The plain tensors in an optimizer's state of one parameter, those inside the libraries' own kinds too."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    if isinstance(state, list):
        return [t for value in state for t in tensors(value)]
    if isinstance(state, Tensor) and type(state) is not Tensor:
        return [t for part in state.__tensor_flatten__()[0] for t in tensors(getattr(state, part))]
    return [state] if isinstance(state, Tensor) else []


@each_dtype
@each_optimizer
def test_resumed_from_a_checkpoint_it_goes_on_bit_for_bit(name, dtype, tmp_path):
    straight = matrices(dtype)
    uninterrupted = build(name, straight)
    run(name, uninterrupted, straight, range(8))

    first = matrices(dtype)
    before = build(name, first)
    run(name, before, first, range(4))
    with averaged_weights(before):  # what a checkpoint's adapter file has
        second = [nn.Parameter(p.detach().clone()) for p in first]
    after = build(name, second)
    restore_optimizer_(after, through_a_checkpoint(tmp_path, name, before), name=name)
    run(name, after, second, range(4, 8))

    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    for a, b in zip(straight, second, strict=True):
        ours, theirs = tensors(dict(uninterrupted.state[a])), tensors(dict(after.state[b]))
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@each_optimizer
def test_the_loss_of_a_small_problem_falls_to_a_tenth(name):
    """A LoRA learns a matrix of rank 4: |(B A) - W|^2 falls to a tenth of its start within 600 updates."""
    generator = torch.Generator().manual_seed(3)
    wanted = (torch.randn(40, 4, generator=generator) @ torch.randn(4, 48, generator=generator)) * 0.02
    down = nn.Parameter(torch.randn(8, 48, generator=generator) / 48**0.5)
    up = nn.Parameter(torch.zeros(40, 8))
    optimizer = build(name, [down, up], learning_rate=RATES.get(name, 3e-3), weight_decay=0.0)
    losses = []
    for _ in range(600):
        loss = (up @ down - wanted).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    with averaged_weights(optimizer), torch.no_grad():
        last = (up @ down - wanted).square().sum().item()
    assert last < 0.1 * losses[0]


# Where AdamW's rate would not do.
RATES = {
    "prodigy": 1.0,
    "torch-adadelta": 10.0,
    "torch-adafactor": 0.3,
    "torch-sgd": 0.1,
    "optimi-sgd": 0.1,
    "torch-asgd": 0.3,
    "torch-adagrad": 0.1,
    "bnb-adagrad": 0.1,
    "bnb-adagrad8bit": 0.1,
}


@each_optimizer
def test_the_state_takes_what_the_catalog_says(name):
    """Bytes per element, of a LoRA's first matrix in Z-Image: 16 x 3840."""
    params = [nn.Parameter(torch.randn(16, 3840, generator=torch.Generator().manual_seed(1))) for _ in range(3)]
    optimizer = build(name, params)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    storages = [t.untyped_storage() for param in params for t in tensors(dict(optimizer.state[param]))]
    num_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    measured = num_bytes / sum(param.numel() for param in params)
    assert measured == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.015)


@each_optimizer
def test_the_global_random_state_is_neither_read_nor_moved(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params = matrices(torch.bfloat16)
        run(name, build(name, params), params, range(3))
        results.append(params)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(seed).get_state())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_optimizer
def test_restoring_keeps_this_runs_hyper_parameters_and_the_optimizers_own_memory(name):
    params = matrices()
    old = build(name, params, weight_decay=0.3, epsilon=1e-5)
    run(name, old, params, range(2))
    optimizer = build(name, params, weight_decay=0.1)
    restore_optimizer_(optimizer, optimizer_state(old), name=name)
    (group,), (old_group,) = optimizer.param_groups, old.param_groups
    assert group["weight_decay"] == 0.1
    if OPTIMIZERS[name].epsilon:
        assert group["eps"] == 1e-8
    for key in ("k", "step", "d", "weight_sum", "setup"):
        if key in old_group and key not in {argument.name for argument in OPTIMIZERS[name].arguments}:
            assert group[key] == old_group[key], key


@each_optimizer
def test_betas_are_the_catalogs_unless_given(name):
    wanted = OPTIMIZERS[name].betas
    for changes, betas in (({}, wanted), ({"beta1": 0.8, "beta2": 0.95}, (0.8, 0.95, *wanted[2:]))):
        group = build(name, matrices(), **changes).param_groups[0]
        told = (
            tuple(group[f"beta{n}"] for n in (1, 2, 3) if f"beta{n}" in group)
            if "beta1" in group
            else group.get("betas")
        )
        assert not wanted or told == betas


def sample(argument: Argument) -> bool | int | float | str:
    if argument.kind == "flag":
        return True
    if argument.kind == "text":
        return argument.choices[-1]
    number = min(max(argument.low, 0.5), argument.high)
    return (
        max(1, int(argument.low)) * 64
        if argument.name == "block_size"
        else (5 if argument.kind == "integer" else number)
    )


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, row in OPTIMIZERS.items() for argument in row.arguments],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_argument_is_one_that_the_library_takes(name, argument):
    """It reaches the optimizer: an argument that is swallowed would be a lie."""
    value = 256 if argument.name == "block_size" else sample(argument)
    params = matrices()
    optimizer = build(name, params, arguments={argument.name: value})
    accepted = inspect.signature(type(optimizer).__init__).parameters
    assert argument.name in accepted or "Uncompiled" in type(optimizer).__name__
    run(name, optimizer, params, range(2))


@pytest.mark.parametrize(
    ("name", "arguments", "layout"),
    [
        ("adamw", {}, "adamw"),
        ("adamw", {"amsgrad": False}, "adamw"),
        ("adamw", {"amsgrad": True}, "adamw amsgrad=True"),
        ("prodigy", {"d_coef": 2.0, "slice_p": 11}, "prodigy slice_p=11"),
        ("soap", {"max_precondition_dim": 256}, "soap"),
        ("optimi-sgd", {"momentum": 0.0}, "optimi-sgd momentum=0.0"),
    ],
)
def test_the_layout_of_a_state_tells_what_fits(name, arguments, layout):
    assert state_layout(name, arguments) == layout


def test_every_name_is_built_or_refused():
    assert set(OPTIMIZERS) == set(MAKERS) | {"adamw", "adamw_bf16", "lion"}
    assert not set(OPTIMIZERS) & set(REFUSED_OPTIMIZERS)
    for row in OPTIMIZERS.values():
        assert row.rates.low <= row.rates.usual <= row.rates.high
        assert row.instead in OPTIMIZERS
        assert "cpu" in OPTIMIZERS[row.instead].devices
    assert all(refused.instead in OPTIMIZERS for refused in REFUSED_OPTIMIZERS.values())


def test_no_library_is_imported_before_it_is_asked_for():
    code = """
import sys
from simpletuner.optim.build import build_optimizer
modules = {"bitsandbytes", "torchao", "optimi", "prodigyopt", "schedulefree", "pytorch_optimizer", "transformers"}
print(sorted(modules & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("language", LANGUAGES)
def test_muon_refuses_what_is_no_matrix(language):
    with pytest.raises(ConfigError) as caught:
        build("muon", [*matrices(), nn.Parameter(torch.zeros(3))])
    (problem,) = caught.value.problems
    title, hint = render_problem(problem, language)
    assert "muon" in title
    assert "1" in title
    assert hint is not None
    assert problem.fixes[0].value == "adamw_bf16"


def test_averaged_weights_are_the_librarys_and_leave_no_trace():
    params = matrices()
    optimizer = build("adamw_schedulefree", params)
    run("adamw_schedulefree", optimizer, params, range(5))
    trained_on = [p.detach().clone() for p in params]
    with averaged_weights(optimizer):
        learnt = [p.detach().clone() for p in params]
    assert all(torch.equal(p, y) for p, y in zip(params, trained_on, strict=True))
    assert not torch.equal(learnt[0], trained_on[0])
    optimizer.eval()
    assert all(torch.equal(p, x) for p, x in zip(params, learnt, strict=True))


def test_other_optimizers_have_learnt_what_they_train_on():
    params = matrices()
    optimizer = build("adamw_bf16", params)
    run("adamw_bf16", optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    with averaged_weights(optimizer):
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert set(optimizer_state(optimizer)) == {"state", "param_groups"}


def test_no_optimizer_prints(capfd):
    for name in OPTIMIZERS:
        params = matrices()
        run(name, build(name, params), params, range(1))
    assert capfd.readouterr().out == ""
