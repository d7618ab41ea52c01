"""Finding images: complete, incremental, and without a trace in the user's folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data import discovery
from simpletuner.data.discovery import Scan, learn_contents, read_texts, remember_unreadable, scan
from simpletuner.data.image_index import Known, open_index
from simpletuner.data.storage import FileInfo, LocalStorage, Unreadable
from simpletuner.problems import SimpletunerError

SaveImage = Callable[..., Path]


def scan_folder(folder: Path, cache_dir: Path, **options: Any) -> Scan:
    storage = LocalStorage(folder=folder)
    with open_index(cache_dir) as index:
        on_progress = options.pop("on_progress", lambda done, total: None)
        return scan(storage, storage.list_files(), index, on_progress=on_progress, **options)


def contents(folder: Path, cache_dir: Path) -> dict[str, str]:
    """The content ids of a folder's images, by key."""
    storage = LocalStorage(folder=folder)
    with open_index(cache_dir) as index:
        found, failed = learn_contents(
            storage, storage.list_files().images, index, on_progress=lambda done, total: None
        )
    assert not failed
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the files that were read, in order. The reading itself is the real one."""
    seen: list[str] = []
    read = discovery._read

    def watch(storage: Any, how: Any, file: FileInfo) -> Any:
        seen.append(file.key)
        return read(storage, how, file)

    monkeypatch.setattr(discovery, "_read", watch)
    return seen


def test_images_are_found_at_every_depth_in_any_case_and_script(tmp_path: Path, save_image: SaveImage) -> None:
    folder = tmp_path / "images"
    names = ["b.JPG", "a.png", "sub/deep/ñandú 猫.webp", "sub/x.y.jpeg", "Z.Tif"]
    for name in names:
        save_image(folder / name, size=(40, 24))
    (folder / "a.txt").write_text("caption")
    (folder / ".hidden").mkdir()
    save_image(folder / ".hidden" / "no.png")
    save_image(folder / "._a.png", format="PNG")
    (folder / "film.mp4").write_bytes(b"")
    (folder / "folder.png").mkdir()
    result = scan_folder(folder, tmp_path / "cache")
    assert [record.key for record in result.records] == sorted(names)
    assert {record.size for record in result.records} == {(40, 24)}
    assert all(Path(result.storage.shown(record.key)).is_file() for record in result.records)
    assert {(other.extension, other.count) for other in result.listing.others} == {(".txt", 1), (".mp4", 1)}
    assert result.unreadable == ()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_are_followed_and_loops_end(tmp_path: Path, save_image: SaveImage) -> None:
    folder, outside = tmp_path / "images", tmp_path / "outside"
    save_image(folder / "zoo" / "cat.png")
    save_image(outside / "dog.png")
    (folder / "zoo" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "zoo")
    (folder / "other").symlink_to(outside)
    (folder / "link.png").symlink_to(outside / "dog.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    result = scan_folder(folder, tmp_path / "cache")
    assert [record.key for record in result.records] == ["link.png", "other/dog.png", "zoo/cat.png"]
    assert result.unreadable == (
        Unreadable(key="gone.png", reason="broken link"),
        Unreadable(key="self.png", reason="broken link"),
    )


def test_a_second_scan_reads_nothing_and_finds_the_same(
    tmp_path: Path, save_image: SaveImage, reads: list[str]
) -> None:
    folder = tmp_path / "images"
    for number in range(5):
        save_image(folder / f"{number}.png", seed=number)
    first = scan_folder(folder, tmp_path / "cache")
    assert len(reads) == 5
    progress: list[tuple[int, int]] = []
    second = scan_folder(folder, tmp_path / "cache", on_progress=lambda done, total: progress.append((done, total)))
    assert second == first
    assert len(reads) == 5
    assert progress == [(5, 5)]


def test_only_what_changed_is_read_again(tmp_path: Path, save_image: SaveImage, reads: list[str]) -> None:
    folder = tmp_path / "images"
    for number in range(4):
        save_image(folder / f"{number}.png", seed=number)
    before = {record.key: record for record in scan_folder(folder, tmp_path / "cache").records}
    reads.clear()
    save_image(folder / "1.png", size=(48, 48), seed=9)
    (folder / "2.png").unlink()
    (folder / "3.png").rename(folder / "renamed.png")
    after = {record.key: record for record in scan_folder(folder, tmp_path / "cache").records}
    assert sorted(reads) == ["1.png", "renamed.png"]
    assert after.keys() == {"0.png", "1.png", "renamed.png"}
    assert after["0.png"] == before["0.png"]
    assert after["1.png"].size == (48, 48)
    connection = sqlite3.connect(tmp_path / "cache" / "images.sqlite")
    assert connection.execute("SELECT count(*) FROM images").fetchone() == (3,)
    connection.close()


def test_contents_are_read_once_and_follow_a_file_wherever_it_goes(
    tmp_path: Path, save_image: SaveImage, reads: list[str]
) -> None:
    folder = tmp_path / "images"
    for number in range(3):
        save_image(folder / f"{number}.png", seed=number)
    scan_folder(folder, tmp_path / "cache")
    before = contents(folder, tmp_path / "cache")
    assert len(set(before.values())) == 3
    reads.clear()
    scan_folder(folder, tmp_path / "cache")
    assert contents(folder, tmp_path / "cache") == before
    assert reads == []
    (folder / "0.png").rename(folder / "moved.png")
    os.utime(folder / "1.png", (9, 9))
    scan_folder(folder, tmp_path / "cache")
    reads.clear()
    after = contents(folder, tmp_path / "cache")
    assert (after["moved.png"], after["1.png"], after["2.png"]) == (before["0.png"], before["1.png"], before["2.png"])
    assert reads == ["1.png", "moved.png"]


def test_an_image_that_cannot_be_decoded_is_unreadable_until_it_is_another(
    tmp_path: Path, save_image: SaveImage
) -> None:
    folder = tmp_path / "images"
    save_image(folder / "a.png")
    save_image(folder / "b.png")
    (record, _) = scan_folder(folder, tmp_path / "cache").records
    with open_index(tmp_path / "cache") as index:
        remember_unreadable(LocalStorage(folder=folder), {record.file: "broken inside"}, index)
    assert scan_folder(folder, tmp_path / "cache").unreadable == (Unreadable(key="a.png", reason="broken inside"),)
    os.utime(folder / "a.png", (9, 9))
    assert scan_folder(folder, tmp_path / "cache").unreadable == ()


def test_caption_files_are_read_when_they_changed(tmp_path: Path, save_image: SaveImage, reads: list[str]) -> None:
    folder = tmp_path / "images"
    for name in ("a", "b"):
        save_image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
        os.utime(folder / f"{name}.txt", (9, 9))

    def texts() -> dict[str, bytes]:
        found = scan_folder(folder, tmp_path / "cache")
        reads.clear()
        with open_index(tmp_path / "cache") as index:
            return read_texts(found, index)

    assert texts() == {"a.txt": b"a", "b.txt": b"b"}
    assert sorted(reads) == ["a.txt", "b.txt"]
    assert texts() == {"a.txt": b"a", "b.txt": b"b"}
    assert reads == []
    (folder / "a.txt").write_text("other")
    (folder / "b.txt").unlink()
    assert texts() == {"a.txt": b"other"}
    assert reads == ["a.txt"]


def test_a_change_within_the_clocks_grain_is_not_missed(tmp_path: Path, save_image: SaveImage) -> None:
    path = save_image(tmp_path / "images" / "a.bmp", seed=1)
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    first = scan_folder(path.parent, tmp_path / "cache").records[0]
    before = contents(path.parent, tmp_path / "cache")
    save_image(path, seed=2)  # the same size, and the same time of change:
    os.utime(path, ns=(now, now))
    second = scan_folder(path.parent, tmp_path / "cache").records[0]
    assert contents(path.parent, tmp_path / "cache") != before
    assert first == second


def test_many_files_are_read_in_processes_with_the_same_result(
    tmp_path: Path, save_image: SaveImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_PROCESSES_FROM_FILES", 100)
    folder = tmp_path / "images"
    for number in range(130):
        save_image(folder / f"{number:03}.bmp", size=(16, 8), seed=number)
    (folder / "077.bmp").write_bytes(b"broken")
    shared = scan_folder(folder, tmp_path / "one", max_workers=2)
    assert shared == scan_folder(folder, tmp_path / "two", max_workers=1)
    assert [item.key for item in shared.unreadable] == ["077.bmp"]
    assert len(shared.records) == 129


def test_bad_files_are_all_named_and_forgiven_once_mended(tmp_path: Path, save_image: SaveImage) -> None:
    folder = tmp_path / "images"
    whole = save_image(folder / "whole.jpg", size=(200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    result = scan_folder(folder, tmp_path / "cache")
    assert [record.key for record in result.records] == ["whole.jpg"]
    reasons = {item.key: item.reason for item in result.unreadable}
    assert reasons.keys() == {"cut.jpg", "empty.png", "text.png"}
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["empty.png"] == "empty file"
    assert reasons["text.png"] == "not an image file"
    save_image(folder / "text.png")
    assert len(scan_folder(folder, tmp_path / "cache").unreadable) == 2


def test_nothing_is_written_in_the_image_folder(tmp_path: Path, save_image: SaveImage) -> None:
    folder = tmp_path / "images"
    save_image(folder / "sub" / "a.png")
    save_image(folder / "b.png")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    scan_folder(folder, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


@pytest.mark.parametrize("damage", ["bytes", "cut", "version"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, save_image: SaveImage, damage: str) -> None:
    folder, index = tmp_path / "images", tmp_path / "cache" / "images.sqlite"
    for number in range(3):
        save_image(folder / f"{number}.png", seed=number)
    first = scan_folder(folder, tmp_path / "cache")
    if damage == "bytes":
        index.write_bytes(b"not a database " * 1000)
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:5000])
    else:
        connection = sqlite3.connect(index)
        connection.executescript("DROP TABLE images; CREATE TABLE images (other TEXT); PRAGMA user_version = 99")
        connection.close()
    assert scan_folder(folder, tmp_path / "cache") == first
    assert scan_folder(folder, tmp_path / "cache") == first


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these file systems have only names that are text")
def test_a_name_that_is_not_text_is_still_a_file(tmp_path: Path, save_image: SaveImage, reads: list[str]) -> None:
    plain = save_image(tmp_path / "images" / "plain.png")
    shutil.copy2(plain, os.path.join(os.fsencode(plain.parent), b"caf\xe9.png"))  # noqa: PTH118
    for _ in range(2):
        keys = [record.key for record in scan_folder(plain.parent, tmp_path / "cache").records]
        assert [os.fsencode(key) for key in keys] == [b"caf\xe9.png", b"plain.png"]
    assert len(reads) == 2


@pytest.mark.slow
def test_two_thousand_images_in_two_seconds_of_processor_time(
    tmp_path: Path, save_image: SaveImage, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    source = save_image(tmp_path / "source.jpg", size=(320, 240), quality=90).read_bytes()
    folder.mkdir()
    then = time.time() - 60
    for number in range(2000):
        path = folder / f"{number:04}.jpg"
        path.write_bytes(source + number.to_bytes(4, "little"))
        os.utime(path, (then, then))
    seconds: list[float] = []
    for _ in range(2):
        before_s = time.process_time()
        assert len(scan_folder(folder, tmp_path / "cache").records) == 2000
        seconds.append(time.process_time() - before_s)
    with capsys.disabled():
        print(f"\n2000 JPEGs: {seconds[0]:.2f} CPU-s cold, {seconds[1]:.2f} CPU-s warm")
    assert seconds[0] < 2.0
    assert seconds[1] < 0.5


def test_a_full_disk_under_the_index_is_one_problem(
    tmp_path: Path, told: Callable[[SimpletunerError], list[str]]
) -> None:
    known = {f"{n}.png": Known(size_bytes=1, version="1", size=(1, 1), content_id="0" * 32) for n in range(2000)}
    with open_index(tmp_path) as index:
        index._connection.execute("PRAGMA max_page_count = 5")
        with pytest.raises(SimpletunerError) as caught:
            index.save_images(str(tmp_path), known)
        assert told(caught.value) == ["E-CACHE-DISK-FULL"]
        assert index.images(str(tmp_path)) == {}
