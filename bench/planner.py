"""The planner's prediction beside what runs really took: memory at its height and time, one process for each row.

Whole runs of `simpletuner train` on random models, on the CPU. Before each, `simpletuner estimate --json` is asked. It
knows nothing of the run but its configuration and, of this machine, how much memory the libraries alone take: one run
before all rows measures that. The rows are not measured before they are predicted.

    python bench/planner.py [--only WORD] [--repeat]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import save_result
from pipeline import save_images, save_pipeline

AIM = 0.10
NUM_IMAGES = 8
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: the model's size, the pictures' side and the options that differ from the usual."""

    size: str
    side_px: int
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.size}, {self.side_px} px" + (f", {told}" if told else "")


NO_CHECKPOINTING = {"gradient_checkpointing": False}
INT8 = {"base_model_precision": "int8-torchao"}
CASES = (
    Case(size="tiny", side_px=128),
    Case(size="tiny", side_px=256, options={**NO_CHECKPOINTING, "lora_rank": 128}),
    Case(size="tiny", side_px=512, options=NO_CHECKPOINTING),
    Case(size="tiny", side_px=512, options={**NO_CHECKPOINTING, "train_batch_size": 4}),
    Case(size="tiny", side_px=512, options={"train_batch_size": 4}),
    Case(size="mid", side_px=128),
    Case(size="mid", side_px=128, options=INT8),
    Case(size="mid", side_px=128, options={"base_model_precision": "nf4-bnb"}),
    Case(size="mid", side_px=128, options={"lora_rank": 256, "optimizer": "adamw"}),
    Case(size="mid", side_px=128, options={"lora_rank": 256, "optimizer": "adamw_bf16", **INT8}),
    Case(size="mid", side_px=256, options=NO_CHECKPOINTING),
    Case(size="mid", side_px=256, options={"gradient_checkpointing_interval": 2}),
    Case(size="mid", side_px=256, options={**INT8, **NO_CHECKPOINTING}),
    Case(size="mid", side_px=256, options={**NO_CHECKPOINTING, "lora_targets": "attention"}),
    Case(size="mid", side_px=256, options={"train_batch_size": 2}),
    Case(size="mid", side_px=512, options={"gradient_checkpointing_interval": 3, **INT8}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for size in sorted({case.size for case in CASES}):
            save_pipeline(root / f"model-{size}", size)
        for side_px in sorted({case.side_px for case in CASES}):
            save_images(root / f"images-{side_px}", NUM_IMAGES, side_px)
        first = Case(size="tiny", side_px=128)
        command(root, "calibration", first, "train")
        for number, case in enumerate(case for case in CASES if only in case.name):
            row = measure(root, f"run-{number}", case)
            rows.append(row)
            print(
                f"{row['ratio']:.3f}  {row['predicted_mb']:7.0f} {row['measured_mb']:7.0f}  {row['name']}", flush=True
            )
    off = max(abs(row["ratio"] - 1) for row in rows)
    within = sum(abs(row["ratio"] - 1) <= AIM for row in rows)
    print(f"{within} of {len(rows)} within {AIM:.0%}; the furthest is off by {off:.1%}")
    if not only:
        save_result("planner", {"aim": AIM, "within": within, "rows": rows})


def measure(root: Path, name: str, case: Case) -> dict[str, Any]:
    """Predict, run, compare."""
    predicted = json.loads(command(root, name, case, "estimate", "--json"))
    command(root, name, case, "train")
    journal = root / name / "simpletuner-results" / "events.jsonl"
    events = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    peaks = {event["phase"]: event for event in events if event["event"] == "memory.measured"}
    training = next(phase for phase in predicted["phases"] if phase["name"] == "training")
    measured, expected = peaks["training"]["host_bytes"], training["host_bytes"]
    steps = sorted(event["step_seconds"] for event in events if event["event"] == "step.finished")
    # After the run, of which the estimate now knows.
    again = json.loads(command(root, name, case, "estimate", "--json"))
    return {
        "name": case.name,
        "predicted_mb": expected / 1e6,
        "measured_mb": measured / 1e6,
        "ratio": expected / measured,
        "in_process_ratio": peaks["training"]["estimated_bytes"] / measured,
        "whole_run_mb": max(peak["host_bytes"] for peak in peaks.values()) / 1e6,
        "predicted_whole_run_mb": predicted["host"]["bytes"] / 1e6,
        "parts_mb": {part["name"]: part["bytes"] / 1e6 for part in training["host"]},
        "predicted_step_s": predicted["time"]["step_s"],
        "step_s": steps[len(steps) // 2],
        "next_estimate": again["host"]["source"],
        "next_estimate_ratio": again["host"]["bytes"] / max(peak["host_bytes"] for peak in peaks.values()),
    }


def command(root: Path, name: str, case: Case, verb: str, *flags: str) -> str:
    """What `simpletuner VERB` says for the case."""
    project = root / name
    if not project.exists():
        write_project(root, project, case)
    words = [sys.executable, "-m", "simpletuner.cli.main", verb, "config", *flags]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SIMPLETUNER_STATE_DIR": str(
            root / ("state" if verb == "train" and name == "calibration" else f"state-{name}")
        ),
    }
    if name != "calibration" and not Path(environment["SIMPLETUNER_STATE_DIR"]).exists():
        shared = (root / "state" / "measurements.jsonl").read_text(encoding="utf-8")
        Path(environment["SIMPLETUNER_STATE_DIR"]).mkdir()
        # Only the memory of the libraries is handed on, nothing about any configuration.
        known = {**json.loads(shared), "key": "", "kin": "", "phases": {}}
        path = Path(environment["SIMPLETUNER_STATE_DIR"]) / "measurements.jsonl"
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def write_project(root: Path, project: Path, case: Case) -> None:
    """The configuration of a case, as a user has it."""
    (project / "config").mkdir(parents=True)
    config = {
        "model_family": "z-image",
        "model_flavour": "base",
        "model_type": "lora",
        "pretrained_model_name_or_path": str(root / f"model-{case.size}"),
        "lora_rank": 16,
        "train_batch_size": 1,
        "max_train_steps": NUM_STEPS,
        "resume_from_checkpoint": "none",
        "validation_disable": True,
        "mixed_precision": "no",
        "seed": 7,
        "device": "cpu",
        **case.options,
    }
    datasets = [
        {
            "id": "images",
            "type": "local",
            "instance_data_dir": str(root / f"images-{case.side_px}"),
            "caption_strategy": "textfile",
            "resolution": case.side_px,
            "resolution_type": "pixel_area",
            "repeats": 1,
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]
    (project / "config" / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (project / "config" / "multidatabackend.json").write_text(json.dumps(datasets, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
