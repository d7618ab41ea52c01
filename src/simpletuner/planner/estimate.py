"""Memory, disk and time of a run, each figure with its source: computed, corrected by a like run, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.config.sizes import parse_bytes
from simpletuner.hardware.space import Space
from simpletuner.planner.blocks import adapter_params
from simpletuner.planner.from_config import Machine, Observed, plan_input
from simpletuner.planner.inputs import PlanInput
from simpletuner.planner.memory import PHASES, RUNTIMES, Memory, PhaseName, average_bytes, estimate_memory
from simpletuner.planner.records import (
    Measurement,
    correction,
    measured_rate,
    newest,
    plan_key,
    plan_kin,
    runtime_bytes,
)
from simpletuner.planner.speed import image_flops, sheet_flops_per_s, step_flops

Source = Literal["computed", "corrected", "measured"]
ROOM = 0.92  # of what is free: above it a run may fail by what no arithmetic sees
_SLACK = 1.04  # of a GPU's allocator: blocks that are too small for the next request
DISK_PARTS = ("download", "checkpoints", "result", "caches")
_DOWNLOAD_BYTES = {"Tongyi-MAI/Z-Image-Turbo": 32_900_000_000, "Tongyi-MAI/Z-Image": 20_500_000_000}


class Verdict(str, Enum):
    """Whether a run will have the memory it needs."""

    FITS = "fits"
    CLOSE = "close"
    DOES_NOT_FIT = "does_not_fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Bytes, and how they are known."""

    num_bytes: int
    source: Source


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one update and of the whole run; None where it is not known. `source`: "sheet" is a GPU's data
    sheet, "measured" an earlier run on this device."""

    step_s: float | None
    total_s: float | None
    source: Literal["sheet", "measured", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run before it is started. `device` is None on a CPU, where `host` is everything. `disk`: part -> bytes.

    `budget_bytes`: what `fit` asks it to fit into, whatever this machine has.
    """

    plan: PlanInput
    machine: Machine
    memory: Memory
    device: Figure | None
    host: Figure
    disk: dict[str, int]
    time: Time
    num_params: int
    near: int = 0  # runs that corrected the computed figure
    budget_bytes: int | None = None

    @property
    def deciding(self) -> Figure:
        """The figure that must fit: of the device, or of main memory on a CPU."""
        return self.device or self.host

    @property
    def space(self) -> Space | None:
        """Where it must fit."""
        if self.budget_bytes is not None:
            return Space(total_bytes=self.budget_bytes, free_bytes=self.budget_bytes)
        return self.machine.host if self.device is None else self.machine.device

    @property
    def verdict(self) -> Verdict:
        space = self.space
        if space is None:
            return Verdict.UNKNOWN
        return judge(self.deciding.num_bytes, space.total_bytes if space.free_bytes is None else space.free_bytes)


def judge(num_bytes: int, free_bytes: int) -> Verdict:
    """Whether `num_bytes` fit into what is free."""
    if num_bytes > free_bytes:
        return Verdict.DOES_NOT_FIT
    return Verdict.FITS if num_bytes <= ROOM * free_bytes else Verdict.CLOSE


def estimate(
    config: Config,
    datasets: DatasetsConfig,
    machine: Machine,
    *,
    records: Sequence[Measurement] = (),
    observed: Observed | None = None,
) -> Estimate:
    """Everything about a run of these options on this machine. `records` are those of earlier runs."""
    asked = plan_input(config, datasets, machine)
    plan = asked if observed is None else plan_input(config, datasets, machine, observed=observed)
    known = RUNTIMES[plan.device]
    kin = plan_kin(asked, machine.name)
    host_bytes = runtime_bytes(records, machine.name, kin)
    runtime = known if host_bytes is None else replace(known, host_bytes=host_bytes)
    memory = estimate_memory(plan, runtime=runtime)
    record = newest(records, plan_key(asked, machine.name))
    return Estimate(
        plan=plan,
        machine=machine,
        memory=memory,
        device=None if plan.device == "cpu" else _figure(memory, record, records, kin, on_device=True),
        host=_figure(memory, record, records, kin, on_device=False),
        disk=_disk(config, plan, observed),
        time=_time(config, plan, machine, records, kin, record, observed),
        num_params=adapter_params(plan, plan.adapter),
        near=sum(other.kin == kin for other in records),
        budget_bytes=parse_bytes(config.memory.fit) if config.memory.fit else None,
    )


