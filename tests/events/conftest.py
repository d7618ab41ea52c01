"""Real child processes that record runs, and a whole run as records."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from simpletuner.events import types as t
from simpletuner.events.journal import Record
from simpletuner.problems import Problem, Severity

CHILD = Path(__file__).with_name("child_run.py")
PATIENCE_S = 20.0
START = datetime(2026, 3, 12, 10, 58, 3, tzinfo=timezone.utc)
TOTAL_STEPS = 40


class Children:
    """Starts children and ends those that are left at the end of the test."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, output_dir: Path, *options: str, wait: bool = True) -> subprocess.Popen[str]:
        """Start one; `wait` until it is at work."""
        ready = output_dir / "ready"
        ready.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(CHILD), str(output_dir), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._processes.append(process)
        if wait:
            wait_until(lambda: ready.exists() or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1]
        return process

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until `condition` holds; fail after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def children() -> Iterator[Children]:
    running = Children()
    yield running
    running.end()


@pytest.fixture
def story() -> list[Record]:
    return as_records()


def story_events() -> list[t.Event]:
    """A whole run, from start to end, with a warning, an overridden setting, a checkpoint and images."""
    return [
        t.RunStarted(
            run_id="r1",
            session=1,
            version="0.1.0",
            pid=7,
            host="h",
            argv=(),
            output_dir="/out/cat",
            config_path="config/config.json",
        ),
        t.RunPhase(key="scan", unit="images"),
        t.RunPhase(key="scan", done=26, total=26, unit="images", elapsed_s=0.3, finished=True),
        t.DatasetPlanned(
            dataset="cats",
            num_images=24,
            num_samples=48,
            buckets=(t.BucketCount(width_px=64, height_px=64, num_samples=48),),
            dropped=(t.DropCount(reason="too_small", num_images=2),),
        ),
        t.RunPlanned(
            model="z_image turbo",
            adapter="LoRA rank 16",
            precision="bf16",
            device="cuda:0",
            device_name="RTX 4090",
            total_steps=TOTAL_STEPS,
            num_epochs=1,
            num_datasets=1,
            num_images=24,
            num_buckets=1,
            effective_batch_size=1,
            validation_step_interval=20,
            checkpoint_step_interval=20,
            gradient_checkpointing=True,
            memory_total_bytes=24_000_000_000,
            memory_free_bytes=22_900_000_000,
        ),
        t.SettingOverridden(option="seed", requested=-1, used=42, reason="why not"),
        t.ProblemReported(
            problem=Problem(code="E-READ-ONLY", severity=Severity.WARNING, params={"path": "/mnt/x"}, origin="a.json:3")
        ),
        t.AdapterCreated(num_params=1_234_567, num_modules=210, rank=16, alpha=16.0, targets=("to_q", "to_k")),
        t.RunPhase(key="latents", total=24, unit="images"),
        t.CacheProgress(dataset="cats", cache="latents", done=24, total=24),
        t.RunPhase(key="latents", done=24, total=24, unit="images", elapsed_s=55.2, finished=True),
        t.ValidationStarted(step=0, num_images=2),
        _image(0),
        _image(0),
        t.ValidationFinished(step=0, num_images=2, seconds=2.0, contact_sheet="validation_images/sheet.png"),
        *_steps(1, 20),
        t.CheckpointSaved(step=20, path="checkpoint-20", bytes=162_000_000, seconds=0.5),
        t.ValidationStarted(step=20, num_images=2),
        _image(20),
        _image(20),
        t.ValidationFinished(step=20, num_images=2, seconds=2.0, contact_sheet="validation_images/sheet.png"),
        t.CheckpointDeleted(step=10, path="checkpoint-10"),
        *_steps(21, TOTAL_STEPS),
        t.CheckpointSaved(step=40, path="pytorch_lora_weights.safetensors", bytes=12_300_000, seconds=0.5, final=True),
        t.RunFinished(state="done", exit_code=0, output="pytorch_lora_weights.safetensors", step=40, seconds=125.0),
    ]


def _image(step: int) -> t.ValidationImage:
    return t.ValidationImage(
        prompt_id="p",
        prompt="a cat",
        step=step,
        seed=1,
        width_px=64,
        height_px=64,
        guidance=0.0,
        path="x.png",
        seconds=1.0,
    )


def _steps(first: int, last: int) -> list[t.Event]:
    return [
        t.StepFinished(
            step=step,
            total=TOTAL_STEPS,
            epoch=1,
            loss=0.5,
            grad_norm=1.25,
            learning_rate=1e-4,
            step_seconds=3.0,
            samples=1,
        )
        for step in range(first, last + 1)
    ]


def as_records(told: list[t.Event] | None = None, *, seconds_each: float = 0.1) -> list[Record]:
    """The events as journal records, `seconds_each` apart."""
    return [
        Record(seq=number, time=START + timedelta(seconds=seconds_each * number), event=event)
        for number, event in enumerate(story_events() if told is None else told)
    ]
