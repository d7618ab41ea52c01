"""Packages that only some storages need: told by name where one is missing. Standard library only."""

from __future__ import annotations

import importlib.util

from simpletuner.data.storages.errors import StorageError


def need_packages(modules: tuple[str, ...], *, extra: str, place: str) -> None:
    """Raise StorageError E-STORAGE-PACKAGE if one of `modules` is not installed. `extra` of ours installs them all."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        params = {"packages": ", ".join(missing), "command": f"pip install 'simpletuner[{extra}]'"}
        raise StorageError("E-STORAGE-PACKAGE", place=place, params=params)
