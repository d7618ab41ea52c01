"""How much main memory is left. Standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (  # (limit, use), version 2 and version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_ram_bytes() -> int | None:
    """What a process could take without swapping, by the system and by its container; None if nobody can tell."""
    found = [size for size in (_by_meminfo(), *(_by_cgroup(*paths) for paths in _CGROUPS)) if size is not None]
    return min(found) if found else _by_sysconf()


def _by_meminfo() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _by_cgroup(limit: Path, use: Path) -> int | None:
    """Pages of files count as used and can be taken back, so this errs on the careful side only a little: they are
    added again."""
    try:
        return max(0, int(limit.read_text()) - int(use.read_text()) + _reclaimable(use.parent / "memory.stat"))
    except (OSError, ValueError):  # "max", or no such file
        return None


def _reclaimable(stat: Path) -> int:
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))


def _by_sysconf() -> int | None:
    """All of the machine's memory: better than nothing on systems without /proc."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
