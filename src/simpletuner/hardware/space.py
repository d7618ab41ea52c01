"""How much memory this machine has, on its GPU and beside it, asked of the system and the driver. No torch."""

from __future__ import annotations

import ctypes
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

_NVML_NAMES = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1",)
_CUDA_NAMES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CGROUP_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))
_MAX_PROCESSES = 64


@dataclass(frozen=True, kw_only=True)
class Space:
    """Bytes there in all, and not in use now; None where the system does not say."""

    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """Another program's memory on a GPU; None bytes where the driver keeps it to itself."""

    pid: int
    name: str
    num_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class GpuSpace:
    """One NVIDIA GPU as the driver shows it."""

    name: str
    space: Space
    processes: tuple[GpuProcess, ...] = ()


def main_memory() -> Space | None:
    """This machine's main memory; of a container, what it may use."""
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
        total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return _within_limit(Space(total_bytes=total, free_bytes=free))
    if sys.platform == "win32":
        return _windows_memory()
    try:
        import os

        return Space(total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free_bytes=None)
    except (AttributeError, OSError, ValueError):
        return None


def free_disk(folder: Path) -> int | None:
    """Bytes free where `folder` is, or will be; None if that cannot be told."""
    place = next((path for path in (folder, *folder.parents) if path.exists()), None)
    try:
        return None if place is None else shutil.disk_usage(place).free
    except OSError:
        return None


def gpu_memory(index: int = 0) -> GpuSpace | None:
    """The GPU that CUDA counts as `index`, through the driver's own library; None if there is none to ask."""
    nvml = _library(_NVML_NAMES)
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return None
    try:
        return _ask_nvml(nvml, index)
    finally:
        nvml.nvmlShutdown()


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _NvmlProcess(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("instance", ctypes.c_uint),
        ("compute", ctypes.c_uint),
    ]


def _ask_nvml(nvml: ctypes.CDLL, index: int) -> GpuSpace | None:
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    bus = _pci_bus(index)
    found = (
        nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
        if bus is not None
        else nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    )
    if found != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, name, len(name))
    return GpuSpace(
        name=name.value.decode("utf-8", "replace"),
        space=Space(total_bytes=int(memory.total), free_bytes=int(memory.free)),
        processes=_gpu_processes(nvml, handle),
    )


def _gpu_processes(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> tuple[GpuProcess, ...]:
    found = []
    for ask in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
        if not hasattr(nvml, ask):
            continue
        count, table = ctypes.c_uint(_MAX_PROCESSES), (_NvmlProcess * _MAX_PROCESSES)()
        if getattr(nvml, ask)(handle, ctypes.byref(count), table) != 0:
            continue
        for row in table[: count.value]:
            used = None if row.used >= 1 << 63 else int(row.used)
            found.append(GpuProcess(pid=row.pid, name=_process_name(row.pid), num_bytes=used))
    return tuple({process.pid: process for process in found}.values())


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "?"


def _pci_bus(index: int) -> bytes | None:
    """Where CUDA's device number `index` sits: its order and CUDA_VISIBLE_DEVICES are CUDA's own."""
    driver = _library(_CUDA_NAMES)
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    return text.value if driver.cuDeviceGetPCIBusId(text, len(text), device) == 0 else None


def _library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _within_limit(space: Space) -> Space:
    limit, used = _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USED)
    if limit is None or limit >= space.total_bytes:
        return space
    free = space.free_bytes if used is None else min(space.free_bytes or limit, max(limit - used, 0))
    return Space(total_bytes=limit, free_bytes=free)


def _first_number(paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def _windows_memory() -> Space | None:
    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "d", "e", "f", "g", "h")),
        ]

    status = Status(length=ctypes.sizeof(Status))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 (exists on Windows alone)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return Space(total_bytes=int(status.total), free_bytes=int(status.free))
