"""Which checkpoint a run goes on from. No torch: this is settled before anything heavy is loaded.

`checkpoint` says what a checkpoint is made of; here it is found and checked, not loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from simpletuner.data.records import PlanParts
from simpletuner.events.paths import RunDirectory
from simpletuner.problems import ConfigError, Problem, Severity

STATE_FILE_NAME = "training_state.json"
_OPTIONS = {
    "batch_size": "train_batch_size",
    "world_size": "num_processes",
    "targets": "lora_targets",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "adapter": "lora_type",
}
"""What a field of the recipe is called in a configuration, where that is another word."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the steps of a run; two runs with equal recipes make the same steps."""

    seed: int
    plan: str  # fingerprint of the images, captions, buckets and repeats
    batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    optimizer: str  # its name, and the arguments that decide which states it keeps
    targets: tuple[str, ...]
    rank: int
    alpha: float
    adapter: str = "lora"  # the kind, and all that decides its weights beside targets, rank and alpha
    parts: PlanParts | None = None  # explain a difference of `plan`; older checkpoints have none
    options: Mapping[str, object] | None = None  # of noise levels, loss and rollouts; older checkpoints have none

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Field or option -> (value here, value in `other`) where they differ; `parts` decide nothing."""
        mine, theirs = (
            {name: value for name, value in asdict(one).items() if name not in ("parts", "options")}
            for one in (self, other)
        )
        if self.options is not None and other.options is not None:
            mine |= self.options
            theirs |= {name: other.options.get(name, value) for name, value in self.options.items()}
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that is complete. `step` counts finished updates."""

    path: Path
    step: int
    recipe: Recipe


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = (read_checkpoint(path) for path in RunDirectory(output_dir).checkpoints().values())
    return sorted((c for c in found if c is not None), key=lambda checkpoint: checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`, or None if it is not complete."""
    try:
        state = json.loads((path / STATE_FILE_NAME).read_text(encoding="utf-8"))
        if any((path / name).stat().st_size != size for name, size in state["files"].items()):
            return None
        stored = state["recipe"]
        parts = PlanParts(**stored["parts"]) if stored.get("parts") else None
        recipe = Recipe(**{**stored, "targets": tuple(stored["targets"]), "parts": parts})
        return Checkpoint(path=path, step=int(state["step"]), recipe=recipe)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def choose_checkpoint(output_dir: Path, requested: str) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` names: "latest", "none" or "", a name, or a path.

    Raises:
        ConfigError: a name or path that is not a complete checkpoint.
    """
    if requested in ("", "none"):
        return None
    checkpoints = find_checkpoints(output_dir)
    if requested == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (output_dir / requested, Path(requested).expanduser()):
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
    names = ", ".join(checkpoint.path.name for checkpoint in checkpoints)
    code = "E-CHECKPOINT-NOT-FOUND" if names else "E-CHECKPOINT-NONE"
    params = {"requested": requested, "output_dir": str(output_dir), "found": names}
    raise ConfigError(Problem(code=code, params=params, path="/resume_from_checkpoint"))


def recipe_problems(checkpoint: Checkpoint, recipe: Recipe) -> list[Problem]:
    """What differs between a checkpoint and this run: errors where it cannot go on, else warnings."""
    name = checkpoint.path.name
    problems: list[Problem] = []
    for field, (now, before) in recipe.differences(checkpoint.recipe).items():
        if field == "plan":
            problems += _data_problems(name, before=checkpoint.recipe.parts, now=recipe.parts)
            continue
        blocks = field in ("targets", "rank", "optimizer", "adapter")
        problems.append(
            Problem(
                code="E-CHECKPOINT-INCOMPATIBLE" if blocks else "W-CHECKPOINT-DIFFERS",
                severity=Severity.ERROR if blocks else Severity.WARNING,
                params={
                    "checkpoint": name,
                    "what": _OPTIONS.get(field, field),
                    "before": _shown(before),
                    "now": _shown(now),
                },
            )
        )
    return problems


def _data_problems(checkpoint: str, *, before: PlanParts | None, now: PlanParts | None) -> list[Problem]:
    """What has changed in the data. Where images were added or taken away, captions and crops differ with them."""
    params: dict[str, object] = {"checkpoint": checkpoint}
    codes: list[str] = []
    if before is not None and now is not None:
        if before.images != now.images:
            codes.append("W-CHECKPOINT-IMAGES")
            params |= {"before": before.num_images, "now": now.num_images}
        else:
            codes += ["W-CHECKPOINT-CAPTIONS"] if before.captions != now.captions else []
            codes += ["W-CHECKPOINT-CROPS"] if before.crops != now.crops else []
        codes += ["W-CHECKPOINT-DATASETS"] if before.datasets != now.datasets else []
    return [Problem(code=code, severity=Severity.WARNING, params=params) for code in codes or ["W-CHECKPOINT-DATA"]]


def _shown(value: object) -> object:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def remove_unfinished(output_dir: Path) -> None:
    """Delete what a killed run left half-written or half-deleted. Call only while no other run writes here."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
