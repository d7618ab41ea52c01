"""A few attempts with growing pauses, for what may work a moment later. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from simpletuner.data.storages.errors import StorageError

_Result = TypeVar("_Result")


class TransientError(Exception):
    """A failure that may pass: a time-out, a broken connection, an overloaded server. The text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often and how long a service is waited for."""

    num_attempts: int = 4
    first_pause_s: float = 0.5
    """The pause after the first attempt; each later one is twice as long."""
    timeout_s: float = 30.0
    """For a connection, and for each pause in what the other side sends."""


def patiently(attempt: Callable[[], _Result], *, patience: Patience, place: str) -> _Result:
    """Return what `attempt` returns, trying again where it raises TransientError.

    Raises: StorageError E-STORAGE-NETWORK: every attempt failed.
    """
    for number in range(patience.num_attempts):
        try:
            return attempt()
        except TransientError as error:
            last = error
        if number + 1 < patience.num_attempts:
            time.sleep(patience.first_pause_s * 2**number)
    params = {"attempts": patience.num_attempts}
    raise StorageError("E-STORAGE-NETWORK", place=place, reason=str(last), params=params) from last
