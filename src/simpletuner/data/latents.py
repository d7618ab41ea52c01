"""The latent of every sample, encoded once and kept on disk.

An entry's key is a hash of the image's bytes, its geometry and the encoder: a change of any of them is another entry,
and a renamed file is the same one. The VAE is loaded only if an entry is missing.
"""

# Tensor shape letters: B batch, C channels, H W height and width in px, h w the latent's.

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simpletuner.data.discovery import Progress, learn_contents, part_of, reason_of, remember_unreadable
from simpletuner.data.hashing import stable_hash
from simpletuner.data.image_index import open_index
from simpletuner.data.images import UnreadableImageError, cut, decode, without_decoder_warnings
from simpletuner.data.plan_problems import shown_names
from simpletuner.data.records import TOLD, Geometry, ImageRecord, Plan, Sample, Size
from simpletuner.data.storage import ChangedFileError, FileInfo, Storage
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.store import TensorStore, Writer
from simpletuner.data.workers import ThreadPool, in_order, process_pool, until_done
from simpletuner.problems import DatasetError, Problem

_PIXELS_VERSION = "pixels 2"
"""Part of every key. Changes when decoding or resizing gives other pixels."""
HOLD_UP_TO_BYTES = 1 << 30
"""Latents of a run that stay in main memory."""
_MAX_DECODERS = 8
_PROCESSES_FROM_PICTURES = 1024


class LatentEncoder(Protocol):
    """A VAE, ready to encode."""

    @property
    def id(self) -> str:
        """Identity of weights and precision."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return latents [B, C, h, w] on any device, scaled as the transformer wants them.

        images_BCHW: CPU float32 in [-1, 1], RGB. Must be deterministic.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """An encoder that is loaded when it is needed."""

    id: str
    """The `id` of what `open` returns, known without loading it."""
    open: Callable[[], LatentEncoder]


class OtherSizeError(OSError):
    """An image has not the size that a table tells."""


class PlanAgainError(Exception):
    """Images turned out to be unreadable when they were decoded. The index knows them now, a new plan leaves them
    out."""


@dataclass(frozen=True)
class LatentKeys:
    """The name of a sample's latent in a cache, once the contents of all files are known."""

    encoder_id: str
    contents: Mapping[str, Mapping[str, str]]
    """Dataset id -> key of a file -> content id."""

    def of(self, sample: Sample) -> str:
        """See `latent_key`."""
        content_id = self.contents[sample.dataset_id][sample.record.key]
        return latent_key(sample.geometry, content_id, self.encoder_id)


def latent_key(geometry: Geometry, content_id: str, encoder_id: str) -> str:
    """The name of a latent in a cache, 32 hex digits: a hash of the image's bytes, its geometry and the encoder."""
    numbers = (*geometry.target, *geometry.intermediary, *geometry.crop)
    return stable_hash(_PIXELS_VERSION, content_id, encoder_id, *numbers)


class LatentStore:
    """The latents of a plan. Small sets end up in memory as a whole, large ones are read as they are asked for."""

    def __init__(self, keys: LatentKeys, stores: Mapping[str, TensorStore]) -> None:
        """Args: stores: by dataset id; several datasets may share one."""
        self._keys = keys
        self._stores = stores
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0

    def get(self, sample: Sample) -> Tensor:
        """Return the sample's latent, [C, h, w] float32 on the CPU. Never write to it.

        Raises: DatasetError: the cache file was damaged since the run began.
        """
        key = self._keys.of(sample)
        held = self._held.get(key)
        if held is not None:
            return held
        latent = self._stores[sample.dataset_id].get(key)
        if self._held_bytes + latent.nbytes <= HOLD_UP_TO_BYTES:
            self._held[key] = latent
            self._held_bytes += latent.nbytes
        return latent


