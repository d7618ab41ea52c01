"""Keys of a dataset that say where its images, captions and sizes are: one group for each place.

In the file, the keys of the first three groups stand in the entry itself, the others in an object: {"parquet": {...}}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Annotated

from annotated_types import Ge, Le
from pydantic import SecretStr

from simpletuner.config.build import build_section
from simpletuner.config.fields import Opt, Option, Section, describe
from simpletuner.config.settings import Setting
from simpletuner.problems import Problem


class S3Keys(Section):
    """Where the objects of a bucket are."""

    aws_bucket_name: Annotated[str, Opt(level="basic", shown_default="required with type aws")] = ""
    """With type aws: the bucket of the images."""

    aws_data_prefix: Annotated[str, Opt(level="basic")] = ""
    """With type aws: only objects whose keys begin with this and a slash."""

    aws_endpoint_url: Annotated[str | None, Opt()] = None
    """With type aws: address of a server that is not Amazon's (MinIO, Cloudflare R2, ...)."""

    aws_region_name: Annotated[str | None, Opt()] = None
    """With type aws: region of the bucket."""

    aws_access_key_id: Annotated[SecretStr | None, Opt(holds="secret")] = None
    """With type aws: name of the key, best as {env:NAME}. Without it the keys of the environment, of a profile or of
    the machine are used."""

    aws_secret_access_key: Annotated[SecretStr | None, Opt(holds="secret")] = None
    """With type aws: the secret that belongs to aws_access_key_id, best as {env:NAME}."""

    aws_session_token: Annotated[SecretStr | None, Opt(holds="secret")] = None
    """With type aws: the token of a key that is valid for some hours, best as {env:NAME}."""

    aws_max_pool_connections: Annotated[int, Ge(1), Le(1000), Opt(level="expert")] = 32
    """With type aws: connections at once."""


class CsvKeys(Section):
    """A CSV file, of URLs or of captions."""

    csv_file: Annotated[str, Opt(level="basic", holds="path")] = ""
    """A CSV file with a header. With type csv a row is an image; with caption_strategy csv the captions are in it."""

    csv_url_column: Annotated[str, Opt()] = "url"
    """With type csv: the column of the images, http or https URLs, or paths that start at the CSV's folder."""

    csv_filename_column: Annotated[str, Opt()] = "filename"
    """With caption_strategy csv and images that are not from the CSV: the column of their file names."""

    csv_caption_column: Annotated[str, Opt()] = "caption"
    """With caption_strategy csv: the column of the captions."""

    csv_cache_dir: Annotated[str, Opt(holds="path", shown_default="<cache_dir>/urls")] = ""
    """With type csv: folder that keeps the fetched images. {id}, {output_dir} and {model_family} are filled in."""


class HubKeys(Section):
    """A Hugging Face dataset."""

    dataset_name: Annotated[str, Opt(level="basic", holds="location")] = ""
    """With type huggingface: name on the hub, a local folder, or a file of rows (.parquet, .jsonl, .csv, .arrow)."""

    split: Annotated[str, Opt()] = "train"
    """With type huggingface: the part of the dataset that is used."""

    revision: Annotated[str | None, Opt()] = None
    """With type huggingface: branch, tag or commit of the dataset."""

    image_column: Annotated[str, Opt()] = "image"
    """With type huggingface: the column of the images."""

    caption_column: Annotated[str, Opt()] = "caption"
    """With caption_strategy huggingface: the column of the captions, each a text or a list of texts."""


class HubReading(Section):
    """How a Hugging Face dataset is fetched."""

    streaming: Annotated[bool, Opt()] = False
    """Read the rows as they come and keep only images and captions, of at most max_num_samples rows, instead of
    downloading the whole dataset first."""

    num_proc: Annotated[int | None, Ge(1), Opt(level="expert")] = None
    """Processes that prepare a downloaded dataset."""

    cache_dir: Annotated[str | None, Opt(level="expert", holds="path")] = None
    """Folder of downloaded datasets; by default where the library keeps them (HF_HOME)."""


