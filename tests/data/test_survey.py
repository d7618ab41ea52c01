"""Files that are the same again: all of them are found, and few are read for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data import survey
from simpletuner.data.finding import FoundImages, find_images
from simpletuner.data.image_index import open_index
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.data.survey import find_duplicates

SaveImage = Callable[..., Path]


def find(tmp_path: Path, *folders: Path) -> FoundImages:
    specs = [DatasetSpec(id=folder.name, storage=LocalStorage(folder=folder)) for folder in folders]
    return find_images(specs, cache_dir=tmp_path / "cache", on_progress=lambda done, total: None)


def groups(tmp_path: Path, found: FoundImages) -> list[set[str]]:
    same = find_duplicates(found, cache_dir=tmp_path / "cache", on_progress=lambda done, total: None)
    return [{Path(file).name for file in group.files} for group in same]


def test_copies_are_found_across_places_and_nothing_else_is_read_in_full(tmp_path: Path, save_image: SaveImage) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for number in range(8):  # BMP files of one size have one length, and different middles
        save_image(one / f"{number}.bmp", seed=number)
    save_image(two / "alone.bmp", seed=99)
    (two / "copy.bmp").write_bytes((one / "3.bmp").read_bytes())
    (two / "again.bmp").write_bytes((one / "3.bmp").read_bytes())
    data = bytearray((one / "5.bmp").read_bytes())
    data[-1] ^= 0xFF  # another picture with the same middle
    (two / "almost.bmp").write_bytes(data)
    found = find(tmp_path, one, two)
    assert groups(tmp_path, found) == [{"3.bmp", "copy.bmp", "again.bmp"}]
    with open_index(tmp_path / "cache") as index:
        known = {
            key for scan in found.scans.values() for key, row in index.images(scan.storage.id).items() if row.content_id
        }
    assert known <= {"3.bmp", "copy.bmp", "again.bmp", "5.bmp", "almost.bmp"}


def test_of_a_remote_place_nothing_is_read(
    tmp_path: Path, save_image: SaveImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    save_image(folder / "a.bmp", seed=1)
    (folder / "b.bmp").write_bytes((folder / "a.bmp").read_bytes())
    found = find(tmp_path, folder)
    monkeypatch.setattr(LocalStorage, "is_remote", True)
    for method in ("read", "open"):
        monkeypatch.setattr(LocalStorage, method, _forbidden)
    assert groups(tmp_path, found) == []


def _forbidden(*_: Any) -> Any:
    raise AssertionError("it was read")


def test_sizes_are_counted_in_classes_without_gaps() -> None:
    sizes = [(100, 100), (500, 500), (1000, 1000), (999, 1001), (4000, 4000), (6000, 4000)]
    classes = survey._size_classes(sizes)
    assert sum(one.num_images for one in classes) == len(sizes)
    assert [(c.least, c.num_images) for c in classes if c.num_images] == [
        (0.0, 1),
        (0.25, 1),
        (0.5, 1),
        (1.0, 1),
        (16.0, 2),
    ]
    assert all(one.below == two.least for one, two in pairwise(classes))
