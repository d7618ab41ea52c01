"""The latent of every sample, encoded once and kept on disk.

An entry's key is a hash of the image's bytes, its geometry and the encoder: a change of any of them is another entry,
and a renamed file is the same one. The VAE is loaded only if an entry is missing.
"""

# Tensor shape letters: B batch, C channels, H W height and width in px, h w the latent's.

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simpletuner.data.discovery import Progress
from simpletuner.data.hashing import content_hash, stable_hash
from simpletuner.data.images import UnreadableImageError, cut, decode, without_decoder_warnings
from simpletuner.data.records import Plan, Sample, Size
from simpletuner.data.store import TensorStore, Writer
from simpletuner.problems import DatasetError, Problem

_PIXELS_VERSION = "pixels 2"
"""Part of every key. Changes when decoding or resizing gives other pixels."""
_HOLD_UP_TO_BYTES = 1 << 30
_MAX_DECODERS = 8


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


class LatentStore:
    """The latents of a plan. Small sets end up in memory as a whole, large ones are read as they are asked for."""

    def __init__(self, encoder_id: str, stores: Mapping[str, TensorStore]) -> None:
        """Args: stores: by dataset id; several datasets may share one."""
        self._encoder_id = encoder_id
        self._stores = stores
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0

    def get(self, sample: Sample) -> Tensor:
        """Return the sample's latent, [C, h, w] float32 on the CPU. Never write to it.

        Raises: DatasetError: the cache file was damaged since the run began.
        """
        key = latent_key(sample, self._encoder_id)
        held = self._held.get(key)
        if held is not None:
            return held
        latent = self._stores[sample.dataset_id].get(key)
        if self._held_bytes + latent.nbytes <= _HOLD_UP_TO_BYTES:
            self._held[key] = latent
            self._held_bytes += latent.nbytes
        return latent


def latent_key(sample: Sample, encoder_id: str) -> str:
    """The name of a sample's latent in a cache: 32 hex digits."""
    geometry = sample.geometry
    numbers = (*geometry.target, *geometry.intermediary, *geometry.crop)
    return stable_hash(_PIXELS_VERSION, sample.record.content_id, encoder_id, *numbers)


