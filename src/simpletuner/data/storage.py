"""Where the files of a dataset are: what every storage offers, and the local folder. Standard library only.

A storage is a frozen value that opens nothing before it is used. It can be pickled and used from threads and other
processes, and it never writes where the images are.
"""

from __future__ import annotations

import io
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""File name endings that count as images, in lower case."""
CAPTION_EXTENSION = ".txt"

_BLOCK_BYTES = 1 << 16
_CLOCK_GRAIN_NS = 2_000_000_000  # FAT counts in steps of two seconds.


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """A file of a dataset, before it is read."""

    key: str
    """Path inside the dataset with forward slashes: `cats/tom.jpg`."""
    size_bytes: int
    version: str
    """Another one when the content may be another: a time of change, an ETag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """A file that is named like an image and cannot be used as one."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherFiles:
    """How many files of a kind that is not an image there are. `extension` is lower case, "" for none."""

    extension: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names of a storage. `images` are sorted by key; `texts` are the caption files by key."""

    images: tuple[FileInfo, ...]
    texts: Mapping[str, FileInfo] = field(default_factory=lambda: MappingProxyType({}))
    unreadable: tuple[Unreadable, ...] = ()
    others: tuple[OtherFiles, ...] = ()


class ChangedFileError(OSError):
    """The file is not the one that was listed."""


class Storage(Protocol):
    """Where the files of a dataset are. Every method raises OSError, after retries of its own."""

    @property
    def id(self) -> str:
        """Stable name of the place, without secrets: "/data/cats", "s3://bucket/cats"."""
        ...

    @property
    def listed_as(self) -> str:
        """The name that its listing is kept under: another one where this machine knows that there is another."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether reading is waiting, mostly: many reads at once are faster than one after the other."""
        ...

    def list_files(self) -> Listing:
        """What is there, at every depth."""
        ...

    def read(self, file: FileInfo) -> bytes:
        """The whole file. Raises ChangedFileError if it is not the one that was listed."""
        ...

    def open(self, file: FileInfo) -> BinaryIO:
        """A seekable stream that fetches little more than what is read from it."""
        ...

    def content_of(self, file: FileInfo) -> str | None:
        """An identity of the bytes that is known without reading them, 32 hex digits; None: read and hash them."""
        ...

    def is_settled(self, file: FileInfo) -> bool:
        """Whether any later change of the file will be another version."""
        ...

    def shown(self, key: str) -> str:
        """The path or URL of a file, for messages."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalStorage:
    """A folder and everything below it. Links are followed, no directory is entered twice.

    Names that start with a dot (".git", "._photo.jpg" of macOS) are passed over.
    """

    folder: Path

    @property
    def id(self) -> str:
        """The folder's absolute path."""
        return os.path.abspath(self.folder)  # noqa: PTH100 (Path.absolute keeps "..", Path.resolve follows links)

    @property
    def listed_as(self) -> str:
        """The same."""
        return self.id

    @property
    def is_remote(self) -> bool:
        """No: reading takes the processor, not time."""
        return False

    def list_files(self) -> Listing:
        """List the folder. Raises OSError: a directory cannot be listed."""
        images: list[FileInfo] = []
        texts: dict[str, FileInfo] = {}
        broken: list[Unreadable] = []
        others: Counter[str] = Counter()
        for entry, key in _walk(self.id):
            extension = _extension(entry.name)
            is_image = extension in EXTENSIONS
            if not is_image:
                others[extension] += 1
                if extension != CAPTION_EXTENSION:
                    continue
            try:
                status = entry.stat()
            except OSError:
                if is_image:
                    broken.append(Unreadable(key=key, reason="broken link"))
                continue
            if stat.S_ISREG(status.st_mode):
                file = FileInfo(key=key, size_bytes=status.st_size, version=str(status.st_mtime_ns))
                if is_image:
                    images.append(file)
                else:
                    texts[key] = file
            elif is_image:
                broken.append(Unreadable(key=key, reason="not a regular file"))
        return Listing(
            images=tuple(sorted(images, key=lambda file: file.key)),
            texts=texts,
            unreadable=tuple(sorted(broken, key=lambda item: item.key)),
            others=tuple(OtherFiles(extension=name, count=count) for name, count in others.most_common()),
        )

    def read(self, file: FileInfo) -> bytes:
        """The whole file, in one read."""
        with self.open(file) as stream:
            data = stream.read()
            self._check(stream, file)
        return data

    def open(self, file: FileInfo) -> BinaryIO:
        """The file itself, without a buffer: whoever reads a header wants a few blocks of it."""
        return open(f"{self.id}{os.sep}{file.key}", "rb", buffering=0)  # noqa: PTH123

    def content_of(self, file: FileInfo) -> str | None:
        """Unknown: a folder tells nothing of what is in its files."""
        return None

    def is_settled(self, file: FileInfo) -> bool:
        """Whether the last change is long enough ago for the file system's clock to tell a next one apart."""
        return int(file.version) < time.time_ns() - _CLOCK_GRAIN_NS

    def shown(self, key: str) -> str:
        """The file's path."""
        return str(Path(self.id) / key)

    def _check(self, stream: BinaryIO, file: FileInfo) -> None:
        status = os.fstat(stream.fileno())
        if (status.st_size, str(status.st_mtime_ns)) != (file.size_bytes, file.version):
            raise ChangedFileError(0, "it changed after it was listed", self.shown(file.key))


class RangedStream(io.RawIOBase):
    """A seekable stream over `read_range(start, length)`, for storages that can fetch a part of a file."""

    def __init__(self, read_range: RangeReader, size_bytes: int) -> None:
        super().__init__()
        self._read_range = read_range
        self._size_bytes = size_bytes
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as every stream does."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fetch the next bytes; 0 at the end of the file."""
        wanted = min(len(buffer), max(self._size_bytes - self._at, 0))
        if wanted == 0:
            return 0
        data = self._read_range(self._at, wanted)
        if not data:
            raise OSError(0, f"it ends after {self._at} of {self._size_bytes} bytes")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class RangeReader(Protocol):
    """Fetches a part of a file."""

    def __call__(self, start: int, length: int) -> bytes:
        """The bytes from `start` on, at most `length`, fewer only at the end of the file."""
        ...


def ranged(read_range: RangeReader, size_bytes: int) -> BinaryIO:
    """A buffered stream that fetches blocks of 64 KiB."""
    return io.BufferedReader(RangedStream(read_range, size_bytes), _BLOCK_BYTES)


def _extension(name: str) -> str:
    """The ending of a file's name in lower case, "" for none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _walk(folder: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield every visible non-directory below `folder` with its key."""
    entered: set[tuple[int, int]] = set()
    waiting = [(folder, "")]
    while waiting:
        directory, prefix = waiting.pop()
        status = os.stat(directory)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        links: list[tuple[str, str]] = []
        directories: list[tuple[str, str]] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if _is_directory(entry):
                    (links if entry.is_symlink() else directories).append((entry.path, f"{prefix}{name}/"))
                else:
                    yield entry, prefix + name
        # Last in, first out: real directories before links, so that a link never takes a directory's place.
        waiting[:0] = sorted(links, reverse=True)
        waiting.extend(sorted(directories, reverse=True))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
