"""Rules between the entries of the datasets file: who names whom, and what nobody names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

from simpletuner.config.datasets import Entry, ImageDataset, ImageEmbeds, TextEmbeds
from simpletuner.problems import Problem, Severity

_SHAPE_KEYS = (
    "resolution",
    "resolution_type",
    "crop",
    "crop_style",
    "crop_aspect",
    "crop_aspect_buckets",
    "maximum_image_size",
    "target_downsample_size",
)


def broken_references(
    entries: Sequence[Entry], *, written: Mapping[str, Set[str]], unread: Set[str]
) -> Iterator[Problem]:
    """The problems of the enabled entries together. A path is "<id of an entry>/<key>".

    Args:
        written: id of a dataset -> the keys that its entry has itself.
        unread: ids of entries with mistakes of their own; who names one of them is not told that it is not there.
    """
    datasets = [entry for entry in entries if isinstance(entry, ImageDataset)]
    pictures = [dataset for dataset in datasets if dataset.dataset_type != "conditioning"]
    masks = [dataset for dataset in datasets if dataset.dataset_type == "conditioning"]
    text_embeds = [entry for entry in entries if isinstance(entry, TextEmbeds)]
    image_embeds = [entry for entry in entries if isinstance(entry, ImageEmbeds)]
    for caches in (text_embeds, image_embeds):
        yield from _defaults(caches)
        yield from _idle_caches(caches, pictures)
    if len(text_embeds) > 1 and not any(entry.default for entry in text_embeds):
        ids = ", ".join(entry.id for entry in text_embeds)
        yield Problem(code="E-DATASETS-NO-DEFAULT", params={"ids": ids}, path=f"{text_embeds[0].id}/id")
    known = {
        "text_embeds": [entry.id for entry in text_embeds],
        "image_embeds": [entry.id for entry in image_embeds],
        "conditioning": [entry.id for entry in masks],
        "image, eval": [entry.id for entry in pictures],
    }
    for dataset, key, value, kind in _names(datasets):
        if value not in known[kind] and value not in unread:
            params = {
                "id": dataset.id,
                "key": key,
                "value": value,
                "kind": kind,
                "known": ", ".join(known[kind]) or "-",
            }
            yield Problem(code="E-DATASET-REFERENCE", params=params, path=f"{dataset.id}/{key}")
    for mask in masks:
        masked = [picture for picture in pictures if mask.id in picture.conditioning_data]
        yield from _mask_problems(mask, masked, written=written[mask.id])


def _names(datasets: Sequence[ImageDataset]) -> Iterator[tuple[ImageDataset, str, str, str]]:
    """(dataset, key, id that it names there, dataset_type that this must have)."""
    for dataset in datasets:
        for key, kind in (("text_embeds", "text_embeds"), ("image_embeds", "image_embeds")):
            value = getattr(dataset, key)
            if value is not None:
                yield dataset, key, value, kind
        if dataset.dataset_type == "conditioning":
            if dataset.source_dataset_id is not None:
                yield dataset, "source_dataset_id", dataset.source_dataset_id, "image, eval"
        else:
            yield from ((dataset, "conditioning_data", value, "conditioning") for value in dataset.conditioning_data)


def _defaults(caches: Sequence[TextEmbeds] | Sequence[ImageEmbeds]) -> Iterator[Problem]:
    defaults = [entry for entry in caches if entry.default]
    if len(defaults) > 1:
        params = {"ids": ", ".join(entry.id for entry in defaults), "kind": defaults[0].dataset_type}
        yield Problem(code="E-DATASETS-DEFAULT-TWICE", params=params, path=f"{defaults[1].id}/default")


def _idle_caches(
    caches: Sequence[TextEmbeds] | Sequence[ImageEmbeds], pictures: Sequence[ImageDataset]
) -> Iterator[Problem]:
    named = {name for picture in pictures for name in (picture.text_embeds, picture.image_embeds)}
    for entry in caches:
        is_only = len(caches) == 1 and isinstance(entry, TextEmbeds)  # which is the default without saying so
        if not entry.default and not is_only and entry.id not in named:
            params = {"id": entry.id, "kind": entry.dataset_type}
            yield Problem(
                code="W-DATASETS-EMBEDS-UNUSED", severity=Severity.WARNING, params=params, path=f"{entry.id}/id"
            )


def _mask_problems(mask: ImageDataset, pictures: Sequence[ImageDataset], *, written: Set[str]) -> Iterator[Problem]:
    """Of one conditioning entry; `pictures` are the datasets whose masks it holds."""
    if not pictures:
        params: dict[str, object] = {"id": mask.id}
        yield Problem(code="W-MASKS-UNUSED", severity=Severity.WARNING, params=params, path=f"{mask.id}/id")
    source = mask.source_dataset_id
    if pictures and source is not None and source not in {picture.id for picture in pictures}:
        params = {"id": mask.id, "source": source, "used": ", ".join(picture.id for picture in pictures)}
        yield Problem(code="E-MASKS-SOURCE", params=params, path=f"{mask.id}/source_dataset_id")
    for picture in pictures:
        differing = [key for key in _SHAPE_KEYS if key in written and getattr(mask, key) != getattr(picture, key)]
        if differing:
            params = {"id": mask.id, "keys": ", ".join(differing), "image": picture.id}
            path = f"{mask.id}/{differing[0]}"
            yield Problem(code="W-MASKS-SHAPE", severity=Severity.WARNING, params=params, path=path)