def cache_latents(
    plan: Plan,
    source: LatentSource,
    *,
    directory_of: Callable[[str], Path],
    batch_size: int,
    on_progress: Progress,
    write_batch_size: int = 128,
    max_workers: int | None = None,
) -> LatentStore:
    """Encode what is missing and return all latents of `plan`.

    Args:
        directory_of: the cache directory of a dataset id.
        batch_size: images per call of the encoder. All of one call have the same size.
        on_progress: called with (latents there, latents wanted), first before anything is encoded.
        write_batch_size: latents per file of the cache; what a killed run loses is at most that, and at most ten
            seconds' work.
        max_workers: threads that decode images; None: up to 8.
    Raises: DatasetError: images that cannot be decoded or changed since the scan, every one of them named, after all
        others were encoded and stored; or the cache cannot be written.
    """
    opened: dict[Path, TensorStore] = {}
    stores: dict[str, TensorStore] = {}
    for dataset in plan.datasets:
        directory = directory_of(dataset.id)
        if directory not in opened:
            opened[directory] = TensorStore(directory)
        stores[dataset.id] = opened[directory]
    writers: dict[TensorStore, Writer] = {}
    wanted = _wanted(plan, stores, source.id)
    for store, by_key in wanted.items():
        store.discard_damaged(by_key)
    jobs = [job for store, by_key in wanted.items() for job in _jobs(store, by_key, batch_size)]
    total = sum(len(by_key) for by_key in wanted.values())
    done = sum(key in store for store, by_key in wanted.items() for key in by_key)
    on_progress(done, total)
    if jobs:
        with ExitStack() as stack:
            for store in {job.store: None for job in jobs}:
                writers[store] = stack.enter_context(store.writer(group_entries=write_batch_size))
            _encode(jobs, source, writers, done=done, total=total, on_progress=on_progress, max_workers=max_workers)
    return LatentStore(source.id, stores)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of the encoder. Some of its latents may be there already."""

    store: TensorStore
    keys: tuple[str, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class _BadImage:
    path: Path
    reason: str
    """Empty if the file is not the one that was scanned."""


_Picture = npt.NDArray[np.uint8]  # [H, W, C]


def _wanted(plan: Plan, stores: Mapping[str, TensorStore], encoder_id: str) -> dict[TensorStore, dict[str, Sample]]:
    wanted: dict[TensorStore, dict[str, Sample]] = defaultdict(dict)
    for sample in plan.samples():
        wanted[stores[sample.dataset_id]].setdefault(latent_key(sample, encoder_id), sample)
    return wanted


def _jobs(store: TensorStore, by_key: Mapping[str, Sample], batch_size: int) -> Iterator[_Job]:
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
                yield _Job(store=store, keys=group, samples=tuple(by_key[key] for key in group))


def _encode(
    jobs: Sequence[_Job],
    source: LatentSource,
    writers: Mapping[TensorStore, Writer],
    *,
    done: int,
    total: int,
    on_progress: Progress,
    max_workers: int | None,
) -> None:
    bad: list[_BadImage] = []
    num_workers = max_workers or min(os.cpu_count() or 1, _MAX_DECODERS)
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    with ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.enter_context(without_decoder_warnings())
        encoder = source.open()
        assert encoder.id == source.id, "the cache would be filled under another encoder's name"
        for job, results in _decode_ahead(jobs, pool, num_ahead=2 + num_workers // len(jobs[0].keys)):
            pictures = [result for result in results if not isinstance(result, _BadImage)]
            if len(pictures) < len(results):
                bad += [result for result in results if isinstance(result, _BadImage)]
                continue
            done += sum(key not in job.store for key in job.keys)
            _encode_job(job, pictures, encoder, writers[job.store])
            on_progress(done, total)
    if bad:
        raise DatasetError(_bad_image_problems(bad))


def _decode_ahead(
    jobs: Sequence[_Job], pool: ThreadPoolExecutor, *, num_ahead: int
) -> Iterator[tuple[_Job, list[_Picture | _BadImage]]]:
    """Yield every job with its pictures, in order, while later ones are being decoded."""
    pending: deque[tuple[_Job, list[Future[_Picture | _BadImage]]]] = deque()
    for job in jobs:
        pending.append((job, [pool.submit(_picture, sample) for sample in job.samples]))
        if len(pending) > num_ahead:
            first, futures = pending.popleft()
            yield first, [future.result() for future in futures]
    for job, futures in pending:
        yield job, [future.result() for future in futures]


def _picture(sample: Sample) -> _Picture | _BadImage:
    record = sample.record
    try:
        data = record.path.read_bytes()
        if content_hash(data) != record.content_id:
            return _BadImage(path=record.path, reason="")
        return cut(decode(data), sample.geometry)
    except UnreadableImageError as error:
        return _BadImage(path=record.path, reason=str(error))
    except OSError as error:
        return _BadImage(path=record.path, reason=error.strerror or str(error))


def _encode_job(job: _Job, pictures: Sequence[_Picture], encoder: LatentEncoder, writer: Writer) -> None:
    pixels_BHWC = torch.from_numpy(np.stack(pictures))
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()
    with torch.no_grad():
        latents_BChw = encoder.encode(images_BCHW).to("cpu", torch.float32)
    assert len(latents_BChw) == len(job.keys)
    for key, sample, latent in zip(job.keys, job.samples, latents_BChw, strict=True):
        if not bool(torch.isfinite(latent).all()):
            raise DatasetError(Problem(code="E-LATENT-NOT-FINITE", params={"file": str(sample.record.path)}))
        writer.put(key, latent)


def _bad_image_problems(bad: Sequence[_BadImage]) -> list[Problem]:
    problems: list[Problem] = []
    broken = [f"{item.path.name} ({item.reason})" for item in bad if item.reason]
    changed = [str(item.path) for item in bad if not item.reason]
    if broken:
        params = {"count": len(broken), "folder": str(bad[0].path.parent), "files": ", ".join(broken)}
        problems.append(Problem(code="E-IMAGE-UNREADABLE", params=params))
    if changed:
        problems.append(Problem(code="E-IMAGE-CHANGED", params={"count": len(changed), "files": ", ".join(changed)}))
    return problems
