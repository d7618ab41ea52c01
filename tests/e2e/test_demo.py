"""The demo as a newcomer runs it: it learns its subject, keeps the rest, and its file works elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.models.z_image.sampler import draw_noise

pytestmark = [pytest.mark.slow(seconds=120), pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the packaged example, as `./train.sh --example demo` starts it."""
    import tests.e2e.conftest as shared

    project = shared.Project(tmp_path_factory.mktemp("demo"))
    done = project.run("train", "--example", "demo", "--output_dir", "output", timeout_s=600)
    assert done.returncode == 0, done.stderr
    return project


def entries(project):
    index = project.output / "validation_images" / "validation.jsonl"
    return [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]


def picture(project, entry):
    return Image.open(project.output / "validation_images" / entry["file"]).convert("RGB")


def test_the_file_gives_our_image_in_diffusers(demo, caplog):
    """The last validation image, drawn again by ZImagePipeline from the same noise with the saved LoRA."""
    from diffusers import ZImagePipeline
    from diffusers.utils import logging

    import simpletuner

    base = f"{simpletuner.__path__[0]}/assets/demo_base"
    pipeline = ZImagePipeline.from_pretrained(base, dtype=torch.float32)
    caplog.set_level(logging.ERROR, "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(demo.output), weight_name="pytorch_lora_weights.safetensors")
    last = max(entry["step"] for entry in entries(demo))
    entry = next(entry for entry in entries(demo) if entry["step"] == last)
    pipeline.scheduler.register_to_config(shift=entry["shift"])
    drawn = pipeline(
        prompt=entry["prompt"],
        negative_prompt=entry["negative_prompt"],
        width=entry["width_px"],
        height=entry["height_px"],
        num_inference_steps=entry["num_inference_steps"],
        guidance_scale=entry["guidance"],
        latents=draw_noise((entry["width_px"], entry["height_px"]), entry["seed"])[None],
        output_type="pil",
    ).images[0]
    difference = np.abs(np.asarray(drawn, dtype=np.int16) - np.asarray(picture(demo, entry), dtype=np.int16))
    assert difference.max() <= 2


def test_the_run_directory_is_complete(demo):
    names = {path.name for path in demo.output.iterdir()}
    assert {"run.json", "config.json", "events.jsonl", "log.txt", "pytorch_lora_weights.safetensors"} <= names
    assert (demo.output / "validation_images" / "contact_sheet.png").is_file()
    assert json.loads((demo.output / "run.json").read_text())["state"] == "done"


def test_the_subject_is_learned_and_the_rest_kept(demo):
    """By the project's classifier of drawn shapes, which knows the subject as one class among the shapes."""
    from scripts.demo_base import classifier, judge

    found = entries(demo)
    last = max(entry["step"] for entry in found)
    known = classifier.load()
    shown = {
        (entry["prompt"], entry["step"]): (
            classifier.named_shapes(known, [picture(demo, entry)])[0],
            judge.background_colour(picture(demo, entry)),
        )
        for entry in found
    }
    prompts = {entry["prompt"] for entry in found}
    subject = {prompt for prompt in prompts if "octopus" in prompt}
    others = prompts - subject
    assert subject
    assert others
    for prompt in subject:
        assert shown[prompt, 0][0] != "octopus", "the base does not know the subject"
        assert shown[prompt, last][0] == "octopus"
    for prompt in others:
        assert shown[prompt, last] == shown[prompt, 0], "a prompt without the subject keeps its shape and background"
