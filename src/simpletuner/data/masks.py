"""How much each place of a latent counts in the loss, from the masks of the images.

A mask is resized and cut exactly as its image, then averaged over the pixels of each latent. The result is kept in a
cache by a hash of the mask's bytes and the geometry. A mask that is black where the image is cut out leaves nothing to
learn: its weights are all 0.
"""

# Tensor shape letters: h w latent height and width.

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.data.discovery import Progress, learn_contents, reason_of
from simpletuner.data.hashing import draw_unit, stable_hash
from simpletuner.data.image_index import open_index
from simpletuner.data.images import UnreadableImageError, cut_mask, decode_mask, without_decoder_warnings
from simpletuner.data.mask_pairs import MaskFiles
from simpletuner.data.plan_problems import shown_names
from simpletuner.data.records import Geometry, Plan, Sample
from simpletuner.data.storage import FileInfo, Storage
from simpletuner.data.store import TensorStore
from simpletuner.data.workers import ThreadPool, in_order, until_done
from simpletuner.problems import DatasetError, Problem, Severity

_VERSION = "mask 1"
"""Part of every key. Changes when reading or averaging gives other weights."""
_MAX_WORKERS = 8
_HOLD_UP_TO_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class _Mask:
    """One mask to read."""

    key: str
    storage: Storage
    file: FileInfo
    geometry: Geometry


