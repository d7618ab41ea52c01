"""Masks and held-out images in real runs: what is learnt where, and that measuring it changes nothing."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw, ImageOps

pytestmark = pytest.mark.slow


def write_masks(project) -> None:
    """Of each ball, and of all but each ball; with them what is held out: the images themselves, by either mask."""
    path = project.root / "config/multidatabackend.json"
    entries = json.loads(path.read_text())
    for image in (project.root / "datasets/subject").glob("*.png"):
        with Image.open(image) as picture:
            mask = Image.new("L", picture.size, 0)
        left = 20 + int(image.stem.rpartition("_")[2])
        ImageDraw.Draw(mask).ellipse((left, 20, 90, 100), fill=255)
        for name, pixels in (("inside", mask), ("outside", ImageOps.invert(mask))):
            folder = project.root / "datasets" / name
            folder.mkdir(exist_ok=True)
            pixels.save(folder / image.name)
    for name in ("inside", "outside"):
        folder = f"datasets/{name}"
        masks = {"dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": folder}
        entries.append({**masks, "id": name})
        held_out = {"dataset_type": "eval", "instance_data_dir": "datasets/subject", "resolution": 128}
        entries.append(
            {**held_out, "id": f"{name}-held-out", "conditioning_data": name, "caption_strategy": "textfile"}
        )
    path.write_text(json.dumps(entries))
    project.set_dataset(conditioning_data="inside")


def held_out(project, output=None) -> dict[int, dict[str, float]]:
    """Step -> set -> loss."""
    found = {}
    for event in project.events(output):
        if event["event"] == "evaluation.finished":
            found[event["step"]] = {one["dataset"]: one["loss"] for one in event["losses"]}
    return found


def test_what_the_masks_show_is_learnt_and_what_they_hide_is_not(project, train):
    write_masks(project)
    project.set_dataset(caption_dropout_probability=0)
    project.set(
        max_train_steps=30,
        learning_rate=3e-3,
        lora_rank=16,
        gradient_checkpointing=False,
        checkpoint_step_interval=0,
        eval_steps_interval=0,
        eval_timesteps=3,
        num_eval_images=6,
    )
    train()
    losses = held_out(project)
    assert sorted(losses) == [0, 30]
    before, after = losses[0], losses[30]
    assert after["inside-held-out"] < 0.75 * before["inside-held-out"]
    assert after["outside-held-out"] > 0.95 * before["outside-held-out"], "without a mask it falls by two fifths"


def test_measuring_and_resuming_change_no_step(project, train):
    """With masks of half the pictures, an average of the weights, dropout: everything that draws."""
    write_masks(project)
    project.set(
        cache_dir="cache",
        masked_loss_probability=0.5,
        lora_dropout=0.1,
        use_ema=True,
        checkpoint_step_interval=2,
        eval_timesteps=3,
        num_eval_images=2,
        max_train_steps=4,
        eval_steps_interval=2,
    )

    train("--eval_loss_disable", "--output_dir=alone")
    train("--max_train_steps=2")
    train()
    alone = project.losses(project.root / "alone")
    assert sorted(alone) == [1, 2, 3, 4]
    assert alone == project.losses()
    assert held_out(project, project.root / "alone") == {}
    assert sorted(held_out(project)) == [0, 2, 4]
