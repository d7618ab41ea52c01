"""Python's collector of reference cycles, kept from looking through a hundred thousand records again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Make many small values that live on, and no cycles, in the block: collecting would find nothing and cost a third
    of the time. Main thread only."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
