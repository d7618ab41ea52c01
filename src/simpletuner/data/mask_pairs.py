"""Which file masks which image: files of the same path and name, whatever their ending. No torch.

`cats/tom.jpg` is masked by `cats/tom.png` of the dataset of masks.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.discovery import Progress, Scan, scan
from simpletuner.data.finding import list_storages
from simpletuner.data.image_index import open_index
from simpletuner.data.plan_problems import shown_names
from simpletuner.data.records import DatasetPlan, ImageRecord, Plan, Size
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import FileInfo, Storage, Unreadable
from simpletuner.problems import DatasetError, Problem


@dataclass(frozen=True, kw_only=True)
class MaskFiles:
    """The masks of one dataset's images: the key of an image -> its mask."""

    storage: Storage
    by_image: Mapping[str, FileInfo]


def pair_masks(
    plan: Plan,
    specs: Mapping[str, DatasetSpec],
    *,
    cache_dir: Path,
    on_progress: Progress,
    max_workers: int | None = None,
) -> dict[str, MaskFiles]:
    """Find the mask of every image of the plan, of the datasets that have masks.

    Args:
        specs: id of a dataset -> that of the masks of its images.
        cache_dir: where the index of known images is.
        on_progress: called with (masks looked at, masks found), of one storage after the other.
    Returns: by id of the dataset.
    Raises: DatasetError: masks that are missing, twice there, unreadable or of another shape, every one of them named.
    """
    problems: list[Problem] = []
    storages = {spec.storage.id: spec.storage for spec in specs.values()}
    listings = list_storages(tuple(specs.values()), problems, cache_dir)
    with open_index(cache_dir) as index:
        scans = {
            name: scan(storages[name], listing, index, on_progress=on_progress, max_workers=max_workers)
            for name, listing in listings.items()
        }
    found: dict[str, MaskFiles] = {}
    for dataset in plan.datasets:
        mask_spec = specs.get(dataset.id)
        if mask_spec is not None and mask_spec.storage.id in scans:
            pairs = _Pairs(dataset, mask_spec, scans[mask_spec.storage.id])
            problems += pairs.problems()
            found[dataset.id] = MaskFiles(storage=mask_spec.storage, by_image=pairs.files)
    if problems:
        raise DatasetError(problems)
    return found


class _Pairs:
    """The images of one dataset and what is there for each."""

    def __init__(self, dataset: DatasetPlan, spec: DatasetSpec, found: Scan) -> None:
        self._dataset_id, self._spec = dataset.id, spec
        by_stem: dict[str, list[ImageRecord | Unreadable]] = defaultdict(list)
        for record in found.records:
            by_stem[_stem(record.key)].append(record)
        for broken in found.unreadable:
            by_stem[_stem(broken.key)].append(broken)
        self.files: dict[str, FileInfo] = {}
        self._missing: list[str] = []
        self._twice: list[str] = []
        self._unreadable: list[str] = []
        self._misshapen: list[str] = []
        for image in sorted((s.record for bucket in dataset.buckets for s in bucket.samples), key=lambda r: r.key):
            self._look_at(image, by_stem.get(_stem(image.key), []))

    def problems(self) -> list[Problem]:
        """What is wrong with them."""
        groups = {
            "E-MASK-MISSING": self._missing,
            "E-MASK-TWICE": self._twice,
            "E-MASK-UNREADABLE": self._unreadable,
            "E-MASK-SHAPE": self._misshapen,
        }
        return [self._problem(code, names) for code, names in groups.items() if names]

    def _look_at(self, image: ImageRecord, masks: Sequence[ImageRecord | Unreadable]) -> None:
        if not masks:
            self._missing.append(image.key)
        elif len(masks) > 1:
            self._twice.append(f"{image.key} ({', '.join(sorted(mask.key for mask in masks))})")
        elif isinstance(masks[0], Unreadable):
            self._unreadable.append(f"{masks[0].key} ({masks[0].reason})")
        elif not has_same_shape(masks[0].size, image.size):
            sizes = [f"{width}x{height}" for width, height in (masks[0].size, image.size)]
            self._misshapen.append(f"{masks[0].key} {sizes[0]} ({image.key}: {sizes[1]})")
        else:
            self.files[image.key] = masks[0].file

    def _problem(self, code: str, names: Sequence[str]) -> Problem:
        params = {
            "id": self._dataset_id,
            "folder": self._spec.storage.id,
            "count": len(names),
            "files": shown_names(names),
        }
        return Problem(code=code, params=params)


def has_same_shape(mask: Size, image: Size) -> bool:
    """Whether a mask is its image enlarged or reduced, up to one pixel of the smaller of the two."""
    (mask_width, mask_height), (width, height) = mask, image
    return abs(mask_width * height - mask_height * width) <= max(*mask, *image)


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0]
