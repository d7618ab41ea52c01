"""What the planner is told of the data: the largest batch there can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.sampler import Sampler
from simpletuner.data.storage import FileInfo, LocalStorage
from simpletuner.train.account import observe

SIZES = {(64, 64): 5, (128, 96): 1, (256, 256): 2}


def dataset() -> DatasetPlan:
    def sample(size: tuple[int, int], number: int) -> Sample:
        record = ImageRecord(file=FileInfo(key=f"{size}/{number}", size_bytes=1, version="1"), size=size)
        geometry = Geometry(target=size, intermediary=size, crop=(0, 0))
        return Sample(dataset_id="cats", record=record, geometry=geometry, captions=("a cat",))

    return DatasetPlan(
        id="cats",
        storage=LocalStorage(folder=Path("images")),
        buckets=tuple(
            Bucket(size=size, samples=tuple(sample(size, number) for number in range(count)))
            for size, count in SIZES.items()
        ),
        repeats=3,
        probability=1.0,
        is_regularisation=False,
        caption_dropout_probability=0.0,
        dropped=(),
    )


def test_no_packed_batch_is_larger_than_the_planner_thinks() -> None:
    plan = Plan(datasets=(replace(dataset(), batch_mixing="packed"),), fingerprint="")
    seen = observe(plan, batch_size=4, total_steps=1)
    sampler = Sampler(plan, seed=1, batch_size=4)
    tokens = [
        sum(w * h // 256 for pick in sampler.picks(index) for w, h in [pick.sample.geometry.target])
        for index in range(200)
    ]
    assert max(tokens) <= seen.picture.count * seen.picture.image_tokens
    assert seen.is_mixed, "its sequences differ in length, so they share a row"
    apart = observe(Plan(datasets=(dataset(),), fingerprint=""), batch_size=4, total_steps=1)
    assert (apart.picture, apart.is_mixed) == (seen.picture, False)
    alone = observe(plan, batch_size=1, total_steps=1)
    assert not alone.is_mixed
