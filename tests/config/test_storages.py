"""Where a dataset's images, captions and sizes come from: what may be said, and what is told where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.dataset_storages import storage_options
from simpletuner.config.datasets import dataset_options
from simpletuner.config.effective import effective_json
from simpletuner.config.libraries import is_installed
from simpletuner.i18n import render_problem
from simpletuner.train.places import storage_of, table_of

S3 = {"id": "a", "type": "aws", "aws_bucket_name": "cats"}
URLS = {"id": "a", "type": "csv", "csv_file": "list.csv", "caption_strategy": "csv"}
HUB = {"id": "a", "type": "huggingface", "dataset_name": "owner/name", "caption_strategy": "huggingface"}
LOCAL = {"id": "a", "instance_data_dir": "x"}
SECRET = "wJalrXUtnFEMI"

PROBLEMS = {
    "bucket": ({"id": "a", "type": "aws"}, "E-DATASET-KEY-MISSING", ["aws_bucket_name"]),
    "csv": ({**URLS, "csv_file": None}, "E-DATASET-KEY-MISSING", ["csv_file"]),
    "hub": ({**HUB, "dataset_name": ""}, "E-DATASET-KEY-MISSING", ["dataset_name"]),
    "folder": ({"id": "a", "type": "local"}, "E-DATASET-KEY-MISSING", ["instance_data_dir"]),
    "captions.csv": ({**LOCAL, "caption_strategy": "csv"}, "E-DATASET-KEY-MISSING", ["csv_file"]),
    "parquet": ({**LOCAL, "metadata_backend": "parquet"}, "E-DATASET-KEY-MISSING", ["parquet.path"]),
    "captions": (
        {**LOCAL, "caption_strategy": "parquet", "parquet": {"path": "t.parquet"}},
        "E-DATASET-KEY-MISSING",
        ["parquet.caption_column"],
    ),
    "s3 key": ({**LOCAL, "aws_bucket_name": "b"}, "E-DATASET-KEY-TYPE", ["aws_bucket_name", "aws", "local"]),
    "folder key": ({**S3, "instance_data_dir": "x"}, "E-DATASET-KEY-TYPE", ["instance_data_dir", "aws"]),
    "csv key": ({**LOCAL, "csv_file": "x.csv"}, "E-DATASET-KEY-TYPE", ["csv_file", "caption_strategy csv"]),
    "url key": (
        {**LOCAL, "caption_strategy": "csv", "csv_file": "x.csv", "csv_url_column": "u"},
        "E-DATASET-KEY-TYPE",
        ["csv_url_column"],
    ),
    "hub object": ({**LOCAL, "huggingface": {"streaming": True}}, "E-DATASET-KEY-TYPE", ["huggingface.streaming"]),
    "hub captions": (
        {**HUB, "caption_strategy": "textfile"},
        "E-DATASET-TYPE-CHOICE",
        ["caption_strategy", "textfile", "huggingface, instanceprompt"],
    ),
    "no hub": ({**LOCAL, "caption_strategy": "huggingface"}, "E-DATASET-TYPE-CHOICE", ["huggingface", "local"]),
    "url captions": ({**URLS, "caption_strategy": "textfile"}, "E-DATASET-TYPE-CHOICE", ["textfile", "csv"]),
    "hub metadata": ({**HUB, "metadata_backend": "discovery"}, "E-DATASET-TYPE-CHOICE", ["metadata_backend"]),
    "idle": ({**LOCAL, "parquet": {"path": "t.parquet"}}, "E-DATASET-PARQUET-IDLE", ["a", "metadata_backend"]),
    "half a size": (
        {**LOCAL, "metadata_backend": "parquet", "parquet": {"path": "t.parquet", "width_column": "w"}},
        "E-DATASET-PARQUET-SIZE",
        ["parquet.width_column", "parquet.height_column"],
    ),
    "half a key": (
        {**S3, "aws_access_key_id": "AKIA"},
        "E-DATASET-CREDENTIALS",
        ["aws_access_key_id", "aws_secret_access_key"],
    ),
    "token": ({**S3, "aws_session_token": "t"}, "E-DATASET-CREDENTIALS", ["aws_session_token"]),
    "user": ({**S3, "aws_endpoint_url": "https://me:x@minio:9000/y"}, "E-DATASET-ENDPOINT-USER", ["aws_endpoint_url"]),
    "filter": ({**HUB, "huggingface": {"filter_func": {"x": 1}}}, "E-DATASET-NOT-YET", ["huggingface.filter_func"]),
    "misspelt": ({**HUB, "huggingface": {"steaming": True}}, "E-DATASET-KEY", ["huggingface.streaming"]),
    "beginning": ({**URLS, "csv_url": "u"}, "E-DATASET-KEY", ["csv_url_column"]),
    "outside": ({**HUB, "huggingface": {"split": "train"}}, "E-DATASET-KEY", ["huggingface.split", "key='split'"]),
    "object": ({**LOCAL, "parquet": "t.parquet"}, "E-DATASET-KEY", ["parquet", "parquet.path"]),
    "number": ({**HUB, "huggingface": {"num_proc": 0}}, "E-VALUE-RANGE", ["a.huggingface.num_proc = 0"]),
}


def check(problem, words):
    for language in ("en", "es"):
        title, hint = render_problem(problem, language)
        assert problem.code not in title and "{" not in title
        for word in words:
            assert word in f"{title} {hint} {problem.fixes}", (word, title, hint)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(with_datasets, name):
    entry, code, words = PROBLEMS[name]
    check(with_datasets(json.dumps([entry], indent=1)).problem(code), words)


def test_the_place_is_that_of_the_key_in_the_object(with_datasets):
    text = '[\n {"id": "a", "instance_data_dir": "x", "metadata_backend": "parquet",\n "parquet": {\n "path": true}}]'
    problem = with_datasets(text).problem("E-VALUE-TEXT")
    assert (problem.origin, problem.path) == ("config/multidatabackend.json:4", "/0/parquet/path")
    assert problem.params["key"] == "a.parquet.path"


@pytest.mark.parametrize(
    ("entry", "package"),
    [
        (S3, "s3fs"),
        (URLS, "aiohttp"),
        (HUB, "datasets"),
        ({**LOCAL, "metadata_backend": "parquet", "parquet": {"path": "x"}}, "pyarrow"),
    ],
)
def test_a_package_that_is_not_installed(with_datasets, monkeypatch, entry, package):
    monkeypatch.setattr(
        "simpletuner.config.libraries.is_installed", lambda name: name != package and is_installed(name)
    )
    problem = with_datasets([entry]).problem("E-LIBRARY-MISSING")
    check(problem, [package, "pip install"])


def test_paths_are_filled_in_and_defaults_are_those_of_the_guide(with_datasets):
    project = with_datasets([{**URLS, "metadata_backend": None}, {**HUB, "id": "b"}])
    (project.folder / "data").mkdir()
    urls, hub = project.load("--output_dir=out").datasets.images
    assert Path(urls.storage.csv.csv_file) == project.folder / "list.csv"
    assert Path(urls.storage.csv.csv_cache_dir) == project.folder / "out/cache/urls"
    assert (hub.storage.hub.dataset_name, hub.metadata_backend) == ("owner/name", "huggingface")
    local = with_datasets([{**HUB, "dataset_name": "data"}]).load().datasets.images[0]
    assert Path(local.storage.hub.dataset_name) == project.folder / "data"


@pytest.mark.parametrize("key", ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"])
def test_secrets_come_from_variables_and_are_shown_nowhere(with_datasets, key):
    keys = {"aws_access_key_id": "one", "aws_secret_access_key": "two", "aws_session_token": "three"}
    project = with_datasets([{**S3, **keys, key: "{env:HIDDEN}"}])
    loaded = project.load(environ={"HIDDEN": SECRET})
    (dataset,) = loaded.datasets.images
    storage = storage_of(dataset, cache_dir=Path("cache"))
    assert getattr(storage, key.removeprefix("aws_")) == SECRET
    shown = f"{effective_json(loaded)} {dataset!r} {dataset} {storage!r} {storage.id} {dataset.model_dump(mode='json')}"
    assert SECRET not in shown
    wrong = with_datasets([{**S3, **keys, key: [SECRET]}]).problem("E-VALUE-TEXT")
    misspelt = with_datasets([{**S3, f"{key}s": SECRET}]).problem("E-DATASET-KEY")
    assert misspelt.params["suggestion"] == key
    for problem in (wrong, misspelt):
        assert SECRET not in f"{problem} {[render_problem(problem, language) for language in ('en', 'es')]}"


@pytest.mark.parametrize(
    ("entry", "table"),
    [
        (LOCAL, None),
        ({**S3, "caption_strategy": "textfile"}, None),
        (URLS, "UrlTable"),
        (HUB, "HubTable"),
        ({**HUB, "caption_strategy": "instanceprompt", "instance_prompt": "x"}, None),
        ({**LOCAL, "caption_strategy": "csv", "csv_file": "x.csv"}, "CsvTable"),
        ({**S3, "metadata_backend": "parquet", "parquet": {"path": "x.parquet"}}, "ParquetTable"),
    ],
)
def test_every_type_has_its_storage_and_table(with_datasets, entry, table):
    (dataset,) = with_datasets([entry]).load().datasets.images
    storage = storage_of(dataset, cache_dir=Path("cache"))
    found = table_of(dataset, storage)
    assert (found and type(found).__name__) == table
    kinds = {"local": "LocalStorage", "aws": "S3Storage", "csv": "UrlStorage", "huggingface": "HubStorage"}
    assert type(storage).__name__ == kinds[entry.get("type", "local")]


def test_keys_of_places_are_keys_of_image_datasets():
    assert storage_options().keys() <= dataset_options("image").keys()
