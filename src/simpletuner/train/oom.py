"""When memory runs out: one message with what was asked for, who holds the memory, and what would save how much."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch

from simpletuner.events import formats
from simpletuner.hardware.space import GpuProcess, gpu_memory
from simpletuner.planner.estimate import Estimate
from simpletuner.planner.memory import Part, Phase
from simpletuner.planner.remedies import Remedy, remedies
from simpletuner.problems import ExitCode, Problem, SimpletunerError

_MOST_REMEDIES = 5
# torch has a type of its own for a GPU's allocator alone.
_WORDS = re.compile(
    r"DefaultCPUAllocator|not enough memory|can't allocate memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)")
_FREE = re.compile(r"of which ([\d.]+) ?(bytes|[KMGT]iB) is free")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNKNOWN = "?"
_NONE = "-"
_GROUPS = (
    ("model", ("weights", "text_encoder", "vae")),
    ("adapter", ("adapter", "optimizer", "gradients")),
    ("activations", ("activations", "contexts", "latents", "pictures")),
    ("working", ("working",)),
    ("runtime", ("runtime",)),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def out_of_memory(error: BaseException, expected: Estimate | None, *, phase: str) -> SimpletunerError:
    """The error for the user. `expected` is the run's estimate, if it got that far; `phase` what it was at."""
    text = str(error)
    if expected is None:
        reason = text.split(". ")[0].strip() or _NONE
        return SimpletunerError(Problem(code="E-OUT-OF-MEMORY", params={"reason": reason}), ExitCode.OUT_OF_MEMORY)
    params: dict[str, object] = {
        "place": "GPU" if expected.device is not None else "RAM",
        "asked": _amount(_ASKED.search(text)),
        "free": _amount(_FREE.search(text)),
        "phase": phase,
    }
    found = expected.memory.phase("training")
    named = next((one for one in expected.memory.phases if one.name == phase), found)
    assert named is not None
    params |= {
        "needed": _size(named.device_bytes if expected.device is not None else named.host_bytes),
        **_holders(named),
        "others": _others(expected),
        "remedies": _remedy_text(remedies(expected.plan)),
    }
    return SimpletunerError(Problem(code="E-OUT-OF-MEMORY-HELD", params=params), ExitCode.OUT_OF_MEMORY)


def _holders(phase: Phase) -> dict[str, object]:
    parts: Sequence[Part] = phase.device or phase.host
    return {name: _size(sum(part.num_bytes for part in parts if part.name in members)) for name, members in _GROUPS}


def _others(expected: Estimate) -> str:
    """Programs beside this one on the GPU, the largest first."""
    if expected.machine.kind != "cuda":
        return _NONE
    gpu = gpu_memory()
    found = [process for process in gpu.processes if process.pid != os.getpid()] if gpu is not None else []
    largest = sorted(found, key=lambda process: -(process.num_bytes or 0))
    return ", ".join(map(_process_text, largest)) or _NONE


def _process_text(process: GpuProcess) -> str:
    return f"{process.name} ({process.pid}) {_UNKNOWN if process.num_bytes is None else _size(process.num_bytes)}"


def _remedy_text(found: Sequence[Remedy]) -> str:
    lines = (
        f"{number}. {remedy.fix.key}={_value(remedy.fix.value)}: -{_size(remedy.saving_bytes)}"
        for number, remedy in enumerate(found[:_MOST_REMEDIES], 1)
    )
    return "\n".join(lines) or _NONE


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _amount(match: re.Match[str] | None) -> str:
    return _UNKNOWN if match is None else _size(float(match[1]) * _UNITS[match[2]])


def _size(num_bytes: float) -> str:
    return formats.size(num_bytes, "en")
