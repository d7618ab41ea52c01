"""Checkpoints: complete or absent.

    checkpoint-<step>/
      pytorch_lora_weights.safetensors   the adapter, float32; loads in diffusers and ComfyUI like the final result
      optimizer.pt                       the optimizer's state_dict
      training_state.json                step, what decides the next steps, and every file's size; written last

A checkpoint is built in a hidden sibling folder, flushed to disk and renamed. One that is found is checked against
its list of sizes before it is trusted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.adapters.files import LORA_FILE_NAME, LoraInfo, load_lora, save_lora
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.problems import ConfigError, Problem, Severity

_OPTIMIZER_FILE_NAME = "optimizer.pt"
_STATE_FILE_NAME = "training_state.json"
_STATE_VERSION = 1
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

    def adapter(self) -> Mapping[str, Tensor]:
        return load_lora(self.path / LORA_FILE_NAME).tensors

    def optimizer_state(self) -> dict[str, object]:
        state: dict[str, object] = torch.load(self.path / _OPTIMIZER_FILE_NAME, map_location="cpu", weights_only=True)
        return state


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    recipe: Recipe,
    adapter: Mapping[str, Tensor],
    info: LoraInfo,
    optimizer_state: Mapping[str, object],
) -> Checkpoint:
    """Write `checkpoint-<step>`, replacing one of the same step.

    Raises:
        FileSystemError: the disk is full or read-only; what was there before is untouched.
    """
    final = output_dir / f"checkpoint-{step}"
    with os_errors_as_problems(final):
        building = Path(tempfile.mkdtemp(prefix=f".checkpoint-{step}-", dir=output_dir))
        try:
            save_lora(building / LORA_FILE_NAME, adapter, info)
            torch.save(dict(optimizer_state), building / _OPTIMIZER_FILE_NAME)
            sizes = {path.name: path.stat().st_size for path in building.iterdir()}
            state = {"version": _STATE_VERSION, "step": step, "recipe": asdict(recipe), "files": sizes}
            (building / _STATE_FILE_NAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in (*building.iterdir(), building):
                _flush(path)
            building.chmod(0o755)
            if final.exists():
                _remove(final)
            building.replace(final)
            _flush(output_dir)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return Checkpoint(path=final, step=step, recipe=recipe)


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = (read_checkpoint(path) for path in output_dir.iterdir() if _NAME.fullmatch(path.name))
    return sorted((c for c in found if c is not None), key=lambda checkpoint: checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`, or None if it is not complete."""
    try:
        state = json.loads((path / _STATE_FILE_NAME).read_text(encoding="utf-8"))
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


def delete_old_checkpoints(output_dir: Path, *, keep: int) -> list[Checkpoint]:
    """Delete all but the newest `keep` checkpoints; return the deleted ones. 0 keeps all."""
    old = find_checkpoints(output_dir)[:-keep] if keep > 0 else []
    for checkpoint in old:
        _remove(checkpoint.path)
    return old


def remove_unfinished(output_dir: Path) -> None:
    """Delete what a killed run left half-written or half-deleted. Call only while no other run writes here."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def total_bytes(paths: Sequence[Path]) -> int:
    """Size of files, folders counted by their files."""
    return sum(p.stat().st_size if p.is_file() else total_bytes(tuple(p.iterdir())) for p in paths)


def _remove(path: Path) -> None:
    """Make `path` invisible in one step, then delete it: a kill in between leaves no half checkpoint."""
    doomed = Path(tempfile.mkdtemp(prefix=".checkpoint-deleted-", dir=path.parent))
    path.replace(doomed / path.name)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until `path` is on the disk. Windows cannot open folders, and does not need to."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
