"""Which checkpoint a run goes on from. No torch: this is settled before anything heavy is loaded.

`checkpoint` says what a checkpoint is made of; here it is found and checked, not loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from simpletuner.problems import ConfigError, Problem, Severity

STATE_FILE_NAME = "training_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the steps of a run; two runs with equal recipes make the same steps."""

    seed: int
    plan: str  # fingerprint of the images, captions, buckets and repeats
    batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    optimizer: str
    targets: tuple[str, ...]
    rank: int
    alpha: float

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Field -> (value here, value in `other`) where they differ."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that is complete. `step` counts finished updates."""

    path: Path
    step: int
    recipe: Recipe


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = (read_checkpoint(path) for path in output_dir.iterdir() if _NAME.fullmatch(path.name))
    return sorted((c for c in found if c is not None), key=lambda checkpoint: checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`, or None if it is not complete."""
    try:
        state = json.loads((path / STATE_FILE_NAME).read_text(encoding="utf-8"))
        if any((path / name).stat().st_size != size for name, size in state["files"].items()):
            return None
        recipe = Recipe(**{**state["recipe"], "targets": tuple(state["recipe"]["targets"])})
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
    problems = []
    for name, (now, before) in recipe.differences(checkpoint.recipe).items():
        blocks = name in ("targets", "rank", "optimizer")
        problems.append(
            Problem(
                code="E-CHECKPOINT-INCOMPATIBLE" if blocks else "W-CHECKPOINT-DIFFERS",
                severity=Severity.ERROR if blocks else Severity.WARNING,
                params={"checkpoint": checkpoint.path.name, "what": name, "before": before, "now": now},
            )
        )
    return problems


def remove_unfinished(output_dir: Path) -> None:
    """Delete what a killed run left half-written or half-deleted. Call only while no other run writes here."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
