"""Images that a CSV names by URL, against a web server that misbehaves."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest

from simpletuner.data.storage import ChangedFileError
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.patience import Patience
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.problems import DatasetError

QUICK = Patience(num_attempts=3, first_pause_s=0.01, timeout_s=0.3)


@pytest.fixture
def storage(tmp_path):
    """storage(*texts of the url column, header="url") -> UrlStorage on a CSV of these rows."""

    def make(*texts: str, name: str = "images.csv", **options: object) -> UrlStorage:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["url", "caption"], *([text, "c"] for text in texts)])
        return UrlStorage(csv_file=path, cache_dir=tmp_path / "cache", patience=QUICK, **options)

    return make


def contents(storage):
    return {storage.shown(file.key): storage.read(file) for file in storage.list_files().images}


@pytest.mark.parametrize("faults", [[], [503, 429], ["cut", 500], ["sleep"]])
def test_what_passes_is_waited_for(site, storage, faults):
    body = bytes(range(256)) * 500
    site.files["/a/cat.jpg"], site.faults["/a/cat.jpg"] = body, faults
    assert contents(storage(f"{site.url}/a/cat.jpg?signature=secret")) == {f"{site.url}/a/cat.jpg": body}
    assert site.asked["/a/cat.jpg"] == len(faults) + 1


def test_a_second_listing_asks_for_nothing_and_is_the_first(site, storage):
    site.files = {f"/{number}.png": b"%d" % number for number in range(40)}
    urls = [f"{site.url}/{number}.png" for number in range(41)]
    first = storage(*urls).list_files()
    assert len(first.images) == 40
    assert [item.reason for item in first.unreadable] == ["HTTP 404 Not Found"]
    site.asked.clear()
    again = storage(*reversed(urls)).list_files()
    assert again == first
    assert not site.asked


@pytest.mark.parametrize("status", [403, 404])
def test_what_a_server_refuses_is_an_unreadable_image_and_asked_for_once(site, storage, status):
    site.files = {"/good.jpg": b"good", "/bad.jpg": b"bad"}
    site.faults["/bad.jpg"] = [status] * 9
    for _ in range(2):
        listing = storage(f"{site.url}/bad.jpg", f"{site.url}/good.jpg").list_files()
        assert [f"HTTP {status}" in item.reason for item in listing.unreadable] == [True]
        assert len(listing.images) == 1
    assert site.asked["/bad.jpg"] == 1


@pytest.mark.parametrize("fault", ["cut", "sleep"])
def test_what_does_not_pass_ends_with_one_message_and_keeps_the_rest(site, storage, fault, tmp_path):
    site.files = {"/good.jpg": b"good", "/bad.jpg": b"badbad"}
    site.faults["/bad.jpg"] = [fault] * 3
    found = storage(f"{site.url}/bad.jpg", f"{site.url}/good.jpg")
    with pytest.raises(StorageError) as caught:
        found.list_files()
    assert caught.value.code == "E-STORAGE-URLS"
    assert caught.value.params["count"] == 1
    assert f"{site.url}/bad.jpg (" in str(caught.value.params["files"])
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept == [b"good"], "nothing half, nothing temporary"
    assert sorted(contents(found).values()) == [b"badbad", b"good"], "the next start goes on"
    assert site.asked["/good.jpg"] == 1


def test_a_server_that_is_gone_is_not_asked_for_every_image(storage, gone_url):
    with pytest.raises(StorageError) as caught:
        storage(*(f"{gone_url}/{number}.jpg" for number in range(1000))).list_files()
    assert caught.value.code == "E-STORAGE-URLS"
    assert int(str(caught.value.params["count"])) < 64


def test_files_beside_the_csv_are_read_where_they_are(storage, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "cat.jpg").write_bytes(b"cat")
    found = storage("sub/cat.jpg", "sub\\cat.jpg", "sub/none.jpg", "ftp://host/dog.jpg")
    listing = found.list_files()
    assert [file.key for file in listing.images] == ["sub/cat.jpg"]
    assert {item.key.rpartition("/")[2] for item in listing.unreadable} == {"none.jpg", "dog.jpg"}
    assert contents(found) == {str(tmp_path / "sub" / "cat.jpg"): b"cat"}
    assert not (tmp_path / "cache").exists()


def test_keys_are_stable_unique_and_without_secrets(storage):
    found = storage("x.jpg")
    urls = [
        "http://h/a.jpg",
        "https://h/a.jpg",
        "http://h/a.jpg?b",
        "http://user:word@h/a.jpg",
        "http://[h",
        "http://h/",
    ]
    keys = [found.key_of(url) for url in urls]
    assert len(set(keys)) == len(urls)
    assert keys == [found.key_of(url) for url in urls]
    assert not [key for key in keys if "word" in key]


def test_an_image_that_changed_after_the_listing_is_noticed(site, storage, tmp_path):
    site.files["/a.jpg"] = b"one"
    found = storage(f"{site.url}/a.jpg")
    (file,) = found.list_files().images
    next(path for path in (tmp_path / "cache").rglob("*.jpg")).write_bytes(b"another")
    with pytest.raises(ChangedFileError):
        found.read(file)


def test_a_copy_that_was_sent_to_another_process_reads_the_same(site, storage):
    site.files["/a.jpg"] = b"one"
    found = storage(f"{site.url}/a.jpg")
    (file,) = found.list_files().images
    copy = pickle.loads(pickle.dumps(found))
    assert copy == found
    assert copy.read(file) == b"one"


def test_a_cache_directory_that_cannot_be_written(site, storage, tmp_path, told):
    site.files["/a.jpg"] = b"one"
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DatasetError) as caught:
        storage(f"{site.url}/a.jpg").list_files()
    assert told(caught.value) == ["E-CACHE-NOT-WRITABLE"]


def test_two_datasets_of_one_csv_fetch_it_once(site, storage):
    site.files["/a.jpg"] = b"one"
    first, second = (storage(f"{site.url}/a.jpg") for _ in range(2))
    assert first.id == second.id
    (file,) = first.list_files().images
    assert second.read(file) == b"one"
    assert site.asked["/a.jpg"] == 1


def test_progress_counts_images(site, storage):
    site.files = {f"/{number}.png": b"x" for number in range(5)}
    seen: list[tuple[int, int]] = []
    storage(*(f"{site.url}/{number}.png" for number in range(5))).prepare(lambda *counts: seen.append(counts))
    assert seen == [(number, 5) for number in range(6)]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, "E-TABLE-MISSING", {}),
        (b"link,caption\nx,y\n", "E-TABLE-COLUMN", {"missing": "url", "columns": "link, caption"}),
        (b"", "E-TABLE-COLUMN", {"columns": "-"}),
        (b"url\n\xff\xfe\xfa\n", "E-TABLE-ENCODING", {}),
        (b'url\n"a" b,c\n', "E-TABLE-DAMAGED", {}),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path: Path, content, code, words):
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        UrlStorage(csv_file=path, cache_dir=tmp_path / "cache").list_files()
    assert caught.value.code == code
    assert caught.value.place == str(path)
    assert words.items() <= caught.value.params.items()
    assert pickle.loads(pickle.dumps(caught.value)).problem("a") == caught.value.problem("a")


@pytest.mark.parametrize("text", ["url;n\na.jpg;1,5\n", "n\turl\n1,5\ta.jpg\n", "url,n\na.jpg,1\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_other_separators_and_encodings(tmp_path, text, encoding):
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    (tmp_path / "a.jpg").write_bytes(b"a")
    listing = UrlStorage(csv_file=tmp_path / "list.csv", cache_dir=tmp_path / "cache").list_files()
    assert [file.key for file in listing.images] == ["a.jpg"]
