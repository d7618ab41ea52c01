"""What can be wrong with a storage or a table, as an OSError that knows its message. Standard library only."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from simpletuner.problems import Problem


class StorageError(OSError):
    """A storage or a table as a whole cannot be used; `reason` is what the other side said.

    It ends the run, other than a single image that is damaged. Can be sent between processes.
    """

    def __init__(self, code: str, *, place: str, reason: str = "", params: Mapping[str, object] | None = None) -> None:
        super().__init__(errno.EIO, reason or code, place)
        self.code = code
        self.place = place
        self.reason = reason
        self.params = dict(params or {})

    def __reduce__(self) -> tuple[object, ...]:
        return _storage_error, (self.code, self.place, self.reason, self.params)

    def problem(self, dataset_id: str) -> Problem:
        """The message, for the dataset that uses the storage."""
        params = {"id": dataset_id, "place": self.place, "reason": self.reason or "-", **self.params}
        return Problem(code=self.code, params=params)


def _storage_error(code: str, place: str, reason: str, params: Mapping[str, object]) -> StorageError:
    return StorageError(code, place=place, reason=reason, params=params)
