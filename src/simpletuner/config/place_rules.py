"""Nothing is written where images are: a picture of a validation would be trained on at the next start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.problems import Problem


def places_in_image_folders(config: Config, datasets: DatasetsConfig) -> Iterator[Problem]:
    """A problem for each local dataset with something of ours in its folder; their paths are /id/key."""
    places = [("output_dir", config.run.output_dir), ("cache_dir", config.data.cache_dir)]
    used = (*datasets.images, *datasets.evals, *datasets.masks)
    for dataset in used:
        places.append((f"{dataset.id}.cache_dir_vae", dataset.cache_dir_vae))
        if dataset.type == "csv":
            places.append((f"{dataset.id}.csv_cache_dir", dataset.storage.csv.csv_cache_dir))
    texts = (datasets.text_embeds, *datasets.other_text_embeds)
    places += [(f"{entry.id}.cache_dir", entry.cache_dir) for entry in texts]
    places += [(f"{entry.id}.cache_dir", entry.cache_dir) for entry in datasets.image_embeds]
    for dataset in used:
        folder = Path(dataset.instance_data_dir)
        if dataset.type != "local" or not dataset.instance_data_dir:
            continue
        inside = next(((key, place) for key, place in places if place and Path(place).is_relative_to(folder)), None)
        if inside is not None:
            key, place = inside
            params = {"id": dataset.id, "folder": str(folder), "key": key, "place": place}
            yield Problem(code="E-DATASET-WRITTEN", params=params, path=f"{dataset.id}/instance_data_dir")
