"""Whether an optional library is there, without importing it."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether `import module` would find something. Of a dotted name only the first part is imported, if at all."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
