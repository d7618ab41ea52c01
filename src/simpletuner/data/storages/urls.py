"""Images that a CSV file names by URL: fetched once into a folder of ours, then read from there."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import SplitResult, unquote, urlsplit

from simpletuner.data.hashing import stable_hash
from simpletuner.data.storage import EXTENSIONS, FileInfo, Listing, LocalStorage, Unreadable
from simpletuner.data.storage_errors import storage_problems
from simpletuner.data.storages.csv_table import read_rows
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.lazy import Lazy
from simpletuner.data.storages.patience import Patience, TransientError, patiently
from simpletuner.data.workers import ThreadPool, until_done
from simpletuner.events.files import replacing, write_atomic

if TYPE_CHECKING:
    from fsspec.implementations.http import HTTPFileSystem

_NUM_FETCHERS = 16
_GIVE_UP_AFTER = 32
"""So many failures in a row mean that nothing can be reached."""
_REASONS_IN_A_MESSAGE = 5
_NAMES_IN_A_MESSAGE = 10
_LONGEST_FETCH_S = 600.0
_REFUSED = ".refused"
_LATER = frozenset((408, 425, 429))
"""Answers of a server that is busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    key: str
    url: str
    """Empty for a file beside the CSV."""


@dataclass(frozen=True, kw_only=True)
class UrlStorage:
    """The rows of a CSV file: URLs of http and https, or paths that start at the CSV's folder.

    A fetched image is kept in `cache_dir`; deleting it there has it fetched again. What a server said it does not have
    is remembered there, too. Rows with the same URL are one image.
    """

    csv_file: Path
    cache_dir: Path
    url_column: str = "url"
    patience: Patience = field(default_factory=Patience)
    _files: Lazy[HTTPFileSystem] = field(default_factory=Lazy, init=False, repr=False, compare=False)
    _read_rows: Lazy[dict[str, _Row]] = field(default_factory=Lazy, init=False, repr=False, compare=False)

    @property
    def id(self) -> str:
        """The CSV's path and column, and where its images are kept."""
        return f"{os.path.abspath(self.csv_file)}#{self.url_column} ({os.path.abspath(self.cache_dir)})"  # noqa: PTH100

    @property
    def listed_as(self) -> str:
        """The same, with what the CSV names: a row more or less is another listing. Raises StorageError."""
        return stable_hash("rows 1", self.id, *sorted(self._rows()))

    @property
    def is_remote(self) -> bool:
        """No: once listed, the images are files of this machine."""
        return False

    def prepare(self, on_progress: Callable[[int, int], None]) -> None:
        """Fetch what is not here yet; `on_progress` counts images.

        Raises:
            StorageError: the CSV cannot be used, or images cannot be reached. What was fetched is kept.
            SimpletunerError: `cache_dir` cannot be written, or its disk is full.
        """
        rows = self._rows()
        settled = self._settled()
        wanted = [row for row in rows.values() if _is_fetched(row.url) and _name(row.url) not in settled]
        done = len(rows) - len(wanted)
        on_progress(done, len(rows))
        if not wanted:
            return
        for number, _ in enumerate(self._fetch_all(wanted), start=1):
            on_progress(done + number, len(rows))

    def check(self) -> None:
        """Look at the CSV alone. Raises StorageError."""
        self._rows()

    def list_files(self) -> Listing:
        """Fetch what is missing and list what there is. Raises StorageError."""
        self.prepare(lambda done, total: None)
        images: list[FileInfo] = []
        unreadable: list[Unreadable] = []
        for row in self._rows().values():
            if row.url and not _is_fetched(row.url):
                unreadable.append(Unreadable(key=row.key, reason=f"not http or https: {_shown_url(row.url)}"))
                continue
            path = self._path(row)
            try:
                status = path.stat()
            except OSError as error:
                unreadable.append(Unreadable(key=row.key, reason=self._refusal(row) or error.strerror or str(error)))
                continue
            images.append(FileInfo(key=row.key, size_bytes=status.st_size, version=str(status.st_mtime_ns)))
        return Listing(
            images=tuple(sorted(images, key=lambda file: file.key)),
            unreadable=tuple(sorted(unreadable, key=lambda item: item.key)),
        )

    def read(self, file: FileInfo) -> bytes:
        """The whole image. Raises ChangedFileError if it is not the one that was listed."""
        path = self._path(self._rows()[file.key])
        return LocalStorage(folder=path.parent).read(replace(file, key=path.name))

    def open(self, file: FileInfo) -> BinaryIO:
        """The file that was fetched."""
        return self._path(self._rows()[file.key]).open("rb", buffering=0)

    def content_of(self, file: FileInfo) -> str | None:
        """Unknown."""
        return None

    def is_settled(self, file: FileInfo) -> bool:
        """Whether the last change is long enough ago for the file system's clock to tell a next one apart."""
        return LocalStorage(folder=self.cache_dir).is_settled(file)

    def shown(self, key: str) -> str:
        """The URL, without what follows its "?": that may be a signature. Or the path."""
        row = self._rows()[key]
        return _shown_url(row.url) if row.url else str(self._path(row))

    def key_of(self, text: str) -> str:
        """The key of a row with this text in its column."""
        return _row_of(text).key

    def _rows(self) -> dict[str, _Row]:
        return self._read_rows.get(self._read_csv)

    def _read_csv(self) -> dict[str, _Row]:
        found: dict[str, _Row] = {}
        for (text,) in read_rows(self.csv_file, [self.url_column], option="csv_file"):
            if text:
                row = _row_of(text)
                found[row.key] = row
        return found

    def _path(self, row: _Row) -> Path:
        if not row.url:
            return self.csv_file.parent / row.key
        return self._place(row.url) / f"{_name(row.url)}{_extension(row.url)}"

    def _place(self, url: str) -> Path:
        return self.cache_dir / _name(url)[:2]

    def _settled(self) -> set[str]:
        """The names of what was fetched, and of what is known not to be there."""
        return {path.stem for path in self.cache_dir.glob("??/*") if not path.name.startswith(".")}

    def _refusal(self, row: _Row) -> str | None:
        """What the server said when the image was asked for."""
        if not row.url:
            return None
        try:
            return (self._place(row.url) / f"{_name(row.url)}{_REFUSED}").read_text(encoding="utf-8")
        except OSError:
            return None

    def _fetch_all(self, rows: list[_Row]) -> Iterator[None]:
        """Fetch many at once; yield after each. Raises StorageError in the end, or where nothing can be reached."""
        failed: list[tuple[_Row, StorageError]] = []
        in_a_row = 0
        waiting = iter(rows)
        pool = ThreadPool(_NUM_FETCHERS)
        with until_done(pool):
            running = {pool.submit(self._fetch, row): row for row in islice(waiting, _NUM_FETCHERS)}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    row = running.pop(future)
                    try:
                        future.result()
                        in_a_row = 0
                    except StorageError as error:
                        failed.append((row, error))
                        in_a_row += 1
                    if in_a_row < _GIVE_UP_AFTER:
                        running |= {pool.submit(self._fetch, row): row for row in islice(waiting, 1)}
                    yield
        if failed:
            raise _unreached(str(self.csv_file), failed)

    def _fetch(self, row: _Row) -> None:
        """Fetch one image into its place, or note there that the server does not give it."""
        place, path = self._place(row.url), self._path(row)

        def attempt() -> None:
            try:
                with storage_problems(self.cache_dir), _explained(), replacing(path, durable=False) as stream:
                    self._opened().get_file(row.url, stream)
            except _RefusedError as refused:
                with storage_problems(self.cache_dir):
                    write_atomic(place / f"{_name(row.url)}{_REFUSED}", str(refused), durable=False)

        with storage_problems(self.cache_dir):
            place.mkdir(parents=True, exist_ok=True)
        patiently(attempt, patience=self.patience, place=_shown_url(row.url))

    def _opened(self) -> HTTPFileSystem:
        return self._files.get(self._open)

    def _open(self) -> HTTPFileSystem:
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        seconds = self.patience.timeout_s
        timeout = aiohttp.ClientTimeout(total=_LONGEST_FETCH_S, sock_connect=seconds, sock_read=seconds)
        options = {"timeout": timeout, "trust_env": True, "headers": {"User-Agent": "simpletuner"}}
        return HTTPFileSystem(client_kwargs=options, skip_instance_cache=True)


