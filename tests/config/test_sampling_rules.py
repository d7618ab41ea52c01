"""Datasets that come and go, filters, shapes and objects in the datasets file: what is read, and what is said."""

from __future__ import annotations

import json

import pytest

from simpletuner.config.datasets import CaptionShuffle
from simpletuner.i18n import LANGUAGES, render_problem

BASIC = {"id": "a", "instance_data_dir": "x"}
OTHER = {"id": "b", "instance_data_dir": "y"}
SHAPES = {"crop": True, "crop_aspect": "random"}

# code -> (entries of multidatabackend.json, options of config.json, words that both languages' texts must hold)
PROBLEMS = {
    "E-DATASET-SCHEDULE": (
        [BASIC, {**OTHER, "start_epoch": 3, "end_epoch": 2}],
        {"num_train_epochs": 9},
        ["b", "start_epoch 3", "end_epoch 2"],
    ),
    "E-DATASETS-START": ([{**BASIC, "start_step": 2}, {**OTHER, "start_epoch": 2}], {}, ["a, b", "start_epoch 1"]),
    "E-DATASETS-GAP-STEP": (
        [{**BASIC, "end_step": 10}, {**OTHER, "start_step": 12}],
        {"max_train_steps": 20},
        ["11", "20", "end_step"],
    ),
    "E-DATASETS-GAP-EPOCH": ([{**BASIC, "end_epoch": 2}], {"num_train_epochs": 3}, ["3", "end_epoch"]),
    "E-DATASET-FACE": ([{**BASIC, "crop": True, "crop_style": "face"}], {}, ["a", "crop_style face", "center"]),
    "E-DATASET-WEIGHTS": (
        [{**BASIC, **SHAPES, "crop_aspect_buckets": [{"aspect": 1, "weight": 3}, {"aspect": 2, "weight": 1}]}],
        {},
        ["a", "crop_aspect_buckets", "4", "1"],
    ),
    "E-DATASET-WEIGHTS-MISSING": (
        [{**BASIC, **SHAPES, "crop_aspect_buckets": [{"aspect": 1, "weight": 1}, 2]}],
        {},
        ["a", "crop_aspect_buckets", "1"],
    ),
    "E-FILTER-FILE": ([{**BASIC, "caption_filter_list": "no.txt"}], {}, ["a.caption_filter_list", "no.txt"]),
    "E-FILTER-JSON": ([{**BASIC, "caption_filter_list": "bad.json"}], {}, ["a.caption_filter_list", "bad.json"]),
    "E-FILTER-EXPRESSION": (
        [{**BASIC, "caption_filter_list": ["fine", "*cat"]}],
        {},
        ["a.caption_filter_list", "*cat", "nothing to repeat"],
    ),
    "E-VALUE-OBJECT": ([{**BASIC, "caption_shuffle": "yes please"}], {}, ["a.caption_shuffle", "yes please"]),
    "E-VALUE-OBJECT-KEY": (
        [{**BASIC, "caption_shuffle": {"splt_on": "comma"}}],
        {},
        ["a.caption_shuffle", "splt_on", "split_on"],
    ),
    "E-VALUE-RANGE": ([{**BASIC, "caption_shuffle": {"count": 0}}], {}, ["a.caption_shuffle.count = 0", ">= 1"]),
    "E-VALUE-CHOICE": ([{**BASIC, "caption_shuffle": {"split_on": "tab"}}], {}, ["a.caption_shuffle.split_on", "tab"]),
    "E-VALUE-INTEGER": ([{**BASIC, "start_step": 1.5}], {}, ["a.start_step", "1.5"]),
}


@pytest.mark.parametrize("code", PROBLEMS)
def test_a_mistake_is_told_with_dataset_key_and_place(project, code):
    entries, options, words = PROBLEMS[code]
    project.write("config/config.json", {"validation_disable": True, **options})
    project.write("config/multidatabackend.json", json.dumps(entries, indent=1))
    project.write("bad.json", {"not": "a list"})
    problem = project.problem(code)
    assert problem.origin.startswith("config/multidatabackend.json:")
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        whole = f"{title}\n{hint or ''}"
        assert code not in title
        for word in words:
            assert word in whole, (language, word, whole)


