"""Other adapters than LoRA, with the real command: they train, resume and stream like it, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_offload import OFFLOADS, VALIDATION, flags, pictures
from tests.e2e.test_resume import WEIGHTS, assert_same_weights

MODEL = "transformer/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.slow

LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "full_matrix": True,
    "factor": 4,
    "rank_dropout": 0.1,
    "apply_preset": {"target_module": ["Attention", "FeedForward"]},
}


@pytest.fixture
def run(train):
    """run(folder, *words): a run in a folder of its own."""
    return lambda folder, *words: train(f"--output_dir={folder}", *words)


@pytest.fixture
def lokr(project):
    (project.root / "config/lycoris_config.json").write_text(json.dumps(LOKR))
    project.set(lora_type="lycoris", optimizer="adamw_bf16")
    return project


def test_a_lokr_that_stops_and_goes_on_is_the_one_that_was_left_alone(lokr, run):
    run("straight", *flags(VALIDATION))
    assert lokr.losses(lokr.root / "straight").keys() == set(range(1, 7))
    for steps in (2, 4, 6):
        run("pieces", f"--max_train_steps={steps}", *flags(OFFLOADS["blocks"] if steps == 4 else {}))
    assert_same_weights(lokr.root / "straight", lokr.root / "pieces")
    assert lokr.losses(lokr.root / "straight") == lokr.losses(lokr.root / "pieces")
    names = load_file(lokr.root / "straight" / WEIGHTS)
    assert "diffusion_model.layers.0.attention.to_q.lokr_w1" in names
    assert json.loads((lokr.root / "straight/lycoris_config.json").read_text()) == LOKR
    assert len(set(pictures(lokr.root / "straight").values())) > 2


def test_a_lokr_on_a_quantised_base_streams_bit_for_bit(lokr, run):
    lokr.set(base_model_precision="int8", max_train_steps=2)
    run("plain")
    run("streamed", *flags(OFFLOADS["leaves from disk"]))
    assert_same_weights(lokr.root / "plain", lokr.root / "streamed")


def test_all_weights_updated_inside_backward_stop_and_go_on_as_if_nothing_had_happened(project, run):
    """Two pieces with updates inside backward are the whole with updates after it."""
    project.set(model_type="full", max_grad_norm=0.01, grad_clip_method="value", learning_rate=1e-4)
    run("straight", "--optimizer_release_gradients=false", *flags(VALIDATION))
    for steps in (3, 6):
        run("pieces", f"--max_train_steps={steps}")
    one, other = (load_file(project.root / folder / MODEL) for folder in ("straight", "pieces"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert project.losses(project.root / "straight") == project.losses(project.root / "pieces")
