"""Inputs of recomputed blocks that wait for backward in main memory.

Recomputation keeps one activation for each block; at 1024 px those of Z-Image are about a gigabyte. Here each is
copied to pinned main memory on a stream of its own while the next block computes, and brought back while the block
above it is differentiated. Two are on the device at a time: the one in use and the next one to be used. They are
copies, so values are equal bit for bit.

On a CPU the same code copies within main memory: of use to tests only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnHost:
    """One activation away from its device. `below` is the one that backward will ask for after it."""

    def __init__(self, host: Tensor, device: torch.device, below: OnHost | None) -> None:
        self.host = host
        self.device = device
        self.below = below
        self.on_device: Tensor | None = None
        self.arrived: Any = None  # event of the copy stream, None on a CPU


class HostInputs:
    """The activations of one model; `begin` a pass, `put` in order, `take` in the opposite order."""

    def __init__(self) -> None:
        self._newest: OnHost | None = None
        self._streams: dict[torch.device, Any] = {}

    def begin(self) -> None:
        """A forward pass begins; what an earlier one has put stays with whoever holds it."""
        self._newest = None

    def put(self, activation: Tensor) -> OnHost:
        """Copy an activation [any shape] away. The newest stays on the device too: backward begins with it."""
        activation = activation.detach()
        below = self._newest
        if below is not None:
            below.on_device = below.arrived = None
        host = _copy_out(activation, self._stream(activation.device))
        self._newest = OnHost(host, activation.device, below)
        self._newest.on_device = activation
        return self._newest

    def take(self, stored: OnHost) -> Tensor:
        """The activation on its device again, for the last time; the one below it is sent for."""
        self._fetch(stored)
        activation, stored.on_device = stored.on_device, None
        assert activation is not None
        if stored.arrived is not None:
            torch.cuda.current_stream(stored.device).wait_event(stored.arrived)
        if stored.below is not None:
            self._fetch(stored.below)
            stored.below = None
        self._newest = None
        return activation

    def _fetch(self, stored: OnHost) -> None:
        if stored.on_device is not None:
            return
        stream = self._stream(stored.device)
        if stream is None:
            stored.on_device = stored.host.to(stored.device, copy=True)
            return
        current = torch.cuda.current_stream(stored.device)
        with torch.cuda.stream(stream):
            stored.on_device = stored.host.to(stored.device, non_blocking=True)
            stored.arrived = stream.record_event()
        stored.on_device.record_stream(current)  # made on the copy stream, used and freed on this one

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def __deepcopy__(self, memo: dict[int, object]) -> HostInputs:
        return HostInputs()


def _copy_out(activation: Tensor, stream: Any) -> Tensor:
    if stream is None:
        return activation.to("cpu", copy=True)
    host = torch.empty(activation.shape, dtype=activation.dtype, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(activation.device))
    with torch.cuda.stream(stream):
        host.copy_(activation, non_blocking=True)
    activation.record_stream(stream)  # its memory is not given to another tensor before it is copied
    return host
