"""A run's account of its memory and time: what it expects, what it takes, the line it leaves for later estimates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.data.records import DatasetPlan, Plan
from simpletuner.events.journal import format_time, utc_now
from simpletuner.events.types import Event, MemoryMeasured, StepFinished
from simpletuner.planner.estimate import Estimate, estimate
from simpletuner.planner.from_config import Machine, Observed, find_machine, plan_input
from simpletuner.planner.inputs import Picture, padded
from simpletuner.planner.memory import Memory
from simpletuner.planner.records import (
    Measurement,
    PhasePeak,
    append_measurement,
    plan_key,
    plan_kin,
    read_measurements,
)
from simpletuner.planner.speed import step_flops
from simpletuner.train.meter import MemoryMeter

_PROMPTS_LOOKED_AT = 100  # the longest ones
_TOKENS_PER_CHARACTER = 0.3
_LEAST_STEPS = 3  # of a run that has something to tell


class Account:
    """Expects, measures and records. `records` is the file of measurements, None to keep none."""

    def __init__(self, config: Config, datasets: DatasetsConfig, *, device: torch.device, records: Path | None) -> None:
        self._config, self._datasets, self._file = config, datasets, records
        self._records = read_measurements(records) if records is not None else ()
        machine = find_machine(config.run.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.name
        self._machine: Machine = replace(machine, name=name)
        self._observed: Observed | None = None
        self._runtime_bytes: int | None = None
        self._step_s: list[float] = []
        self.meter = MemoryMeter(device)

    def look_at(self, plan: Plan, total_steps: int, num_tokens: Callable[[str], int] | None = None) -> None:
        """Take the pictures and captions as they are in place of what the options let guess. `num_tokens` of a
        caption, once it is embedded."""
        batch = self._config.optimizer.train_batch_size
        self._observed = observe(plan, batch_size=batch, total_steps=total_steps, num_tokens=num_tokens)

    def expected(self) -> Estimate:
        """The estimate, as well as it is known by now."""
        return estimate(self._config, self._datasets, self._machine, records=self._records, observed=self._observed)

    def before_model(self) -> None:
        """The libraries are there and the model is not: what is resident now belongs to no part of it."""
        self._runtime_bytes = self.meter.host_bytes

    def step_done(self, event: Event) -> None:
        """Take the time of a step."""
        if isinstance(event, StepFinished):
            self._step_s.append(event.step_seconds - (event.data_seconds or 0.0))

    def close(self) -> tuple[MemoryMeasured, ...]:
        """What was measured, with what was computed for it; and the line for later estimates is written."""
        computed = self._computed()
        on_cpu = self._machine.kind == "cpu"
        told = []
        for peak in self.meter.measured():
            phase = next((phase for phase in computed.phases if phase.name == peak.phase), None)
            expected = None if phase is None else phase.host_bytes if on_cpu else phase.device_bytes
            told.append(replace(peak, estimated_bytes=expected))
        if len(self._step_s) >= _LEAST_STEPS and self._file is not None:
            with suppress(OSError):  # a run does not fail for want of a note
                append_measurement(self._file, self._measurement(told))
        return tuple(told)

    def _computed(self) -> Memory:
        """With the runtime as it is in this process."""
        records = self._records
        if self._runtime_bytes is not None:
            here = Measurement(key="", kin="", device=self._machine.name, runtime_host_bytes=self._runtime_bytes)
            records = (*records, here)
        return estimate(self._config, self._datasets, self._machine, records=records, observed=self._observed).memory

    def _measurement(self, peaks: list[MemoryMeasured]) -> Measurement:
        on_cpu = self._machine.kind == "cpu"
        asked = plan_input(self._config, self._datasets, self._machine)
        seen = plan_input(self._config, self._datasets, self._machine, observed=self._observed)
        found: dict[str, PhasePeak] = {}
        for peak in peaks:
            num_bytes = peak.host_bytes if on_cpu else peak.device_bytes
            if num_bytes is not None:
                found[peak.phase] = PhasePeak(
                    num_bytes=num_bytes, host_bytes=peak.host_bytes, computed_bytes=peak.estimated_bytes
                )
        return Measurement(
            key=plan_key(asked, self._machine.name),
            kin=plan_kin(asked, self._machine.name),
            device=self._machine.name,
            phases=found,
            runtime_host_bytes=self._runtime_bytes,
            step_s=statistics.median(self._step_s),
            step_flops=step_flops(seen).step * seen.accumulation,
            time=format_time(utc_now()),
        )


def observe(
    plan: Plan, *, batch_size: int, total_steps: int, num_tokens: Callable[[str], int] | None = None
) -> Observed:
    """What the plan says about memory and time. A packed dataset's largest batch is taken to be one of its largest
    size alone. `num_tokens` of a caption; None: about as many as its letters tell."""
    counted = num_tokens or _usual_tokens
    lengths = {dataset.id: list(_lengths(dataset, counted)) for dataset in plan.datasets}
    pictures = [
        Picture(
            width_px=bucket.size[0],
            height_px=bucket.size[1],
            count=dataset.batch_size or batch_size,
            caption_tokens=max(lengths[dataset.id]),
        )
        for dataset in plan.datasets
        for bucket in dataset.buckets
    ]
    largest = max(pictures, key=lambda picture: picture.count * picture.tokens)
    kinds = {padded(length) for found in lengths.values() for length in found}
    return Observed(
        picture=largest,
        is_mixed=largest.count > 1 and (len(kinds) > 1 or any(map(_mixes_sizes, plan.datasets))),
        num_captions=len(plan.prompts()),
        num_images=sum(dataset.num_images for dataset in plan.datasets),
        total_steps=total_steps,
    )


def _mixes_sizes(dataset: DatasetPlan) -> bool:
    return dataset.batch_mixing == "packed" and len(dataset.buckets) > 1


def _lengths(dataset: DatasetPlan, num_tokens: Callable[[str], int]) -> Iterator[int]:
    captions = {caption for bucket in dataset.buckets for sample in bucket.samples for caption in sample.captions}
    yield from map(num_tokens, sorted(captions, key=len)[-_PROMPTS_LOOKED_AT:])
    if dataset.caption_dropout_probability > 0:
        yield num_tokens("")


def _usual_tokens(caption: str) -> int:
    return 10 + round(len(caption) * _TOKENS_PER_CHARACTER)
