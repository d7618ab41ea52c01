"""A run that is told to measures its drift with every validation, and tells of it."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_a_run_tells_the_drift_of_the_base_and_of_what_it_trains(project):
    project.set(
        validation_disable=False,
        validation_prompt="a red circle",
        validation_num_inference_steps=2,
        validation_step_interval=1,
        validation_turbo_drift=1,
        learning_rate=0.05,
        max_train_steps=2,
    )
    done = project.run("train")
    assert done.returncode == 0, done.stderr
    told = [event for event in project.events() if event["event"] == "validation.drift"]
    assert [event["step"] for event in told] == [0, 1, 2]
    assert len({event["base_drift"] for event in told}) == 1
    assert told[0]["drift"] == told[0]["base_drift"] > 0
    assert len({event["drift"] for event in told}) == 3
    assert (told[0]["few_steps"], told[0]["many_steps"], told[0]["num_images"]) == (8, 30, 1)
    assert "turbo drift of the base model: " in done.stderr
    assert "turbo drift 2: " in done.stderr
