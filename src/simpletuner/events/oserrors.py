"""What the operating system refused, as a Problem with a fix. For everything that writes or reads user files."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner.problems import ExitCode, Problem, SimpletunerError

_WINDOWS_DISK_FULL = 112
_WINDOWS_WRITE_PROTECTED = 19

_CODES = {
    errno.ENOSPC: "E-DISK-FULL",
    errno.EDQUOT: "E-DISK-FULL",
    errno.EFBIG: "E-FILE-TOO-LARGE",
    errno.EROFS: "E-READ-ONLY",
    errno.EACCES: "E-NO-PERMISSION",
    errno.EPERM: "E-NO-PERMISSION",
    errno.ENOENT: "E-PATH-NOT-FOUND",
    errno.ENOTDIR: "E-NOT-A-FOLDER",
    errno.EEXIST: "E-NOT-A-FOLDER",
    errno.EISDIR: "E-IS-A-FOLDER",
    errno.ENAMETOOLONG: "E-PATH-TOO-LONG",
    errno.EMFILE: "E-TOO-MANY-FILES",
    errno.ENFILE: "E-TOO-MANY-FILES",
}


class FileSystemError(SimpletunerError):
    """A file or folder of the user cannot be read or written."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, ExitCode.ENVIRONMENT)


def problem_from_oserror(error: OSError, path: str | Path) -> Problem:
    """Say in a user's terms why `path` could not be used."""
    windows_error = getattr(error, "winerror", None)
    if windows_error == _WINDOWS_DISK_FULL:
        code = "E-DISK-FULL"
    elif windows_error == _WINDOWS_WRITE_PROTECTED:
        code = "E-READ-ONLY"
    else:
        code = _CODES.get(error.errno or 0, "E-INPUT-OUTPUT")
    return Problem(code=code, params={"path": str(path), "reason": error.strerror or str(error)})


@contextmanager
def os_errors_as_problems(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a FileSystemError about `path`."""
    try:
        yield
    except OSError as error:
        raise FileSystemError(problem_from_oserror(error, path)) from error