def device_peak(plan: PlanInput, *, phases: Sequence[PhaseName] = PHASES) -> int:
    """What must fit, computed: bytes of the device with its allocator's slack, or of main memory on a CPU."""
    memory = estimate_memory(plan)
    counted = Memory(phases=tuple(phase for phase in memory.phases if phase.name in phases))
    return counted.host_peak.host_bytes if plan.device == "cpu" else _with_slack(counted)


def _figure(
    memory: Memory, record: Measurement | None, records: Sequence[Measurement], kin: str, *, on_device: bool
) -> Figure:
    peaks = [] if record is None else list(record.phases.values())
    measured = [peak.num_bytes if on_device else peak.host_bytes or 0 for peak in peaks]
    if any(measured):
        return Figure(num_bytes=max(measured), source="measured")
    phase = memory.device_peak if on_device else memory.host_peak
    computed = _with_slack(memory) if on_device else phase.host_bytes
    factor = correction(records, kin, phase.name) if on_device or not memory.device_peak.device_bytes else None
    if factor is None:
        return Figure(num_bytes=computed, source="computed")
    return Figure(num_bytes=round(computed * factor), source="corrected")


def _with_slack(memory: Memory) -> int:
    phase = memory.device_peak
    runtime = sum(part.num_bytes for part in phase.device if part.name == "runtime")
    return runtime + round((phase.device_bytes - runtime) * _SLACK)


def _disk(config: Config, plan: PlanInput, observed: Observed | None) -> dict[str, int]:
    params = adapter_params(plan, plan.adapter)
    average = average_bytes(plan)
    result = params * plan.adapter.weight_bytes + average
    limit, every, steps = (
        config.run.checkpoints_total_limit,
        config.run.checkpoint_step_interval,
        _steps(config, observed),
    )
    count = 1 + (steps // every if every and steps else 0)
    kept = min(count, limit) if limit else count
    # While one is written, the oldest is still there.
    checkpoints = (kept + 1) * (result + average + round(params * plan.state_bytes))
    latent = plan.train.width_px * plan.train.height_px // 64 * plan.sizes.vae.latent_channels * 4
    num_images = observed.num_images if observed is not None else 0
    prompt = plan.train.caption_tokens * plan.sizes.text_encoder.hidden_size * plan.weight_bytes
    parts = {
        "download": _DOWNLOAD_BYTES.get(config.model.pretrained_model_name_or_path, 0),
        "checkpoints": checkpoints,
        "result": result,
        "caches": num_images * latent + plan.num_contexts * prompt,
    }
    return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}


def _time(
    config: Config,
    plan: PlanInput,
    machine: Machine,
    records: Sequence[Measurement],
    kin: str,
    record: Measurement | None,
    observed: Observed | None,
) -> Time:
    flops = step_flops(plan).step * plan.accumulation
    measured = measured_rate(records, machine.name, kin)
    rate = measured or sheet_flops_per_s(machine.name)
    if rate is None:
        return Time(step_s=None, total_s=None, source="unknown")
    step_s = record.step_s if record is not None and record.step_s else flops / rate
    steps = _steps(config, observed)
    total_s = steps * step_s + _images_flops(config, plan, steps) / rate if steps else None
    return Time(step_s=step_s, total_s=total_s, source="measured" if measured else "sheet")


def _images_flops(config: Config, plan: PlanInput, steps: int) -> float:
    if plan.validation is None:
        return 0.0
    options = config.validation
    every = options.validation_step_interval
    rounds = 1 + (not options.disable_benchmark) + (steps // every if every else 0)
    one = image_flops(plan, plan.validation, options.validation_num_inference_steps, plan.guided)
    return rounds * plan.validation.count * one


def _steps(config: Config, observed: Observed | None) -> int:
    return config.run.max_train_steps or (observed.total_steps if observed is not None else 0)
