"""What docs/DATASETS says is what the program does, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simpletuner.config.datasets import every_dataset_key
from simpletuner.data.images import MAX_PIXELS
from simpletuner.data.plan import make_plan
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Sample
from simpletuner.data.sampler import Sampler
from simpletuner.data.storage import FileInfo, LocalStorage

DOCS = Path(__file__).parents[2] / "docs"
FOUR_DATASETS = Path(__file__).parents[1] / "e2e" / "four_datasets.json"


@pytest.fixture(params=["DATASETS.md", "DATASETS.es.md"])
def page(request: pytest.FixtureRequest) -> str:
    return (DOCS / request.param).read_text(encoding="utf-8")


def test_every_key_has_its_place_in_the_table(page: str) -> None:
    table = page.split("## The keys" if "## The keys" in page else "## Las claves")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_.]+)`", table))
    assert set(every_dataset_key()) - named == set()


def test_the_example_of_four_entries_is_the_one_that_trains(page: str) -> None:
    (block,) = re.findall(r"```json datasets\n(.*?)```", page, flags=re.DOTALL)
    written = json.loads(block)
    for entry in written:
        if "instance_prompt" in entry:
            entry["instance_prompt"] = "the name of your subject goes here"
    assert written == json.loads(FOUR_DATASETS.read_text(encoding="utf-8"))


def test_the_limit_of_pixels_is_the_programs(page: str) -> None:
    assert re.search(rf"\b{MAX_PIXELS // 1_000_000} mega", page)


def a_dataset(name: str, num_images: int, **options: object) -> DatasetPlan:
    storage = LocalStorage(folder=Path(name))
    geometry = Geometry(target=(64, 64), intermediary=(64, 64), crop=(0, 0))
    samples = tuple(
        Sample(
            dataset_id=name,
            record=ImageRecord(file=FileInfo(key=f"{number}.png", size_bytes=1, version="1"), size=(64, 64)),
            geometry=geometry,
            captions=("a cat",),
        )
        for number in range(num_images)
    )
    values: dict[str, object] = {
        "id": name,
        "storage": storage,
        "buckets": (Bucket(size=(64, 64), samples=samples),),
        "repeats": 0,
        "probability": 1.0,
        "is_regularisation": False,
        "caption_dropout_probability": 0.0,
        "dropped": (),
        "unreadable": (),
        **options,
    }
    return DatasetPlan(**values)  # type: ignore[arg-type]


def test_the_numbers_of_the_example_are_those_of_the_sampler(page: str) -> None:
    """20 images ten times at full share, 100 images at half of it, batches of 4."""
    datasets = (a_dataset("cat", 20, repeats=9), a_dataset("other-cats", 100, probability=0.5))
    sampler = Sampler(make_plan(datasets, "auto-weighting"), seed=1, batch_size=4)
    assert (sampler.batches_per_epoch, sampler.samples_per_epoch) == (62, 248)
    first = [sampler.picks(index)[0].sample.dataset_id for index in range(62)]
    assert (first.count("cat"), first.count("other-cats")) == (50, 12)
    uniform = Sampler(make_plan(datasets, "uniform"), seed=1, batch_size=4)
    assert uniform.batches_per_epoch == 75
    for number in ("200", "50", "25", "12", "62", "248", "31", "75"):
        assert re.search(rf"\b{number}\b", page)
