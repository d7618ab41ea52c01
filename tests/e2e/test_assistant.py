"""A run with an assistant: other losses, the same images of the base, and nothing of it in what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from simpletuner.adapters.files import LoraInfo, save_lora


def write_assistant(path):
    """Random factors for one layer of the demo base."""
    draws, name = torch.Generator().manual_seed(3), "layers.1.attention.to_q"
    shapes = {"A": (3, 192), "B": (192, 3)}
    state = {f"{name}.lora_{part}.weight": torch.randn(size, generator=draws) for part, size in shapes.items()}
    save_lora(path, state, LoraInfo(rank=3, alpha=0.1))


@pytest.mark.slow
def test_images_show_the_plain_base_and_the_file_holds_only_the_trained_adapter(project, train):
    write_assistant(project.root / "assistant.safetensors")
    project.set(
        validation_disable=False,
        validation_prompt="a red circle",
        validation_num_inference_steps=2,
        validation_step_interval=0,
        max_train_steps=2,
    )
    runs = {"plain": (), "helped": ("--assistant_lora_path", "assistant.safetensors")}
    for run, words in runs.items():
        train(f"--output_dir={run}", *words)
    base = [next((project.root / run / "validation_images").glob("step_0_*.png")) for run in runs]
    assert base[0].read_bytes() == base[1].read_bytes()
    assert project.losses(project.root / "plain") != project.losses(project.root / "helped")
    saved = []
    for run in runs:
        with safe_open(project.root / run / "pytorch_lora_weights.safetensors", framework="pt") as file:
            saved.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
            assert "assistant" not in json.dumps(file.metadata())
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_a_resumed_run_makes_the_steps_of_one_that_was_left_alone(project, train):
    """With a merged assistant, a regularisation dataset and the drift measured in between."""
    write_assistant(project.root / "assistant.safetensors")
    path = project.root / "config" / "multidatabackend.json"
    subject, embeds = json.loads(path.read_text())
    kept = {**subject, "id": "kept", "is_regularisation_data": True, "repeats": 0}
    path.write_text(json.dumps([subject, kept, embeds]))
    project.set(
        assistant_lora_path="assistant.safetensors",
        assistant_lora_mode="merged",
        validation_disable=False,
        validation_prompt="a red circle",
        validation_num_inference_steps=1,
        validation_step_interval=3,
        validation_turbo_drift=1,
        checkpoint_step_interval=2,
        max_train_steps=6,
    )
    for name, words in {"straight": [()], "resumed": [("--max_train_steps", "4"), ()]}.items():
        for more in words:
            train(f"--output_dir={name}", *more)
    straight, resumed = project.root / "straight", project.root / "resumed"
    assert project.losses(straight) == project.losses(resumed)
    weights = [(run / "pytorch_lora_weights.safetensors").read_bytes() for run in (straight, resumed)]
    assert load(weights[0]).keys() == load(weights[1]).keys()
    for key, tensor in load(weights[0]).items():
        assert torch.equal(tensor, load(weights[1])[key]), key
    drifts = [
        {event["step"]: event["drift"] for event in project.events(run) if event["event"] == "validation.drift"}
        for run in (straight, resumed)
    ]
    assert drifts[0][6] == drifts[1][6]
    told = [event["regularisation_loss"] for event in project.events(straight) if event["event"] == "step.finished"]
    assert any(loss is not None and loss > 0 for loss in told)
