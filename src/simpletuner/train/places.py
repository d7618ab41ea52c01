"""Where the images and captions of a dataset are, from its options to the values of the data layer. No torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.storage import LocalStorage, Storage
from simpletuner.data.storages.hub import HubStorage
from simpletuner.data.storages.s3 import S3Storage
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.data.tables import CsvTable, HubTable, ParquetTable, Table, UrlTable


def storage_of(dataset: ImageDataset, *, cache_dir: Path) -> Storage:
    """The storage of a dataset's images. Rows of a stream are kept in `cache_dir`."""
    keys = dataset.storage
    match dataset.type:
        case "local":
            return LocalStorage(folder=Path(dataset.instance_data_dir))
        case "aws":
            return S3Storage(
                bucket=keys.s3.aws_bucket_name,
                prefix=keys.s3.aws_data_prefix,
                endpoint_url=keys.s3.aws_endpoint_url,
                region_name=keys.s3.aws_region_name,
                access_key_id=_plain(keys.s3.aws_access_key_id),
                secret_access_key=_plain(keys.s3.aws_secret_access_key),
                session_token=_plain(keys.s3.aws_session_token),
                max_pool_connections=keys.s3.aws_max_pool_connections,
            )
        case "csv":
            return UrlStorage(
                csv_file=Path(keys.csv.csv_file),
                cache_dir=Path(keys.csv.csv_cache_dir),
                url_column=keys.csv.csv_url_column,
            )
        case "huggingface":
            return HubStorage(
                dataset_name=keys.hub.dataset_name,
                split=keys.hub.split,
                revision=keys.hub.revision,
                image_column=keys.hub.image_column,
                caption_column=keys.hub.caption_column if dataset.caption_strategy == "huggingface" else None,
                streaming=keys.reading.streaming,
                num_proc=keys.reading.num_proc,
                cache_dir=keys.reading.cache_dir,
                stream_dir=cache_dir / "streams",
                max_rows=dataset.max_num_samples,
            )


def table_of(dataset: ImageDataset, storage: Storage) -> Table | None:
    """The table that tells a dataset's captions or sizes; None if files do."""
    keys = dataset.storage
    if "parquet" in (dataset.caption_strategy, dataset.metadata_backend):
        return ParquetTable(
            path=Path(keys.parquet.path),
            filename_column=keys.parquet.filename_column,
            caption_column=keys.parquet.caption_column,
            fallback_caption_column=keys.parquet.fallback_caption_column,
            width_column=keys.parquet.width_column,
            height_column=keys.parquet.height_column,
            identifier_includes_extension=keys.parquet.identifier_includes_extension,
        )
    if dataset.caption_strategy == "csv" and isinstance(storage, UrlStorage):
        return UrlTable(storage=storage, caption_column=keys.csv.csv_caption_column)
    if dataset.caption_strategy == "csv":
        return CsvTable(
            path=Path(keys.csv.csv_file),
            filename_column=keys.csv.csv_filename_column,
            caption_column=keys.csv.csv_caption_column,
        )
    if dataset.caption_strategy == "huggingface" and isinstance(storage, HubStorage):
        return HubTable(storage=storage)
    return None


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None
