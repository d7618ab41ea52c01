"""Tables that know the captions, and perhaps the sizes, of a dataset's images: parquet, CSV, rows of a dataset.

pyarrow is imported where it is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from simpletuner.data.storages.csv_table import missing_columns, read_rows
from simpletuner.data.storages.errors import StorageError

if TYPE_CHECKING:
    from simpletuner.data.records import Size
    from simpletuner.data.storages.hub import HubStorage
    from simpletuner.data.storages.urls import UrlStorage

_ROWS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """What a table says of one image. `size` is None if it does not say."""

    captions: tuple[str, ...]
    size: Size | None = None


class Table(Protocol):
    """Where captions and sizes are written down together."""

    @property
    def shown(self) -> str:
        """The table's name in messages."""
        ...

    def check(self) -> None:
        """Make sure that the table is there with its columns, as far as that needs no network. Raises StorageError."""
        ...

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """What is said of these images, by key; those that the table does not have are missing.

        Raises: StorageError: the table cannot be read, or lacks a column.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ParquetTable:
    """A parquet file with one row per image; only the named columns are read, a few thousand rows at a time."""

    path: Path
    filename_column: str
    caption_column: str | None = None
    fallback_caption_column: str | None = None
    """Asked where the caption is empty."""
    width_column: str | None = None
    height_column: str | None = None
    identifier_includes_extension: bool = False

    @property
    def shown(self) -> str:
        """The file's path."""
        return str(self.path)

    def check(self) -> None:
        """Look at the columns."""
        for _ in self._batches():
            return

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images. A file name without a folder means every image of that name."""
        names = _Names(keys, with_extension=self.identifier_includes_extension)
        by_path: dict[str, TableRow] = {}
        by_name: dict[str, TableRow] = {}
        for row in (row for batch in self._batches() for row in batch):
            name = str(row[self.filename_column] or "")
            for keys_of, found in ((names.with_path, by_path), (names.with_name, by_name)):
                for key in keys_of(name):
                    found[key] = TableRow(captions=self._captions(row), size=self._size(row))
        return {**by_name, **by_path}

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        for column in (self.caption_column, self.fallback_caption_column):
            texts = caption_texts(row[column]) if column else ()
            if texts:
                return texts
        return ()

    def _size(self, row: Mapping[str, Any]) -> Size | None:
        if self.width_column is None or self.height_column is None:
            return None
        width, height = row[self.width_column], row[self.height_column]
        return (int(width), int(height)) if width and height and width > 0 and height > 0 else None

    def _batches(self) -> Iterator[Sequence[Mapping[str, Any]]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        named = (
            self.filename_column,
            self.caption_column,
            self.fallback_caption_column,
            self.width_column,
            self.height_column,
        )
        columns = list(dict.fromkeys(column for column in named if column is not None))
        try:
            with pq.ParquetFile(self.path) as file:
                there = file.schema_arrow.names
                missing = [column for column in columns if column not in there]
                if missing:
                    raise missing_columns(self.shown, "parquet.path", missing, there)
                yield []
                for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
                    yield batch.to_pylist()
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            params = {"key": "parquet.path"}
            raise StorageError("E-TABLE-DAMAGED", place=self.shown, reason=reason, params=params) from error
        except StorageError:
            raise
        except OSError as error:
            params = {"key": "parquet.path"}
            reason = error.strerror or str(error)
            raise StorageError("E-TABLE-MISSING", place=self.shown, reason=reason, params=params) from error


@dataclass(frozen=True, kw_only=True)
class CsvTable:
    """A CSV file with the name of an image, with or without its ending, and a caption in each row. Several rows of one
    image are several captions."""

    path: Path
    filename_column: str
    caption_column: str

    @property
    def shown(self) -> str:
        """The file's path."""
        return str(self.path)

    def check(self) -> None:
        """Look at the columns."""
        for _ in read_rows(self.path, [self.filename_column, self.caption_column], option="csv_file"):
            return

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images. A file name without a folder means every image of that name."""
        whole, bare = (_Names(keys, with_extension=flag) for flag in (True, False))
        pairs = list(read_rows(self.path, [self.filename_column, self.caption_column], option="csv_file"))

        def gathered(*ways: Callable[[str], Sequence[str]]) -> dict[str, TableRow]:
            found = ((next((keys for way in ways if (keys := way(name))), ()), caption) for name, caption in pairs)
            return _gathered((key, caption) for keys, caption in found for key in keys)

        return {**gathered(whole.with_name, bare.with_name), **gathered(whole.with_path, bare.with_path)}


@dataclass(frozen=True, kw_only=True)
class UrlTable:
    """The captions in the CSV file that also names the URLs."""

    storage: UrlStorage
    caption_column: str

    @property
    def shown(self) -> str:
        """The file's path."""
        return str(self.storage.csv_file)

    def check(self) -> None:
        """Look at the columns."""
        for _ in read_rows(self.storage.csv_file, self._columns, option="csv_file"):
            return

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images."""
        wanted = set(keys)
        pairs = read_rows(self.storage.csv_file, self._columns, option="csv_file")
        named = ((self.storage.key_of(url), caption) for url, caption in pairs if url)
        return _gathered(pair for pair in named if pair[0] in wanted)

    @property
    def _columns(self) -> list[str]:
        return [self.storage.url_column, self.caption_column]


@dataclass(frozen=True, kw_only=True)
class HubTable:
    """The caption column of a Hugging Face dataset."""

    storage: HubStorage

    @property
    def shown(self) -> str:
        """The dataset's name."""
        return self.storage.id

    def check(self) -> None:
        """Nothing: what the dataset has is known once it was fetched."""

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images."""
        wanted = set(keys)
        return {key: TableRow(captions=texts) for key, texts in self.storage.captions() if key in wanted}


def caption_texts(value: object) -> tuple[str, ...]:
    """The captions in one cell: a text, or a list of texts; empty ones are none."""
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(text for item in value for text in caption_texts(item))
    text = str(value).strip()
    return (text,) if text else ()


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, TableRow]:
    captions: dict[str, list[str]] = defaultdict(list)
    for key, caption in pairs:
        texts = captions[key]
        if caption and caption not in texts:
            texts.append(caption)
    return {key: TableRow(captions=tuple(texts)) for key, texts in captions.items()}


class _Names:
    """Finds the images that a name in a table means. One that is a path inside the dataset means that image, before any
    that only says the file's name."""

    def __init__(self, keys: Sequence[str], *, with_extension: bool) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            path = PurePosixPath(key) if with_extension else PurePosixPath(key).with_suffix("")
            self._by_path[path.as_posix()].append(key)
            self._by_name[path.name].append(key)

    def with_path(self, name: str) -> Sequence[str]:
        """The keys of the images at this path."""
        return self._by_path.get(_as_key(name), ())

    def with_name(self, name: str) -> Sequence[str]:
        """The keys of the images with this name, in any folder."""
        return self._by_name.get(_as_key(name), ())


def _as_key(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")
