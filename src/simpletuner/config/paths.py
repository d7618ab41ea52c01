"""Paths in options: {package}, ~, what a relative path is relative to, and how paths are shown."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent.parent
EXAMPLES_DIR = PACKAGE_DIR / "examples"
EXAMPLES_PREFIX = "config/examples/"
"""Options may name the files of an example by this prefix."""

PACKAGE_PLACEHOLDER = "{package}"

_LONGEST_NAME = 60  # file systems take 255 bytes, and a letter has up to four


def fill_package(text: str) -> str:
    """Replace {package} by the folder of the installed package."""
    return text.replace(PACKAGE_PLACEHOLDER, PACKAGE_DIR.as_posix())


def fill_path(text: str, cwd: Path) -> str:
    """The absolute path that an option means: {package} and ~ filled in, the rest relative to `cwd`.

    `config/examples/NAME/...` means the packaged example where the working directory has no such file.
    """
    written = fill_package(text)
    path = Path(os.path.normpath(cwd / expand_home(written)))
    if written.replace("\\", "/").startswith(EXAMPLES_PREFIX) and not path_exists(path):
        packaged = EXAMPLES_DIR / written[len(EXAMPLES_PREFIX) :]
        return str(packaged if path_exists(packaged) else path)
    return str(path)


def expand_home(text: str) -> Path:
    """The path with a leading ~ replaced; as it is where that user has no home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def shown_path(path: Path, cwd: Path) -> str:
    """A path as messages show it: relative to `cwd` if it lies inside, with forward slashes. A packaged example is
    shown by the path that stands for it in options."""
    for folder, prefix in ((cwd, ""), (EXAMPLES_DIR, EXAMPLES_PREFIX)):
        with contextlib.suppress(ValueError):
            return prefix + path.relative_to(folder).as_posix()
    return path.as_posix()


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for names that the file system cannot have or places it will not show."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False for names that the file system cannot have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def path_exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for names that the file system cannot have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def as_file_name(text: str) -> str:
    """`text` as one name that every file system takes: what would lead elsewhere, or be too long, is replaced."""
    name = re.sub(r'[\x00-\x1f<>:"/\\|?*{}]', "_", text)[:_LONGEST_NAME].rstrip(". ")
    return name or "_"
