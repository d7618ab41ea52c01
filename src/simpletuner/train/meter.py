"""What a run's phases really take: memory at its height, of the process and of the device, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simpletuner.events.types import MemoryMeasured
from simpletuner.hardware.process_memory import peak_bytes, reset_peak, resident_bytes


class MemoryMeter:
    """Reads the counters of system and allocator at the borders of phases. A phase may come back: its highest counts.

    Where the system cannot reset its counter, a phase's main memory is the highest so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase = "start"
        self._peaks: dict[str, MemoryMeasured] = {}
        self._reset()

    def enter(self, phase: str) -> None:
        """A phase begins, and with it the one before ends."""
        self._close()
        self._phase = phase

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """`phase` inside of another one, which goes on afterwards."""
        outer = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def measured(self) -> tuple[MemoryMeasured, ...]:
        """What was seen of each phase so far."""
        self._close()
        return tuple(self._peaks.values())

    @property
    def phase(self) -> str:
        """Where the run is."""
        return self._phase

    @property
    def host_bytes(self) -> int | None:
        """Main memory of the process now."""
        return resident_bytes()

    def _close(self) -> None:
        before = self._peaks.get(self._phase)
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        now = MemoryMeasured(
            phase=self._phase, host_bytes=peak_bytes(), device_bytes=reserved, allocated_bytes=allocated
        )
        self._peaks[self._phase] = now if before is None else _higher(before, now)
        self._reset()

    def _reset(self) -> None:
        reset_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def _higher(a: MemoryMeasured, b: MemoryMeasured) -> MemoryMeasured:
    def larger(one: int | None, other: int | None) -> int | None:
        return max((x for x in (one, other) if x is not None), default=None)

    return MemoryMeasured(
        phase=b.phase,
        host_bytes=larger(a.host_bytes, b.host_bytes),
        device_bytes=larger(a.device_bytes, b.device_bytes),
        allocated_bytes=larger(a.allocated_bytes, b.allocated_bytes),
    )
