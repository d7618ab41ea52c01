"""Tables that know the captions, and perhaps the sizes, of a dataset's images: parquet, CSV, rows of a dataset.

pyarrow is imported where it is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from simpletuner.data.records import Size
from simpletuner.data.storages.csv_table import missing_columns, read_rows
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.packages import need_packages

if TYPE_CHECKING:
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

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images. A file name without a folder means every image of that name."""
        matching = _by_name(keys, with_extension=self.identifier_includes_extension)
        found: dict[str, TableRow] = {}
        for row in self._read():
            for key in matching(str(row[self.filename_column] or "")):
                found[key] = TableRow(captions=self._captions(row), size=self._size(row))
        return found

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

    def _read(self) -> Iterator[Mapping[str, Any]]:
        need_packages(("pyarrow",), extra="parquet", place=self.shown)
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
                for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
                    yield from batch.to_pylist()
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

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images. A file name without a folder means every image of that name."""
        exact = _by_name(keys, with_extension=True)
        bare = _by_name(keys, with_extension=False)
        pairs = read_rows(self.path, [self.filename_column, self.caption_column], option="csv_file")
        return _gathered((key, caption) for name, caption in pairs for key in exact(name) or bare(name))


@dataclass(frozen=True, kw_only=True)
class UrlTable:
    """The captions in the CSV file that also names the URLs."""

    storage: UrlStorage
    caption_column: str

    @property
    def shown(self) -> str:
        """The file's path."""
        return str(self.storage.csv_file)

    def rows(self, keys: Sequence[str]) -> Mapping[str, TableRow]:
        """The rows of these images."""
        wanted = set(keys)
        columns = [self.storage.url_column, self.caption_column]
        pairs = read_rows(self.storage.csv_file, columns, option="csv_file")
        named = ((self.storage.key_of(url), caption) for url, caption in pairs if url)
        return _gathered(pair for pair in named if pair[0] in wanted)


@dataclass(frozen=True, kw_only=True)
class HubTable:
    """The caption column of a Hugging Face dataset."""

    storage: HubStorage

    @property
    def shown(self) -> str:
        """The dataset's name."""
        return self.storage.id

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


def _by_name(keys: Sequence[str], *, with_extension: bool) -> Callable[[str], Sequence[str]]:
    """Finds the keys that a name in a table means: a path inside the dataset, or a file's name in any folder."""
    by_path: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        path = PurePosixPath(key)
        path = path if with_extension else path.with_suffix("")
        by_path[path.as_posix()].append(key)
        if path.name != path.as_posix():
            by_path[path.name].append(key)

    def find(name: str) -> Sequence[str]:
        return by_path.get(name.strip().replace("\\", "/").removeprefix("./"), ())

    return find
