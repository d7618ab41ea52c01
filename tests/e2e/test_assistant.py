"""A run with an assistant: other losses, the same images of the base, and nothing of it in what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from simpletuner.adapters.files import LoraInfo, save_lora


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
def test_images_show_the_plain_base_and_the_file_holds_only_the_trained_adapter(project, precision):
    draws, name = torch.Generator().manual_seed(3), "layers.1.attention.to_q"
    shapes = {"A": (3, 192), "B": (192, 3)}
    state = {f"{name}.lora_{part}.weight": torch.randn(size, generator=draws) for part, size in shapes.items()}
    save_lora(project.root / "assistant.safetensors", state, LoraInfo(rank=3, alpha=0.1))
    project.set(
        base_model_precision=precision,
        validation_disable=False,
        validation_prompt="a red circle",
        validation_num_inference_steps=2,
        validation_step_interval=0,
        max_train_steps=2,
    )
    runs = {"plain": (), "helped": ("--assistant_lora_path", "assistant.safetensors")}
    for run, words in runs.items():
        done = project.run("train", "--output_dir", run, *words)
        assert done.returncode == 0, done.stderr
    if precision == "no_change":
        base = [next((project.root / run / "validation_images").glob("step_0_*.png")) for run in runs]
        assert base[0].read_bytes() == base[1].read_bytes()
    assert project.losses(project.root / "plain") != project.losses(project.root / "helped")
    saved = []
    for run in runs:
        with safe_open(project.root / run / "pytorch_lora_weights.safetensors", framework="pt") as file:
            saved.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
            assert "assistant" not in json.dumps(file.metadata())
    assert saved[0] == saved[1]
