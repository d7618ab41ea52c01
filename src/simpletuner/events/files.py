"""Small files that are complete or absent, on every operating system."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

_SHARING_RETRIES = 20
_SHARING_WAIT_S = 0.01


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by a file with `text`, as by `replacing`.

    Raises:
        OSError: nothing was changed, and no temporary file is left.
    """
    with replacing(path, durable=durable) as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """What is written within replaces `path` in one step: a reader sees the old or the new content, never a part.

    `durable` also waits until the content is on the disk, so that a power cut cannot leave an empty file.

    Raises:
        OSError: nothing was changed, and no temporary file is left; so too if the block raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        _patiently(lambda: temporary.replace(path))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_text(path: Path) -> str:
    """The text of a file that another process may be replacing at this moment."""
    return _patiently(lambda: path.read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold an operating system lock on `path` (created if absent) during the block; freed even if the process dies.

    Yields False where another process holds it. A file system without locks yields True: the caller's own checks
    must then be enough.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _patiently(action: Callable[[], T]) -> T:
    """Windows refuses to replace an open file and to open one that is being replaced; both last microseconds."""
    for _ in range(_SHARING_RETRIES if sys.platform == "win32" else 0):
        try:
            return action()
        except PermissionError:
            time.sleep(_SHARING_WAIT_S)
    return action()


def _lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        except OSError:
            return True
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True
