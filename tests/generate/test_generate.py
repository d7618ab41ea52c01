"""`simpletuner generate` makes what a validation makes, bit for bit, of the base, of a run and of its checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import tests.e2e.conftest as shared

pytestmark = pytest.mark.slow

PROMPTS = {"circle": "a red circle on a blue background", "ball": "a photo of a sks ball"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with a checkpoint and images at two of them."""
    project = shared.make_project(tmp_path_factory.mktemp("generate"))
    (project.root / "prompts.json").write_text(json.dumps(PROMPTS))
    project.set(
        validation_disable=False,
        user_prompt_library="prompts.json",
        validation_step_interval=2,
        validation_num_inference_steps=3,
        learning_rate=0.05,
        max_train_steps=4,
    )
    done = project.run("train")
    assert done.returncode == 0, done.stderr
    return project


def shown(project, step):
    """Prompt -> validation image of that step."""
    lines = (project.output / "validation_images" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {
        entry["prompt"]: pixels(project.output / "validation_images" / entry["file"])
        for entry in entries
        if entry["step"] == step
    }


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def generate(project, *words):
    done = project.run("generate", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_checkpoints_of_a_run_look_as_they_looked_in_training(trained):
    made = generate(trained, "output", "--grid", "checkpoint")  # the result is the checkpoint of step 4
    steps = {"base": 0, "2": 2, "4": 4}
    seen = set()
    for image in made["images"]:
        checkpoint = image["adapters"][0]["checkpoint"]
        seen.add((checkpoint, image["prompt"]))
        assert np.array_equal(pixels(image["path"]), shown(trained, steps[checkpoint])[image["prompt"]]), checkpoint
    assert seen == {(checkpoint, prompt) for checkpoint in steps for prompt in PROMPTS.values()}
    first, last = shown(trained, 0), shown(trained, 4)
    assert all(not np.array_equal(first[prompt], last[prompt]) for prompt in PROMPTS.values())
    with Image.open(made["sheet"]) as sheet:
        assert sheet.width > 3 * 192


def test_an_image_tells_how_it_was_made(trained):
    file = trained.output / "pytorch_lora_weights.safetensors"
    words = ("--flavour", "demo", "-p", "a blue square", "--lora", f"{file}@0.5", "--seed", "9", "--steps", "2")
    made = generate(trained, *words, "--cfg", "2.5", "--size", "128x96", "-o", "images", "--mixed_precision", "no")
    (image,) = made["images"]
    assert made["sheet"] is None
    assert image["path"] == "images/0001_a_blue_square.png"
    with Image.open(trained.root / image["path"]) as picture:
        assert picture.size == (128, 96)
        told = json.loads(picture.info["simpletuner"])
        text = picture.info["parameters"]
    assert told == {key: value for key, value in image.items() if key != "path"}
    assert told["adapters"] == [{"name": "pytorch_lora_weights", "strength": 0.5}]
    assert (told["guidance"], told["guidance_usual"], told["seed"], told["steps"]) == (1.5, 2.5, 9, 2)
    assert text.startswith("a blue square\n")
    assert "CFG scale: 2.5" in text and "Seed: 9" in text
    assert str(trained.root) not in text + json.dumps(told)


LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 8,
    "full_matrix": True,
    "apply_preset": {"target_module": ["Attention", "FeedForward"]},
}
KINDS = {"lokr": {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}, "full": {"model_type": "full"}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_trained_weights_looks_as_it_looked_in_training(tmp_path, kind):
    project = shared.make_project(tmp_path)
    (project.root / "lycoris.json").write_text(json.dumps(LOKR))
    project.set(
        validation_disable=False,
        validation_prompt=PROMPTS["circle"],
        validation_step_interval=0,
        validation_num_inference_steps=3,
        learning_rate=0.01,
        max_train_steps=2,
        **KINDS[kind],
    )
    done = project.run("train")
    assert done.returncode == 0, done.stderr
    (image,) = generate(project, "output")["images"]
    assert np.array_equal(pixels(image["path"]), shown(project, 2)[PROMPTS["circle"]])
    assert not np.array_equal(pixels(image["path"]), shown(project, 0)[PROMPTS["circle"]])
