"""What earlier runs on this machine took, one JSON line a run; read by every later estimate."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from simpletuner.planner.inputs import PlanInput

FILE_NAME = "measurements.jsonl"
_VERSION = 1
_MAX_READ_BYTES = 4_000_000
_MOST_OFF = 1.3  # a correction beyond this says that something else went on
_MIN_NEAR = 1


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """Bytes of one phase at its height: `num_bytes` of the device (of main memory on a CPU), `host_bytes` of main
    memory, and what had been computed for the device."""

    num_bytes: int
    host_bytes: int | None = None
    computed_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run. `key` stands for everything that decides its memory, `kin` for what makes others comparable."""

    key: str
    kin: str
    device: str
    phases: Mapping[str, PhasePeak] = field(default_factory=dict)
    runtime_host_bytes: int | None = None
    step_s: float | None = None
    step_flops: float | None = None
    time: str = ""
    version: int = _VERSION


def plan_key(plan: PlanInput, device: str) -> str:
    """Equal for configurations that need the same memory on the same device: 16 hex digits."""
    return _digest(repr(plan), device)


def plan_kin(plan: PlanInput, device: str) -> str:
    """Equal for configurations that one measurement says something about: same model, formats, checkpointing and kind
    of trained weights."""
    facts: tuple[object, ...] = (
        plan.sizes,
        plan.precision,
        plan.weight_bytes,
        plan.compute_bytes,
        plan.checkpointing,
        plan.offload,
    )
    adapter = plan.adapter
    if adapter.whole or adapter.dora or adapter.lycoris is not None:
        algos = () if adapter.lycoris is None else sorted({update.algo for update in adapter.lycoris.updates})
        facts += ((adapter.whole, adapter.dora, *algos),)
    return _digest(repr(facts), device)


def append_measurement(path: Path, measurement: Measurement) -> None:
    """Add one line, whole or not at all beside other writers: lines are short, and appended in one call.

    Raises:
        OSError: no room, or no right to write there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(measurement), separators=(",", ":")) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """All lines that this version understands, oldest first; none if there is no file. Torn lines are skipped."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _MAX_READ_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ()
    return tuple(found for line in lines if (found := _parsed(line)) is not None)


def newest(records: Sequence[Measurement], key: str) -> Measurement | None:
    """The last run of an equal configuration."""
    return next((record for record in reversed(records) if record.key == key), None)


def correction(records: Iterable[Measurement], kin: str, phase: str) -> float | None:
    """What computed bytes of a phase are to be multiplied by: the median of measured to computed over the runs of the
    same kin, within bounds; None without any."""
    ratios = [
        peak.num_bytes / peak.computed_bytes
        for record in records
        if record.kin == kin and (peak := record.phases.get(phase)) is not None and peak.computed_bytes
    ]
    if len(ratios) < _MIN_NEAR:
        return None
    return min(max(statistics.median(ratios), 1 / _MOST_OFF), _MOST_OFF)


def measured_rate(records: Sequence[Measurement], device: str, kin: str) -> float | None:
    """Operations per second that training steps reached on a device, of the newest run of this kin. Other models and
    number formats reach other rates."""
    alike = (record for record in reversed(records) if record.device == device and record.kin == kin)
    return next((record.step_flops / record.step_s for record in alike if record.step_s and record.step_flops), None)


def runtime_bytes(records: Sequence[Measurement], device: str, kin: str) -> int | None:
    """Main memory of the program without a model, as the newest run of this kin on that device had it.

    Other runs do not tell: with warm caches and without images, half of what is imported is missing. The record of a
    run that is under way has no kin, and holds.
    """
    alike = (r for r in reversed(records) if r.device == device and r.kin in (kin, ""))
    return next((r.runtime_host_bytes for r in alike if r.runtime_host_bytes), None)


def _parsed(line: str) -> Measurement | None:
    try:
        values = json.loads(line)
        if values.get("version") != _VERSION:
            return None
        phases = {name: PhasePeak(**peak) for name, peak in values.pop("phases").items()}
        known = {f.name for f in fields(Measurement)}
        return Measurement(phases=phases, **{name: value for name, value in values.items() if name in known})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