def learn_latent_keys(
    plan: Plan, encoder_id: str, *, cache_dir: Path, on_progress: Progress, max_workers: int | None = None
) -> LatentKeys:
    """Read the files whose content is not known yet; the index in `cache_dir` remembers it.

    `on_progress` is called with (contents known, contents wanted).
    Raises: DatasetError: files that cannot be read or changed since the scan, every one of them named.
    """
    wanted: dict[str, dict[str, FileInfo]] = {}
    for dataset in plan.datasets:
        files = wanted.setdefault(dataset.storage.id, {})
        files.update((s.record.key, s.record.file) for bucket in dataset.buckets for s in bucket.samples)
    total = sum(map(len, wanted.values()))
    contents: dict[str, Mapping[str, str]] = {}
    problems: list[Problem] = []
    before = 0
    with open_index(cache_dir) as index:
        for storage in {dataset.storage.id: dataset.storage for dataset in plan.datasets}.values():
            files = wanted[storage.id]
            try:
                contents[storage.id], failed = learn_contents(
                    storage,
                    [files[key] for key in sorted(files)],
                    index,
                    on_progress=part_of(on_progress, before=before, total=total),
                    max_workers=max_workers,
                )
            except StorageError as error:
                users = [dataset.id for dataset in plan.datasets if dataset.storage.id == storage.id]
                raise DatasetError([*problems, error.problem(users[0])]) from error
            before += len(files)
            problems += _failure_problems(
                [_BadImage(dataset_id="", storage=storage, file=files[key], error=failed[key]) for key in failed]
            )
    if problems:
        raise DatasetError(problems)
    return LatentKeys(encoder_id, {dataset.id: contents[dataset.storage.id] for dataset in plan.datasets})


