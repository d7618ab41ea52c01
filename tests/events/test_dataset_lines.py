"""What the console says about datasets: when they take part, and what became of too few images of a shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simpletuner.events import types as t
from simpletuner.events.text import Narrator

CATS = t.DatasetPlanned(
    dataset="cats",
    num_images=4,
    num_samples=4,
    buckets=(t.BucketCount(width_px=320, height_px=192, num_samples=4),),
)
FEW = (
    t.BucketCount(width_px=192, height_px=320, num_samples=1),
    t.BucketCount(width_px=64, height_px=64, num_samples=2),
)


def lines(event: t.Event, story: list, language: str) -> list[str]:
    return [line.text for line in Narrator(language).tell(replace(story[0], event=event))]


@pytest.mark.parametrize(
    ("schedule", "english", "spanish"),
    [
        ({}, "", ""),
        ({"start_epoch": 2}, ", from epoch 2", ", desde la época 2"),
        ({"start_step": 9, "end_step": 40}, ", from step 9, to step 40", ", desde el paso 9, hasta el paso 40"),
        ({"end_epoch": 3}, ", to epoch 3", ", hasta la época 3"),
        ({"steps_of_epoch": 5}, ", the first 5 steps of each epoch", ", los primeros 5 pasos de cada época"),
    ],
)
def test_a_dataset_says_when_it_takes_part(story, schedule, english, spanish):
    event = replace(CATS, **schedule)
    assert lines(event, story, "en") == [f"cats: 4 images, 1 bucket{english}"]
    assert lines(event, story, "es") == [f"cats: 4 imágenes, 1 bucket{spanish}"]
    assert t.from_json(t.to_json(event)) == event


@pytest.mark.parametrize(
    ("language", "pruned", "filled"),
    [
        ("en", "3 images left out: too few of their shape for a batch", "shown more often"),
        ("es", "3 imágenes descartadas: hay demasiado pocas de su forma para un lote", "se muestran más a menudo"),
    ],
)
def test_too_few_of_a_shape_are_named(story, language, pruned, filled):
    drops = (t.DropCount(reason="short_bucket", num_images=3),)
    assert lines(replace(CATS, dropped=drops, pruned=FEW), story, language)[1] == (
        f"cats: {pruned} (192x320: 1, 64x64: 2)"
    )
    (_, told) = lines(replace(CATS, filled=FEW), story, language)
    assert filled in told
    assert told.endswith("192x320: 1, 64x64: 2")


@pytest.mark.parametrize(
    ("language", "epochs", "steps", "row"),
    [
        ("en", 2, 20, "40 steps (2 epochs of 20)"),
        ("es", 2, 20, "40 pasos (2 épocas de 20)"),
        ("en", 1, 300, "40 steps (1 epoch of 300)"),
        ("en", 1, 40, "40 steps (1 epoch) "),
    ],
)
def test_the_banner_counts_the_steps_of_an_epoch(story, language, epochs, steps, row):
    plan = next(record for record in story if isinstance(record.event, t.RunPlanned))
    told = Narrator(language).tell(replace(plan, event=replace(plan.event, num_epochs=epochs, steps_per_epoch=steps)))
    assert any(line.text.startswith(row) for line in told)
