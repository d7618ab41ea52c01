"""Caches on the command line: filled without training, and never more of them made anew than a change affects."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from simpletuner.cli.main import main
from tests.e2e.conftest import COLOURS, Project

Made = Callable[..., tuple[int, int]]
FOUR_DATASETS = Path(__file__).with_name("four_datasets.json")


@pytest.fixture(autouse=True)
def _in_the_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("SIMPLETUNER_LANG", "en"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def made(capsys: pytest.CaptureFixture[str]) -> Made:
    """made(*words): how many latents and prompts `simpletuner dataset cache` had to make."""

    def fill(*words: str) -> tuple[int, int]:
        capsys.readouterr()
        assert main(["dataset", "cache", "--json", *words]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert list(summary) == ["latents", "prompts", "unreadable", "left_to_training"]
        return summary["latents"]["made"], summary["prompts"]["made"]

    return fill


def second_dataset(project: Project) -> None:
    """The same folder once more, smaller."""
    path = project.root / "config" / "multidatabackend.json"
    datasets = json.loads(path.read_text())
    datasets[0]["crop_style"] = "center"  # a random one would be another one under another name
    datasets.insert(1, {**datasets[0], "id": "smaller", "resolution": 64})
    path.write_text(json.dumps(datasets))


@pytest.mark.slow
def test_a_change_makes_anew_exactly_what_it_affects(project: Project, made: Made) -> None:
    images = project.root / "datasets" / "subject"
    second_dataset(project)
    assert made() == (16, 9)  # eight images twice, eight captions and the empty one
    project.set_dataset(repeats=5, probability=0.5, caption_dropout_probability=0.1)
    for ending in ("png", "txt"):
        (images / f"image_2.{ending}").rename(images / f"renamed.{ending}")
        (images / f"copy.{ending}").write_bytes((images / f"image_5.{ending}").read_bytes())
        (images / f"image_6.{ending}").unlink()
    touched = time.time() - 30
    os.utime(images / "image_1.png", (touched, touched))
    assert made("--output_dir=elsewhere", "--cache_dir=output/cache") == (0, 0)
    (images / "image_3.txt").write_text("another caption\n")
    assert made() == (0, 1)
    project.set_dataset(crop=True)
    # Of the first dataset alone, and there of the four images that are not square, one of which is gone.
    assert made() == (3, 0)
    project.set_dataset(crop=False)
    assert made() == (0, 0)  # the way back is free
    Image.open(images / "image_4.png").rotate(180).save(images / "image_4.png")
    assert made() == (2, 0)
    project.set_dataset(prepend_instance_prompt=True, instance_prompt="sks")
    assert made() == (0, 7)  # seven different captions are left, which the second dataset has without the word


@pytest.mark.slow
def test_a_run_may_end_with_its_caches_and_the_next_one_makes_nothing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.root / "config" / "multidatabackend.json"
    datasets = json.loads(path.read_text())
    datasets.append({**datasets[0], "id": "held-out", "dataset_type": "eval", "resolution": 64})
    path.write_text(json.dumps(datasets))
    project.set(num_eval_images=4, eval_timesteps=1)
    assert main(["train", "--log-format", "plain", "--cache-only"]) == 0
    told = capsys.readouterr()
    assert "Latents: 12, made now: 12" in told.out
    assert "as cache-only asked" in told.err
    assert json.loads((project.output / "run.json").read_text())["state"] == "done"
    assert list(project.output.glob("checkpoint-*")) == []
    assert not (project.output / "pytorch_lora_weights.safetensors").exists()
    assert main(["train", "--log-format", "plain", "--max_train_steps=1"]) == 0
    phases = [event for event in project.events() if event["event"] == "run.phase" and event.get("finished")]
    caches = ("prompts", "latents", "held_out")
    filled = [(phase["key"], phase["done"], phase["before"]) for phase in phases if phase["key"] in caches]
    assert filled == [
        *(("prompts", 9, 0), ("latents", 8, 0), ("held_out", 4, 0)),
        *(("prompts", 9, 9), ("latents", 8, 8), ("held_out", 4, 4)),
    ]
    assert [phase["key"] for phase in phases].count("text_encoder") == 1


@pytest.mark.slow
def test_an_image_that_only_decoding_shows_to_be_broken_is_left_out_and_counted(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.root / "datasets" / "subject" / "image_3.png"
    data = path.read_bytes()
    path.write_bytes(data[:-60] + bytes(20) + data[-40:])
    assert main(["dataset", "cache"]) == 0
    told = capsys.readouterr()
    assert "Latents: 7, made now: 7" in told.out
    assert "left out: 1" in told.out
    assert "W-IMAGE-UNREADABLE" in told.err
    assert main(["dataset", "scan", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["datasets"]
    assert [item["file"] for item in found["unreadable"]] == ["image_3.png"]


@pytest.mark.slow
def test_the_four_datasets_of_the_specification_train_unchanged(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """512 and 1024 px of one folder together, and regularisation images from another."""
    folders = {"pseudo-camera-10k/a_red_ball.png": (640, 512), "dreambooth-subject/1.png": (1024, 1024)}
    for at, (name, size) in enumerate(folders.items()):
        path = project.root / "datasets" / name
        path.parent.mkdir()
        image = Image.new("RGB", size, COLOURS[at])
        ImageDraw.Draw(image).ellipse((90, 90, 400, 400), fill=COLOURS[at + 2])
        image.save(path)
    (project.root / "config" / "multidatabackend.json").write_bytes(FOUR_DATASETS.read_bytes())
    project.set(train_batch_size=1, max_train_steps=2, gradient_checkpointing=False)
    assert main(["dataset", "scan", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    sizes = {found["id"]: [bucket["size"] for bucket in found["buckets"]] for found in data["datasets"]}
    assert sizes == {
        "pseudo-camera-10k-zimage": [[512, 512]],
        "dreambooth-subject": [[1024, 1024]],
        "dreambooth-subject-512": [[512, 512]],
    }
    assert data["run"]["samples_per_epoch"] == 1 + 1001 + 1001
    assert main(["train", "--log-format", "plain"]) == 0
    losses = project.losses()
    assert losses.keys() == {1, 2}
    made = {
        path.relative_to(project.root / "cache").parts[:3] for path in (project.root / "cache").rglob("*.safetensors")
    }
    assert {"/".join(parts[:-1]) for parts in made} == {"vae/zimage", "text/zimage"}
    assert {parts[2] for parts in made if parts[0] == "vae"} == {
        "pseudo-camera-10k",
        "dreambooth-subject",
        "dreambooth-subject-512",
    }
