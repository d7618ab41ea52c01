"""An estimate as data: what `simpletuner estimate --json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpletuner.hardware.space import Space
from simpletuner.planner.choose import Choice
from simpletuner.planner.estimate import Estimate, Figure
from simpletuner.planner.memory import Part, Phase
from simpletuner.planner.remedies import remedies


def as_json(found: Estimate, choices: Sequence[Choice] = ()) -> dict[str, Any]:
    """Bytes and seconds; a key without a value is null."""
    picture = found.plan.train
    return {
        "verdict": found.verdict.value,
        "device": {
            "kind": found.machine.kind,
            "name": found.machine.name,
            "memory": _space(found.machine.device),
            "main_memory": _space(found.machine.host),
        },
        "vram": _figure(found.device),
        "host": _figure(found.host),
        "phases": [_phase(phase) for phase in found.memory.phases],
        "disk": found.disk,
        "time": {"step_s": found.time.step_s, "total_s": found.time.total_s, "source": found.time.source},
        "assumed": {
            "width_px": picture.width_px,
            "height_px": picture.height_px,
            "batch_size": picture.count,
            "caption_tokens": picture.caption_tokens,
            "model": "read" if found.plan.sizes.is_read else "released",
        },
        "trained_parameters": found.num_params,
        "chosen": {choice.option: choice.after for choice in choices},
        "remedies": [
            {"option": remedy.fix.key, "value": remedy.fix.value, "saving_bytes": remedy.saving_bytes}
            for remedy in remedies(found.plan)
        ],
    }


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else {"bytes": figure.num_bytes, "source": figure.source}


def _space(space: Space | None) -> dict[str, Any] | None:
    return None if space is None else {"total_bytes": space.total_bytes, "free_bytes": space.free_bytes}


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "device_bytes": phase.device_bytes,
        "host_bytes": phase.host_bytes,
        "device": [_part(part) for part in phase.device],
        "host": [_part(part) for part in phase.host],
    }


def _part(part: Part) -> dict[str, Any]:
    return {"name": part.name, "bytes": part.num_bytes}
