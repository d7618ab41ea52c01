"""Which held-out images are measured: always the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.held_out import POOL, choose_held_out, trained_warnings
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.storage import FileInfo, LocalStorage
from simpletuner.i18n import render_problem
from simpletuner.problems import DatasetError, SimpletunerError


def dataset(name: str, keys: list[str]) -> DatasetPlan:
    """Two buckets, two captions each."""
    samples: dict[int, list[Sample]] = {64: [], 96: []}
    for key in keys:
        size = 64 + 32 * (hash_of(key) % 2)
        geometry = Geometry(target=(size, 64), intermediary=(size, 64), crop=(0, 0))
        record = ImageRecord(file=FileInfo(key=key, size_bytes=1, version="1"), size=(size, 64))
        samples[size].append(Sample(dataset_id=name, record=record, geometry=geometry, captions=(f"{key} 1", "2")))
    buckets = tuple(Bucket(size=(size, 64), samples=tuple(found)) for size, found in samples.items() if found)
    return DatasetPlan(
        id=name,
        buckets=buckets,
        repeats=0,
        probability=1.0,
        is_regularisation=False,
        caption_dropout_probability=0.0,
        dropped=(),
        storage=LocalStorage(folder=Path(name)),
    )


def hash_of(key: str) -> int:
    return sum(map(ord, key))


def plan(**keys: int) -> Plan:
    found = [dataset(name, [f"{number}.png" for number in range(count)]) for name, count in keys.items()]
    return Plan(datasets=tuple(found), fingerprint="x")


def keys(samples: tuple[Sample, ...]) -> set[tuple[str, str]]:
    return {(sample.dataset_id, sample.record.key) for sample in samples}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_so_many_of_each_or_of_all_together(first, second, count, is_pooled):
    found = choose_held_out(plan(a=first, b=second), num_images=count, is_pooled=is_pooled)
    sizes = {one.name: len(one.samples) for one in found.sets}
    expected = {POOL: min(count, first + second)} if is_pooled else {"a": min(count, first), "b": min(count, second)}
    assert sizes == expected
    chosen = [sample for one in found.sets for sample in one.samples]
    assert keys(found.plan.samples()) == keys(chosen)
    assert len(found.plan.samples()) == len(chosen)
    assert all(len(sample.captions) == 1 and sample.captions[0].endswith(" 1") for sample in found.plan.samples())
    assert all(dataset.buckets for dataset in found.plan.datasets)


@pytest.mark.parametrize("is_pooled", [True, False])
def test_an_image_more_pushes_out_one_at_most(is_pooled):
    before = choose_held_out(plan(a=20), num_images=5, is_pooled=is_pooled)
    after = choose_held_out(plan(a=21), num_images=5, is_pooled=is_pooled)
    gone = keys(before.plan.samples()) - keys(after.plan.samples())
    assert len(gone) <= 1
    more = choose_held_out(plan(a=20), num_images=9, is_pooled=is_pooled)
    assert keys(before.plan.samples()) < keys(more.plan.samples())


def test_held_out_images_that_are_trained_on_are_told(told: Callable[[SimpletunerError], list[str]]):
    """The same file, whatever the datasets are called; not one of the same name elsewhere."""
    found = choose_held_out(plan(a=6, b=2), num_images=3, is_pooled=False)
    chosen = sorted(key for name, key in keys(found.plan.samples()) if name == "a")
    folder = {"a": "elsewhere", "b": "b"}
    trained = plan(a=6, c=6)
    assert trained_warnings(choose_held_out(plan(b=2), num_images=3, is_pooled=False), trained) == []
    moved = [replace(d, storage=LocalStorage(folder=Path(folder.get(d.id, d.id)))) for d in trained.datasets]
    assert trained_warnings(found, replace(trained, datasets=tuple(moved))) == []
    (problem,) = trained_warnings(found, trained)
    assert told(DatasetError([problem])) == ["W-EVAL-TRAINED"]
    for language in ("en", "es"):
        assert f"3 {'held' if language == 'en' else 'imagen'}" in render_problem(problem, language)[0]
        assert ", ".join(chosen) in render_problem(problem, language)[0]
