"""The rows of a Hugging Face dataset, of the hub or of a local folder, through the library `datasets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from simpletuner.data.hashing import stable_hash
from simpletuner.data.storage import FileInfo, Listing, Unreadable
from simpletuner.data.storages.csv_table import missing_columns
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.lazy import Lazy
from simpletuner.data.storages.patience import Patience, TransientError, patiently
from simpletuner.data.storages.row_store import RowStore, StreamRow, in_groups
from simpletuner.data.tables import caption_texts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

_KEY_DIGITS = 9
_ROWS_PER_BATCH = 1024
_ROWS_PER_COMMIT = 256
_BYTES_PER_COMMIT = 32 << 20
_SAVED = "state.json"
"""In every folder that `Dataset.save_to_disk` wrote."""
_FILE_KINDS = {".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A dataset with the columns of image and caption, images as their encoded bytes."""

    dataset: Dataset
    identity: str


@dataclass(frozen=True, kw_only=True)
class HubStorage:
    """The images of a dataset's split; a row's number is its key.

    With `streaming`, rows come in order and only image and caption are kept, in a file of `stream_dir`; otherwise the
    library downloads and keeps the whole dataset where it always does, or in `cache_dir`.
    """

    dataset_name: str
    """A name on the hub, a local folder, or a file of rows (.parquet, .jsonl, ...)."""
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    streaming: bool = False
    num_proc: int | None = None
    cache_dir: str | None = None
    stream_dir: Path
    """Where streams are kept, each in a file of its own."""
    max_rows: int | None = None
    """Of a stream, only its first so many rows are taken."""
    patience: Patience = field(default_factory=Patience)
    """Above that of the library, which repeats most of what may pass by itself."""
    _rows: Lazy[_Opened] = field(default_factory=Lazy, init=False, repr=False, compare=False)

    @property
    def id(self) -> str:
        """hf://name@revision, split and columns."""
        revision = f"@{self.revision}" if self.revision else ""
        first = f"[:{self.max_rows}]" if self.streaming and self.max_rows else ""
        return f"hf://{self.dataset_name}{revision}#{self.split}{first}/{','.join(self._columns)}"

    @property
    def listed_as(self) -> str:
        """The same."""
        return self.id

    @property
    def is_remote(self) -> bool:
        """Yes: the dataset is opened once, not in every process."""
        return True

    def prepare(self, on_progress: Callable[[int, int], None]) -> None:
        """Fetch what is not here yet; `on_progress` counts rows, of a stream also those that are known to come.

        Raises: StorageError: there is no such dataset, split or column; it cannot be reached or read.
        """
        if self._is_streamed:
            self._fill(on_progress)
        else:
            num_rows = len(self._opened().dataset)
            on_progress(0, num_rows)
            on_progress(num_rows, num_rows)

    def list_files(self) -> Listing:
        """One image per row. Raises StorageError."""
        if self._is_streamed:
            identity = self._fill(lambda done, total: None)
            sizes: Iterator[tuple[int, int | None]] = iter(self._store.sizes())
        else:
            identity = self._opened().identity
            sizes = enumerate(self._sizes())
        images: list[FileInfo] = []
        empty: list[Unreadable] = []
        for number, size_bytes in sizes:
            if size_bytes is None:
                empty.append(Unreadable(key=_key(number), reason=f"no image in column {self.image_column}"))
            else:
                images.append(FileInfo(key=_key(number), size_bytes=size_bytes, version=identity))
        return Listing(images=tuple(images), unreadable=tuple(empty))

    def read(self, file: FileInfo) -> bytes:
        """The image of a row, as it is encoded."""
        number = int(file.key)
        if self._is_streamed:
            return self._store.image(number)
        with self._explained():
            image = _image_bytes(self._opened().dataset[number][self.image_column])
        if image is None:
            raise OSError(0, f"no image in column {self.image_column}", self.shown(file.key))
        return image

    def open(self, file: FileInfo) -> BinaryIO:
        """The image of a row, in memory."""
        return BytesIO(self.read(file))

    def content_of(self, file: FileInfo) -> str | None:
        """Unknown."""
        return None

    def is_settled(self, file: FileInfo) -> bool:
        """Yes: a dataset that changes has another version."""
        return True

    def shown(self, key: str) -> str:
        """The dataset and the row's number."""
        return f"{self.dataset_name}#{self.split}/{int(key)}"

    def captions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(key, captions) of every row, of a stream as it was last listed. Raises StorageError."""
        assert self.caption_column is not None
        if self._is_streamed:
            if not self._store.path.exists():
                self._fill(lambda done, total: None)
            for number, texts in self._store.captions():
                yield _key(number), texts
            return
        with self._explained():
            batches = self._opened().dataset.select_columns([self.caption_column]).iter(batch_size=_ROWS_PER_BATCH)
            values = (value for batch in batches for value in batch[self.caption_column])
            for number, value in enumerate(values):
                yield _key(number), caption_texts(value)

    @property
    def _is_streamed(self) -> bool:
        return self.streaming and self._saved_folder is None

    @property
    def _saved_folder(self) -> Path | None:
        folder = Path(self.dataset_name)
        return next((place for place in (folder, folder / self.split) if (place / _SAVED).is_file()), None)

    @property
    def _store(self) -> RowStore:
        return RowStore(self.stream_dir / f"{stable_hash('stream file 1', self.id)}.sqlite")

    @property
    def _columns(self) -> list[str]:
        return [self.image_column, *([self.caption_column] if self.caption_column else [])]

    def _opened(self) -> _Opened:
        return self._rows.get(lambda: patiently(self._open, patience=self.patience, place=self.id))

    def _open(self) -> _Opened:
        with self._explained():
            if self._saved_folder is not None:
                import datasets

                dataset = datasets.load_from_disk(str(self._saved_folder))
                identity = json.loads((self._saved_folder / _SAVED).read_text(encoding="utf-8"))["_fingerprint"]
            else:
                builder = self._builder()
                builder.download_and_prepare(num_proc=self.num_proc)
                dataset = builder.as_dataset(split=self.split)
                identity = _identity(builder)
            return _Opened(dataset=self._with_columns(dataset), identity=str(identity))

    def _builder(self) -> DatasetBuilder:
        import datasets

        path = Path(self.dataset_name)
        if path.is_file() and path.suffix.lower() in _FILE_KINDS:
            files = {self.split: str(path)}
            kind = _FILE_KINDS[path.suffix.lower()]
            return datasets.load_dataset_builder(kind, data_files=files, cache_dir=self.cache_dir)
        return datasets.load_dataset_builder(self.dataset_name, revision=self.revision, cache_dir=self.cache_dir)

    def _with_columns(self, dataset: Any) -> Any:
        """The dataset with the wanted columns alone, which must be there, and with images that are not decoded."""
        from datasets import Image

        there = list(dataset.column_names or ())
        missing = [column for column in self._columns if column not in there]
        if there and missing:
            raise missing_columns(self.id, "dataset_name", missing, there)
        return dataset.select_columns(self._columns).cast_column(self.image_column, Image(decode=False))

    def _sizes(self) -> Iterator[int | None]:
        """The bytes of every row's image; None without one."""
        import pyarrow.compute as pc

        tables = self._opened().dataset.select_columns([self.image_column]).with_format("arrow")
        with self._explained():
            for table in tables.iter(batch_size=_ROWS_PER_BATCH):
                images = table.column(self.image_column).combine_chunks()
                lengths = pc.binary_length(images.field("bytes")).to_pylist()
                for length, path in zip(lengths, images.field("path").to_pylist(), strict=True):
                    yield _size_of(path) if length is None else length

    def _fill(self, on_progress: Callable[[int, int], None]) -> str:
        """Keep what the stream has beyond what is kept already; return the stream's identity."""
        return patiently(lambda: self._go_on(on_progress), patience=self.patience, place=self.id)

    def _go_on(self, on_progress: Callable[[int, int], None]) -> str:
        with self._explained():
            builder = self._builder()
            identity = stable_hash("stream 1", self.id, _identity(builder))
            done = self._store.begin(identity)
            counted = (builder.info.splits or {}).get(self.split)
            total = max(counted.num_examples if counted else 0, done)
            total = min(total, self.max_rows or total)
            on_progress(done, total)
            if self._store.is_complete():
                return identity
            stream = self._with_columns(builder.as_streaming_dataset(split=self.split)).skip(done)
            rows = islice(stream, None if self.max_rows is None else max(self.max_rows - done, 0))
            read = (self._stream_row(row) for row in rows)
            for group in in_groups(read, num_rows=_ROWS_PER_COMMIT, size_bytes=_BYTES_PER_COMMIT):
                self._store.add(done, group)
                done += len(group)
                on_progress(done, max(total, done))
            self._store.complete()
        return identity

    def _stream_row(self, row: dict[str, Any]) -> StreamRow:
        captions = caption_texts(row[self.caption_column]) if self.caption_column else ()
        return StreamRow(image=_image_bytes(row[self.image_column]), captions=captions)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what an error of the libraries means: it may pass (TransientError), or what has to be mended."""
        import datasets
        import pyarrow as pa
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        # Of whichever http library this version of the hub library uses.
        http_error = cast("type[Exception]", HfHubHTTPError.__mro__[1])
        datasets.disable_progress_bars()
        try:
            yield
        except StorageError:
            raise
        except http_error as error:
            reason = " ".join(str(error).split())
            answer = getattr(error, "response", None)
            if answer is None or answer.status_code >= 500 or answer.status_code == 429:
                raise TransientError(reason) from error
            raise StorageError("E-STORAGE-DATASET", place=self.id, reason=reason) from error
        except (DatasetsError, pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
            cause = error.__cause__ or error
            reason = " ".join(str(cause if isinstance(error, DatasetsError) else error).split())
            raise StorageError("E-STORAGE-DATASET", place=self.id, reason=reason or type(error).__name__) from error


def _identity(builder: DatasetBuilder) -> str:
    """Another one for other rows: of a folder or a repository the hash tells them apart, of one file the name."""
    return f"{builder.hash} {builder.config_id}"


def _key(number: int) -> str:
    return f"{number:0{_KEY_DIGITS}}"


def _image_bytes(value: Any) -> bytes | None:
    """The bytes of an image that was not decoded: they are in the row, or where it says."""
    import fsspec

    if value is None:
        return None
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    if not value["path"]:
        return None
    with fsspec.open(value["path"], "rb") as stream:
        return bytes(stream.read())


def _size_of(path: str | None) -> int | None:
    if not path:
        return None
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
