"""One part of the model is in memory at a time while a run starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("startup_parts.py")


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_a_part_is_gone_before_the_next_is_loaded(project, keep):
    """The parts' memory, told by weak references to it; `keep_vae_loaded` keeps the VAE for the images."""
    project.set(
        max_train_steps=1,
        validation_disable=False,
        validation_prompt="a sks ball",
        validation_resolution="128x128",
        validation_num_inference_steps=1,
        keep_vae_loaded=keep,
    )
    told = project.root / "parts.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(told), *project.command("train")[3:]],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    begin = [["text encoder", []], ["vae", []]]
    if keep:
        assert json.loads(told.read_text()) == [*begin, ["transformer", ["vae"]]]
    else:
        assert json.loads(told.read_text()) == [*begin, ["transformer", []], ["vae", ["transformer"]]]
