"""Real runs of the real command on the demo base, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from simpletuner.cli.main import main

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:  # scripts/ and tests/ are not installed
    sys.path.insert(0, ROOT)

COLOURS = ("red", "green", "blue", "orange", "purple", "white")


@dataclass(frozen=True)
class Project:
    """A folder with a configuration, as a user has it."""

    root: Path

    @property
    def output(self) -> Path:
        return self.root / "output"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "simpletuner.cli.main", *arguments]

    def environment(self, **extra: str) -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1", "SIMPLETUNER_LANG": "en", "NO_COLOR": "1", **extra}

    def run(self, *arguments: str, timeout_s: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def set(self, **options: object) -> None:
        path = self.root / "config" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}, indent=2))

    def set_dataset(self, **options: object) -> None:
        path = self.root / "config" / "multidatabackend.json"
        datasets = json.loads(path.read_text())
        datasets[0].update(options)
        path.write_text(json.dumps(datasets, indent=2))

    def events(self, output: Path | None = None) -> list[dict[str, object]]:
        lines = ((output or self.output) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # a kill tears the last line of a session
                continue
        return found

    def losses(self, output: Path | None = None) -> dict[int, set[float]]:
        """Step -> every loss that was ever reported for it."""
        losses: dict[int, set[float]] = {}
        for event in self.events(output):
            if event["event"] == "step.finished":
                losses.setdefault(int(event["step"]), set()).add(float(event["loss"]))
        return losses


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two small folders' worth of images in two aspects, batch 2, six steps, no validation."""
    return make_project(tmp_path)


@pytest.fixture
def train(project, monkeypatch):
    """`simpletuner train WORDS ...` in this process, which has torch already."""
    monkeypatch.chdir(project.root)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("SIMPLETUNER_LANG", "en"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)

    def run(*words: str) -> None:
        assert main(["train", "--log-format", "plain", *words]) == 0

    return run


def make_project(tmp_path: Path) -> Project:
    """The project of the fixture, in a folder of the caller's."""
    images = tmp_path / "datasets" / "subject"
    images.mkdir(parents=True)
    for index in range(8):
        size = (160, 160) if index % 2 else (192, 128)
        image = Image.new("RGB", size, COLOURS[index % len(COLOURS)])
        ImageDraw.Draw(image).ellipse((20 + index, 20, 90, 100), fill=COLOURS[(index + 3) % len(COLOURS)])
        image.save(images / f"image_{index}.png")
        (images / f"image_{index}.txt").write_text(f"a photo of a sks ball number {index}\n")
    (tmp_path / "config").mkdir()
    config = {
        "model_family": "z-image",
        "model_flavour": "demo",
        "model_type": "lora",
        "output_dir": "output",
        "data_backend_config": "config/multidatabackend.json",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "checkpoint_step_interval": 2,
        "validation_disable": True,
        "mixed_precision": "no",
        "seed": 7,
    }
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    datasets = [
        {
            "id": "subject",
            "type": "local",
            "instance_data_dir": "datasets/subject",
            "caption_strategy": "textfile",
            "resolution": 128,
            "resolution_type": "pixel_area",
            "caption_dropout_probability": 0.2,
            "repeats": 1,
        },
        {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]
    (tmp_path / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    return Project(tmp_path)