class ParquetKeys(Section):
    """A parquet file with a row for each image."""

    path: Annotated[str, Opt(level="basic", holds="path", shown_default="required with parquet")] = ""
    """The parquet file."""

    filename_column: Annotated[str, Opt()] = "filename"
    """The column of the images' names: a path inside the dataset, or a file name in any of its folders."""

    caption_column: Annotated[str | None, Opt()] = None
    """The column of the captions, each a text or a list of texts. Needed with caption_strategy parquet."""

    fallback_caption_column: Annotated[str | None, Opt()] = None
    """The column that is looked into where the caption is empty."""

    width_column: Annotated[str | None, Opt()] = None
    """With metadata_backend parquet: the column of the upright widths in px."""

    height_column: Annotated[str | None, Opt()] = None
    """With metadata_backend parquet: the column of the upright heights in px."""

    identifier_includes_extension: Annotated[bool, Opt()] = False
    """Whether names in filename_column have their ending (.jpg)."""


class StorageKeys(Section):
    """The groups of one dataset. Those that do not belong to its type have their defaults."""

    s3: S3Keys = S3Keys()
    csv: CsvKeys = CsvKeys()
    hub: HubKeys = HubKeys()
    reading: HubReading = HubReading()
    parquet: ParquetKeys = ParquetKeys()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """`prefix`: the object that holds the keys, with a dot; "" if they stand in the entry itself."""

    model: type[Section]
    prefix: str = ""


_GROUPS: Mapping[str, _Group] = MappingProxyType(
    {
        "s3": _Group(model=S3Keys),
        "csv": _Group(model=CsvKeys),
        "hub": _Group(model=HubKeys),
        "reading": _Group(model=HubReading, prefix="huggingface."),
        "parquet": _Group(model=ParquetKeys, prefix="parquet."),
    }
)
OBJECTS = tuple(group.prefix.rstrip(".") for group in _GROUPS.values() if group.prefix)
"""Keys of an entry that hold an object of keys."""


@cache
def storage_options() -> Mapping[str, Option]:
    """Key, with its object's name and a dot before it -> its declaration."""
    return MappingProxyType(
        {
            f"{group.prefix}{option.name}": replace(option, name=f"{group.prefix}{option.name}")
            for group in _GROUPS.values()
            for option in describe(group.model, "image")
        }
    )


def group_keys(name: str) -> frozenset[str]:
    """The keys of a group, as `storage_options` names them."""
    return frozenset(f"{_GROUPS[name].prefix}{key}" for key in _GROUPS[name].model.model_fields)


def flattened(entry: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """(key, JSON pointer below the entry, value) of every key; those in an object of keys each for itself."""
    for key, value in entry.items():
        pointer = key.replace("~", "~0").replace("/", "~1")
        if key in OBJECTS and isinstance(value, dict):
            for inner, inner_value in value.items():
                inner_pointer = str(inner).replace("~", "~0").replace("/", "~1")
                yield f"{key}.{inner}", f"{pointer}/{inner_pointer}", inner_value
        else:
            yield key, pointer, value


def build_storage_keys(settings: Mapping[str, Setting]) -> tuple[StorageKeys, list[Problem]]:
    """Validate the settings of all groups. A value that is refused becomes a problem, and the key has its default."""
    built: dict[str, Section] = {}
    problems: list[Problem] = []
    for name, group in _GROUPS.items():
        declared = {option.name: option for option in describe(group.model, "image")}
        own = {key: settings[f"{group.prefix}{key}"] for key in declared if f"{group.prefix}{key}" in settings}
        built[name], found = build_section(group.model, own, declared)
        problems += (_with_prefix(problem, group.prefix) for problem in found)
    return StorageKeys.model_validate(built), problems


def _with_prefix(problem: Problem, prefix: str) -> Problem:
    if not prefix:
        return problem
    params = {**problem.params, "key": f"{prefix}{problem.params['key']}"}
    return replace(problem, params=params, path=f"/{prefix.replace('.', '/')}{(problem.path or '')[1:]}")
