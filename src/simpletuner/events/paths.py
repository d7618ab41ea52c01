"""Where everything of a run is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MODEL_FOLDER = "transformer"
"""The result, and its form in a checkpoint, of a run that trains all weights."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run. Makes nothing, and reads no file."""

    path: Path

    @property
    def run_json(self) -> Path:
        """State, process, progress and ending."""
        return self.path / "run.json"

    @property
    def config_json(self) -> Path:
        """The effective options with their origin."""
        return self.path / "config.json"

    @property
    def events_jsonl(self) -> Path:
        """The journal."""
        return self.path / "events.jsonl"

    @property
    def log_txt(self) -> Path:
        """The same for people, in English."""
        return self.path / "log.txt"

    @property
    def heartbeat(self) -> Path:
        """Touched every two seconds; also the lock of a start."""
        return self.path / "heartbeat"

    @property
    def control(self) -> Path:
        """Commands as files."""
        return self.path / "control"

    @property
    def validation_images(self) -> Path:
        """Validation images and their index."""
        return self.path / "validation_images"

    @property
    def preview(self) -> Path:
        """The latest live preview of each prompt."""
        return self.path / "preview"

    @property
    def weights(self) -> Path:
        """The result."""
        return self.path / "pytorch_lora_weights.safetensors"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint, complete or not, oldest first."""
        found = {}
        for folder in self.path.iterdir() if self.path.is_dir() else ():
            match = _CHECKPOINT.fullmatch(folder.name)
            if match is not None:
                found[int(match[1])] = folder
        return dict(sorted(found.items()))
