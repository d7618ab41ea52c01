"""Optional libraries that an option asks for, looked for without importing them."""

from __future__ import annotations

from simpletuner.catalog.libraries import Library
from simpletuner.hardware.probe import is_installed
from simpletuner.problems import Fix, Problem


def missing_library(key: str, value: str, library: Library | None, *, instead: str) -> Problem | None:
    """The problem if `key` = `value` needs a library that is not installed; `instead` is a value that needs none."""
    if library is None or is_installed(library.module):
        return None
    params = {
        "key": key,
        "value": value,
        "distribution": library.distribution,
        "extra": f"pip install -e '.[{library.extra}]'",
        "command": f"pip install '{library.requirement}'",
    }
    return Problem(code="E-LIBRARY-MISSING", params=params, path=f"/{key}", fixes=(Fix(key=key, value=instead),))
