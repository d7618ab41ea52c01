"""Is that process still the one that wrote its number down? Without third-party packages.

A process number is reused after a while, so it is only trusted together with the start time of its process. The start
time is an opaque text: it only has to be the same when the same process is asked again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PS_TIMEOUT_S = 5.0


def process_start(pid: int) -> str | None:
    """The start time of a live process; None if there is no such process, or it is a zombie, or nobody can tell."""
    if pid <= 0:
        return None
    if sys.platform == "win32":
        return _start_windows(pid)
    if Path("/proc/self/stat").exists():
        return _start_linux(pid)
    return _start_ps(pid)


def is_alive(pid: int, start: str | None) -> bool | None:
    """Whether process `pid` runs and is the one that started at `start`; None if this cannot be found out here."""
    now = process_start(pid)
    if now is not None:
        return None if start is None else now == start
    if process_start(os.getpid()) is None:  # this system does not tell start times at all
        return None if _exists(pid) else False
    return False


def is_suspended(pid: int) -> bool:
    """Whether a live process was halted (Ctrl-Z, SIGSTOP) and waits to be continued. Only Linux tells; else False."""
    fields = _stat_linux(pid)
    return bool(fields) and fields[0] == b"T"


def _start_linux(pid: int) -> str | None:
    fields = _stat_linux(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return None
    if not fields or fields[0] in (b"Z", b"X", b"x"):
        return None
    return f"{boot}:{fields[19].decode()}"


def _stat_linux(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: first the state, 19 further the start time. Empty: no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    # The second field is the command in brackets and may hold anything, brackets too.
    return stat[stat.rfind(b")") + 2 :].split()


def _start_ps(pid: int) -> str | None:
    try:
        answer = subprocess.run(
            ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            timeout=_PS_TIMEOUT_S,
            check=False,
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        ).stdout.split(maxsplit=1)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[1].strip() if len(answer) == 2 and not answer[0].startswith("Z") else None


def _exists(pid: int) -> bool:
    if sys.platform == "win32":  # there, os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


if sys.platform == "win32":

    def _start_windows(pid: int) -> str | None:
        import ctypes
        from ctypes import wintypes

        query_limited_information, still_active = 0x1000, 259
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = wintypes.HANDLE
        handle = kernel32.OpenProcess(query_limited_information, False, pid)
        if not handle:
            return None
        try:
            code = wintypes.DWORD()
            times = [wintypes.FILETIME() for _ in range(4)]
            if (
                not kernel32.GetExitCodeProcess(wintypes.HANDLE(handle), ctypes.byref(code))
                or code.value != still_active
            ):
                return None
            if not kernel32.GetProcessTimes(wintypes.HANDLE(handle), *(ctypes.byref(moment) for moment in times)):
                return None
            return str((times[0].dwHighDateTime << 32) | times[0].dwLowDateTime)
        finally:
            kernel32.CloseHandle(wintypes.HANDLE(handle))