def cache_latents(
    plan: Plan,
    source: LatentSource,
    keys: LatentKeys,
    *,
    directory_of: Callable[[str], Path],
    cache_dir: Path,
    batch_size: int,
    on_progress: Progress,
    write_batch_size: int = 128,
    write_batch_sizes: Mapping[Path, int] | None = None,
    max_workers: int | None = None,
) -> LatentStore:
    """Encode what is missing and return all latents of `plan`.

    Args:
        directory_of: the cache directory of a dataset id.
        cache_dir: where the index of known images is.
        batch_size: images per call of the encoder. All of one call have the same size.
        on_progress: called with (latents there, latents wanted), first before anything is encoded.
        write_batch_size: latents per file of the cache; what a killed run loses is at most that, and at most ten
            seconds' work. `write_batch_sizes` has others for some directories.
        max_workers: how many decode images at once; None: up to 8.
    Raises:
        PlanAgainError: images cannot be decoded; all others were encoded and stored.
        DatasetError: files that cannot be read or changed since the scan, every one of them named, after all others
            were encoded and stored; or the cache cannot be written.
    """
    storages = {dataset.id: dataset.storage for dataset in plan.datasets}
    opened: dict[Path, TensorStore] = {}
    stores: dict[str, TensorStore] = {}
    for dataset in plan.datasets:
        directory = directory_of(dataset.id)
        if directory not in opened:
            opened[directory] = TensorStore(directory)
        stores[dataset.id] = opened[directory]
    wanted = _wanted(plan, stores, keys)
    for store, by_key in wanted.items():
        store.discard_damaged(by_key)
    jobs = [job for store, by_key in wanted.items() for job in _jobs(store, by_key, storages, batch_size)]
    total = sum(len(by_key) for by_key in wanted.values())
    done = sum(key in store for store, by_key in wanted.items() for key in by_key)
    on_progress(done, total)
    if jobs:
        group_sizes = write_batch_sizes or {}
        with ExitStack() as stack:
            writers = {
                store: stack.enter_context(
                    store.writer(group_entries=group_sizes.get(store.directory, write_batch_size))
                )
                for store in {job.store: None for job in jobs}
            }
            bad = _encode(
                jobs, source, writers, done=done, total=total, on_progress=on_progress, max_workers=max_workers
            )
        _settle(bad, cache_dir)
    return LatentStore(keys, stores)


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """One image to decode, as a worker takes it. `told` is the size that a table tells."""

    dataset_id: str
    storage: Storage
    file: FileInfo
    geometry: Geometry
    told: Size | None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of the encoder. Some of its latents may be there already."""

    store: TensorStore
    keys: tuple[str, ...]
    pictures: tuple[_Picture, ...]


@dataclass(frozen=True, kw_only=True)
class _BadImage:
    """A file that gave no picture: `UnreadableImageError` if it is no whole image, else what reading it said."""

    dataset_id: str
    storage: Storage
    file: FileInfo
    error: UnreadableImageError | OSError


Pixels = npt.NDArray[np.uint8]  # [H, W, C]


def _wanted(plan: Plan, stores: Mapping[str, TensorStore], keys: LatentKeys) -> dict[TensorStore, dict[str, Sample]]:
    wanted: dict[TensorStore, dict[str, Sample]] = defaultdict(dict)
    for sample in plan.samples():
        wanted[stores[sample.dataset_id]].setdefault(keys.of(sample), sample)
    return wanted


def _jobs(
    store: TensorStore, by_key: Mapping[str, Sample], storages: Mapping[str, Storage], batch_size: int
) -> Iterator[_Job]:
    """Yield the calls of the encoder that are not all there yet.

    Who shares a call is settled by what is wanted, never by what happens to be missing: a VAE may round differently
    in another company, and a run that was interrupted while caching must not learn from other numbers.
    """
    by_size: dict[Size, list[str]] = defaultdict(list)
    for key in sorted(by_key):
        by_size[by_key[key].geometry.target].append(key)
    for _, keys in sorted(by_size.items()):
        for first in range(0, len(keys), batch_size):
            group = tuple(keys[first : first + batch_size])
            if not all(key in store for key in group):
                yield _Job(store=store, keys=group, pictures=tuple(_task(by_key[key], storages) for key in group))


def _task(sample: Sample, storages: Mapping[str, Storage]) -> _Picture:
    record = sample.record
    return _Picture(
        dataset_id=sample.dataset_id,
        storage=storages[sample.dataset_id],
        file=record.file,
        geometry=sample.geometry,
        told=told_size(record),
    )


def _encode(
    jobs: Sequence[_Job],
    source: LatentSource,
    writers: Mapping[TensorStore, Writer],
    *,
    done: int,
    total: int,
    on_progress: Progress,
    max_workers: int | None,
) -> list[_BadImage]:
    """Decode, encode and store; return the images that could not be decoded. Their companions are left for later."""
    bad: list[_BadImage] = []
    is_remote = any(picture.storage.is_remote for job in jobs for picture in job.pictures)
    num_workers = _MAX_DECODERS if is_remote else min(max_workers or os.cpu_count() or 1, _MAX_DECODERS)
    num_pictures = sum(len(job.pictures) for job in jobs)
    in_processes = num_pictures >= _PROCESSES_FROM_PICTURES and not is_remote
    pool = process_pool(num_workers) if in_processes else ThreadPool(num_workers)
    with ExitStack() as stack:
        stack.enter_context(until_done(pool))
        stack.enter_context(without_decoder_warnings())
        encoder = source.open()
        assert encoder.id == source.id, "the cache would be filled under another encoder's name"
        tasks = (picture for job in jobs for picture in job.pictures)
        num_ahead = 2 * max(num_workers, len(jobs[0].pictures))
        decoded = in_order(_decode, tasks, pool, num_ahead=num_ahead)
        for job in jobs:
            results = [result for _, result in islice(decoded, len(job.pictures))]
            pictures = [result for result in results if not isinstance(result, _BadImage)]
            if len(pictures) < len(results):
                bad += [result for result in results if isinstance(result, _BadImage)]
                _stop_without_storage(bad)
                continue
            done += sum(key not in job.store for key in job.keys)
            _encode_job(job, pictures, encoder, writers[job.store])
            on_progress(done, total)
    return bad


def _decode(picture: _Picture) -> Pixels | _BadImage:
    try:
        return pixels_of(picture.storage.read(picture.file), picture.geometry, told=picture.told)
    except (UnreadableImageError, OSError) as error:
        return _BadImage(dataset_id=picture.dataset_id, storage=picture.storage, file=picture.file, error=error)


def pixels_of(data: bytes, geometry: Geometry, *, told: Size | None) -> Pixels:
    """Return the training picture of an image file; `told` is the size that a table tells.

    Raises: UnreadableImageError. OtherSizeError: a table was wrong.
    """
    image = decode(data)
    if told is not None and image.size != told:
        raise OtherSizeError(0, f"{image.size[0]}x{image.size[1]}, not {told[0]}x{told[1]}")
    return cut(image, geometry)


def told_size(record: ImageRecord) -> Size | None:
    """The size of an image, if a table told it."""
    return record.size if record.traits == TOLD else None


def _stop_without_storage(bad: Sequence[_BadImage]) -> None:
    """Raise DatasetError if it is not single images that fail but the storage."""
    for item in bad:
        if isinstance(item.error, StorageError):
            raise DatasetError(item.error.problem(item.dataset_id)) from item.error


def _settle(bad: Sequence[_BadImage], cache_dir: Path) -> None:
    problems = _failure_problems([item for item in bad if isinstance(item.error, OSError)])
    if problems:
        raise DatasetError(problems)
    if not bad:
        return
    with open_index(cache_dir) as index:
        for storage in {item.storage.id: item.storage for item in bad}.values():
            reasons = {item.file: str(item.error) for item in bad if item.storage.id == storage.id}
            remember_unreadable(storage, reasons, index)
    raise PlanAgainError


def _encode_job(job: _Job, pixels: Sequence[Pixels], encoder: LatentEncoder, writer: Writer) -> None:
    shown = [picture.storage.shown(picture.file.key) for picture in job.pictures]
    for key, latent in zip(job.keys, encode_pixels(pixels, encoder, shown), strict=True):
        writer.put(key, latent)


def encode_pixels(pixels: Sequence[Pixels], encoder: LatentEncoder, names: Sequence[str]) -> list[Tensor]:
    """Return the latents of pictures of one size, each [C, h, w] float32 on the CPU.

    Raises: DatasetError: a latent is not finite; it tells the name of its picture.
    """
    pixels_BHWC = torch.from_numpy(np.stack(pixels))
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()
    with torch.no_grad():
        latents_BChw = encoder.encode(images_BCHW).to("cpu", torch.float32)
    for name, latent in zip(names, latents_BChw, strict=True):
        if not bool(torch.isfinite(latent).all()):
            raise DatasetError(Problem(code="E-LATENT-NOT-FINITE", params={"file": name}))
    return list(latents_BChw)


def _failure_problems(bad: Sequence[_BadImage]) -> list[Problem]:
    """What to tell of files that could not be read."""
    problems: list[Problem] = []
    bad = sorted(bad, key=lambda item: item.file.key)
    changed = [item.storage.shown(item.file.key) for item in bad if isinstance(item.error, ChangedFileError)]
    other_sizes = [item for item in bad if isinstance(item.error, OtherSizeError)]
    failed = [item for item in bad if not isinstance(item.error, (ChangedFileError, OtherSizeError))]
    if failed:
        names = [f"{item.file.key} ({reason_of(item.error)})" for item in failed]
        params = {"count": len(names), "folder": failed[0].storage.id, "files": shown_names(names)}
        problems.append(Problem(code="E-IMAGE-UNREADABLE", params=params))
    if changed:
        problems.append(Problem(code="E-IMAGE-CHANGED", params={"count": len(changed), "files": shown_names(changed)}))
    if other_sizes:
        names = [f"{item.storage.shown(item.file.key)} ({reason_of(item.error)})" for item in other_sizes]
        params = {"id": other_sizes[0].dataset_id, "count": len(names), "files": shown_names(names)}
        problems.append(Problem(code="E-TABLE-SIZE", params=params))
    return problems
