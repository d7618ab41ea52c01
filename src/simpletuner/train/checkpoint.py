"""Checkpoints: complete or absent.

    checkpoint-<step>/
      pytorch_lora_weights.safetensors   the adapter, float32; loads in diffusers and ComfyUI like the final result;
                                         transformer/ in its place where all weights are trained
      optimizer.pt                       the optimizer's state_dict
      pytorch_lora_weights_ema.safetensors, ema.pt   with use_ema: the averaged adapter, and the average itself
      training_state.json                step, what decides the next steps, and every file's size; written last

A checkpoint is built in a hidden sibling folder, flushed to disk and renamed. One that is found is checked against
its list of sizes before it is trusted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.train.resume import STATE_FILE_NAME, Checkpoint, Recipe, find_checkpoints

_OPTIMIZER_FILE_NAME = "optimizer.pt"
_EMA_FILE_NAME = "ema.pt"
_STATE_VERSION = 1


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    recipe: Recipe,
    write: Callable[[Path], object],
    optimizer_state: Mapping[str, object],
    average: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Write `checkpoint-<step>`, replacing one of the same step. `write(folder)` puts the trained weights there;
    `average` is the state of their moving average.

    Raises:
        FileSystemError: the disk is full or read-only; what was there before is untouched.
    """
    final = output_dir / f"checkpoint-{step}"
    with os_errors_as_problems(final):
        building = Path(tempfile.mkdtemp(prefix=f".checkpoint-{step}-", dir=output_dir))
        try:
            write(building)
            torch.save(dict(optimizer_state), building / _OPTIMIZER_FILE_NAME)
            if average is not None:
                torch.save(dict(average), building / _EMA_FILE_NAME)
            files = [path for path in building.rglob("*") if path.is_file()]
            sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in files}
            state = {"version": _STATE_VERSION, "step": step, "recipe": asdict(recipe), "files": sizes}
            (building / STATE_FILE_NAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in (*building.rglob("*"), building):
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


def load_optimizer_state(checkpoint: Checkpoint) -> dict[str, object]:
    """The optimizer's state_dict, on the CPU."""
    path = checkpoint.path / _OPTIMIZER_FILE_NAME
    state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_average(checkpoint: Checkpoint) -> dict[str, object] | None:
    """The state of the moving average, on the CPU; None if there was none."""
    path = checkpoint.path / _EMA_FILE_NAME
    if not path.is_file():
        return None
    state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def delete_old_checkpoints(output_dir: Path, *, keep: int) -> list[Checkpoint]:
    """Delete all but the newest `keep` checkpoints; return the deleted ones. 0 keeps all."""
    old = find_checkpoints(output_dir)[:-keep] if keep > 0 else []
    for checkpoint in old:
        _remove(checkpoint.path)
    return old


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