class MaskStore:
    """The masks of a run. Those of the plan are cached; those of other crops are made when they are asked for."""

    def __init__(
        self,
        masks: Mapping[str, MaskFiles],
        *,
        px_per_latent: int,
        store: TensorStore | None = None,
        keys: Mapping[tuple[str, str, Geometry], str] | None = None,
    ) -> None:
        """Args: masks: by id of the dataset. keys: (dataset, key of an image, geometry) -> entry of `store`."""
        self._masks = masks
        self._px_per_latent = px_per_latent
        self._store = store
        self._keys = keys or {}
        self._held: dict[tuple[str, str, Geometry], Tensor] = {}
        self._held_bytes = 0

    def weights(self, sample: Sample) -> Tensor | None:
        """How much each place of the sample's latent counts, [1, h, w] float32 with a mean of 1; all 0 where nothing
        is to be learnt; None if its dataset has no masks.

        Raises: DatasetError: the mask cannot be read any more.
        """
        masks = self._masks.get(sample.dataset_id)
        if masks is None:
            return None
        name = (sample.dataset_id, sample.record.key, sample.geometry)
        coverage_hw = self._held.get(name)
        if coverage_hw is None:
            coverage_hw = self._read(masks, name)
            if self._held_bytes + coverage_hw.nbytes <= _HOLD_UP_TO_BYTES:
                self._held[name] = coverage_hw
                self._held_bytes += coverage_hw.nbytes
        return weights_of(coverage_hw)

    def _read(self, masks: MaskFiles, name: tuple[str, str, Geometry]) -> Tensor:
        key = self._keys.get(name)
        if self._store is not None and key is not None and key in self._store:
            coverage_hw = self._store.get(key)
            if coverage_hw.numel():
                return coverage_hw
            width, height = name[2].target
            return torch.zeros(height // self._px_per_latent, width // self._px_per_latent, dtype=torch.uint8)
        mask = _Mask(key="", storage=masks.storage, file=masks.by_image[name[1]], geometry=name[2])
        with without_decoder_warnings():
            made = _coverage(self._px_per_latent, mask)
        if isinstance(made, Exception):
            raise DatasetError(_unreadable_problem(name[0], masks.storage, [(mask.file.key, reason_of(made))]))
        return made


def weights_of(coverage_hw: Tensor) -> Tensor:
    """The weights [1, h, w] of a mask [h, w]: in proportion to it, with a mean of 1; all 0 for a black one."""
    share_hw = coverage_hw.to(torch.float64) / 255
    mean = share_hw.mean()
    return (share_hw / mean if mean > 0 else share_hw).to(torch.float32)[None]


@dataclass(frozen=True, kw_only=True)
class MaskDraw:
    """The weights of a micro-batch: the share `probability` of its samples is masked, drawn from the seed."""

    store: MaskStore
    probability: float
    seed: int

    def weights(self, samples: Sequence[Sample], index: int, rank: int) -> tuple[Tensor | None, ...] | None:
        """Of the samples of `rank`'s micro-batch `index`, one each; None where a whole sample counts alike."""
        found = tuple(
            self.store.weights(sample) if draw_unit(self.seed, "mask", index, rank, place) < self.probability else None
            for place, sample in enumerate(samples)
        )
        return found if any(weights is not None for weights in found) else None


def cache_masks(
    plan: Plan,
    masks: Mapping[str, MaskFiles],
    *,
    directory: Path,
    cache_dir: Path,
    px_per_latent: int,
    on_progress: Progress,
    max_workers: int | None = None,
) -> tuple[MaskStore, list[Problem]]:
    """Read the masks of a plan that the cache in `directory` lacks.

    Args:
        masks: by id of the dataset.
        cache_dir: where the index of known images is.
        px_per_latent: pixels on a side that share a latent.
        on_progress: called with (masks there, masks wanted), first before anything is read.
    Returns: them, and warnings of those that are black where their image is cut out.
    Raises: DatasetError: masks that cannot be read, every one of them named; or the cache cannot be written.
    """
    samples = [sample for sample in plan.samples() if sample.dataset_id in masks]
    problems: list[Problem] = []
    contents = _contents(samples, masks, cache_dir, problems, max_workers)
    if problems:
        raise DatasetError(problems)
    store = TensorStore(directory)
    keys: dict[tuple[str, str, Geometry], str] = {}
    wanted: dict[str, _Mask] = {}
    for sample in samples:
        of_dataset, geometry = masks[sample.dataset_id], sample.geometry
        file = of_dataset.by_image[sample.record.key]
        numbers = (px_per_latent, *geometry.target, *geometry.intermediary, *geometry.crop)
        key = stable_hash(_VERSION, contents[of_dataset.storage.id][file.key], *numbers)
        keys[sample.dataset_id, sample.record.key, geometry] = key
        wanted.setdefault(key, _Mask(key=key, storage=of_dataset.storage, file=file, geometry=geometry))
    store.discard_damaged(wanted)
    missing = [mask for key, mask in wanted.items() if key not in store]
    on_progress(len(wanted) - len(missing), len(wanted))
    bad: list[tuple[_Mask, Exception]] = []
    if missing:
        with ExitStack() as stack:
            pool = ThreadPool(min(max_workers or os.cpu_count() or 1, _MAX_WORKERS))
            stack.enter_context(until_done(pool))
            stack.enter_context(without_decoder_warnings())
            writer = stack.enter_context(store.writer())
            found = in_order(partial(_coverage, px_per_latent), missing, pool, num_ahead=4 * _MAX_WORKERS)
            for number, (mask, coverage_hw) in enumerate(found, start=len(wanted) - len(missing) + 1):
                if isinstance(coverage_hw, Exception):
                    bad.append((mask, coverage_hw))
                else:
                    # An empty entry stands for a black mask, so that it is known without being read.
                    writer.put(mask.key, coverage_hw if coverage_hw.any() else coverage_hw[:0])
                on_progress(number, len(wanted))
    for dataset_id, storage in _storages(masks):
        reasons = [(mask.file.key, reason_of(error)) for mask, error in bad if mask.storage.id == storage.id]
        if reasons:
            problems.append(_unreadable_problem(dataset_id, storage, reasons))
    if problems:
        raise DatasetError(problems)
    return MaskStore(masks, px_per_latent=px_per_latent, store=store, keys=keys), _black_warnings(keys, masks, store)


def _coverage(px_per_latent: int, mask: _Mask) -> Tensor | UnreadableImageError | OSError:
    """The mask at the resolution of latents, [h, w] uint8, or why it could not be read."""
    try:
        pixels_HW = cut_mask(decode_mask(mask.storage.read(mask.file)), mask.geometry)
    except (UnreadableImageError, OSError) as error:
        return error
    height, width = (edge // px_per_latent for edge in pixels_HW.shape)
    blocks = torch.from_numpy(pixels_HW.copy()).reshape(height, px_per_latent, width, px_per_latent)
    return blocks.to(torch.float32).mean(dim=(1, 3)).round().to(torch.uint8)


def _contents(
    samples: Sequence[Sample],
    masks: Mapping[str, MaskFiles],
    cache_dir: Path,
    problems: list[Problem],
    max_workers: int | None,
) -> dict[str, dict[str, str]]:
    """By storage and key of a mask, its content id."""
    files: dict[str, dict[str, FileInfo]] = {}
    for sample in samples:
        of_dataset = masks[sample.dataset_id]
        file = of_dataset.by_image[sample.record.key]
        files.setdefault(of_dataset.storage.id, {})[file.key] = file
    contents: dict[str, dict[str, str]] = {}
    with open_index(cache_dir) as index:
        for dataset_id, storage in _storages(masks):
            contents[storage.id], failed = learn_contents(
                storage,
                [file for _, file in sorted(files.get(storage.id, {}).items())],
                index,
                on_progress=lambda done, total: None,
                max_workers=max_workers,
            )
            if failed:
                reasons = [(key, reason_of(error)) for key, error in failed.items()]
                problems.append(_unreadable_problem(dataset_id, storage, reasons))
    return contents


def _storages(masks: Mapping[str, MaskFiles]) -> list[tuple[str, Storage]]:
    """(id of a dataset, the storage of its masks), each storage once."""
    found = {of_dataset.storage.id: (dataset_id, of_dataset.storage) for dataset_id, of_dataset in masks.items()}
    return list(found.values())


def _unreadable_problem(dataset_id: str, storage: Storage, reasons: Sequence[tuple[str, str]]) -> Problem:
    names = [f"{key} ({reason})" for key, reason in reasons]
    params = {
        "id": dataset_id,
        "folder": storage.id,
        "count": len(names),
        "files": shown_names(names),
    }
    return Problem(code="E-MASK-UNREADABLE", params=params)


def _black_warnings(
    keys: Mapping[tuple[str, str, Geometry], str], masks: Mapping[str, MaskFiles], store: TensorStore
) -> list[Problem]:
    problems: list[Problem] = []
    for dataset_id in masks:
        names = [image for (owner, image, _), key in keys.items() if owner == dataset_id and not store.num_bytes(key)]
        if names:
            params = {"id": dataset_id, "count": len(names), "files": shown_names(names)}
            problems.append(Problem(code="W-MASK-BLACK", severity=Severity.WARNING, params=params))
    return problems
