"""The file of a real run in each layout, and a run that goes on with another layout."""

from __future__ import annotations

import pytest
import safetensors.torch
from safetensors import safe_open

from simpletuner.adapters.files import load_lora
from simpletuner.adapters.formats.programs import who_loads

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_lora_format_is_the_results_layout_and_nothing_else(project):
    project.set_dataset(caption_strategy="instanceprompt", instance_prompt="a sks ball")
    assert project.run("train", "--output_dir", "straight", "--max_train_steps", "4").returncode == 0
    for layout, steps in (("kohya", 2), ("diffusers", 4)):
        done = project.run("train", "--lora_format", layout, "--max_train_steps", str(steps))
        assert done.returncode == 0, done.stderr
        path = project.output / WEIGHTS
        keys = tuple(safetensors.torch.load_file(path))
        assert all(key.startswith({"kohya": "lora_unet_", "diffusers": "transformer."}[layout]) for key in keys)
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
        programs = {verdict.program: verdict for verdict in who_loads(keys, metadata)}
        assert programs["ComfyUI"].loads and programs["diffusers"].loads and not programs["ComfyUI"].reasons
        assert metadata["modelspec.trigger_phrase"] == "a sks ball"
        assert str(project.root) not in str(metadata)
    straight, resumed = (load_lora(folder / WEIGHTS).tensors for folder in (project.root / "straight", project.output))
    assert straight.keys() == resumed.keys()
    assert all(tensor.equal(resumed[key]) for key, tensor in straight.items())
    saved = safetensors.torch.load_file(project.output / "checkpoint-4" / WEIGHTS)
    assert all(key.startswith("diffusion_model.") for key in saved)
