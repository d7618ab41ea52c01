"""What happens to images on their way into training, end to end, in runs of the demo base."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from simpletuner.cli.main import main

WEIGHTS = "pytorch_lora_weights.safetensors"


def same_weights(project, one: str, other: str) -> bool:
    first, second = (load_file(project.root / name / WEIGHTS) for name in (one, other))
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


@pytest.mark.slow
def test_an_image_found_broken_while_caching_is_left_out_of_cold_and_warm_runs_alike(project, train):
    path = project.root / "datasets" / "subject" / "image_3.png"
    data = path.read_bytes()
    path.write_bytes(data[:-60] + bytes(20) + data[-40:])
    train("--output_dir=cold", "--cache_dir=cache")
    train("--output_dir=warm", "--cache_dir=cache")
    cold, warm = (project.events(project.root / name) for name in ("cold", "warm"))
    planned = [event["num_images"] for event in cold if event["event"] == "dataset.planned"]
    assert planned == [8, 7]
    assert [event["num_images"] for event in warm if event["event"] == "dataset.planned"] == [7]
    for events in (cold, warm):
        told = [event["problem"] for event in events if event["event"] == "problem"]
        assert any(p["code"] == "W-IMAGE-UNREADABLE" and "image_3.png" in p["params"]["files"] for p in told)
    assert project.losses(project.root / "cold") == project.losses(project.root / "warm")
    assert same_weights(project, "cold", "warm")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["vae_cache_ondemand", "vae_cache_disable"])
def test_encoding_while_training_makes_the_steps_of_a_cache_whether_resumed_or_not(project, train, way):
    train("--output_dir=cached", "--cache_dir=one")
    train("--output_dir=straight", "--cache_dir=two", f"--{way}=true")
    train("--output_dir=halves", "--cache_dir=three", f"--{way}=true", "--max_train_steps=3")
    train("--output_dir=halves", "--cache_dir=three", f"--{way}=true")
    assert project.losses(project.root / "cached") == project.losses(project.root / "straight")
    assert same_weights(project, "cached", "straight")
    assert same_weights(project, "straight", "halves")
    written = list((project.root / "two").rglob("vae/**/*.safetensors"))
    assert bool(written) == (way == "vae_cache_ondemand")


@pytest.mark.slow(seconds=15)
def test_fresh_crops_in_every_epoch_resume_as_if_nothing_had_happened(project, train):
    project.set_dataset(vae_cache_clear_each_epoch=True, crop=True, resolution=96, repeats=0)
    train("--output_dir=straight", "--max_train_steps=10")
    train("--output_dir=halves", "--max_train_steps=7")
    train("--output_dir=halves", "--max_train_steps=10")
    assert same_weights(project, "straight", "halves")
    assert not list(project.root.rglob("vae/**/*.safetensors"))
    project.set_dataset(vae_cache_clear_each_epoch=False)
    train("--output_dir=fixed", "--max_train_steps=10")
    fresh, fixed = (project.losses(project.root / name) for name in ("straight", "fixed"))
    num_first = 4  # 8 images in batches of 2
    assert all(abs(min(fresh[step]) - min(fixed[step])) < 1e-5 for step in range(1, num_first + 1))
    assert fresh != fixed


@pytest.mark.slow
def test_unreadable_images_stop_a_run_that_asks_for_it(project, train, monkeypatch, capsys):
    (project.root / "datasets" / "subject" / "bad.jpg").write_bytes(b"no image")
    project.set_dataset(unreadable_images="stop")
    assert main(["train", "--log-format", "plain"]) != 0
    assert "E-IMAGE-UNREADABLE" in capsys.readouterr().err
    assert json.loads((project.output / "run.json").read_text())["state"] == "failed"


@pytest.mark.slow(seconds=22)
def test_two_runs_fill_one_cache_at_once(project, train):
    options = ("--log-format=plain", "--cache_dir=shared", "--max_train_steps=2")
    runs = [project.start("train", f"--output_dir={name}", *options) for name in ("one", "two")]
    assert [run.wait(timeout=240) for run in runs] == [0, 0]
    for run in runs:
        run.communicate()
    train("--output_dir=alone", "--max_train_steps=2")
    losses = [project.losses(project.root / name) for name in ("one", "two", "alone")]
    assert losses[0] == losses[1] == losses[2]
    assert same_weights(project, "one", "two")
    assert same_weights(project, "one", "alone")
