"""Quantised bases train as the unquantised one does, and their runs resume, save and export."""

from __future__ import annotations

import shutil
import statistics

import pytest
from safetensors.torch import load_file

from simpletuner.catalog.precisions import PRECISIONS

NUM_STEPS = 60
WEIGHTS = "pytorch_lora_weights.safetensors"
# int4-quanto compiles an extension at its first use, which takes longer than all of these runs together.
NOT_HERE = {"int4-quanto"}
ON_A_CPU = sorted(
    name for name, row in PRECISIONS.items() if row.is_quantised and row.refused is None and name not in NOT_HERE
)


def end_of(project, output: str) -> float:
    """Mean loss of the last third of a run's steps."""
    losses = project.losses(project.root / output)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    return statistics.mean(next(iter(losses[step])) for step in range(NUM_STEPS * 2 // 3 + 1, NUM_STEPS + 1))


@pytest.fixture
def short(project):
    project.set(
        cache_dir="cache",
        max_train_steps=NUM_STEPS,
        checkpoint_step_interval=NUM_STEPS // 2,
        train_batch_size=1,
        gradient_checkpointing=False,
    )
    return project


@pytest.mark.slow(seconds=65)
def test_every_precision_learns_like_the_unquantised_base(short, train, record_property):
    train("--output_dir=no_change")
    reference = end_of(short, "no_change")
    for precision in ON_A_CPU:
        train(f"--output_dir={precision}", "--base_model_precision", precision)
        ratio = end_of(short, precision) / reference
        record_property(precision, ratio)
        print(f"{precision}: {ratio:.4f}")
        assert ratio == pytest.approx(1, abs=0.05), precision
        assert (
            load_file(short.root / precision / WEIGHTS).keys() == load_file(short.root / "no_change" / WEIGHTS).keys()
        )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-torchao", "nf4-bnb"])
def test_a_run_on_a_quantised_base_resumes_bit_for_bit(short, train, precision):
    chosen = ("--base_model_precision", precision, "--quantized_model_dir", "kept")
    train("--output_dir=straight", *chosen)
    half = short.root / "resumed" / f"checkpoint-{NUM_STEPS // 2}"
    shutil.copytree(short.root / "straight" / half.name, half)
    train("--output_dir=resumed", *chosen)
    steps = short.losses(short.root / "resumed")
    assert min(steps) == NUM_STEPS // 2 + 1
    straight = short.losses(short.root / "straight")
    assert steps == {step: straight[step] for step in steps}
    one, other = (load_file(short.root / output / WEIGHTS) for output in ("straight", "resumed"))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
