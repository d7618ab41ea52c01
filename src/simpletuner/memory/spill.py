"""Streamed weights in files, for machines whose main memory does not hold them.

A spill is a folder: one file of bytes for each group, and `index.json`, written last, which says what they hold. It is
made under another name and renamed when all of it is on the disk, so a folder of the right name is whole, and one of
another name is nobody's. Its name is made from what is in it; a later run with the same weights reads it as it is.

Blocks are read, not mapped: mapped pages count as memory of the process until the system takes them back, and a GPU can
be fed from pinned memory only, so the bytes would be copied anyway. What main memory is free keeps the blocks that were
read last, which backward wants first.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from simpletuner.events.oserrors import FileSystemError, os_errors_as_problems
from simpletuner.events.processes import is_alive, process_start
from simpletuner.memory.groups import aligned
from simpletuner.memory.store import GroupLayout, GroupStore, PartLayout, Parts, lay_out
from simpletuner.problems import Problem

_INDEX = "index.json"
_VERSION = 1  # raise it when the same weights would lie in another way
_PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A group's file: its layout and the CRC-32 of its bytes."""

    layout: GroupLayout
    crc: int


class SpillStore(GroupStore):
    """Blocks in the folder `directory / key`, which is made if it is not there.

    `key` stands for the weights and their form; `groups` are the layers' names. `is_ready` tells whether the blocks
    are there from an earlier run. Every block's checksum is compared when it is first read.

    Raises:
        FileSystemError: the folder cannot be made or written to, a file cannot be read, E-SPILL-DAMAGED.
    """

    def __init__(self, directory: Path, key: str, groups: Sequence[Sequence[str]]) -> None:
        self._path = directory / key
        self._groups = groups
        self._blocks: dict[int, _Block] = {}
        self._checked: set[int] = set()
        with os_errors_as_problems(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(directory)
            found = _read_index(self._path, groups)
            self.is_ready = found is not None
            if found is not None:
                self._blocks = found
                return
            if self._path.exists():  # of another version, or somebody has been at it
                shutil.rmtree(self._path)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{key}{_PARTIAL}", suffix=f"-{os.getpid()}", dir=directory))
            (self._partial / "process").write_text(process_start(os.getpid()) or "")

    @property
    def path(self) -> Path:
        return self._path

    def put(self, group: int, layers: Mapping[str, Parts]) -> None:
        layout = lay_out(layers)
        crc = 0
        with os_errors_as_problems(self._partial), (self._partial / _file_name(group)).open("wb") as file:
            for content in _contents(layers):
                file.write(content)
                crc = zlib.crc32(content, crc)
            file.flush()
            os.fsync(file.fileno())
        self._blocks[group] = _Block(layout=layout, crc=crc)

    def finish(self) -> None:
        if self.is_ready:
            return
        assert self._blocks.keys() == set(range(len(self._groups)))
        index = {"version": _VERSION, "groups": [_to_json(self._blocks[g]) for g in range(len(self._groups))]}
        with os_errors_as_problems(self._partial):
            (self._partial / "process").unlink()
            with (self._partial / _INDEX).open("w", encoding="utf-8") as file:
                json.dump(index, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                self._partial.rename(self._path)
            except OSError:
                if _read_index(self._path, self._groups) is None:
                    raise
                shutil.rmtree(self._partial)  # another run was quicker
        self.is_ready = True

    def layout(self, group: int) -> GroupLayout:
        return self._blocks[group].layout

    def block(self, group: int) -> None:
        return None

    def read(self, group: int, into: Tensor) -> None:
        path = self._path / _file_name(group)
        with os_errors_as_problems(path), path.open("rb", buffering=0) as file:
            content = _bytes_of(into)
            rest = content
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise _damaged(self._path)
                rest = rest[count:]
        if group not in self._checked:
            if zlib.crc32(content) != self._blocks[group].crc:
                raise _damaged(self._path)
            self._checked.add(group)


def is_spilled(directory: Path, key: str, groups: Sequence[Sequence[str]]) -> bool:
    """Whether an earlier run has left these weights there, whole."""
    return _read_index(directory / key, groups) is not None


def _contents(layers: Mapping[str, Parts]) -> Iterator[memoryview | bytes]:
    """The bytes of a block from its beginning on, as `lay_out` places them, with zeros in the gaps."""
    for parts in layers.values():
        for tensor in parts.values():
            yield _bytes_of(tensor.contiguous().reshape(-1).view(torch.uint8))
            yield bytes(aligned(tensor.nbytes) - tensor.nbytes)


def _remove_left_behind(directory: Path) -> None:
    """What runs that are dead had begun to write."""
    for path in directory.glob(f".*{_PARTIAL}*"):
        pid = path.name.rpartition("-")[2]
        start_file = path / "process"
        start = start_file.read_text() if start_file.exists() else None
        if pid.isdigit() and is_alive(int(pid), start or None) is not False:
            continue
        shutil.rmtree(path, ignore_errors=True)


def _read_index(path: Path, groups: Sequence[Sequence[str]]) -> dict[int, _Block] | None:
    """The blocks of a spill; None if it is not there, not whole, or of other groups."""
    try:
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        if index["version"] != _VERSION or len(index["groups"]) != len(groups):
            return None
        blocks = {number: _from_json(entry) for number, entry in enumerate(index["groups"])}
        sizes = {number: (path / _file_name(number)).stat().st_size for number in blocks}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for number, block in blocks.items():
        if set(block.layout.layers) != set(groups[number]) or block.layout.size_bytes != sizes[number]:
            return None
    return blocks


def _to_json(block: _Block) -> dict[str, object]:
    layers = {
        layer: {name: [str(p.dtype).removeprefix("torch."), list(p.shape), p.start] for name, p in parts.items()}
        for layer, parts in block.layout.layers.items()
    }
    return {"layers": layers, "size_bytes": block.layout.size_bytes, "crc": block.crc}


def _from_json(entry: Mapping[str, Any]) -> _Block:
    layers = {
        layer: {
            name: PartLayout(dtype=getattr(torch, dtype), shape=tuple(shape), start=start)
            for name, (dtype, shape, start) in parts.items()
        }
        for layer, parts in entry["layers"].items()
    }
    return _Block(layout=GroupLayout(layers=layers, size_bytes=entry["size_bytes"]), crc=entry["crc"])


def _file_name(group: int) -> str:
    return f"group-{group:04d}.bin"


def _damaged(path: Path) -> FileSystemError:
    return FileSystemError(Problem(code="E-SPILL-DAMAGED", params={"path": path}, path="/group_offload_to_disk_path"))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 [n] tensor, not a copy."""
    return memoryview(cast("Any", tensor.numpy()))
