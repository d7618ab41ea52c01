"""What this machine has, found out without importing anything heavy. Standard library only."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

_CUDA_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_ROCM_DEVICE = Path("/dev/kfd")
_BUILT_FOR = re.compile(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", re.MULTILINE)


def is_installed(module: str) -> bool:
    """Whether the top-level `module` could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported in an unusual way: it is there
        return module in sys.modules


def device_type(requested: str) -> str:
    """The torch device type that the option `device` comes to here: "cpu", "cuda" or "mps"."""
    if requested != "auto":
        return requested.partition(":")[0]
    if has_cuda():
        return "cuda"
    return "mps" if sys.platform == "darwin" and _is_apple_silicon() else "cpu"


def has_cuda() -> bool:
    """Whether torch could use a GPU as its device "cuda": torch is built for one, and there is one.

    Asking the driver takes some tenths of a second; ask where the answer matters. ROCm counts as "cuda", as it does
    in torch.
    """
    built_for = torch_built_for()
    if built_for == "cuda":
        return _num_cuda_devices() > 0
    return built_for == "hip" and _ROCM_DEVICE.exists()


def torch_built_for() -> str | None:
    """ "cuda", "hip", or None: the torch that is installed knows no GPU of these kinds, or there is no torch."""
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations or () if spec else ():
        version = Path(folder) / "version.py"
        if version.is_file():
            found = _BUILT_FOR.search(version.read_text(encoding="utf-8"))
            return found[1] if found else None
    return None


def cuda_capability() -> int | None:
    """Compute capability of the weakest NVIDIA GPU that this process sees, times ten: 89 for 8.9. None without one."""
    driver = _cuda_driver()
    found = []
    for index in range(_num_cuda_devices()):
        device, value = ctypes.c_int(0), ctypes.c_int(0)
        if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
            return None
        parts = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
                return None
            parts.append(value.value)
        found.append(10 * parts[0] + parts[1])
    return min(found, default=None)


def _num_cuda_devices() -> int:
    """Devices that the driver shows to this process; CUDA_VISIBLE_DEVICES counts."""
    driver, count = _cuda_driver(), ctypes.c_int(0)
    if driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
        return count.value
    return 0


def _cuda_driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, ready to be asked."""
    for name in _CUDA_DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == 0 else None
    return None


def _is_apple_silicon() -> bool:
    import platform

    return platform.machine() == "arm64"