class _RefusedError(Exception):
    """The server will not give the image, however often it is asked. The text is its answer."""


@contextmanager
def _explained() -> Iterator[None]:
    """Say what an error of the libraries means: it may pass (TransientError), or not (_RefusedError)."""
    import aiohttp
    from fsspec.exceptions import FSTimeoutError

    try:
        yield
    except FileNotFoundError as error:
        raise _RefusedError("HTTP 404 Not Found") from error
    except aiohttp.ClientResponseError as error:
        reason = f"HTTP {error.status} {error.message}".strip()
        if error.status >= 500 or error.status in _LATER:
            raise TransientError(reason) from error
        raise _RefusedError(reason) from error
    except (aiohttp.InvalidURL, ValueError) as error:
        raise _RefusedError(f"not a URL ({error})") from error
    except (aiohttp.ClientError, asyncio.TimeoutError, FSTimeoutError, ConnectionError) as error:
        raise TransientError(" ".join(str(error).split()) or "time-out") from error


def _unreached(place: str, failed: list[tuple[_Row, StorageError]]) -> StorageError:
    """The error of images that could not be fetched, by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row, error in failed:
        by_reason[error.reason].append(_shown_url(row.url))
    told = [f"{_names(sorted(urls))} ({reason})" for reason, urls in sorted(by_reason.items())[:_REASONS_IN_A_MESSAGE]]
    return StorageError("E-STORAGE-URLS", place=place, params={"count": len(failed), "files": "; ".join(told)})


def _names(urls: list[str]) -> str:
    more = len(urls) - _NAMES_IN_A_MESSAGE
    return ", ".join(urls[:_NAMES_IN_A_MESSAGE]) + (f", +{more}" if more > 0 else "")


def _row_of(text: str) -> _Row:
    """The row that a text stands for: a URL, or a path beside the CSV."""
    if "://" not in text:
        return _Row(key=PurePosixPath(text.replace("\\", "/")).as_posix(), url="")
    parts = _split(text)
    name = unquote(PurePosixPath(parts.path).name) or "image"
    return _Row(key=f"{parts.netloc.rpartition('@')[2]}/{_name(text)[:12]}/{name}", url=text)


def _name(url: str) -> str:
    return stable_hash("url 1", url)


def _is_fetched(url: str) -> bool:
    return _split(url).scheme.lower() in ("http", "https")


def _extension(url: str) -> str:
    extension = PurePosixPath(_split(url).path).suffix.lower()
    return extension if extension in EXTENSIONS else ".image"


def _shown_url(url: str) -> str:
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that hold no address
        return SplitResult("", url.partition("?")[0], "", "", "")
