"""Rules on where a dataset's images, captions and sizes come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from simpletuner.catalog.libraries import AIOHTTP, DATASETS, PYARROW, S3FS, Library
from simpletuner.config.dataset_storages import OBJECTS, group_keys
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.libraries import missing_library
from simpletuner.problems import Fix, Problem

_REQUIRED: Mapping[str, str] = MappingProxyType(
    {"local": "instance_data_dir", "aws": "aws_bucket_name", "csv": "csv_file", "huggingface": "dataset_name"}
)
"""type -> the key that says where the images are."""
_CAPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "local": ("filename", "textfile", "instanceprompt", "parquet", "csv"),
        "aws": ("filename", "textfile", "instanceprompt", "parquet", "csv"),
        "csv": ("csv", "filename", "instanceprompt"),
        "huggingface": ("huggingface", "instanceprompt"),
    }
)
_METADATA: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "local": ("discovery", "parquet"),
        "aws": ("discovery", "parquet"),
        "csv": ("discovery",),
        "huggingface": ("huggingface",),
    }
)
_PACKAGES: Mapping[str, Library] = MappingProxyType({"aws": S3FS, "csv": AIOHTTP, "huggingface": DATASETS})


def owners(dataset: ImageDataset) -> Mapping[str, str]:
    """Key -> what a dataset would have to be for it to mean something; only keys that mean nothing here."""
    csv = group_keys("csv")
    has_csv = dataset.type == "csv" or dataset.caption_strategy == "csv"
    idle: dict[str, str] = {}
    if dataset.type != "local":
        idle["instance_data_dir"] = "local"
    if dataset.type != "aws":
        idle |= dict.fromkeys(group_keys("s3"), "aws")
    if dataset.type != "huggingface":
        idle |= dict.fromkeys(group_keys("hub") | group_keys("reading"), "huggingface")
    if not has_csv:
        idle |= dict.fromkeys(csv, "csv")
    elif dataset.type == "csv":
        idle["csv_filename_column"] = "local"
    else:
        idle |= dict.fromkeys(("csv_url_column", "csv_cache_dir"), "csv")
    return idle


def broken_storage_rules(dataset: ImageDataset, *, written: frozenset[str]) -> Iterator[Problem]:
    """The problems of one dataset; their paths name keys. `written` are the keys of the entry itself."""
    idle = owners(dataset)
    misplaced = sorted(written & idle.keys())
    for key in misplaced:
        params = {"id": dataset.id, "key": key, "type": dataset.type, "wanted": idle[key]}
        yield Problem(code="E-DATASET-KEY-TYPE", params=params, path=_path(key))
    checks: tuple[Callable[[ImageDataset], Problem | None], ...] = (
        _captions,
        _metadata,
        _parquet,
        _credentials,
        _endpoint,
        _packages,
        _no_place,
    )
    for check in checks if not misplaced else ():
        problem = check(dataset)
        if problem is not None:
            yield problem


def _no_place(dataset: ImageDataset) -> Problem | None:
    """A key is missing without which there are no images, or no captions."""
    keys = dataset.storage
    wanted = [(_REQUIRED[dataset.type], True)]
    wanted.append(("csv_file", dataset.caption_strategy == "csv"))
    uses_parquet = "parquet" in (dataset.caption_strategy, dataset.metadata_backend)
    wanted.append(("parquet.path", uses_parquet))
    wanted.append(("parquet.caption_column", dataset.caption_strategy == "parquet"))
    values = {
        "instance_data_dir": dataset.instance_data_dir,
        "aws_bucket_name": keys.s3.aws_bucket_name,
        "csv_file": keys.csv.csv_file,
        "dataset_name": keys.hub.dataset_name,
        "parquet.path": keys.parquet.path,
        "parquet.caption_column": keys.parquet.caption_column,
    }
    missing = next((key for key, is_wanted in wanted if is_wanted and not values[key]), None)
    if missing is None:
        return None
    return Problem(code="E-DATASET-KEY-MISSING", params={"id": dataset.id, "key": missing}, path="")


def _captions(dataset: ImageDataset) -> Problem | None:
    return _choice(dataset, "caption_strategy", dataset.caption_strategy, _CAPTIONS[dataset.type])


def _metadata(dataset: ImageDataset) -> Problem | None:
    return _choice(dataset, "metadata_backend", dataset.metadata_backend, _METADATA[dataset.type])


def _choice(dataset: ImageDataset, key: str, value: str, choices: tuple[str, ...]) -> Problem | None:
    if value in choices:
        return None
    params = {"id": dataset.id, "key": key, "value": value, "type": dataset.type, "choices": ", ".join(choices)}
    fixes = (Fix(key=key, value=choices[0]),)
    return Problem(code="E-DATASET-TYPE-CHOICE", params=params, path=f"/{key}", fixes=fixes)


def _endpoint(dataset: ImageDataset) -> Problem | None:
    """A name and a password in an address would be shown wherever it is, and no server of this kind takes them."""
    host = (dataset.storage.s3.aws_endpoint_url or "").partition("://")[2].partition("/")[0]
    if "@" not in host:
        return None
    return Problem(code="E-DATASET-ENDPOINT-USER", params={"id": dataset.id}, path="/aws_endpoint_url")


def _parquet(dataset: ImageDataset) -> Problem | None:
    """A table that nothing is taken from, or sizes that are half told."""
    table = dataset.storage.parquet
    if table.path and "parquet" not in (dataset.caption_strategy, dataset.metadata_backend):
        fixes = (Fix(key="metadata_backend", value="parquet"),)
        return Problem(code="E-DATASET-PARQUET-IDLE", params={"id": dataset.id}, path="/parquet", fixes=fixes)
    if (table.width_column is None) == (table.height_column is None):
        return None
    there, missing = ("width_column", "height_column") if table.width_column else ("height_column", "width_column")
    params = {"id": dataset.id, "there": there, "missing": missing}
    return Problem(code="E-DATASET-PARQUET-SIZE", params=params, path=f"/parquet/{there}")


def _credentials(dataset: ImageDataset) -> Problem | None:
    """Keys that are given in part."""
    keys = dataset.storage.s3
    given = {
        "aws_access_key_id": keys.aws_access_key_id,
        "aws_secret_access_key": keys.aws_secret_access_key,
        "aws_session_token": keys.aws_session_token,
    }
    there = [key for key, value in given.items() if value is not None]
    missing = [key for key in ("aws_access_key_id", "aws_secret_access_key") if given[key] is None]
    if not there or not missing:
        return None
    params = {"id": dataset.id, "there": ", ".join(there), "missing": ", ".join(missing)}
    return Problem(code="E-DATASET-CREDENTIALS", params=params, path=f"/{there[0]}")


def _packages(dataset: ImageDataset) -> Problem | None:
    problem = missing_library("type", dataset.type, _PACKAGES.get(dataset.type), instead="local")
    if problem is None and dataset.storage.parquet.path:
        problem = missing_library("metadata_backend", "parquet", PYARROW, instead="discovery")
    return problem


def _path(key: str) -> str:
    head = key.partition(".")[0]
    return f"/{key.replace('.', '/')}" if head in OBJECTS else f"/{key}"
