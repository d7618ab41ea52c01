"""Weight files on disk: what they hold, whether they are whole, what identifies them. Reads headers, loads nothing.

A safetensors file is 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from simpletuner.problems import ModelError, Problem

GGUF_SUFFIX = ".gguf"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20
_LFS_POINTER = b"version https://git-lfs"

# What a fingerprint reads of a file: all of it up to _WHOLE_BYTES; of a larger one a piece in the middle of every
# tensor and pieces at even distances, a few MiB in all. Training moves every entry of a tensor, so this tells
# checkpoints apart without reading them.
_WHOLE_BYTES = 32 << 20
_TENSOR_SAMPLE_BYTES = 4 << 10
_CHUNK_BYTES = 64 << 10
_NUM_CHUNKS = 64
# Entries of a config.json that say who wrote it, not what it describes.
_PROVENANCE_KEYS = frozenset({"_diffusers_version", "_name_or_path", "transformers_version"})


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """One part of a pipeline: the config.json that gives its sizes and the safetensors files, sorted by name."""

    part: str
    config_path: Path
    shards: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One entry of a file's header; `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors or GGUF file says that it holds, in file order; the file is known to be long enough for it."""

    path: Path
    size_bytes: int
    tensors: tuple[StoredTensor, ...]
    digest: bytes
    metadata: Mapping[str, str]


def read_json(path: Path) -> Mapping[str, Any]:
    """Parse a JSON object.

    Raises:
        ModelError: E-MODEL-JSON, not valid JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _json_problem(path, error.lineno, error.colno) from error
    except UnicodeDecodeError as error:
        raise _json_problem(path, 1, error.start + 1) from error
    if not isinstance(value, dict):
        raise _json_problem(path, 1, 1)
    return value


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors or GGUF file.

    Raises:
        ModelError: E-MODEL-LFS-POINTER, E-MODEL-NOT-SAFETENSORS or E-MODEL-TRUNCATED; see `open_gguf`.
    """
    if is_gguf(path):
        return _read_gguf_header(path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if prefix == _LFS_POINTER[:_LENGTH_BYTES]:
            raise ModelError(Problem(code="E-MODEL-LFS-POINTER", params={"path": path}))
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise _not_safetensors(path)
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, expected_bytes=_LENGTH_BYTES + length, found_bytes=size_bytes)
    try:
        entries = json.loads(raw)
        tensors = tuple(sorted(_entries(entries, _LENGTH_BYTES + length), key=lambda tensor: tensor.start))
        metadata = {str(key): str(value) for key, value in entries.get("__metadata__", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_safetensors(path) from error
    expected_bytes = max((tensor.stop for tensor in tensors), default=_LENGTH_BYTES + length)
    if size_bytes < expected_bytes:
        raise _truncated(path, expected_bytes=expected_bytes, found_bytes=size_bytes)
    digest = hashlib.sha256(raw).digest()
    return Header(path=path, size_bytes=size_bytes, tensors=tensors, digest=digest, metadata=metadata)


def is_gguf(path: Path) -> bool:
    """Whether the name says that it is a GGUF file."""
    return path.suffix.lower() == GGUF_SUFFIX


def open_gguf(path: Path) -> Any:
    """The package's reader of a GGUF file: a map of the file, nothing copied.

    Raises:
        ModelError: E-MODEL-GGUF-PACKAGE, the package `gguf` is not installed; E-MODEL-GGUF, it is no such file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(Problem(code="E-MODEL-GGUF-PACKAGE", params={"path": path})) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(Problem(code="E-MODEL-GGUF", params={"path": path, "reason": str(error)})) from error


def fingerprint(files: WeightFiles) -> str:
    """Identity of a part's contents: 64 hex digits, equal wherever the files lie and whatever they are called.

    Made of the config's values and, per file, its size, its header and samples of its bytes: milliseconds for
    8 GB. Used in cache keys, so that a cached result never outlives the model that made it.
    """
    config = {key: value for key, value in read_json(files.config_path).items() if key not in _PROVENANCE_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for shard in files.shards:
        header = read_header(shard)
        digest.update(header.size_bytes.to_bytes(8, "little") + header.digest)
        with shard.open("rb") as file:
            for chunk in _samples(file, header):
                digest.update(chunk)
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Hash of the full contents of small files, names included, in order of name: 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        contents = path.read_bytes()
        digest.update(f"{path.name}\0{len(contents)}\0".encode() + contents)
    return digest.hexdigest()


def unsupported(config_path: Path, error: Exception) -> ModelError:
    """The problem for a config whose values the part's class does not take."""
    params = {"path": config_path, "reason": f"{type(error).__name__}: {error}"}
    return ModelError(Problem(code="E-MODEL-UNSUPPORTED", params=params))


def _entries(header: Mapping[str, Any], data_start: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        yield StoredTensor(
            name=name,
            dtype=str(entry["dtype"]),
            shape=tuple(int(side) for side in entry["shape"]),
            start=data_start + int(start),
            stop=data_start + int(stop),
        )


def _read_gguf_header(path: Path) -> Header:
    """Names, shapes as the model has them, and where the blocks lie. Their format is the dtype, "GGML_" before it."""
    reader = open_gguf(path)
    tensors = []
    for tensor in reader.tensors:
        # GGUF counts sides from the innermost; some files keep apart the shape of a tensor that was flattened.
        shape = tuple(int(side) for side in reversed(tensor.shape))
        original = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        if original is not None:
            shape = tuple(int(original.parts[index][0]) for index in original.data)
        start = int(tensor.data_offset)
        stored = StoredTensor(
            name=str(tensor.name),
            dtype=f"GGML_{tensor.tensor_type.name}",
            shape=shape,
            start=start,
            stop=start + int(tensor.n_bytes),
        )
        tensors.append(stored)
    first = min((tensor.start for tensor in tensors), default=0)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(first)).digest()
    return Header(path=path, size_bytes=path.stat().st_size, tensors=tuple(tensors), digest=digest, metadata={})


def _samples(file: BinaryIO, header: Header) -> Iterator[bytes]:
    if header.size_bytes <= _WHOLE_BYTES:
        file.seek(0)
        yield file.read()
        return
    ends = [(tensor.start + tensor.stop - _TENSOR_SAMPLE_BYTES) // 2 for tensor in header.tensors]
    ranges = [(max(tensor.start, at), tensor.stop) for tensor, at in zip(header.tensors, ends, strict=True)]
    for start, stop in ranges:
        file.seek(start)
        yield file.read(min(_TENSOR_SAMPLE_BYTES, stop - start))
    for index in range(_NUM_CHUNKS):
        file.seek(index * (header.size_bytes - _CHUNK_BYTES) // (_NUM_CHUNKS - 1))
        yield file.read(_CHUNK_BYTES)


def _json_problem(path: Path, line: int, column: int) -> ModelError:
    return ModelError(Problem(code="E-MODEL-JSON", params={"path": path, "line": line, "column": column}))


def _not_safetensors(path: Path) -> ModelError:
    return ModelError(Problem(code="E-MODEL-NOT-SAFETENSORS", params={"path": path}))


def _truncated(path: Path, *, expected_bytes: int, found_bytes: int) -> ModelError:
    params = {"path": path, "expected_bytes": expected_bytes, "found_bytes": found_bytes}
    return ModelError(Problem(code="E-MODEL-TRUNCATED", params=params))
