"""Latents that are encoded when a batch first asks for them, instead of all before training."""

# Tensor shape letters: C latent channels, h w latent height and width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from torch import Tensor

from simpletuner.data.discovery import known_contents
from simpletuner.data.hashing import content_hash
from simpletuner.data.image_index import Known, open_index
from simpletuner.data.images import UnreadableImageError, without_decoder_warnings
from simpletuner.data.latents import (
    HOLD_UP_TO_BYTES,
    LatentSource,
    OtherSizeError,
    encode_pixels,
    latent_key,
    pixels_of,
    told_size,
)
from simpletuner.data.records import DatasetPlan, Sample
from simpletuner.data.storage import Storage
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.store import TensorStore, Writer
from simpletuner.problems import DatasetError, Problem


class OnDemandLatents(AbstractContextManager["OnDemandLatents"]):
    """The latents of some datasets, each encoded alone, when it is first asked for.

    A context manager: on the way out, what was learned is written. One thread at a time may use it.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetPlan],
        source: LatentSource,
        *,
        directories: Mapping[str, Path],
        cache_dir: Path,
        write_batch_size: int = 128,
    ) -> None:
        """
        Args:
            directories: the cache directories of the datasets that keep their latents on disk. Those of the others
                stay in memory as far as there is room, unless the dataset takes fresh crops: then they are not kept.
            cache_dir: where the index of known images is.
            write_batch_size: latents per file of a cache; what a killed run loses is at most that, and at most ten
                seconds' work.
        """
        self._source = source
        self._cache_dir = cache_dir
        self._storages: dict[str, Storage] = {dataset.id: dataset.storage for dataset in datasets}
        self._passing = frozenset(dataset.id for dataset in datasets if dataset.takes_fresh_crops)
        self._contents: dict[str, dict[str, str]] = {}
        with open_index(cache_dir) as index:
            for dataset in datasets:
                files = [sample.record.file for bucket in dataset.buckets for sample in bucket.samples]
                self._contents[dataset.id] = known_contents(dataset.storage, files, index)
        self._learned: dict[str, dict[str, Known]] = {}
        self._exit = ExitStack()
        self._writers: dict[str, tuple[TensorStore, Writer]] = {}
        opened: dict[Path, tuple[TensorStore, Writer]] = {}
        for name, directory in directories.items():
            if directory not in opened:
                store = TensorStore(directory)
                opened[directory] = store, self._exit.enter_context(store.writer(group_entries=write_batch_size))
            self._writers[name] = opened[directory]
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0

    def __exit__(self, *details: object) -> None:
        """Write what is not written yet."""
        self._exit.close()
        with open_index(self._cache_dir) as index:
            for source, learned in self._learned.items():
                index.save_images(source, learned)

    def get(self, sample: Sample) -> Tensor:
        """Return the sample's latent, [C, h, w] float32 on the CPU. Never write to it.

        Raises: DatasetError: the image cannot be read or decoded.
        """
        storage, file = self._storages[sample.dataset_id], sample.record.file
        try:
            content_id, data = self._contents[sample.dataset_id].get(file.key), None
            if content_id is None:
                data = storage.read(file)
                content_id = self._learn(sample, storage, content_hash(data))
            key = latent_key(sample.geometry, content_id, self._source.id)
            found = self._find(sample.dataset_id, key)
            if found is not None:
                return found
            with without_decoder_warnings():
                data = storage.read(file) if data is None else data
                pixels = pixels_of(data, sample.geometry, told=told_size(sample.record))
        except (UnreadableImageError, OSError) as error:
            raise self._broken(storage, sample, error) from error
        (latent,) = encode_pixels([pixels], self._source.open(), [storage.shown(file.key)])
        if sample.dataset_id in self._writers:
            self._writers[sample.dataset_id][1].put(key, latent)
        if sample.dataset_id not in self._passing:
            self._hold(key, latent)
        return latent

    def _learn(self, sample: Sample, storage: Storage, content_id: str) -> str:
        record = sample.record
        self._contents[sample.dataset_id][record.key] = content_id
        if storage.is_settled(record.file):
            self._learned.setdefault(storage.id, {})[record.key] = Known(
                size_bytes=record.file.size_bytes,
                version=record.file.version,
                size=record.size,
                traits=record.traits,
                content_id=content_id,
            )
        return content_id

    def _find(self, dataset_id: str, key: str) -> Tensor | None:
        held = self._held.get(key)
        if held is None and dataset_id in self._writers:
            store, _ = self._writers[dataset_id]
            if key in store:
                held = store.get(key)
                self._hold(key, held)
        return held

    def _hold(self, key: str, latent: Tensor) -> None:
        if self._held_bytes + latent.nbytes <= HOLD_UP_TO_BYTES:
            self._held[key] = latent
            self._held_bytes += latent.nbytes

    def _broken(self, storage: Storage, sample: Sample, error: UnreadableImageError | OSError) -> DatasetError:
        """Tell of an image that gave no picture; one that is broken is known as such from now on."""
        file = sample.record.file
        if isinstance(error, StorageError):
            return DatasetError(error.problem(sample.dataset_id))
        params = {"id": sample.dataset_id, "file": storage.shown(file.key), "reason": str(error)}
        if isinstance(error, OtherSizeError):
            files = f"{params['file']} ({error.strerror})"
            return DatasetError(
                Problem(code="E-TABLE-SIZE", params={"id": sample.dataset_id, "count": 1, "files": files})
            )
        if isinstance(error, OSError):
            return DatasetError(Problem(code="E-IMAGE-GONE", params=params))
        row = Known(size_bytes=file.size_bytes, version=file.version, size=(0, 0), reason=str(error))
        self._learned.setdefault(storage.id, {})[file.key] = row
        return DatasetError(Problem(code="E-IMAGE-BROKEN", params=params))
