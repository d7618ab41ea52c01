"""A run that is killed at any moment and started again makes the steps of one that was left alone, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
NUM_STEPS = 40
NUM_KILLS = 20


def assert_same_weights(one, other) -> None:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name


@pytest.mark.slow(seconds=150)
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(project):
    project.set(
        max_train_steps=NUM_STEPS,
        checkpoint_step_interval=3,
        checkpoints_total_limit=2,
        gradient_accumulation_steps=2,
        lora_dropout=0.1,
        lr_scheduler="cosine",
        lr_warmup_steps=5,
    )
    straight = project.run("train", "--output_dir", "straight")
    assert straight.returncode == 0, straight.stderr
    reference = project.losses(project.root / "straight")
    assert sorted(reference) == list(range(1, NUM_STEPS + 1))

    rng = random.Random(0)
    kills = 0
    while kills < NUM_KILLS:
        process = project.start("train")
        journal = project.output / "events.jsonl"
        seen = journal.stat().st_size if journal.exists() else 0
        wait_for_growth(journal, seen, process)
        # A third of the kills fall into loading and caching, the others into steps and saves.
        time.sleep(rng.uniform(0, 2.0) if kills % 3 == 0 else rng.uniform(4.5, 9.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if process.returncode == 0:
            shutil.rmtree(project.output)  # it was done before the kill: begin again
    resumed = project.run("train")
    assert resumed.returncode == 0, resumed.stderr

    losses = project.losses()
    assert losses, "at least one step was made in some session"
    for step, values in losses.items():
        assert values == reference[step], f"step {step} of a resumed run differs"
    assert_same_weights(project.root / "straight", project.output)
    assert not list(project.output.glob(".checkpoint-*"))


def wait_for_growth(journal, seen, process) -> None:
    """Wait until this session has written its first event."""
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > seen):
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.slow(seconds=25)
def test_stopped_by_command_or_key_and_resumed_equals_uninterrupted(project):
    assert project.run("train", "--output_dir", "straight", "--max_train_steps", "16").returncode == 0
    project.set(max_train_steps=16, checkpoint_step_interval=0)
    for number, way in enumerate(("runs stop", "Ctrl-C"), 1):
        process = project.start("train")
        wait_for_step(project, process, session=number)
        if way == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            stopped = project.run("runs", "stop", "output")
            assert stopped.returncode == 0, stopped.stderr
        _, stderr = process.communicate(timeout=120)
        if process.returncode != 0:  # it was not at its end already
            assert process.returncode == 75, stderr
            assert list(project.output.glob("checkpoint-*"))
    assert project.run("train").returncode == 0
    assert project.losses() == project.losses(project.root / "straight")
    assert_same_weights(project.root / "straight", project.output)


def wait_for_step(project, process: subprocess.Popen[str], *, session: int) -> None:
    """Wait until this session has made a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return
        if (project.output / "events.jsonl").exists():
            names = [event["event"] for event in project.events()]
            starts = [index for index, name in enumerate(names) if name == "run.started"]
            if len(starts) >= session and "step.finished" in names[starts[session - 1] :]:
                return
        time.sleep(0.05)
    raise AssertionError("no step within 120 s")


@pytest.mark.slow
def test_cold_and_warm_caches_give_the_same_run(project):
    assert project.run("train").returncode == 0
    cold = project.losses()
    shutil.move(project.output / "cache", project.root / "cache")
    shutil.rmtree(project.output)
    warm = project.run("train", "--cache_dir", "cache")
    assert warm.returncode == 0, warm.stderr
    assert project.losses() == cold
    phases = {event["key"] for event in project.events() if event["event"] == "run.phase"}
    assert not phases & {"vae", "text_encoder"}, "nothing was missing, so nothing was loaded"


IMAGES = {
    "validation_disable": "false",
    "validation_prompt": "a photo of a sks ball",
    "validation_step_interval": "1",
    "validation_num_inference_steps": "1",
    "validation_resolution": "64x64",
}


@pytest.mark.slow
def test_equal_runs_write_equal_files(project):
    for folder in ("one", "another"):
        done = project.run("train", "--output_dir", f"{folder}/ball")
        assert done.returncode == 0, done.stderr
    for file in (WEIGHTS, f"checkpoint-4/{WEIGHTS}", "checkpoint-4/optimizer.pt"):
        one, another = (project.root / folder / "ball" / file for folder in ("one", "another"))
        assert one.read_bytes() == another.read_bytes(), file


@pytest.mark.slow(seconds=22)
@pytest.mark.parametrize(("optimizer", "images"), [("adamw_schedulefree", IMAGES), ("ao-adamw4bit", {})])
def test_optimizers_with_states_of_their_own_resume_as_if_nothing_had_happened(project, optimizer, images):
    """Images and checkpoints in between show what is learnt; they do not move what is trained on."""
    project.set(optimizer=optimizer, checkpoint_step_interval=0)
    straight = project.run("train", "--output_dir", "straight")
    assert straight.returncode == 0, straight.stderr
    flags = [word for name, value in images.items() for word in (f"--{name}", value)]
    first = project.run("train", "--max_train_steps", "3", "--checkpoint_step_interval", "1", *flags)
    assert first.returncode == 0, first.stderr
    second = project.run("train")
    assert second.returncode == 0, second.stderr
    assert project.losses() == project.losses(project.root / "straight")
    assert_same_weights(project.root / "straight", project.output)
