"""Paths in options: {package}, ~, and what a relative path is relative to."""

from __future__ import annotations

import os
from pathlib import Path

from simpletuner.config.search import EXAMPLES_DIR, EXAMPLES_PREFIX, PACKAGE_DIR

PACKAGE_PLACEHOLDER = "{package}"


def fill_package(text: str) -> str:
    """Replace {package} by the folder of the installed package."""
    return text.replace(PACKAGE_PLACEHOLDER, PACKAGE_DIR.as_posix()) if PACKAGE_PLACEHOLDER in text else text


def fill_path(text: str, cwd: Path) -> str:
    """The absolute path that an option means: {package} and ~ filled in, the rest relative to `cwd`.

    `config/examples/NAME/...` means the packaged example where the working directory has no such file.
    """
    written = fill_package(text)
    path = Path(os.path.normpath(cwd / Path(written).expanduser()))
    if written.replace("\\", "/").startswith(EXAMPLES_PREFIX) and not path.exists():
        packaged = EXAMPLES_DIR / written[len(EXAMPLES_PREFIX) :]
        return str(packaged if packaged.exists() else path)
    return str(path)
