"""Memory that runs out: real failures of real allocations become one message that says who holds it and what helps."""

from __future__ import annotations

import pytest
import torch

from simpletuner.config.load import load_run_config
from simpletuner.hardware import space as memory
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.planner.estimate import estimate
from simpletuner.planner.from_config import Machine
from simpletuner.problems import ExitCode, SimpletunerError
from simpletuner.train import oom
from simpletuner.train import run as run_module
from simpletuner.train.oom import is_out_of_memory, out_of_memory

SPACE = memory.Space(total_bytes=24 * 10**9, free_bytes=10**9)
CARD = Machine(kind="cuda", name="GPU", device=SPACE, host=SPACE)


def real_failure() -> BaseException:
    """What torch says when main memory has no room for a tensor."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    return caught.value


@pytest.fixture
def expected(tmp_path):
    words = ("--example", "z-image-turbo.lora-24gb")
    loaded = load_run_config(words, environ={}, cwd=tmp_path, must_run=False, check_folders=False)
    return lambda machine: estimate(loaded.config, loaded.datasets, machine)


def test_what_is_no_lack_of_memory():
    assert is_out_of_memory(real_failure())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_holders_and_the_remedies_are_named(language, expected, monkeypatch):
    mine = memory.GpuProcess(pid=1, name="chrome", num_bytes=312 * 10**6)
    monkeypatch.setattr(oom, "gpu_memory", lambda: memory.GpuSpace(name="GPU", space=SPACE, processes=(mine,)))
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total capacity of 24.0 GiB "
        "of which 420.00 MiB is free."
    )
    told = out_of_memory(error, expected(CARD), phase="training")
    assert told.exit_code == ExitCode.OUT_OF_MEMORY
    title, hint = render_problem(told.problems[0], language)
    assert "1.3 GB" in title and "440 MB" in title
    assert "12 GB" in title  # the model
    assert "chrome (1) 312 MB" in title
    assert "1. base_model_precision=" in hint
    assert "-" in hint.split("\n")[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_cpu_without_memory(language, expected):
    cpu = Machine(kind="cpu", name="CPU", device=None, host=SPACE)
    told = out_of_memory(real_failure(), expected(cpu), phase="training")
    title, hint = render_problem(told.problems[0], language)
    assert "RAM" in title
    assert f"{(1 << 50) / 1e12:,.0f} TB".replace(",", "") in title
    assert "base_model_precision=" in hint


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_failure_before_anything_is_known(language):
    told = out_of_memory(MemoryError("no room"), None, phase="start")
    title, hint = render_problem(told.problems[0], language)
    assert "no room" in title
    assert "simpletuner estimate" in hint


@pytest.mark.parametrize("error", [real_failure, MemoryError])
def test_a_run_ends_with_its_own_exit_code(monkeypatch, error):
    def full(self):
        raise error()

    monkeypatch.setattr(run_module._Run, "carry_out", full)

    class Recorder:
        directory = type("Directory", (), {"path": None})

    class Start:
        config = None

    with pytest.raises(SimpletunerError) as caught:
        run_module.train(None, Start, run=Recorder, stop=None)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


def test_another_error_goes_on(monkeypatch):
    def broken(self):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(run_module._Run, "carry_out", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_module.train(
            None,
            type("S", (), {"config": None}),
            run=type("R", (), {"directory": type("D", (), {"path": None})}),
            stop=None,
        )
