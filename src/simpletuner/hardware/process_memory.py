"""The main memory of this process, now and at its height. Standard library only."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes() -> int | None:
    """Resident memory now; None where the system does not say cheaply."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """Resident memory at its height since the process began, or since `reset_peak` where that works."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Let `peak_bytes` count from now on; False where the system has no such thing or forbids it."""
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def return_free_memory() -> None:
    """Hand pages that the C library keeps for later back to the system. glibc keeps most of what tensors below 32 MB
    leave behind: after a model was quantised, half of it. Takes milliseconds; nothing where there is no such call."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
