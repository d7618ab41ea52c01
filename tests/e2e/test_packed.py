"""Small folders with many shapes, two resolutions of one folder, and datasets that come and go: whole runs."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
SHAPES = [(160, 160), (192, 128), (128, 192), (224, 96), (96, 224), (256, 96), (176, 144)]


@pytest.fixture
def shapes(project):
    """Seven images of seven shapes, at two resolutions, the larger of which comes later; batches of three."""
    images = project.root / "datasets" / "subject"
    for path in images.iterdir():
        path.unlink()
    for number, size in enumerate(SHAPES):
        Image.new("RGB", size, (30 * number, 255 - 30 * number, 90)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"sks ball, number {number}, red, round\na ball\n")
    path = project.root / "config" / "multidatabackend.json"
    subject, embeds = json.loads(path.read_text())
    subject |= {"repeats": 0, "resolution": 96}
    subject["caption_shuffle"] = {"count": 2, "position_start": 1}
    subject["caption_filter_list"] = ["s/red/blue/"]
    larger = {**subject, "id": "larger", "resolution": 128, "start_step": 3, "batch_mixing": "packed"}
    path.write_text(json.dumps([{**subject, "end_step": 5}, larger, embeds]))
    project.set(
        train_batch_size=3, gradient_accumulation_steps=2, max_train_steps=6, batch_mixing="packed", cache_dir="cache"
    )
    return project


@pytest.mark.slow
def test_a_folder_of_many_shapes_trains_packed_and_resumed_equals_uninterrupted(shapes, train):
    train("--output_dir=straight")
    reference = shapes.losses(shapes.root / "straight")
    assert sorted(reference) == list(range(1, 7))

    for steps in ("4", "6"):  # while both datasets are there, and after the first has left
        train(f"--max_train_steps={steps}")
    assert shapes.losses() == reference
    first, second = (load_file(folder / WEIGHTS) for folder in (shapes.root / "straight", shapes.output))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    planned = [event for event in shapes.events() if event["event"] == "dataset.planned"]
    assert [(p["start_step"], p["end_step"], p["batch_mixing"]) for p in planned[-2:]] == [
        (1, 5, "packed"),
        (3, None, "packed"),
    ]


def test_without_packing_the_same_folder_says_what_would_help(shapes):
    result = shapes.run("train", "--batch_mixing", "bucket")
    assert result.returncode == 5
    assert "zero usable batches" in result.stderr
    assert "batch_mixing=packed" in result.stderr
