"""A connection that each process makes for itself, when it first needs one. Standard library only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Lazy(Generic[_Value]):
    """Holds what was made in this process; another process starts empty, and a copy that was sent does, too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[int, _Value] | None = None

    def get(self, make: Callable[[], _Value]) -> _Value:
        """The value, made by the first thread that asks."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), make())
            return self._made[1]

    def __reduce__(self) -> tuple[object, ...]:
        return Lazy, ()
