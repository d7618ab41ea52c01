"""Which blocks are recomputed changes nothing in a run."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_losses_are_the_same_whatever_is_recomputed(project, train):
    ways = {
        "none": ["--gradient_checkpointing=false"],
        "budget": ["--gradient_checkpointing_interval=auto", "--gradient_checkpointing_budget=0.01"],
        "told": ["--gradient_checkpointing_interval=auto", "--gradient_checkpointing_offload"],
    }
    for output, arguments in ways.items():
        train(f"--output_dir={output}", "--cache_dir=cache", "--max_train_steps=3", *arguments)
        assert project.losses(project.root / output) == project.losses(project.root / "none")
    overridden = [e for e in project.events(project.root / "told") if e["event"] == "setting.overridden"]
    assert {e["option"] for e in overridden} >= {"gradient_checkpointing_interval", "gradient_checkpointing_offload"}
