"""Turns what an operating system says about a full or locked disk into problems a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner.problems import DatasetError, ExitCode, Problem, SimpletunerError

_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


@contextmanager
def storage_problems(directory: Path) -> Iterator[None]:
    """Raise a problem that names `directory` where the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise storage_error(directory, error) from error


def storage_error(directory: Path, error: OSError) -> SimpletunerError:
    """The problem behind an OSError while writing to a cache directory."""
    if error.errno in _FULL:
        return SimpletunerError(
            Problem(code="E-CACHE-DISK-FULL", params={"directory": str(directory)}), ExitCode.ENVIRONMENT
        )
    reason = error.strerror or str(error)
    return DatasetError(Problem(code="E-CACHE-NOT-WRITABLE", params={"directory": str(directory), "reason": reason}))
