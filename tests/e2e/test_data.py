"""What happens to images on their way into training, end to end, in runs of the demo base."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from simpletuner.cli.main import main

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def train(project, monkeypatch):
    """`simpletuner train WORDS ...` in this process, which has torch already."""
    monkeypatch.chdir(project.root)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("SIMPLETUNER_LANG", "en"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)

    def run(*words: str) -> None:
        assert main(["train", "--log-format", "plain", *words]) == 0

    return run


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
    train("--output_dir=cached", "--cache_dir=one", "--vae_batch_size=1")
    train("--output_dir=straight", "--cache_dir=two", f"--{way}=true")
    train("--output_dir=halves", "--cache_dir=three", f"--{way}=true", "--max_train_steps=3")
    train("--output_dir=halves", "--cache_dir=three", f"--{way}=true")
    assert project.losses(project.root / "cached") == project.losses(project.root / "straight")
    assert same_weights(project, "cached", "straight")
    assert same_weights(project, "straight", "halves")
    written = list((project.root / "two").rglob("vae/**/*.safetensors"))
    assert bool(written) == (way == "vae_cache_ondemand")


@pytest.mark.slow
def test_unreadable_images_stop_a_run_that_asks_for_it(project, train, monkeypatch, capsys):
    (project.root / "datasets" / "subject" / "bad.jpg").write_bytes(b"no image")
    project.set_dataset(unreadable_images="stop")
    assert main(["train", "--log-format", "plain"]) != 0
    assert "E-IMAGE-UNREADABLE" in capsys.readouterr().err
    assert json.loads((project.output / "run.json").read_text())["state"] == "failed"