def test_a_wrong_sum_is_mended_by_the_fix(with_datasets):
    shapes = [{"aspect": 1, "weight": 3}, {"aspect": 2, "weight": 1}]
    problem = with_datasets(crop=True, crop_aspect="random", crop_aspect_buckets=shapes).problem("E-DATASET-WEIGHTS")
    (fix,) = problem.fixes
    assert fix.value == [{"aspect": 1, "weight": 0.75}, {"aspect": 2, "weight": 0.25}]
    mended = with_datasets(crop=True, crop_aspect="random", crop_aspect_buckets=fix.value).load()
    assert [bucket.weight for bucket in mended.datasets.images[0].crop_aspect_buckets] == [0.75, 0.25]


def test_thirds_are_near_enough(with_datasets):
    shapes = [{"aspect": aspect, "weight": 0.33} for aspect in (0.5, 1, 2)]
    assert with_datasets(crop=True, crop_aspect="random", crop_aspect_buckets=shapes).load()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"start_epoch": 0, "start_step": -3, "end_epoch": 0, "end_step": -1}, (1, 0, None, None)),
        ({"start_epoch": "2", "start_step": None, "end_epoch": 4, "end_step": ""}, (2, 0, 4, None)),
    ],
)
def test_what_lies_before_the_start_is_the_start(with_datasets, written, meant):
    first, image = with_datasets([BASIC, {**OTHER, **written}]).load().datasets.images
    assert (image.start_epoch, image.start_step, image.end_epoch, image.end_step) == meant
    assert first.start_epoch == 1


@pytest.mark.parametrize(
    "options", [{"num_train_epochs": 0, "max_train_steps": 9}, {"num_train_epochs": 5}], ids=["steps", "epochs"]
)
def test_what_only_the_images_can_tell_is_left_to_them(with_config, options):
    """How many steps an epoch has is not known yet."""
    project = with_config(options)
    entries = [{**BASIC, "end_epoch": 2}, {**OTHER, "start_step": 5}]
    project.write("config/multidatabackend.json", entries)
    assert project.load()


def test_a_dataset_of_probability_zero_does_not_fill_a_gap(with_datasets):
    entries = [{**BASIC, "probability": 0}, {**OTHER, "start_step": 5}]
    assert "E-DATASETS-START" in with_datasets(entries).codes()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (True, CaptionShuffle()),
        (False, CaptionShuffle(enable=False)),
        ({"count": "3", "split-on": "Space", "_note": "x", "seed": None}, CaptionShuffle(count=3, split_on="space")),
        ('{"position_start": 2}', CaptionShuffle(position_start=2)),
        (None, None),
    ],
)
def test_an_object_is_read_as_options_are(with_datasets, written, meant):
    (image,) = with_datasets(caption_shuffle=written).load().datasets.images
    assert image.caption_shuffle == meant


@pytest.mark.parametrize(
    ("name", "content"), [("filters.txt", "masterpiece\n\ns/cat/dog/\n"), ("f.json", '["masterpiece", "s/cat/dog/"]')]
)
def test_filters_may_be_in_a_file(project, name, content):
    project.write(name, content)
    entries = [{**BASIC, "caption_filter_list": name}, {"id": "t", "dataset_type": "text_embeds"}]
    entries[1]["caption_filter_list"] = []
    project.write("config/multidatabackend.json", entries)
    loaded = project.load()
    assert loaded.datasets.images[0].caption_filter_list == ("masterpiece", "s/cat/dog/")
    assert loaded.datasets.text_embeds.caption_filter_list == ()


def test_filters_of_the_text_cache_are_checked_too(with_datasets):
    embeds = {"id": "t", "dataset_type": "text_embeds", "caption_filter_list": ["("]}
    problem = with_datasets([BASIC, embeds]).problem("E-FILTER-EXPRESSION")
    assert problem.params["key"] == "t.caption_filter_list"


def test_datasets_inherit_how_their_images_are_mixed(with_config):
    project = with_config(batch_mixing="packed", max_upscale_threshold=0.2, disable_multiline_split=True)
    project.write("config/multidatabackend.json", [BASIC, {**OTHER, "batch_mixing": "bucket"}])
    first, second = project.load().datasets.images
    assert (first.batch_mixing, second.batch_mixing) == ("packed", "bucket")
    assert (first.max_upscale_threshold, first.disable_multiline_split) == (0.2, True)
