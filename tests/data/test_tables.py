"""Captions and sizes from parquet and CSV files."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.storages.csv_table import read_rows
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.data.tables import CsvTable, ParquetTable, TableRow, UrlTable, caption_texts

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

KEYS = ["a/cat.jpg", "b/cat.png", "dog.v2.jpg", "none.jpg"]


@pytest.fixture
def parquet(tmp_path):
    def make(columns, **options) -> ParquetTable:
        pq.write_table(pa.table(columns), tmp_path / "table.parquet")
        options = {"filename_column": "file", "caption_column": "caption", **options}
        return ParquetTable(path=tmp_path / "table.parquet", **options)

    return make


def captions(table):
    return {key: row.captions for key, row in table.rows(KEYS).items()}


@pytest.mark.parametrize(
    ("names", "with_extension", "expected"),
    [
        (["cat", "dog.v2"], False, {"a/cat.jpg": "0", "b/cat.png": "0", "dog.v2.jpg": "1"}),
        (["a/cat", "b\\cat"], False, {"a/cat.jpg": "0", "b/cat.png": "1"}),
        (["cat.jpg", "dog.v2.jpg"], True, {"a/cat.jpg": "0", "dog.v2.jpg": "1"}),
        (["a/cat.jpg", "./b/cat.png"], True, {"a/cat.jpg": "0", "b/cat.png": "1"}),
        (["cat.jpg", "cat"], False, {"a/cat.jpg": "1", "b/cat.png": "1"}),
    ],
)
def test_a_name_is_a_path_or_a_file_in_any_folder(parquet, names, with_extension, expected):
    table = parquet({"file": names, "caption": ["0", "1"]}, identifier_includes_extension=with_extension)
    assert captions(table) == {key: (caption,) for key, caption in expected.items()}


def test_captions_lists_of_them_and_fallbacks(parquet):
    table = parquet(
        {
            "file": ["a/cat", "b/cat", "dog.v2", "none"],
            "caption": [["one", " two ", ""], [], None, [" "]],
            "short": ["x", "y", None, "z"],
            "ignored": [b"0"] * 4,
        },
        fallback_caption_column="short",
    )
    assert captions(table) == {
        "a/cat.jpg": ("one", "two"),
        "b/cat.png": ("y",),
        "dog.v2.jpg": (),
        "none.jpg": ("z",),
    }


def test_sizes_where_both_are_there(parquet):
    table = parquet(
        {"file": ["a/cat", "b/cat", "dog.v2"], "w": [640, None, 0], "h": [480.0, 480.0, 1.0]},
        caption_column=None,
        width_column="w",
        height_column="h",
    )
    assert table.rows(KEYS) == {
        "a/cat.jpg": TableRow(captions=(), size=(640, 480)),
        "b/cat.png": TableRow(captions=()),
        "dog.v2.jpg": TableRow(captions=()),
    }


def test_only_the_named_columns_are_read(parquet, monkeypatch):
    read = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: read.append(k["columns"]) or real(self, *a, **k)
    )
    parquet({"file": ["a"], "caption": ["c"], "image": [b"x" * 1000]}).rows(KEYS)
    assert read == [["file", "caption"]]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5})?", fullmatch=True), st.text(min_size=1), max_size=20))
def test_what_is_written_comes_back(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    pq.write_table(pa.table({"file": list(written), "caption": list(written.values())}), path)
    table = ParquetTable(
        path=path, filename_column="file", caption_column="caption", identifier_includes_extension=True
    )
    rows = table.rows(list(written))
    paths = {key: caption for key, caption in written.items() if "/" in key}
    assert {key: rows[key].captions for key in paths} == {key: caption_texts(text) for key, text in paths.items()}


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "E-TABLE-MISSING"), (b"", "E-TABLE-DAMAGED"), (b"PAR1 hello", "E-TABLE-DAMAGED")],
)
def test_a_parquet_file_that_cannot_be_used(tmp_path, content, code):
    path = tmp_path / "table.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        ParquetTable(path=path, filename_column="f").rows(KEYS)
    assert (caught.value.code, caught.value.place) == (code, str(path))
    assert caught.value.params["key"] == "parquet.path"


def test_a_column_that_is_missing(parquet):
    with pytest.raises(StorageError) as caught:
        parquet({"file": ["a"], "text": ["b"]}, width_column="w").rows(KEYS)
    assert caught.value.code == "E-TABLE-COLUMN"
    assert caught.value.params == {"key": "parquet.path", "missing": "caption, w", "columns": "file, text"}


def test_a_csv_names_files_with_or_without_ending_and_may_repeat_them(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('filename,caption\ncat.jpg,one\nb/cat,"two, three"\ncat.jpg,again\ncat.jpg,one\ndog.v2.jpg,\n')
    table = CsvTable(path=path, filename_column="filename", caption_column="caption")
    assert captions(table) == {"a/cat.jpg": ("one", "again"), "b/cat.png": ("two, three",), "dog.v2.jpg": ()}


def test_captions_beside_urls(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("url,caption\nhttps://h/a.jpg,one\nx.jpg,two\nhttps://h/a.jpg,three\n,four\n")
    storage = UrlStorage(csv_file=path, cache_dir=tmp_path / "cache")
    keys = [storage.key_of("https://h/a.jpg"), "x.jpg"]
    rows = UrlTable(storage=storage, caption_column="caption").rows(keys)
    assert {key: row.captions for key, row in rows.items()} == {keys[0]: ("one", "three"), "x.jpg": ("two",)}


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CELL, CELL)), st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_any_csv_comes_back_as_it_was_written(tmp_path_factory, rows, delimiter, encoding):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([("other", "caption", "url"), *(("x", *row) for row in rows)])
    read = list(read_rows(path, ["url", "caption"], option="csv_file"))
    assert read == [(url.strip(), caption.strip()) for caption, url in rows]
