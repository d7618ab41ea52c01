"""A directory of tensors by key: content-addressed, crash-safe, shared by any number of runs at once.

Entries are written in groups, one safetensors file per group. A file is written under a temporary name, flushed to
the disk and renamed, so a reader sees it whole or not at all. Its header carries a checksum of every entry and its
name is the hash of the header: whatever is damaged later is noticed and treated as absent. Entries never change.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.data.hashing import content_hash
from simpletuner.data.storage_errors import storage_problems
from simpletuner.problems import DatasetError, Problem

_SUFFIX = ".safetensors"
_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_AFTER_S = 3600.0
_CHECK_UP_TO_BYTES = 1 << 30
_HEADER_ALIGNMENT = 8
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _New:
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes


class TensorStore:
    """Tensors of one cache directory. Sees what was there when it was opened, and what its own writer adds."""

    def __init__(self, directory: Path) -> None:
        """Read the headers of `directory`, which need not exist. Files that are not whole are left out."""
        self.directory = directory
        self._entries: dict[str, _Entry] = {}
        if directory.is_dir():
            for shard in sorted(directory.glob("*" + _SUFFIX)):
                self._entries.update(_read_header(shard))

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def contains(self, key: str) -> bool:
        """Whether `key` can be read."""
        return key in self._entries

    def num_bytes(self, key: str) -> int:
        """The size of an entry, known without reading it. Raises: KeyError: absent."""
        return self._entries[key].num_bytes

    def get(self, key: str) -> Tensor:
        """Return a fresh CPU tensor, as it was put.

        Raises: KeyError: absent. DatasetError: the file was damaged or removed since it was opened.
        """
        entry = self._entries[key]
        tensor = _read_entry(entry)
        if tensor is None:
            raise DatasetError(Problem(code="E-CACHE-DAMAGED", params={"file": str(entry.shard)}))
        return tensor

    def discard_damaged(self, keys: Iterable[str], *, num_threads: int = 4) -> int:
        """Check the bytes of `keys` that are present. Delete the files that are damaged, with all their entries.

        Beyond 1 GiB that would take seconds, and nothing is checked: `get` still notices. Returns how many entries
        are gone.
        """
        present = [self._entries[key] for key in keys if key in self._entries]
        if sum(entry.num_bytes for entry in present) > _CHECK_UP_TO_BYTES:
            return 0
        with ThreadPoolExecutor(num_threads) as pool:
            intact = list(pool.map(lambda entry: _read_bytes(entry) is not None, present))
        damaged = {entry.shard for entry, is_intact in zip(present, intact, strict=True) if not is_intact}
        num_before = len(self._entries)
        self._entries = {key: entry for key, entry in self._entries.items() if entry.shard not in damaged}
        for shard in damaged:
            with suppress(OSError):
                shard.unlink()
        return num_before - len(self._entries)

    @contextmanager
    def writer(
        self, *, group_entries: int = 128, group_bytes: int = 64 << 20, group_s: float = 10.0
    ) -> Iterator[Writer]:
        """Open the store for `put`. A group is written when it is full, or `group_s` after its first entry.

        What was put is written on the way out too, after an exception as well: finished work is kept.

        Raises: DatasetError: the disk is full, or the directory cannot be written. What was written before stays.
        """
        with storage_problems(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.directory)
        writer = Writer(self, group_entries=group_entries, group_bytes=group_bytes, group_s=group_s)
        try:
            yield writer
        finally:
            writer.flush()

    def _add(self, shard: Path) -> None:
        self._entries.update(_read_header(shard))


class Writer:
    """Collects entries and writes them in groups. One thread at a time may call `put`."""

    def __init__(self, store: TensorStore, *, group_entries: int, group_bytes: int, group_s: float) -> None:
        self._store = store
        self._group_entries = group_entries
        self._group_bytes = group_bytes
        self._group_s = group_s
        self._pending: list[_New] = []
        self._pending_bytes = 0
        self._oldest_s = 0.0

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor (float32, bfloat16, float16 or uint8; any shape, any device). A key that is there is kept."""
        if key in self._store or any(new.key == key for new in self._pending):
            return
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if not self._pending:
            self._oldest_s = time.monotonic()
        self._pending.append(_New(key=key, dtype=tensor.dtype, shape=tuple(tensor.shape), data=data))
        self._pending_bytes += len(data)
        if (
            len(self._pending) >= self._group_entries
            or self._pending_bytes >= self._group_bytes
            or time.monotonic() - self._oldest_s >= self._group_s
        ):
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Afterwards the store can read it."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        with storage_problems(self._store.directory):
            self._store._add(_write_shard(self._store.directory, pending))


def _write_shard(directory: Path, entries: list[_New]) -> Path:
    """Write one safetensors file, whole or not at all, and return its path."""
    header: dict[str, object] = {"__metadata__": {new.key: f"{zlib.crc32(new.data):08x}" for new in entries}}
    end = 0
    for new in entries:
        start, end = end, end + len(new.data)
        header[new.key] = {"dtype": _DTYPE_NAMES[new.dtype], "shape": new.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    final = directory / (content_hash(encoded) + _SUFFIX)
    temporary = directory / f"{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
    try:
        with temporary.open("xb") as file:
            file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little"))
            file.write(encoded)
            for new in entries:
                file.write(new.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(directory)
    return final


def _read_header(shard: Path) -> dict[str, _Entry]:
    """Return the entries of a shard; none if the file is not one that was written whole."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                return {}
            encoded = file.read(length)
            file_bytes = os.fstat(file.fileno()).st_size
    except OSError:
        return {}
    if content_hash(encoded) != shard.stem:
        return {}
    header = json.loads(encoded)
    checksums = header.pop("__metadata__")
    start = _LENGTH_BYTES + length
    entries: dict[str, _Entry] = {}
    for key, value in header.items():
        first, end = value["data_offsets"]
        if start + end <= file_bytes:
            entries[key] = _Entry(
                shard=shard,
                offset=start + first,
                num_bytes=end - first,
                dtype=_DTYPES[value["dtype"]],
                shape=tuple(value["shape"]),
                crc32=int(checksums[key], 16),
            )
    return entries


def _read_bytes(entry: _Entry) -> bytearray | None:
    """The bytes of an entry, or None if they are not those that were written."""
    data = bytearray(entry.num_bytes)
    try:
        with entry.shard.open("rb") as file:
            file.seek(entry.offset)
            complete = file.readinto(data) == entry.num_bytes
    except OSError:
        return None
    return data if complete and zlib.crc32(data) == entry.crc32 else None


def _read_entry(entry: _Entry) -> Tensor | None:
    data = _read_bytes(entry)
    if data is None:
        return None
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _remove_abandoned(directory: Path) -> None:
    """Delete the temporary files of writers that were killed. A live writer's is seconds old."""
    oldest = time.time() - _ABANDONED_AFTER_S
    for path in directory.glob("*" + _TEMPORARY_SUFFIX):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut. Windows has no such call and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
