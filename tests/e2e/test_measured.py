"""A run tells what it took, and the next estimate of the same configuration knows."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_the_next_estimate_is_what_the_run_took(project):
    state = {"SIMPLETUNER_STATE_DIR": str(project.root / "state")}
    before = json.loads(project.run("estimate", "--json", **state).stdout)
    assert before["host"]["source"] == "computed"
    assert before["time"]["step_s"] is None
    done = project.run("train", **state)
    assert done.returncode == 0, done.stderr
    (planned,) = (event for event in project.events() if event["event"] == "run.planned")
    assert planned["estimate_source"] == "computed"
    peaks = {event["phase"]: event for event in project.events() if event["event"] == "memory.measured"}
    assert {"prompts", "latents", "load", "training"} <= peaks.keys()
    training = peaks["training"]
    assert training["estimated_bytes"] == pytest.approx(training["host_bytes"], rel=0.1)
    after = json.loads(project.run("estimate", "--json", **state).stdout)
    assert after["host"]["source"] == "measured"
    assert after["host"]["bytes"] == max(peak["host_bytes"] for peak in peaks.values())
    assert after["time"]["source"] == "measured"
    near = json.loads(project.run("estimate", "--json", "--lora_rank=8", **state).stdout)
    assert near["host"]["source"] == "corrected"
    table = project.run("estimate", "--lang=es", **state).stdout
    assert "medido" in table
    line = next(line for line in done.stderr.splitlines() + done.stdout.splitlines() if "memory at its height" in line)
    assert "estimated" in line


@pytest.mark.slow
def test_a_plan_is_followed_and_said(project):
    done = project.run("train", "--fit=5GB", "--max_train_steps=1", SIMPLETUNER_STATE_DIR=str(project.root / "state"))
    assert done.returncode == 0, done.stderr
    overridden = {e["option"]: e["used"] for e in project.events() if e["event"] == "setting.overridden"}
    assert overridden == {"gradient_checkpointing": False}
    kept = json.loads((project.output / "config.json").read_text())
    assert kept["gradient_checkpointing"] is False
    assert kept["__origins__"]["gradient_checkpointing"] == "memory_plan"
