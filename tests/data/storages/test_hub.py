"""Rows of Hugging Face datasets in local folders and files, whole and as a stream."""

from __future__ import annotations

import io
import pickle
import shutil

import pytest
from PIL import Image

from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.hub import HubStorage
from simpletuner.data.storages.row_store import RowStore, StreamRow, in_groups
from simpletuner.data.tables import HubTable

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64 + number, 48), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [png(number) for number in range(12)]
CAPTIONS = [f"caption {number}" if number != 3 else "  " for number in range(12)]


def as_parquet(folder, *, images=IMAGES, names=("image", "caption")):
    folder.mkdir(exist_ok=True)
    cells = [{"bytes": image, "path": None} if image else None for image in images]
    table = pa.table({names[0]: cells, names[1]: CAPTIONS[: len(images)], "other": [0] * len(images)})
    pq.write_table(table, folder / "train.parquet", row_group_size=4)
    return folder


def as_folder(folder):
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        (folder / f"{number:02}.png").write_bytes(image)
    lines = [f'{{"file_name": "{number:02}.png", "caption": "{CAPTIONS[number]}"}}' for number in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_saved(folder):
    import datasets

    parquet = as_parquet(folder.with_name("source"))
    datasets.Dataset.from_parquet(str(parquet / "train.parquet"), cache_dir=str(folder.parent / "hf")).save_to_disk(
        folder
    )
    return folder


FORMS = {
    "parquet": as_parquet,
    "one file": lambda folder: as_parquet(folder) / "train.parquet",
    "images": as_folder,
    "saved": as_saved,
}


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(name, **options) -> HubStorage:
        options = {"caption_column": "caption", "cache_dir": str(tmp_path / "hf"), **options}
        return HubStorage(dataset_name=str(name), stream_dir=tmp_path / "stream", **options)

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_images_with_captions(tmp_path, storage, form, streaming):
    source = FORMS[form](tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    found = storage(source, streaming=streaming)
    listing = found.list_files()
    assert [file.key for file in listing.images] == [f"{number:09}" for number in range(12)]
    assert [found.read(file) for file in listing.images] == IMAGES
    assert [file.size_bytes for file in listing.images] == [len(image) for image in IMAGES]
    rows = HubTable(storage=found).rows([file.key for file in listing.images])
    assert [rows[file.key].captions for file in listing.images] == [(c.strip(),) if c.strip() else () for c in CAPTIONS]
    again = pickle.loads(pickle.dumps(found))
    assert again.list_files() == listing
    assert again.open(listing.images[5]).read() == IMAGES[5]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["", "train.parquet"])
def test_another_content_is_another_version(tmp_path, storage, name, streaming):
    folder = as_parquet(tmp_path / "data")
    source = folder / name
    before = storage(source, streaming=streaming).list_files()
    as_parquet(folder, images=[*IMAGES[:3], None, *IMAGES[4:8]])
    found = storage(source, streaming=streaming)
    after = found.list_files()
    assert {file.version for file in before.images} & {file.version for file in after.images} == set()
    assert [item.key for item in after.unreadable] == ["000000003"]
    assert [found.read(file) for file in after.images] == [*IMAGES[:3], *IMAGES[4:8]]


def test_a_stream_that_was_interrupted_goes_on(tmp_path, storage, monkeypatch):
    monkeypatch.setattr("simpletuner.data.storages.hub._ROWS_PER_COMMIT", 5)
    source = as_parquet(tmp_path / "data")

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage(source, streaming=True).prepare(interrupt)
    seen = []
    found = storage(source, streaming=True)
    found.prepare(lambda *counts: seen.append(counts[0]))
    assert seen == [5, 10, 12]
    assert [found.read(file) for file in found.list_files().images] == IMAGES


def test_a_stream_that_was_listed_is_read_without_its_source(tmp_path, storage):
    source = as_parquet(tmp_path / "data")
    listing = storage(source, streaming=True).list_files()
    shutil.rmtree(source)
    found = storage(source, streaming=True)
    assert [found.read(file) for file in listing.images] == IMAGES
    assert dict(found.captions())["000000005"] == ("caption 5",)
    with pytest.raises(StorageError):
        found.list_files()


def test_a_damaged_stream_is_read_anew(tmp_path, storage):
    found = storage(as_parquet(tmp_path / "data"), streaming=True)
    listing = found.list_files()
    (kept,) = (tmp_path / "stream").glob("*.sqlite")
    kept.write_bytes(b"no database " * 100)
    assert found.list_files() == listing
    assert [found.read(file) for file in listing.images] == IMAGES


def test_of_a_stream_only_the_first_rows_are_taken(tmp_path, storage):
    source = as_parquet(tmp_path / "data")
    found = storage(source, streaming=True, max_rows=4)
    assert [found.read(file) for file in found.list_files().images] == IMAGES[:4]
    assert found.id != storage(source, streaming=True).id


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"image_column": "picture"}, "E-TABLE-COLUMN", "picture"),
        ({"caption_column": "text"}, "E-TABLE-COLUMN", "image, caption, other"),
        ({"split": "test"}, "E-STORAGE-DATASET", "test"),
        ({"image_column": "other"}, "E-STORAGE-DATASET", ""),
        ({"name": "owner/no-such-dataset"}, "E-STORAGE-DATASET", "owner/no-such-dataset"),
    ],
)
def test_what_cannot_be_used(tmp_path, storage, streaming, change, code, words):
    options = {"name": as_parquet(tmp_path / "data"), "streaming": streaming, **change}
    with pytest.raises(StorageError) as caught:
        storage(options.pop("name"), **options).list_files()
    assert caught.value.code == code
    assert words in str(caught.value.problem("a").params)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_file(tmp_path, storage, streaming):
    source = as_parquet(tmp_path / "data")
    whole = (source / "train.parquet").read_bytes()
    (source / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError) as caught:
        storage(source, streaming=streaming).list_files()
    assert caught.value.code == "E-STORAGE-DATASET"
    shutil.rmtree(source)
    found = storage(as_parquet(tmp_path / "data"), streaming=streaming)
    assert len(found.list_files().images) == 12


def test_groups_are_bounded_by_number_and_size():
    rows = [StreamRow(image=b"x" * size, captions=()) for size in (1, 1, 1, 9, 1, 20, 1)]
    groups = list(in_groups(rows, num_rows=3, size_bytes=10))
    assert [row for group in groups for row in group] == rows
    assert [len(group) for group in groups] == [3, 2, 1, 1]


def test_rows_of_another_stream_are_dropped(tmp_path):
    store = RowStore(tmp_path / "deep" / "rows.sqlite")
    assert store.begin("one") == 0
    store.add(0, [StreamRow(image=b"a", captions=("x", "y"))])
    store.complete()
    assert (store.begin("one"), store.is_complete()) == (1, True)
    assert list(store.captions()) == [(0, ("x", "y"))]
    assert (store.begin("two"), store.is_complete()) == (0, False)
