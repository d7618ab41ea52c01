"""From folders to a plan, and every message on the way."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data.batching import minimum_repeats
from simpletuner.data.plan import plan_parts, unreadable_warnings
from simpletuner.data.records import DropReason, Plan
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import CaptionSpec, DatasetSpec, ResizeSpec, Schedule, ShuffleSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, ExitCode, SimpletunerError

MakePlan = Callable[..., Plan]
SaveImage = Callable[..., Path]
Told = Callable[[SimpletunerError], list[str]]
LITERAL = "no images detected in dataset"


def spec_of(folder: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(
        **{"id": "cats", "storage": LocalStorage(folder=folder), "resize": ResizeSpec(resolution=256), **options}
    )


@pytest.fixture
def folder(tmp_path: Path, save_image: SaveImage) -> Path:
    """Three landscape pictures and one portrait."""
    for number in range(3):
        save_image(tmp_path / "images" / f"cat_{number}.png", size=(96, 64), seed=number)
    save_image(tmp_path / "images" / "tall_cat.png", size=(64, 96), seed=3)
    return tmp_path / "images"


def titles(error: DatasetError, language: str = "en") -> list[str]:
    return [render_problem(problem, language)[0] for problem in error.problems]


def test_a_plan_has_every_image_in_its_bucket(folder: Path, make_plan: MakePlan) -> None:
    progress: list[tuple[int, int]] = []
    plan = make_plan(
        spec_of(folder, repeats=2, probability=0.5, is_regularisation_data=True, caption_dropout_probability=0.1),
        progress=progress,
    )
    (dataset,) = plan.datasets
    assert [(bucket.size, len(bucket.samples)) for bucket in dataset.buckets] == [((192, 320), 1), ((320, 192), 3)]
    assert {sample.captions for sample in plan.samples()} == {("cat 0",), ("cat 1",), ("cat 2",), ("tall cat",)}
    assert (dataset.id, dataset.num_images, dataset.repeats, dataset.probability) == ("cats", 4, 2, 0.5)
    assert dataset.is_regularisation
    assert dataset.dropped == ()
    assert plan.prompts() == ("", "cat 0", "cat 1", "cat 2", "tall cat")
    assert progress[-1] == (4, 4)


def test_two_datasets_may_share_a_folder(folder: Path, make_plan: MakePlan) -> None:
    progress: list[tuple[int, int]] = []
    plan = make_plan(
        spec_of(folder),
        spec_of(folder, id="square", resize=ResizeSpec(resolution=128, crop=True)),
        progress=progress,
    )
    assert [dataset.id for dataset in plan.datasets] == ["cats", "square"]
    assert {b.size for b in plan.datasets[1].buckets} == {(128, 128)}
    assert progress[-1] == (4, 4)


def test_a_plan_does_not_depend_on_places_or_times(folder: Path, make_plan: MakePlan) -> None:
    captions = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("a cat",))
    before = make_plan(spec_of(folder, captions=captions))
    os.utime(folder / "cat_1.png", (1, 1))
    moved = folder.rename(folder.parent / "elsewhere")
    after = make_plan(spec_of(moved, captions=captions))
    assert after.fingerprint == before.fingerprint
    orders = [
        [pick.sample.record.key for i in range(20) for pick in Sampler(plan, seed=1, batch_size=1).picks(i)]
        for plan in (before, after)
    ]
    assert orders[0] == orders[1]


def test_the_parts_of_a_plan_say_what_has_changed(folder: Path, make_plan: MakePlan, save_image: SaveImage) -> None:
    captions = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("a cat",))
    spec = spec_of(folder, captions=captions)
    before = make_plan(spec)
    os.utime(folder / "cat_0.png", (1, 1))
    assert plan_parts(make_plan(spec)) == plan_parts(before)
    other = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("a dog",))
    changes: list[tuple[DatasetSpec, set[str]]] = [
        (replace(spec, captions=other), {"captions"}),
        (replace(spec, resize=ResizeSpec(resolution=320)), {"crops"}),
        (replace(spec, resize=ResizeSpec(resolution=256, crop=True, crop_style="corner")), {"crops"}),
        *((replace(spec, **change), {"datasets"}) for change in SETTINGS),
        (replace(spec, max_num_samples=3), {"num_images", "images", "captions", "crops"}),
    ]
    for changed, expected in changes:
        plan = make_plan(changed)
        assert plan.fingerprint != before.fingerprint
        assert parts_that_differ(before, plan) == expected
    save_image(folder / "cat_0.png", seed=99)
    assert parts_that_differ(before, make_plan(spec)) == {"images", "captions", "crops"}


SETTINGS: list[dict[str, Any]] = [
    {"id": "other"},
    {"repeats": 1},
    {"probability": 0.5},
    {"is_regularisation_data": True},
    {"caption_dropout_probability": 0.5},
    {"train_batch_size": 1},
    {"batch_mixing": "packed"},
    {"schedule": Schedule(end_step=5)},
]


def parts_that_differ(one: Plan, other: Plan) -> set[str]:
    mine, theirs = asdict(plan_parts(one)), asdict(plan_parts(other))
    return {name for name in mine if mine[name] != theirs[name]}


def test_the_fingerprint_changes_with_all_that_training_sees(
    folder: Path, make_plan: MakePlan, save_image: SaveImage
) -> None:
    spec = spec_of(folder)
    changes = [
        replace(spec, id="other"),
        replace(spec, repeats=1),
        replace(spec, probability=0.5),
        replace(spec, is_regularisation_data=True),
        replace(spec, caption_dropout_probability=0.5),
        replace(spec, resize=ResizeSpec(resolution=320)),
        replace(spec, resize=ResizeSpec(resolution=256, crop=True, crop_style="corner")),
        replace(spec, resize=ResizeSpec(resolution=256, crop=True, crop_style="center")),
        replace(spec, captions=CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("a",))),
        replace(spec, max_num_samples=3),
        replace(spec, train_batch_size=1),
    ]
    prints = [make_plan(changed).fingerprint for changed in [spec, *changes]]
    prints.append(make_plan(spec, seed=43).fingerprint)
    save_image(folder / "cat_0.png", seed=99)
    prints.append(make_plan(spec).fingerprint)
    assert len(set(prints)) == len(prints)
    assert make_plan(spec).fingerprint == prints[-1]


def test_a_limit_keeps_the_same_images_whatever_else_changes(
    folder: Path, make_plan: MakePlan, save_image: SaveImage
) -> None:
    for number in range(10, 30):
        save_image(folder / f"{number}.png", seed=number)
    spec = spec_of(folder, max_num_samples=7)
    first = make_plan(spec)
    assert first.datasets[0].num_images == 7
    assert first.datasets[0].count_dropped(DropReason.LIMIT) == 17
    other_seed = make_plan(replace(spec, repeats=3), seed=7)
    assert {s.record.key for s in first.samples()} == {s.record.key for s in other_seed.samples()}
    other_id = make_plan(replace(spec, id="dogs"))
    assert {s.record.key for s in first.samples()} != {s.record.key for s in other_id.samples()}


def test_a_missing_folder(tmp_path: Path, make_plan: MakePlan, told: Told) -> None:
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(tmp_path / "nowhere"))
    assert told(caught.value) == ["E-DATASET-FOLDER-MISSING"]
    assert caught.value.exit_code is ExitCode.DATASET
    for language in LANGUAGES:
        (title,) = titles(caught.value, language)
        assert LITERAL in title
        assert str(tmp_path / "nowhere") in title
        assert '"cats"' in title


def test_a_folder_without_images(tmp_path: Path, make_plan: MakePlan, told: Told) -> None:
    (tmp_path / "images").mkdir()
    for name in ["a.heic", "b.HEIC", "notes.txt", "LICENSE"]:
        (tmp_path / "images" / name).write_bytes(b"x")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(tmp_path / "images"))
    assert told(caught.value) == ["E-DATASET-EMPTY"]
    for language in LANGUAGES:
        (title,) = titles(caught.value, language)
        assert LITERAL in title
        assert "2 .heic" in title
        assert ".jpeg" in title


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="this user may list everything")
def test_a_folder_that_cannot_be_listed(folder: Path, make_plan: MakePlan, told: Told) -> None:
    (folder / "locked").mkdir(mode=0)
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder))
    (folder / "locked").chmod(0o700)
    assert told(caught.value) == ["E-DATASET-FOLDER-UNREADABLE"]
    assert str(folder / "locked") in titles(caught.value)[0]


def test_a_folder_that_vanishes_while_it_is_listed(
    folder: Path, make_plan: MakePlan, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder))
    assert told(caught.value) == ["E-DATASET-FOLDER-UNREADABLE"]
    for language in LANGUAGES:
        assert LITERAL in titles(caught.value, language)[0]
        assert "Permission denied" in titles(caught.value, language)[0]


def test_all_images_dropped_says_why_with_counts(folder: Path, make_plan: MakePlan, told: Told) -> None:
    resize = ResizeSpec(resolution=256, minimum_image_size=70, maximum_aspect_ratio=1.0, crop=True)
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, resize=resize))
    assert told(caught.value) == ["E-DATASET-ALL-DROPPED"]
    for language in LANGUAGES:
        (title,) = titles(caught.value, language)
        assert LITERAL in title
        assert "4 " in title
        assert "64x96" in title or "96x64" in title
    params = caught.value.problems[0].params
    assert (params["too_small"], params["aspect"], params["minimum_image_size"]) == (4, 0, 70)


def test_a_bucket_that_cannot_fill_a_batch_says_how_many_repeats_would(
    folder: Path, make_plan: MakePlan, told: Told
) -> None:
    spec = spec_of(folder)
    with pytest.raises(DatasetError) as caught:
        make_plan(spec, batch_size=4)
    assert told(caught.value) == ["E-DATASET-NO-BATCH"]
    for language in LANGUAGES:
        (title,) = titles(caught.value, language)
        assert LITERAL in title
        assert "192x320: 1, 320x192: 3" in title
    assert "zero usable batches" in titles(caught.value)[0]
    (problem,) = caught.value.problems
    assert problem.params["minimum_repeats"] == 3
    assert [(fix.key, fix.value) for fix in problem.fixes] == [("repeats", 3), ("batch_mixing", "packed")]
    with pytest.raises(DatasetError):
        make_plan(replace(spec, repeats=2), batch_size=4)
    make_plan(replace(spec, repeats=3), batch_size=4)
    make_plan(replace(spec, train_batch_size=1), batch_size=4)
    with pytest.raises(DatasetError):
        make_plan(replace(spec, train_batch_size=4), batch_size=1)


def test_images_that_cannot_fill_a_batch_are_shown_more_often_where_that_is_allowed(
    folder: Path, make_plan: MakePlan
) -> None:
    plan = make_plan(spec_of(folder, fills_short_buckets=True), batch_size=3)
    (dataset,) = plan.datasets
    assert [(b.size, b.num_images) for b in dataset.filled] == [((192, 320), 1)]
    assert dataset.num_images == 4
    sampler = Sampler(plan, seed=1, batch_size=3)
    seen = Counter(pick.sample.record.key for index in range(2) for pick in sampler.picks(index))
    assert seen == {"cat_0.png": 1, "cat_1.png": 1, "cat_2.png": 1, "tall_cat.png": 3}


def test_a_bucket_that_cannot_fill_a_batch_is_left_out_where_that_is_asked_for(
    folder: Path, make_plan: MakePlan, told: Told
) -> None:
    spec = spec_of(folder, prunes_short_buckets=True)
    (dataset,) = make_plan(spec, batch_size=3).datasets
    assert [(b.size, b.num_images) for b in dataset.pruned] == [((192, 320), 1)]
    assert (dataset.num_images, dataset.count_dropped(DropReason.SHORT_BUCKET)) == (3, 1)
    filled = make_plan(replace(spec, fills_short_buckets=True), batch_size=3).datasets[0]
    assert (filled.num_images, filled.pruned) == (4, ())
    with pytest.raises(DatasetError) as caught:  # nothing would be left
        make_plan(spec, batch_size=4)
    assert told(caught.value) == ["E-DATASET-NO-BATCH"]


def test_a_packed_batch_takes_images_of_any_shape(folder: Path, make_plan: MakePlan, told: Told) -> None:
    spec = spec_of(folder, batch_mixing="packed")
    sampler = Sampler(make_plan(spec, batch_size=4), seed=1, batch_size=4)
    assert sampler.batches_per_epoch == 1
    assert len({pick.sample.record.key for pick in sampler.picks(0)}) == 4
    with pytest.raises(DatasetError) as caught:
        make_plan(spec, batch_size=9)
    assert told(caught.value) == ["E-DATASET-NO-BATCH-PACKED"]
    assert caught.value.problems[0].params["minimum_repeats"] == 2
    for language in LANGUAGES:
        assert LITERAL in titles(caught.value, language)[0]
    make_plan(replace(spec, repeats=2), batch_size=9)


def test_what_shares_follow_is_part_of_a_plan(folder: Path, make_plan: MakePlan) -> None:
    weighted, uniform = (make_plan(spec_of(folder), sampling=law) for law in ("auto-weighting", "uniform"))
    assert weighted.fingerprint != uniform.fingerprint
    assert parts_that_differ(weighted, uniform) == {"datasets"}


def test_minimum_repeats_is_the_smallest_that_fills_a_batch() -> None:
    for num_images in range(1, 20):
        for batch_size in range(1, 40):
            repeats = minimum_repeats(num_images, batch_size)
            assert num_images * (repeats + 1) >= batch_size
            assert repeats <= 0 or num_images * repeats < batch_size


def test_unreadable_images_are_all_named(folder: Path, make_plan: MakePlan, told: Told) -> None:
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "empty.webp").write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, skips_unreadable=False))
    assert told(caught.value) == ["E-IMAGE-UNREADABLE"]
    (warning,) = unreadable_warnings(make_plan(spec_of(folder), spec_of(folder, id="again")))
    for language in LANGUAGES:
        for title in (titles(caught.value, language)[0], render_problem(warning, language)[0]):
            assert "bad.jpg (not an image file), empty.webp (empty file)" in title


def test_a_folder_of_nothing_but_unreadable_images(tmp_path: Path, make_plan: MakePlan, told: Told) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(tmp_path / "images"))
    assert told(caught.value) == ["E-IMAGE-UNREADABLE"]


def test_caption_problems_are_all_named(folder: Path, make_plan: MakePlan, told: Told) -> None:
    (folder / "cat_0.txt").write_text("")
    (folder / "cat_1.txt").write_bytes(b"caf\xe9")
    (folder / "cat_2.txt").write_text("a cat")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, captions=CaptionSpec(caption_strategy="textfile")))
    assert told(caught.value) == ["E-CAPTION-MISSING", "E-CAPTION-EMPTY", "E-CAPTION-ENCODING"]
    for language in LANGUAGES:
        for title, name in zip(titles(caught.value, language), ["tall_cat", "cat_0", "cat_1"], strict=True):
            assert str(folder / f"{name}.txt") in title


def test_captions_of_which_filters_leave_nothing_are_named(folder: Path, make_plan: MakePlan, told: Told) -> None:
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, captions=CaptionSpec(filters=("tall cat",))))
    assert told(caught.value) == ["E-CAPTION-FILTERED"]
    for language in LANGUAGES:
        assert "tall_cat.png" in titles(caught.value, language)[0]


def test_every_variant_of_a_caption_is_a_prompt_to_cache(folder: Path, make_plan: MakePlan) -> None:
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem}, sitting, red\na cat")
    captions = CaptionSpec(
        caption_strategy="textfile", filters=("s/red/blue/",), shuffle=ShuffleSpec(count=2, position_start=1)
    )
    plan = make_plan(spec_of(folder, captions=captions, caption_dropout_probability=0.2))
    sampler = Sampler(plan, seed=1, batch_size=1)
    shown = {pick.prompt for index in range(400) for pick in sampler.picks(index)}
    assert shown == set(plan.prompts())
    assert "cat_0, blue, sitting" in shown
    assert len(shown) == 2 + 4 * 2, "nothing, a cat, and of each image two orders: there are no more"


def test_a_missing_instance_prompt(folder: Path, make_plan: MakePlan, told: Told) -> None:
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, captions=CaptionSpec(caption_strategy="instanceprompt")))
    assert told(caught.value) == ["E-CAPTION-NO-INSTANCE-PROMPT"]
    assert '"cats"' in titles(caught.value)[0]


def test_the_problems_of_all_datasets_come_at_once(folder: Path, make_plan: MakePlan, told: Told) -> None:
    (folder / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError) as caught:
        make_plan(
            spec_of(folder, skips_unreadable=False),
            spec_of(folder / "nowhere", id="second"),
            spec_of(folder, id="third", captions=CaptionSpec(caption_strategy="textfile")),
        )
    assert told(caught.value) == ["E-DATASET-FOLDER-MISSING", "E-IMAGE-UNREADABLE", "E-CAPTION-MISSING"]


def test_a_hundred_names_and_a_count_are_enough(folder: Path, make_plan: MakePlan) -> None:
    for number in range(130):
        (folder / f"bad{number:03}.png").write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, skips_unreadable=False))
    (title,) = titles(caught.value)
    assert "bad099.png" in title
    assert "bad100.png" not in title
    assert "(+30)" in title


@pytest.mark.parametrize("probabilities", [[], [0.0], [0.0, 0.0]])
def test_nothing_to_draw_from(folder: Path, make_plan: MakePlan, told: Told, probabilities: list[float]) -> None:
    specs = [spec_of(folder, id=f"d{i}", probability=p) for i, p in enumerate(probabilities)]
    with pytest.raises(DatasetError) as caught:
        make_plan(*specs)
    assert told(caught.value) == ["E-DATASET-NONE"]
    assert f"of {len(specs)} image dataset" in titles(caught.value)[0]


def test_a_cache_directory_that_is_a_file(folder: Path, make_plan: MakePlan, tmp_path: Path, told: Told) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder))
    assert told(caught.value) == ["E-CACHE-NOT-WRITABLE"]
    for language in LANGUAGES:
        assert str(tmp_path / "cache") in titles(caught.value, language)[0]
